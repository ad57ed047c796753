"""GGUF files: tensors, config and tokenizer."""
