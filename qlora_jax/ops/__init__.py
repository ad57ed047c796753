"""The formats and every operation on them: essays, reference implementations, kernels, and the one place that chooses."""
