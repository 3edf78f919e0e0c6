"""Real steps on the device: one strategy in a child process, or a climb to the fastest that fits."""
