#!/usr/bin/env python3
"""Refuse one allocation of a run after another, and compare the weights it ends with to those of a run without.

    python benchmarks/recover_points.py --points 240 --out benchmarks/results/recover_points.md

Every allocation larger than a block is a point; of more than `--points` as many are taken, evenly spread. Settings are
those of the tests: a tiny Llama in fp64, dropout 0, two optimizer steps, micro-batch 4 (2 on each of two ranks).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "runtime"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from recover_toys import OPTIMIZERS, SAME, Refuser, differ, flatten, train_refused, train_undisturbed  # noqa: E402

Row = dict[str, Any]
Run = Callable[[Refuser], tuple[torch.Tensor, Any, list[Any]]]


def sweep(run: Run, truth: torch.Tensor, steps: Any, points: int) -> Row:
    """Return what became of as many points, evenly spread over those that there are."""
    counter = Refuser()
    quiet = run(counter)
    chosen = sorted({number * counter.seen // points for number in range(points)})
    worst, places, bad = differ(quiet[0], truth), Counter[str](), []
    for point in chosen:
        weights, taken, events = run(Refuser(point))
        distance = differ(weights, truth)
        worst = max(worst, distance)
        places.update(event.where for event in events)
        if distance > SAME or taken != steps or len(events) != 1:
            bad.append(point)
    return {"there are": counter.seen, "points": len(chosen), "worst": worst, "bad": bad, "where": dict(places)}


def sweep_plain(kind: str, points: int) -> Row:
    def run(refuser: Refuser) -> Any:
        weights, taken, recovery = train_refused(kind, refuser)
        return weights, taken, recovery.events

    return sweep(run, *train_undisturbed(kind), points)


def sweep_trainer(kind: str, points: int) -> Row:
    """Refuse in the second window of Hugging Face's loop, or of TRL's; the truth is the guarded run without."""
    from recover_toys import count_steps
    from test_recover_trainer import make_trainer, train
    from test_recover_trl import prepare

    import brim

    folder = Path(tempfile.mkdtemp())

    def run(refuser: Refuser) -> Any:
        trainer = brim.guard(make_trainer(folder)) if kind == "hf" else prepare(kind, folder)
        trainer, _ = train(trainer, refuser, first=1)
        return flatten(trainer.model), (count_steps(trainer.optimizer), trainer.state.global_step), (
            trainer.recovery_events
        )  # fmt: skip

    if kind == "hf":
        stock = make_trainer(folder)
        stock.train()
        return sweep(run, flatten(stock.model), (count_steps(stock.optimizer), stock.state.global_step), points)
    weights, steps, _ = run(Refuser())
    return sweep(run, weights, steps, points)


def sweep_rank(rank: int, wrap: str, points: int, out: str) -> None:
    """Refuse on one rank and the other in turn; both have to end alike."""
    from test_recover_ranks import train

    logging.disable(logging.WARNING)
    truth, steps = train_undisturbed("adamw-foreach")
    train(wrap, Refuser(), rank)  # the first run of FSDP2 in a process allocates a few tensors that no other does
    counter = Refuser()
    train(wrap, counter, rank)
    least = torch.tensor(counter.seen)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    chosen = sorted({number * int(least) // points for number in range(points)})
    row: Row = {"there are": int(least), "points": len(chosen), "worst": 0.0, "bad": [], "where": {}}
    places = Counter[str]()
    for number, point in enumerate(chosen):
        mine = number % 2 == rank
        weights, taken, recovery = train(wrap, Refuser(point if mine else None), rank)
        distance = differ(weights, truth)
        row["worst"] = max(row["worst"], distance)
        places.update(event.where for event in recovery.events if event.own)
        if distance > SAME or taken != steps or (mine and len(recovery.events) != 1):
            row["bad"].append(point)
    Path(f"{out}.{rank}").write_text(json.dumps({**row, "where": dict(places)}))


def sweep_ranks(wrap: str, points: int) -> Row:
    import test_recover_ranks

    out = tempfile.mktemp()
    check = partial(test_recover_ranks.sweep_from_benchmark, wrap=wrap, points=points, out=out)
    test_recover_ranks.spawn(check, seconds=6 * 3600)
    first, second = (json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2))
    return {
        **first, "worst": max(first["worst"], second["worst"]), "bad": sorted({*first["bad"], *second["bad"]}),
        "where": dict(Counter(first["where"]) + Counter(second["where"])),
    }  # fmt: skip


def list_settings(points: int, few: int) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield every setting by name."""
    for kind in OPTIMIZERS:
        yield f"plain, {kind}", lambda kind=kind: sweep_plain(kind, points)
    yield "HF Trainer, adamw-foreach", lambda: sweep_trainer("hf", points)
    for kind in ("sft", "dpo", "reward"):
        yield f"TRL {kind}, adamw-foreach", lambda kind=kind: sweep_trainer(kind, few)
    for wrap in ("ddp", "fsdp2"):
        yield f"2 ranks {wrap}, adamw-foreach", lambda wrap=wrap: sweep_ranks(wrap, points)


def format_report(rows: dict[str, Row]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# An out-of-memory at points all over a step", "",
        "Generated by `python benchmarks/recover_points.py --out benchmarks/results/recover_points.md`.",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"trl {trl.__version__}, {platform.machine()}, {os.cpu_count()} cores, no GPU.", "",
        "A point is an allocation of more than 512 bytes that a capped CPU refuses once, evenly spread; the run ends "
        "with the weights",
        f"of an undisturbed run where their relative norm over all parameters is at most {SAME:g}. Failed: another",
        "norm, another number of optimizer steps, or not exactly one recovery.", "",
        "| setting | points | of | failed | worst relative norm | forward | backward | clipping | optimizer step |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, row in rows.items():
        where = [str(row["where"].get(place, 0)) for place in ("forward", "backward", "clipping", "optimizer step")]
        lines.append(
            f"| {name} | {row['points']} | {row['there are']} | {len(row['bad'])} | {row['worst']:.1e} | "
            + " | ".join(where) + " |"
        )  # fmt: skip
    total, failed = (sum(count) for count in zip(*((r["points"], len(r["bad"])) for r in rows.values()), strict=True))
    return "\n".join([*lines, "", f"{total:,} points in all, {failed} failed.", ""])


def main() -> int:
    """Run the settings that were asked for; rows of earlier runs are kept beside the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=240)
    parser.add_argument("--few", type=int, default=24, help="points of each TRL trainer")
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    parser.add_argument("--out", type=Path)
    said = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    kept = said.out.with_suffix(".json") if said.out else None
    rows = json.loads(kept.read_text()) if kept and kept.exists() else {}
    for name, measure in list_settings(said.points, said.few):
        if said.only not in name:
            continue
        start = time.monotonic()
        rows[name] = measure()
        print(f"{name}: {rows[name]} in {time.monotonic() - start:.0f} s", flush=True)
        if kept is not None:
            kept.write_text(json.dumps(rows, indent=1) + "\n")
            said.out.write_text(format_report(rows))
    return int(any(row["bad"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
