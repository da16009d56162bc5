"""What is done with finished runs: sweeps, curves, exports."""
