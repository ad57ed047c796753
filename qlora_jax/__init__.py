"""QLoRA fine-tuning of Llama-family models in pure JAX and Flax."""

__version__ = "0.1.0"
