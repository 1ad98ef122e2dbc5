"""Whether the GPU kernels are right and how fast they are, on a machine with nothing of ours installed."""
