"""What it would take when nothing fits: changes of the job, each evaluated, cheapest first."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from brim.errors import DoesNotFit, InvalidStrategy, ProbeFailed
from brim.planner.answerer import Answerer
from brim.planner.candidates import Fixed
from brim.planner.experts import unquantised_expert_bytes
from brim.planner.recipe import build_lora, build_quantization, build_recipe
from brim.planner.record import Relaxation
from brim.planner.search import Found, least_peak_bytes, search
from brim.spec.device import Cluster, Device
from brim.spec.workload import Workload, with_seq_len
from brim.tables.read import find_trainer, list_devices
from brim.units import format_size

_SHORTEST = 128
_MEANINGFUL_FRACTION = 0.05
"""A lighter method that saves less of the least peak is no way out."""
_RELEASABLE = (
    ("activation_checkpointing", "--activation-checkpointing full", "costs one more forward pass, changes no result"),
    ("micro_batch_size", "leave out --micro-batch-size", "brim chooses it; the effective batch stays"),
    ("gradient_accumulation_steps", "leave out --gradient-accumulation-steps", "brim chooses; the batch stays"),
    ("attention_kernel", "leave out --attention-kernel", "the model's default kernel"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """One way out, before it is evaluated."""

    change: str
    effect: str
    workload: Workload
    fixed: Fixed

    def and_then(self, flag: str, effect: str, workload: Workload) -> _Change:
        """Return this change with a second one on top."""
        return _Change(
            change=f"{self.change} {flag}".strip(), effect="; ".join(text for text in (self.effect, effect) if text),
            workload=workload, fixed=self.fixed,
        )  # fmt: skip


def refuse_unfit(workload: Workload, fixed: Fixed, answerer: Answerer, found: Found) -> NoReturn:
    """Raise DoesNotFit with the verdict in one line, and every way out that was found.

    Args:
        workload: the job that does not fit.
        fixed: Strategy fields the user fixed.
        answerer: who costs the ways out.
        found: the search that found nothing.

    Raises:
        DoesNotFit: always.
    """
    smallest = found.smallest
    moment = answerer.moment(workload, smallest.strategy)
    gap_bytes = smallest.peak_bytes - found.budget_bytes
    relaxations = list_relaxations(workload, fixed, answerer)
    verdict = _verdict(workload, found, moment, gap_bytes)
    if not relaxations:
        verdict += "; no method, length or card that brim knows makes it fit one device"
    raise DoesNotFit(
        verdict, gap_bytes=gap_bytes, at_moment=moment, relaxations=relaxations,
        peak_allocated_bytes=smallest.peak_bytes, budget_bytes=found.budget_bytes, source=answerer.source,
        **({"experts_unquantised_bytes": spared} if (spared := unquantised_expert_bytes(workload)) else {}),
    )  # fmt: skip


def _verdict(workload: Workload, found: Found, moment: str, gap_bytes: int) -> str:
    recipe, cluster = workload.recipe, workload.cluster
    what = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[recipe.method]
    strategy = found.smallest.strategy
    text = (
        f"{what} of {workload.model.name} at {workload.data.seq_len:,} tokens does not fit {cluster.device.name}: the "
        f"smallest strategy (micro-batch {strategy.micro_batch_size}, {strategy.activation_checkpointing} "
        f"checkpointing) needs {format_size(found.smallest.peak_bytes)} at {moment}, "
        f"{format_size(gap_bytes)} more than the {format_size(found.budget_bytes)} budget"
    )
    spared = unquantised_expert_bytes(workload)
    if spared:
        text += (
            f"; {format_size(spared)} of it are experts that are not quantised (experts_unquantised: transformers 5 "
            "keeps all experts of a layer in one parameter)"
        )
    if cluster.num_devices > 1:
        text += f"; each of the {cluster.num_devices} devices holds a whole replica (sharding is not planned yet)"
    return text


def list_relaxations(workload: Workload, fixed: Fixed, answerer: Answerer) -> tuple[Relaxation, ...]:
    """Return changes that make the job fit, cheapest first; if none does, the one that comes closest.

    A smaller effective batch is never among them: accumulation already makes it free of memory.
    """
    asked = _Change(change="", effect="", workload=workload, fixed=fixed)
    methods = _worthwhile(asked, _lighter_methods(asked), answerer)
    simple = [*_released(asked), *_lighter_optimizer(asked), *methods]
    evaluated = [_evaluate(change, answerer) for change in simple]
    enough = bool(evaluated and evaluated[-1] and evaluated[-1].fits)
    # A method that is not enough alone may be with a second change.
    bases = [asked] if enough else [asked, *methods[-1:]]
    further = [*_all_of(_shorter, bases, answerer), *_all_of(_bigger_card, bases, answerer)]
    evaluated += [_evaluate(change, answerer) for change in further]
    known = [relaxation for relaxation in evaluated if relaxation is not None]
    fitting = tuple(relaxation for relaxation in known if relaxation.fits)
    if fitting:
        return fitting
    known += [last for change in _last_resort(bases[-1], answerer) if (last := _evaluate(change, answerer))]
    if not known or known[-1].fits:
        return tuple(known[-1:])
    return (min(known, key=lambda relaxation: relaxation.peak_allocated_bytes),)


def _worthwhile(asked: _Change, methods: Iterable[_Change], answerer: Answerer) -> list[_Change]:
    """Return the methods whose least peak is clearly below that of the one before (fused experts stay in 16 bit)."""
    kept: list[_Change] = []
    least = _least(asked, answerer)
    for method in methods:
        peak = _least(method, answerer)
        if peak is not None and (least is None or peak <= least * (1 - _MEANINGFUL_FRACTION)):
            kept.append(method)
            least = peak
    return kept


def _least(change: _Change, answerer: Answerer) -> int | None:
    try:
        return least_peak_bytes(change.workload, change.fixed, answerer)
    except (InvalidStrategy, ProbeFailed):
        return None


def _all_of(
    find: Callable[[_Change, Answerer], Iterator[_Change]], bases: Iterable[_Change], answerer: Answerer
) -> Iterator[_Change]:
    for base in bases:
        yield from find(base, answerer)


def _evaluate(change: _Change, answerer: Answerer) -> Relaxation | None:
    """Return the change with the peak of what would be chosen (of the smallest strategy, if none fits)."""
    workload, fixed = change.workload, change.fixed
    try:
        found = search(workload, fixed, answerer, answerer.budget(workload).budget_bytes)
    except (InvalidStrategy, ProbeFailed):
        return None
    shown = found.best or found.smallest
    return Relaxation(
        change=change.change, effect=change.effect, peak_allocated_bytes=shown.peak_bytes, fits=found.best is not None
    )


def _fits(workload: Workload, fixed: Fixed, answerer: Answerer) -> bool:
    try:
        return least_peak_bytes(workload, fixed, answerer) <= answerer.budget(workload).budget_bytes
    except (InvalidStrategy, ProbeFailed):
        return False


def _released(asked: _Change) -> Iterator[_Change]:
    """What the user fixed among the knobs that change no result."""
    fixed = asked.fixed
    for name, change, effect in _RELEASABLE:
        if name in fixed and fixed[name] != "full" and not isinstance(fixed[name], tuple):
            released = {other: value for other, value in fixed.items() if other != name}
            if name == "activation_checkpointing":
                released[name] = "full"
            yield _Change(change=change, effect=effect, workload=asked.workload, fixed=released)


def _lighter_optimizer(asked: _Change) -> Iterator[_Change]:
    workload = asked.workload
    if workload.recipe.method != "full" or workload.recipe.optimizer == "adamw-8bit":
        return
    recipe = replace(workload.recipe, optimizer="adamw-8bit")
    yield _Change(
        change="--optimizer adamw-8bit", effect="optimizer states in 8 bit; results differ slightly",
        workload=replace(workload, recipe=recipe), fixed=_without(asked.fixed, "optimizer_kernel"),
    )  # fmt: skip


def _lighter_methods(asked: _Change) -> Iterator[_Change]:
    workload = asked.workload
    recipe, trainer = workload.recipe, find_trainer(workload.recipe.engine.name)
    dtype = recipe.compute_dtype
    if recipe.method == "full":
        lora = build_lora(workload.model, trainer, "lora", dtype)
        lighter = replace(build_recipe("lora", dtype, recipe.optimizer, trainer), lora=lora, engine=recipe.engine)
        yield _Change(
            change="--method lora", effect=f"trains rank-{lora.r} adapters instead of all weights",
            workload=replace(workload, recipe=lighter), fixed=asked.fixed,
        )  # fmt: skip
    if recipe.method != "qlora":
        lora = recipe.lora or build_lora(workload.model, trainer, "qlora", dtype)
        adapter = build_lora(workload.model, trainer, "qlora", dtype, lora.r).dtype
        lighter = replace(
            build_recipe("qlora", dtype, recipe.optimizer, trainer), lora=replace(lora, dtype=adapter),
            quantization=build_quantization(trainer), engine=recipe.engine,
        )  # fmt: skip
        yield _Change(
            change="--method qlora", effect="adapters on a 4-bit base; unpacking it makes each micro-batch slower",
            workload=replace(workload, recipe=lighter), fixed=asked.fixed,
        )  # fmt: skip


def _shorter(base: _Change, answerer: Answerer) -> Iterator[_Change]:
    """The longest rounded length that fits."""
    seq_len = base.workload.data.seq_len
    if base.workload.model.sequence_tokens is not None:
        return
    lengths = _shorter_lengths(seq_len)
    # Shorter never needs more, so the lengths are halved rather than walked.
    first = bisect_left(
        lengths, True, key=lambda length: _fits(with_seq_len(base.workload, length), base.fixed, answerer)
    )
    if first < len(lengths):
        length = lengths[first]
        effect = f"longer sequences are cut at {length:,} tokens instead of {seq_len:,}"
        yield base.and_then(f"--seq-len {length}", effect, with_seq_len(base.workload, length))


def _shorter_lengths(seq_len: int) -> list[int]:
    """Return powers of two and one and a half times them below `seq_len`, longest first, down to 128 tokens."""
    powers = [2**exponent for exponent in range(seq_len.bit_length() + 1)]
    lengths = {*powers, *(power + power // 2 for power in powers)}
    return sorted((length for length in lengths if _SHORTEST <= length < seq_len), reverse=True)


def _bigger_card(base: _Change, answerer: Answerer) -> Iterator[_Change]:
    """The smallest card of the table that fits, of the same vendor."""
    cluster = base.workload.cluster
    # Larger cards may be too old for the job or have larger workspaces, so every one is asked, smallest first.
    tried: set[tuple[object, int]] = set()
    least = _least(base, answerer) if answerer.is_dear(base.workload) else None  # on this card; alike on others
    for device in _cards(cluster):
        alike = (device.compute_capability, device.capacity_bytes)
        if device.capacity_bytes <= cluster.device.plannable_bytes or alike in tried:
            continue
        tried.add(alike)
        if least is not None and answerer.budget(_moved(base, device)).budget_bytes < least:
            continue
        if _fits(_moved(base, device), base.fixed, answerer):
            size = format_size(device.capacity_bytes)
            effect = f"the smallest {device.vendor.upper()} card of the table that fits, {size}"
            yield base.and_then(f"--gpu {_gpu_words(device, cluster)}", effect, _moved(base, device))
            return


def _cards(cluster: Cluster) -> list[Device]:
    """Return the cards of the table of the same vendor, smallest first; none for a CPU that is held to a size."""
    cards = [device for device in list_devices() if device.vendor == cluster.device.vendor]
    return sorted(cards, key=lambda device: device.capacity_bytes)


def _moved(base: _Change, device: Device) -> Workload:
    return replace(base.workload, cluster=replace(base.workload.cluster, device=device))


def _last_resort(base: _Change, answerer: Answerer) -> Iterator[_Change]:
    """The largest card of the same vendor, with the longest rounded length that fits it."""
    cluster = base.workload.cluster
    cards = _cards(cluster)
    if not cards:
        return
    largest = cards[-1]
    effect = f"the largest {largest.vendor.upper()} card of the table, {format_size(largest.capacity_bytes)}"
    yield from _shorter(base.and_then(f"--gpu {_gpu_words(largest, cluster)}", effect, _moved(base, largest)), answerer)


def _gpu_words(device: Device, cluster: Cluster) -> str:
    return device.name + (f":{cluster.devices_per_node}" if cluster.devices_per_node > 1 else "")


def _without(fixed: Fixed, *names: str) -> Fixed:
    return {name: value for name, value in fixed.items() if name not in names}
