"""What a step costs on one of many GPUs."""
