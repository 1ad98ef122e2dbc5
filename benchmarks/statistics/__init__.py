"""The noise's randomness, on record: docs/statistics.md."""
