"""Reads the machine code that compilers generate for the GPU kernels, on any machine."""
