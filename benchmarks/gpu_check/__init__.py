"""Tests and times the GPU kernels on a machine on which this package is not installed."""
