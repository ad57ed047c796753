"""Kernels for a GPU; imported by `dispatch` alone, and only where they are used."""
