"""One answer: draft, verify, accept, commit.

In: a target, a head, a tree template and a prompt. Out: tokens, with the accepted drafts and seconds of each step.
Read ``loop`` first, then ``acceptance``.
"""
