"""Model folders and their tensors, read and written under Hugging Face's and bitsandbytes' names."""
