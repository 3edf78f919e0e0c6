"""What a device holds: meters that read it, and a CPU that pretends to be a small card. Needs torch."""
