"""Text in, token ids and masks out.

Comes in: question files, conversations, chat templates. Goes out: prompts to decode, and the training stream in its order.
Read ``encoding`` first; ``questions`` for question files, ``conversations`` and ``streams`` for training data.
"""
