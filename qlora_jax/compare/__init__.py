"""Our numbers beside PyTorch's (transformers + bitsandbytes + peft) on the same model, adapter and tokens.

The two sides run in processes of their own and meet in files: `reference.py` is PyTorch's, run as a program and imported by nobody, so
that torch never enters ours; `ours.py` runs the engine that trains. What each leaves is a `Side`. `stages.py` takes the differences,
`bounds.py` says how large they may be and why, `report.py` shows them.

Each side quantizes the model for itself, and the bytes are compared. From there on both compute with the *reference's* bytes, so that
what is left is arithmetic, and bounds can be narrow; what our own bytes change in the end is a row of its own.
"""
