"""Measured runs, kept on this machine: what was predicted, what was measured, and no name of whose it was."""
