"""The bundled draft heads. Each registers in ``pyproject.toml`` like anyone's; see ``heads/README.md``."""
