"""What is compiled and walked: layer programs, the two walks over the layers, objectives, the optimizer, generation."""
