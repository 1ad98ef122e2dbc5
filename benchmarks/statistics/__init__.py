"""Tests of the noise's randomness; docs/statistics.md has the results."""
