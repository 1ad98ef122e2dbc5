"""What compilers make of the GPU kernels, read on any machine."""
