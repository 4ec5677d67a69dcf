"""How a target is loaded and checked.

In: the name of a checkpoint, on disk or on the hub, with device, dtype and engine. Out: a ``Target``, whose
generation settings are ignored, or the reason why draft trees do not work with it. Read ``targets`` first.
"""
