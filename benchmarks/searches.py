"""What finding the batch costs: brim's climb against the searches that people use, on fifty simulated devices.

    python benchmarks/searches.py [--out benchmarks/results/searches.md]

A run of a strategy costs 1 s, an out-of-memory 10 s more. The loops of the others are written after their sources,
named below; they search the micro-batch alone and are given the checkpointing of the best strategy, which nobody tells
their users. Speed is that of the chosen strategy at the batch that was wanted, over the fastest of all that fit. The
climb's constants were looked at on the fifty; `--seeds 50 450` makes devices that played no part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent / "devices"))

from make import make
from simulated import VARIANTS, Answer, SimulatedDevice, read_devices

from brim.spec.strategy import Strategy
from brim.trials.climb import climb
from brim.trials.ladder import Candidate, Outcome

STEP_SECONDS, OOM_SECONDS = 1.0, 10.0


@dataclass(slots=True)
class Bill:
    """What a search has spent on a device, and what it chose."""

    device: SimulatedDevice
    runs: int = 0
    ooms: int = 0
    micro_batch_size: int = 0
    variant: str = "none"
    effective_batch_size: int = 0

    def run(self, size: int, variant: str, steps: int = 1) -> Answer:
        """Run a strategy for some steps, and note what that costs."""
        answer = self.device.run(size, variant)
        self.runs += 1 if answer.died else steps
        self.ooms += answer.died
        return answer

    def fits(self, size: int, variant: str, steps: int = 1) -> bool:
        """Run a strategy for some steps; return whether it did not run out of memory."""
        return not self.run(size, variant, steps).died

    def choose(self, size: int, variant: str, effective_batch_size: int) -> None:
        """Note the choice."""
        self.micro_batch_size, self.variant, self.effective_batch_size = size, variant, effective_batch_size

    @property
    def seconds(self) -> float:
        """Time spent."""
        return self.runs * STEP_SECONDS + self.ooms * OOM_SECONDS

    @property
    def keeps_batch(self) -> bool:
        """Whether training averages over the batch that was wanted."""
        return self.effective_batch_size == self.device.numbers["effective_batch_size"]

    @property
    def speed(self) -> float:
        """Sequences per second at the choice, over those of the best strategy; 0 if it does not run."""
        if not self.micro_batch_size:
            return 0.0
        size, numbers = self.micro_batch_size, self.device.numbers
        answer = self.device.run(size, self.variant)
        if answer.died:
            return 0.0
        # the others may not split the batch: as many micro-batches as there are, whole or not
        whole = numbers["effective_batch_size"] // size
        if not whole:
            return 0.0  # one micro-batch is more than the batch that was wanted
        micro = (answer.seconds - numbers["fixed_seconds"]) / whole
        seconds = numbers["fixed_seconds"] + numbers["effective_batch_size"] / size * micro
        return self.device.best()[2] / seconds


def run_climb(device: SimulatedDevice) -> Bill:
    """Return what brim's climb spends."""
    bill, batch = Bill(device), device.numbers["effective_batch_size"]
    candidates = [
        Candidate(
            strategy=Strategy(
                micro_batch_size=size, gradient_accumulation_steps=batch // size, activation_checkpointing=variant
            ),
            peak_bytes=device.predicted_bytes(size, variant), seconds=device.predicted_seconds(size, variant),
        )
        for variant in VARIANTS for size in device.splits()
    ]  # fmt: skip

    def run(strategy: Strategy) -> Outcome:
        size, variant = strategy.micro_batch_size, strategy.activation_checkpointing
        answer = bill.run(size, variant)
        if answer.died:
            return Outcome(strategy=strategy, fits=False, died=True, problem="out of memory")
        return Outcome(
            strategy=strategy, fits=answer.fits, peak_bytes=answer.peak_bytes, held_bytes=answer.reserved_bytes,
            seconds=answer.seconds,
        )  # fmt: skip

    found = climb(candidates, run, device.usable_bytes)
    if found.best is not None:
        best = found.best.strategy
        bill.choose(
            best.micro_batch_size, best.activation_checkpointing,
            best.micro_batch_size * best.gradient_accumulation_steps,
        )  # fmt: skip
    return bill


