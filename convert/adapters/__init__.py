"""Adapters as PEFT writes them: settings, tensors, quantization of their base, deltas for a merge."""
