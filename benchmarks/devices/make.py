"""Write the fifty simulated devices: python benchmarks/devices/make.py"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("simulated.jsonl")
GIB = 1 << 30
SHAPES = ("spill", "fragmentation", "steps", "all")
SPREADS = (0.0, 0.03, 0.15, 0.40)


def make(seed: int) -> dict[str, Any]:
    """Return the numbers of one device."""
    draw = random.Random(seed)
    capacity = draw.choice((8, 12, 16, 24, 40, 48, 80)) * GIB
    static = draw.uniform(0.15, 0.7) * capacity
    room = math.exp(draw.uniform(math.log(1.2), math.log(100)))
    rising = draw.random() < 0.2
    spread = SPREADS[(seed // 2) % len(SPREADS)]
    return {
        "seed": seed, "capacity_bytes": capacity, "static_bytes": int(static),
        "optimizer_bytes": int(draw.uniform(0.0, 0.6) * (capacity - static)),
        "sequence_bytes": int((capacity - static) / room),
        "effective_batch_size": draw.choice((16, 32, 48, 64, 128, 256)),
        "kept_fraction": {"none": 1.0, "selective": draw.uniform(0.3, 0.6), "full": draw.uniform(0.08, 0.25)},
        "slower": {"none": 1.0, "selective": draw.uniform(1.15, 1.3), "full": draw.uniform(1.25, 1.4)},
        "fixed_seconds": draw.uniform(0.05, 0.5), "launch_seconds": draw.uniform(0.005, 0.1),
        "sequence_seconds": draw.uniform(0.02, 0.4), "knee_sequences": draw.uniform(0.2, 4.0),
        "rises_above": draw.choice((2, 4, 8, 16)) if rising else None, "rise_fraction": draw.uniform(0.05, 0.3),
        "shape": SHAPES[(seed // 2) % len(SHAPES)] if seed % 2 else "affine",
        "step_at": draw.choice((2, 3, 4, 6, 8, 16)), "step_fraction": draw.uniform(0.05, 0.25),
        "pool_fraction": draw.uniform(0.02, 0.15),
        "spread": SPREADS[(seed // 2 + seed // 8) % len(SPREADS)] if seed % 2 else spread,
        "memory_factor": draw_factor(draw), "seconds_factor": draw_factor(draw),
        "variant_factor": {name: draw_factor(draw) / 10 for name in ("none", "selective", "full")},
    }  # fmt: skip


def draw_factor(draw: random.Random) -> float:
    """Return a standard normal number, cut at 2; the spread multiplies it."""
    return max(-2.0, min(2.0, draw.gauss(0.0, 1.0)))


if __name__ == "__main__":
    OUT.write_text("".join(json.dumps(make(seed)) + "\n" for seed in range(50)), encoding="utf-8")
