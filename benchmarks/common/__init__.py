"""What all benchmarks share: clocks, machines, models, the format of results."""
