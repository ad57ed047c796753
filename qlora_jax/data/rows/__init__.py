"""Rows: where they come from, how they are decoded, and what their fields mean."""
