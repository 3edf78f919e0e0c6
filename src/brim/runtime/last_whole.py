"""The last whole step on disk, each rank its own part, and the split that a restarted run begins with."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brim.errors import InvalidFile
from brim.runtime.restore import WindowStart, list_sharded, local_part

RECORD = "brim-recover.json"
"""Name of the file with the split that a restarted run reads."""
EXIT_CODE = 75
"""What a rank that was left hanging ends with: torchrun restarts it. Source: sysexits.h, EX_TEMPFAIL.

torchrun of torch 2.13 keeps the addresses of the run that was lost in a store that it shares with the restarted one,
which then cannot connect: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each run its own. Source:
torch/distributed/elastic/rendezvous/dynamic_rendezvous.py, `next_rendezvous`.
"""


def write_record(folder: Path, **facts: Any) -> None:
    """Write down the split and why; whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / RECORD, lambda path: path.write_text(json.dumps(facts, indent=1), encoding="utf-8"))


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `write_record` wrote; empty where there is none.

    Raises:
        InvalidFile: the file is no such record.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidFile(path=str(path), problem=str(error)) from None
    size = found.get("micro_batch_size") if isinstance(found, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InvalidFile(path=str(path), problem="has no micro_batch_size of 1 or more")
    return found


def save_shard(
    folder: Path, rank: int, model: nn.Module, optimizer: torch.optim.Optimizer, step: int,
    start: WindowStart | None = None,
) -> Path:  # fmt: skip
    """Write this rank's own part of weights and optimizer states; it asks no other rank and waits for no collective.

    Args:
        folder: where. rank: whose part it is.
        model, optimizer: may be in the middle of a window.
        step: optimizer steps taken.
        start: what that window began with, where buffers and random state have moved since.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = start.list_buffers() if start is not None else {}
    random = start.random_state if start is not None else None
    with _own_stream():
        names = {parameter: name for name, parameter in _list_parameters(model).items()}
        held = {
            "step": step, "random": torch.get_rng_state() if random is None else random,
            "tensors": {name: _copy(begun.get(id(value), value)) for name, value in _list_tensors(model)},
            "states": {
                names[one]: {key: _copy(value) for key, value in state.items()}
                for one, state in optimizer.state.items() if one in names
            },
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        }  # fmt: skip
    path = folder / f"rank-{rank}.pt"
    _replace(path, lambda place: torch.save(held, place))
    return path


def load_shard(folder: Path, rank: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> int | None:
    """Put this rank's part back; return how many steps it has taken, None if there is none."""
    path = folder / f"rank-{rank}.pt"
    if not path.exists():
        return None
    held = torch.load(path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, value in _list_tensors(model):
            local_part(value).copy_(held["tensors"][name])
    for name, parameter in _list_parameters(model).items():
        if name in held["states"]:
            optimizer.state[parameter] = {
                key: _fit(value, parameter) for key, value in held["states"][name].items()
            }  # fmt: skip
    for group, kept in zip(optimizer.param_groups, held["groups"], strict=True):
        group.update(kept)
    torch.set_rng_state(held["random"])
    return int(held["step"])


@contextmanager
def watch_for_hang(seconds: float | None, on_hang: Callable[[], None]) -> Iterator[None]:
    """End the process if what is entered takes longer: a collective that one rank never enters cannot be taken back.

    Args:
        seconds: how long it may take; None watches nothing.
        on_hang: run before, in a thread of its own; it must not wait for other ranks.
    """
    if seconds is None:
        yield
        return

    def end() -> None:
        try:
            on_hang()
        finally:
            os._exit(EXIT_CODE)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _list_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from _list_parameters(model).items()
    yield from model.named_buffers()


def _list_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters by name; FSDP2's own parts of them, whose place whole ones take in the middle of a pass."""
    found: dict[str, Tensor] = dict(model.named_parameters())
    names = {part: f"{name}." if name else "" for name, part in model.named_modules()}
    for part in list(names):
        for one in (one for group in list_sharded(part) for one in group.fsdp_params):
            found[names[one._module_info.module] + one._module_info.param_name] = one.sharded_param
    return found


def _copy(value: Any) -> Any:
    return local_part(value).cpu() if isinstance(value, Tensor) else value


def _fit(value: Any, parameter: Tensor) -> Any:
    """Return a state as the optimizer would hold it: sharded and placed like its parameter, scalars on the host."""
    if not isinstance(value, Tensor) or value.shape != local_part(parameter).shape or not value.dim():
        return value
    room = torch.zeros_like(parameter, dtype=value.dtype)
    local_part(room).copy_(value)
    return room.detach()


def _own_stream() -> Any:
    """Return a context in which copies wait for no stuck collective."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.stream(torch.cuda.Stream())
    return nullcontext()


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    draft = path.with_suffix(path.suffix + f".{os.getpid()}")
    write(draft)
    os.replace(draft, path)
