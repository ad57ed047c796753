"""A run: its steps, checkpoints, folder, metrics, samples and signals."""
