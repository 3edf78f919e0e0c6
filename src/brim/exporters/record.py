"""What an exporter returns: words, files, and how to start them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from brim.errors import InvalidStrategy
from brim.planner.record import Plan
from brim.tables.dialects import Dialect


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFile:
    """One file to be written."""

    name: str
    """File name, without a folder."""
    text: str
    """Contents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A plan in the words of one framework."""

    target: str
    """Name of the target, for example `trl`."""
    dialect: str
    """The versions these words are for, for example `trl>=1.15`."""
    keywords: Mapping[str, Any]
    """Keywords of the target's own config class or file."""
    outside: Mapping[str, Any]
    """What that class has no field for, by the word of the call that takes it: `attn_implementation`, `max_length`,
    `quantization_config`, `peft_config`, `num_processes`, environment variables."""
    files: tuple[ExportFile, ...]
    """Everything to write; the first is the script."""
    launch: str
    """The line that starts the run on one node."""
    notes: tuple[str, ...]
    """What the user should know, one sentence each."""

    @property
    def settings(self) -> dict[str, Any]:
        """All words in one mapping, which `brim.readers.trainer_args` reads back."""
        return {**self.outside, **self.keywords}


def check_product(plan: Plan) -> None:
    """Refuse a plan whose batch does not multiply to its effective batch.

    Raises:
        InvalidStrategy: a plan file that was edited by hand.
    """
    micro, steps = plan.strategy.micro_batch_size, plan.strategy.gradient_accumulation_steps
    ranks = plan.strategy.mesh.data_parallel_size
    if micro * steps * ranks != plan.effective_batch_size:
        raise InvalidStrategy(
            f"micro-batch {micro} x accumulation {steps} x {ranks} ranks is {micro * steps * ranks} sequences, "
            f"not the plan's effective batch {plan.effective_batch_size}"
        )


def name_requirements(plan: Plan, dialect: Dialect) -> tuple[str, ...]:
    """Return the packages the exported script needs, as pip writes them."""
    recipe = plan.workload.recipe
    wanted = list(dialect.requires)
    if recipe.lora is not None and dialect.target != "unsloth":
        wanted.append("peft")
    own_kernels = dialect.target == "unsloth"
    if plan.strategy.layer_kernels == "liger" or (plan.strategy.loss_kernel == "fused" and not own_kernels):
        wanted.append("liger-kernel")
    if plan.strategy.attention_kernel == "flash":
        wanted.append("flash-attn")
    return tuple(wanted)
