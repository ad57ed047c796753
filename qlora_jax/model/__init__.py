"""The model: its architecture, the decoder layer, linears with adapters, the loss."""
