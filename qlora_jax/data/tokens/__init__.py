"""Tokens: encoded on all cores, with a loss mask, kept on the disk."""
