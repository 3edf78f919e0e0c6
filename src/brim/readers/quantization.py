"""A checkpoint that is stored quantised: in which format, and the only job it can be trained by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from brim.errors import InvalidInput, UnsupportedModel, quoted
from brim.planner.job import Job
from brim.planner.options import JobOptions
from brim.readers.config_fields import LARGEST_DIM, ConfigFields, describe
from brim.spec.recipe import Quantization

_ADVICE = "name the unquantised checkpoint instead"
# transformers' own values of keys that may be absent. Source: transformers 5.23 utils/quantization_config.py.
_DEFAULTS = {
    "load_in_4bit": False, "load_in_8bit": False, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
    "group_size": 128,
}  # fmt: skip


def read_quantization(config: Mapping[str, Any], *, name: str) -> Quantization | None:
    """Return how a config says its checkpoint is stored, None if unquantised.

    Raises:
        InvalidConfig: a broken `quantization_config`. UnsupportedModel: a format that cannot be trained on here.
    """
    values = config.get("quantization_config")
    if not values:
        return None
    if not isinstance(values, Mapping):
        fields = ConfigFields(source=name, model_type="", values=config)
        fields.refuse("quantization_config", f"must be an object, not {describe(values)}")
    fields = ConfigFields(
        source=name, model_type="", values=values, defaults=_DEFAULTS, prefix="quantization_config."
    )  # fmt: skip
    if not fields.has("quant_method") and (fields.has("load_in_4bit") or fields.has("load_in_8bit")):
        return _read_bitsandbytes(fields)  # what transformers wrote before it named the method
    method = fields.text("quant_method").lower()
    if method == "bitsandbytes":
        return _read_bitsandbytes(fields)
    if method == "gptq":
        return _read_gptq(fields)
    raise UnsupportedModel(model=name, what=f"weights stored as {quoted(method)[1:-1]}", advice=_ADVICE)


def _read_bitsandbytes(fields: ConfigFields) -> Quantization | None:
    if fields.flag("load_in_8bit"):
        return Quantization(kind="int8")
    if not fields.flag("load_in_4bit"):
        return None
    kind = fields.text("bnb_4bit_quant_type")
    if kind not in ("nf4", "fp4"):
        fields.refuse("bnb_4bit_quant_type", f"must be nf4 or fp4, not {describe(kind)}")
    return Quantization(kind="nf4" if kind == "nf4" else "fp4", double_quant=fields.flag("bnb_4bit_use_double_quant"))


def _read_gptq(fields: ConfigFields) -> Quantization:
    bits = fields.number("bits", at_most=64)
    if bits != 4:
        raise UnsupportedModel(model=fields.source, what=f"{bits}-bit GPTQ weights", advice=_ADVICE)
    group_size = fields.number("group_size", at_least=-1)
    if group_size == 0:
        fields.refuse("group_size", "must be -1 or at least 1, not 0")
    return Quantization(kind="gptq-int4", block_size=LARGEST_DIM if group_size == -1 else group_size)


def follow_checkpoint(options: JobOptions, stored: Quantization, name: str) -> tuple[JobOptions, tuple[str, ...]]:
    """Return the options on a quantised checkpoint, QLoRA on it as stored, and what was filled in.

    Raises:
        InvalidInput: options that a checkpoint stored this way cannot follow.
    """
    facts = f"{quoted(name)[1:-1]} is stored in {stored.kind}"
    if options.method not in (None, "qlora"):
        raise InvalidInput(
            f"{facts}: method {options.method} cannot train it; use method qlora, or {_ADVICE}", option="method"
        )
    if options.quantization not in (None, stored.kind):
        raise InvalidInput(f"{facts}, not {options.quantization}; leave quantization out, or {_ADVICE}")
    if options.double_quant not in (None, stored.double_quant):
        said = "with" if stored.double_quant else "without"
        raise InvalidInput(f"{facts} {said} double quantisation; leave double_quant out, or {_ADVICE}")
    filled = [] if options.method else ["method qlora, since the checkpoint is quantised"]
    grouped = stored.kind == "gptq-int4" and stored.block_size < LARGEST_DIM
    groups = f" in groups of {stored.block_size}" if grouped else ""
    filled.append(f"base weights in {stored.kind}{groups}, as the checkpoint stores them")
    # A storage the recipe knows stands in until `keep_storage` puts the checkpoint's in its place.
    stand_in = replace(options, method="qlora", quantization="nf4", double_quant=False)
    return stand_in, tuple(filled)


def keep_storage(job: Job, stored: Quantization) -> Job:
    """Return the job with its base stored as the checkpoint has it."""
    recipe = job.workload.recipe
    upcast_rest = recipe.quantization is not None and recipe.quantization.upcast_rest
    recipe = replace(recipe, quantization=replace(stored, upcast_rest=upcast_rest))
    return replace(job, workload=replace(job.workload, recipe=recipe))
