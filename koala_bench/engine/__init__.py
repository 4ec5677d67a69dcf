"""One forward pass of the target over a draft tree.

In: a draft tree and the KV cache. Out: logits and hidden states at each node, and the time that it took.
Read ``target`` first, then ``cache``. ``graphs`` makes ``--engine graph``, with kernels for the CPU in ``processor``
and for GPUs in ``kernels``.
"""
