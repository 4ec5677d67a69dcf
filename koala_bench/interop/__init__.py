"""Other projects' files: released checkpoints (``eagle``, ``medusa``), and answer files (``answers``, ``traces``)."""
