"""Shared by several heads: growing trees, KV caches of autoregressive heads, layers, losses, discriminators.

Comes in: scores of a node's children. Goes out: a draft tree. Read ``growth`` first.
"""
