"""How a target is loaded and checked.

In: the name of a checkpoint, on disk or on the hub, with device, dtype and engine. Out: a ``Target``, of whose
generation settings none is in force, or the reason why draft trees do not work with it. Read ``targets`` first.
"""
