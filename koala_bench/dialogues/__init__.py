"""Text in, token ids and masks out.

In: question files, conversations, chat templates. Out: prompts to decode, and the training stream in its order.
Read ``encoding`` first; ``questions`` for question files, ``conversations`` and ``streams`` for training data.
"""
