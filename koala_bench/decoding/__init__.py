"""One answer: draft, verify, accept, commit.

Comes in: a target, a head, a tree template and a prompt. Goes out: tokens, with accepted drafts and seconds of each step.
Read ``loop`` first, then ``acceptance``.
"""
