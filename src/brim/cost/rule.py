"""The field's rule of thumb as an answerer: what one is told, not what is true.

    model      0.5 GB per billion parameters in 4-bit, 2 GB in 16-bit, spread evenly over the devices
    remaining  card - model - 2 GB
    batch      start low, raise until about 90 % of what remains is used

The saying has no formula for activations, so they are read from its own examples (`tables/rule.toml`): in 4-bit a
matrix row implies what one sequence takes; in 16 bit one law fits its four patterns. Checkpointing is taken to be
on in the examples (it "saves 40-60 %": off costs twice that). They grow linearly with length, with eager attention
quadratically.

Leaves out: optimizer states and gradients, logits, dequantisation, the trainer, fragmentation - with each of them
wrong by gigabytes; `docs/` shows by how much.
"""

from __future__ import annotations

import re
from math import log

from brim.cost.ledger import Estimate, Ledger, Moment
from brim.cost.parameters import count_parameters
from brim.spec.device import Device
from brim.spec.strategy import Strategy
from brim.spec.workload import Workload
from brim.tables.read import RuleRow, list_rule_rows, read_rule_constants
from brim.units import GIB

GB = 10**9
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bm])", re.IGNORECASE)


def estimate_rule(workload: Workload, strategy: Strategy) -> Estimate:
    """Return the rule's answer: model, buffer and activations of one device, at one moment."""
    billions, bits = count_billions(workload), weight_bits(workload)
    ledger = Ledger(
        parameters=model_bytes(billions, bits, workload.cluster.num_devices),
        activations=activation_bytes(workload, strategy),
        overhead=round(read_rule_constants().buffer_gb * GB),
    )
    total = ledger.total_bytes
    return Estimate(
        source="rule", moments=(Moment(name="training", ledger=ledger),), peak_allocated_bytes=total,
        peak_reserved_bytes=total, device_bytes=total, peak_moment="training",
        notes=(f"rule of thumb for {billions:g}B parameters in {bits} bit on {card_gb(workload):g} GB",),
    )  # fmt: skip


def rule_peak_bytes(workload: Workload, strategy: Strategy) -> int:
    """Return the rule's bytes of one device, without the ledger."""
    buffer_bytes = round(read_rule_constants().buffer_gb * GB)
    base = model_bytes(count_billions(workload), weight_bits(workload), workload.cluster.num_devices)
    return base + buffer_bytes + activation_bytes(workload, strategy)


def rule_budget_bytes(workload: Workload) -> int:
    """Return the bytes the rule lets a plan use: model, buffer, and 90 % of what remains of the card.

    A row that says "40 GB+" keeps its answer on every larger card, for models that fit 40 GB at all.
    """
    constants, billions, bits = read_rule_constants(), count_billions(workload), weight_bits(workload)
    base = model_bytes(billions, bits, workload.cluster.num_devices) + round(constants.buffer_gb * GB)
    card = card_gb(workload)
    row = find_row(billions, bits, card)
    if row is not None and row.or_more and card >= row.card_gb > base / GB:
        card = row.card_gb
    remaining = max(0, round(card * GB) - base)
    return base + int(remaining * constants.used_fraction) if remaining else round(card * GB)


def count_billions(workload: Workload) -> float:
    """Return the model's size in billions of parameters: the size in its name, as people say it, else counted."""
    name = workload.model.name.rsplit("/", 1)[-1]
    sizes = [float(digits) / (1000 if unit in "mM" else 1) for digits, unit in _SIZE.findall(name)]
    counted = count_parameters(workload.model) / GB
    return next((size for size in sizes if 0.75 * counted <= size <= 1.25 * counted), round(counted, 3))


def weight_bits(workload: Workload) -> int:
    """Return 4 for a 4-bit base, else 16: the rule knows no other."""
    quantization = workload.recipe.quantization
    return 4 if quantization is not None and quantization.kind in ("nf4", "fp4", "gptq-int4") else 16


def card_gb(workload: Workload) -> float:
    """Return the card's size as people say it: a `24 GB` card reports 22.4 to 24 GiB."""
    return _said_gb(workload.cluster.device)


def _said_gb(device: Device) -> float:
    size = device.plannable_bytes
    for said in sorted({row.card_gb for row in list_rule_rows()} | {12, 32, 48, 80, 96, 141, 192}):
        if 0.95 * said * GB <= size <= 1.01 * said * GIB:
            return said
    return round(size / GB, 1)


def model_bytes(billions: float, bits: int, num_devices: int = 1) -> int:
    """Return what the rule says the weights take on each device, bytes."""
    constants = read_rule_constants()
    per_billion = constants.gb_per_billion_4bit if bits == 4 else constants.gb_per_billion_16bit
    return round(billions * per_billion * GB / num_devices)


def find_row(billions: float, bits: int, card: float) -> RuleRow | None:
    """Return the nearest row of the matrix: nearest size, then the largest card not above, else the smallest.

    None in 16 bit: the matrix is about 4-bit models.
    """
    rows = [row for row in list_rule_rows() if row.bits == bits]
    if not rows:
        return None
    distance = min(abs(log(row.billions / billions)) for row in rows)
    near = [row for row in rows if abs(log(row.billions / billions)) == distance]
    not_above = [row for row in near if row.card_gb <= card]
    return max(not_above, key=lambda row: row.card_gb) if not_above else min(near, key=lambda row: row.card_gb)


def activation_bytes(workload: Workload, strategy: Strategy) -> int:
    """Return what the rule says the activations of a micro-batch take, bytes."""
    billions, bits = count_billions(workload), weight_bits(workload)
    sequence_gb = _sequence_gb(billions, bits, card_gb(workload))
    length = workload.data.seq_len / read_rule_constants().reference_seq_len
    growth = length**2 if strategy.attention_kernel == "eager" else length
    share = _checkpointing_share(strategy)
    return round(strategy.micro_batch_size * sequence_gb * growth * share * GB)


def _sequence_gb(billions: float, bits: int, card: float) -> float:
    """Return what one sequence takes in the rule's examples, GB."""
    constants, row = read_rule_constants(), find_row(billions, bits, card)
    if row is None:
        ratio = billions / constants.activation_billions_16bit
        return float(constants.activation_gb_16bit * ratio**constants.activation_exponent_16bit)
    base_gb = model_bytes(row.billions, bits) / GB + constants.buffer_gb
    # A size that is said a little differently (6.7B, 8B) takes proportionally more or less.
    return constants.used_fraction * (row.card_gb - base_gb) / row.micro_batch[1] * billions / row.billions


def _checkpointing_share(strategy: Strategy) -> float:
    """Return activations relative to the examples, which are read with full checkpointing."""
    least, most = read_rule_constants().checkpointing_saves_fraction
    kept = {"none": 1.0, "selective": 1 - least, "full": 1 - (least + most) / 2}
    return kept[strategy.activation_checkpointing] / kept["full"]
