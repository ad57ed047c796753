"""The machine and its devices: memory, placement of arrays, the prefetcher of layers, memory registered with the driver."""
