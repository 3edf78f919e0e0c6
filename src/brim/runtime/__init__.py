"""What stays with the run: exact accumulation in plain PyTorch and in every trainer."""
