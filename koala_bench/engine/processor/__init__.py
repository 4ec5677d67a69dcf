"""Operations of a pass on the CPU by kernels of our own, compiled for the processor that runs them.

In: tensors in float32. Out: what torch's operations give, up to rounding. Read ``kernels`` first; the .c files are the
kernels.
"""
