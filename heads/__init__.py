"""The bundled draft heads, one file each, and KOALA's adversarial objective.

Comes in: a ``TargetSpec`` and the head's options; then what the target verified. Goes out: draft trees, and losses in training.
Each registers in ``pyproject.toml`` like anyone's. Read ``medusa`` first; ``README.md`` here builds a head step by step.
"""
