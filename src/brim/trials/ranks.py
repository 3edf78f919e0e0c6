"""A trial on several ranks: every rank runs the same request, and the weakest decides for all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

from brim.checks.ranks import count_ranks
from brim.trials.child import read_answer
from brim.trials.request import Answer

_LONGEST = timedelta(minutes=20)
"""How long a rank waits for the answers of the others."""
_PREFIX = "brim-trial"


def open_store(*, may_keep: bool = False) -> Any:
    """Return the store through which the ranks of torchrun find each other.

    torchrun keeps it itself, but where each rank was started by hand: there the first rank's process does, which
    lives as long as the trial.

    Args:
        may_keep: whether this process may be the one that keeps it.

    Source: torch/distributed/rendezvous.py _create_c10d_store, TORCHELASTIC_USE_AGENT_STORE.
    """
    import torch.distributed as dist

    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), count_ranks(),
        is_master=may_keep and not kept and os.environ.get("RANK") == "0", timeout=_LONGEST,
    )  # fmt: skip


class Ranks:
    """This rank among those of the trial; alone where torchrun started none."""

    def __init__(self) -> None:
        """Join the others."""
        self.size, self.rank = count_ranks(), int(os.environ.get("RANK", "0"))
        self._store = open_store(may_keep=True) if self.size > 1 else None
        self._number = 0

    def name_meeting(self) -> str | None:
        """Return where the processes of the next request meet; None for one rank."""
        return f"{_PREFIX}/{self._number}/meet" if self.size > 1 else None

    def is_lost(self) -> bool:
        """Return whether another rank's process has died, so that this one's waits for nothing."""
        if self._store is None:
            return False
        return any(self._store.check([self._key(rank, "dead")]) for rank in range(self.size) if rank != self.rank)

    def agree(self, answer: Answer) -> Answer:
        """Return what all ranks together say: the most memory, the longest time, the worst ending."""
        if self._store is None:
            return answer
        if answer.ending != "done":
            self._store.set(self._key(self.rank, "dead"), "1")
        self._store.set(self._key(self.rank, "answer"), json.dumps(asdict(answer)))
        keys = [self._key(rank, "answer") for rank in range(self.size)]
        self._store.wait(keys, _LONGEST)
        answers = [read_answer(self._store.get(key).decode()) for key in keys]
        self._number += 1
        return find_weakest(answers)

    def find_least(self, what: str, value: int) -> int:
        """Return the least of a number that every rank has one of."""
        if self._store is None:
            return value
        self._store.set(f"{_PREFIX}/{what}/{self.rank}", str(value))
        keys = [f"{_PREFIX}/{what}/{rank}" for rank in range(self.size)]
        self._store.wait(keys, _LONGEST)
        return min(int(self._store.get(key)) for key in keys)

    def _key(self, rank: int, what: str) -> str:
        return f"{_PREFIX}/{self._number}/{what}/{rank}"


def find_weakest(answers: Sequence[Answer]) -> Answer:
    """Return one answer for all ranks.

    A rank that ran out of memory says more than those that failed because it was gone, or were stopped.
    """
    order = {"oom": 0, "failed": 1, "lost": 2, "done": 3}
    worst = min(range(len(answers)), key=lambda rank: order[answers[rank].ending])
    first = answers[worst]
    if first.ending != "done":
        return replace(first, problem=f"rank {worst}: {first.problem}")
    counts = set.intersection(*(set(one.seconds) for one in answers))
    return replace(
        first, peak_allocated_bytes=_most(answers, "peak_allocated_bytes"),
        peak_reserved_bytes=_most(answers, "peak_reserved_bytes"), device_bytes=_most(answers, "device_bytes"),
        num_retries=_most(answers, "num_retries") or 0,
        real_fraction=sum(one.real_fraction for one in answers) / len(answers),
        seconds={count: max(one.seconds[count] for one in answers) for count in counts},
    )  # fmt: skip


def _most(answers: Sequence[Answer], name: str) -> int | None:
    known = [value for one in answers if (value := getattr(one, name)) is not None]
    return max(known, default=None)
