"""What runs the arithmetic: devices, precision, CUDA graphs, ranks, signals, memory."""
