"""The machine code for the GPU, run on the CPU: an interpreter of PTX in NumPy and two drivers that feed it.

    program.py        PTX text -> functions of instructions, each with its line and its line of source
    instructions.py   what each family of instructions does
    numbers.py        floating point as the GPU has it: one rounding, NaN, subnormal numbers, approximations
    memory.py         global, shared and local memory: bounds, alignment, races, reads of what nobody wrote
    machine.py        all threads of some blocks at a time, their branches, calls and barriers
    triton_driver.py  Triton's own launches, compiled for a GPU, end here
    cuda_driver.py    the launches of csrc/cuda.cpp, compiled by nvcc, end here

What is not known is an error, never a guess.
"""
