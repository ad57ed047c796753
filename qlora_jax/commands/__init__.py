"""The doors of `python -m qlora_jax`: thin, on top of everything else, and free to use `convert`."""
