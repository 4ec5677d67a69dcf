"""The bundled draft heads, one file each, and KOALA's adversarial objective.

In: a ``TargetSpec`` and the head's options; then the tokens and states that the target committed. Out: draft trees, and
losses in training. Each head registers in ``pyproject.toml`` like a third party's. Read ``medusa`` first; ``README.md``
builds a head step by step.
"""
