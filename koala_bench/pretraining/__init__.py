"""Make a small target, or a draft model for one: the way the bundled ones were made.

An optional part: ``pip install koala-bench[pretrain]`` brings the packages whose documentation ``corpus`` reads. In come
dialogues, out comes a folder with a target and its card. Read ``loop`` first.
"""
