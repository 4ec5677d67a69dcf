"""Training text that the target writes itself: its answers to given questions, or whole dialogues.

In: a target, and questions or none. Out: a file of conversations, and a manifest of how they were made. Read
``answers`` first.
"""