def run_accelerate(device: SimulatedDevice) -> Bill:
    """Source: accelerate/utils/memory.py find_executable_batch_size, x 0.9 from 128; accumulation rounded down."""
    bill, variant = Bill(device), device.best()[1]
    size = 128
    while size and not bill.fits(size, variant):
        size = int(size * 0.9)
    batch = device.numbers["effective_batch_size"]
    bill.choose(size, variant, size * max(1, batch // size) if size else 0)
    return bill


def run_auto_find(device: SimulatedDevice) -> Bill:
    """Source: transformers/trainer.py auto_find_batch_size over accelerate's loop, halving from the default of 8; the
    accumulation that was set for 8 stays."""
    bill, variant = Bill(device), device.best()[1]
    size, steps = 8, max(1, device.numbers["effective_batch_size"] // 8)
    while size and not bill.fits(size, variant):
        size //= 2
    bill.choose(size, variant, size * steps)
    return bill


def run_power(device: SimulatedDevice) -> Bill:
    """Source: lightning/pytorch/tuner/batch_size_scaling.py _run_power_scaling, from 2, three steps a trial."""
    bill, variant = Bill(device), device.best()[1]
    size, largest = 2, 0
    for _ in range(25):
        if not bill.fits(size, variant, steps=3):
            size = largest or size // 2
            break
        largest = size
        size *= 2
        if size > 8192:
            break
    bill.choose(size, variant, size)
    return bill


def run_binsearch(device: SimulatedDevice) -> Bill:
    """Source: lightning/pytorch/tuner/batch_size_scaling.py _run_binary_scaling, from 2, three steps a trial."""
    bill, variant = Bill(device), device.best()[1]
    size, low, high = 2, 1, None
    for _ in range(25):
        if bill.fits(size, variant, steps=3):
            low = size
            if high is not None and high - low <= 1:
                break
            size = (high + low) // 2 if high is not None else size * 2
            if size > 8192:
                break
        else:
            high = size
            size = (high + low) // 2
            if high - low <= 1:
                size = low
                break
    bill.choose(low, variant, low)
    return bill


SEARCHES: dict[str, Callable[[SimulatedDevice], Bill]] = {
    "brim climb": run_climb, "accelerate find_executable_batch_size": run_accelerate,
    "HF auto_find_batch_size": run_auto_find, "Lightning power": run_power, "Lightning binsearch": run_binsearch,
}  # fmt: skip


def describe(bills: list[Bill]) -> str:
    """Return one row of the table."""
    speeds = [min(bill.speed, 1.0) for bill in bills]
    return (
        f"{mean(b.seconds for b in bills):.1f} | {mean(b.runs for b in bills):.1f} | {mean(b.ooms for b in bills):.2f} "
        f"({max(b.ooms for b in bills)}) | {sum(s >= 0.999 for s in speeds)} | {sum(s >= 0.99 for s in speeds)} | "
        f"{mean(speeds):.1%} | {sum(b.keeps_batch for b in bills)}"
    )


def main() -> None:
    """Run every search on every device and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs=2, help="devices made now from these seeds, in place of the fifty")
    given = parser.parse_args()
    devices = [SimulatedDevice(make(seed)) for seed in range(*given.seeds)] if given.seeds else read_devices()
    devices = [device for device in devices if device.runs_at_all()]
    others = [SimulatedDevice(make(seed)) for seed in range(50, 450)]
    others = [device for device in others if device.runs_at_all()]
    lines = [
        f"| search ({len(devices)} devices) | mean s | runs | OOMs (most) | optimum | within 1 % | mean speed | "
        "batch kept |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, search in SEARCHES.items():
        lines.append(f"| {name} | {describe([search(device) for device in devices])} |")
    lines.append(f"| brim climb, {len(others)} other devices | {describe([run_climb(device) for device in others])} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(f"# Finding the batch\n\n{' '.join(__doc__.split())}\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
