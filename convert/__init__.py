"""Model folders in and out: safetensors, GGUF and the Hugging Face hub. No JAX here, and no torch."""
