"""Conversations: written by a chat template, with the spans that are learned."""
