"""Benchmarks of the PATS step: `python -m benchmarks --help`."""
