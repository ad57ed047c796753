"""Bytes and seconds of a run from shapes, the search for where everything lives, the disk, which memory ran out."""
