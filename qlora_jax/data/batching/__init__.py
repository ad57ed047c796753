"""Batches: packing, order, and a step's rows as a function of its number."""
