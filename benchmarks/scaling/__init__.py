"""The cost of a step on one of many GPUs."""
