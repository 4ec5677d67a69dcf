"""Files of other projects: released checkpoints, and answer files.

In: checkpoints of Medusa, Hydra, EAGLE-1 and EAGLE-3; answer files of FastChat, Medusa, EAGLE and Spec-Bench. Out:
heads of ours, and the same files written back; answers step by step. Read ``checkpoints`` first, for answers
``traces``.
"""
