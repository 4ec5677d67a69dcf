"""Shared by several heads: growing trees, KV caches of autoregressive heads, layers, losses, discriminators.

In: scores of a node's children. Out: a draft tree. Read ``growth`` first.
"""
