"""Training text that the target writes itself: its answers to given questions, or whole dialogues.

Read ``answers`` first.
"""
