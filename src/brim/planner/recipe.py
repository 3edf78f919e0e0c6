"""From a method and a trainer preset to the recipe: precision, adapter, storage, semantics of the loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from brim.cost.parameters import default_targets, target_linears
from brim.errors import InvalidInput, UnknownName
from brim.planner.options import JobOptions, split_targets
from brim.spec.device import Device
from brim.spec.model import ModelShape
from brim.spec.recipe import Dtype, Engine, Lora, Method, Preference, Quantization, Recipe
from brim.spec.strategy import OptimizerKernel
from brim.tables.read import Optimizer, Trainer, find_optimizer

BF16_CAPABILITY = (8, 0)
DEFAULT_RANK = 16
DEFAULT_VIRTUAL_TOKENS = 20
_ADAPTED: tuple[Method, ...] = ("lora", "qlora")
_PROMPTED: tuple[Method, ...] = ("prompt-tuning", "prefix-tuning")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeChoice:
    """A recipe, the optimizer kernel a HF name implies, and the defaults that were filled in."""

    recipe: Recipe
    """The recipe."""
    optimizer_kernel: OptimizerKernel | None
    """Kernel the user's optimizer name stands for; None when the name leaves it open."""
    assumptions: tuple[str, ...]
    """One sentence per default."""


def choose_recipe(shape: ModelShape, device: Device, trainer: Trainer, options: JobOptions) -> RecipeChoice:
    """Return the recipe the options ask for, with defaults filled in and said.

    Raises:
        UnknownName: no such optimizer. InvalidInput: options that exclude each other.
    """
    said: list[str] = []
    _refuse_lora_of_full(options)
    method = _choose_method(options, said)
    dtype = _choose_dtype(options, device, said)
    optimizer, kernel = _choose_optimizer(options, said)
    recipe = build_recipe(method, dtype, optimizer.name, trainer)
    recipe = replace(
        recipe, lora=_choose_lora(shape, trainer, recipe, options, said) if method in _ADAPTED else None,
        quantization=_choose_quantization(trainer, method, options, said),
        num_virtual_tokens=_choose_virtual_tokens(method, said),
        preference=_choose_preference(trainer, recipe, options, said),
        engine=replace(recipe.engine, resumes=bool(options.resume)),
    )  # fmt: skip
    return RecipeChoice(recipe=recipe, optimizer_kernel=kernel, assumptions=tuple(said))


def build_recipe(method: Method, dtype: Dtype, optimizer: str, trainer: Trainer) -> Recipe:
    """Return the recipe of a method under a trainer, without adapter or quantisation.

    A full fine-tune in fp16 keeps fp32 weights: torch's gradient scaler cannot unscale fp16 gradients.
    """
    autocast = trainer.autocast and dtype != "fp32"
    full_fp16 = method == "full" and dtype == "fp16"
    return Recipe(
        method=method, optimizer=optimizer, compute_dtype=dtype, weight_dtype="fp32" if full_fp16 else dtype,
        autocast=autocast or full_fp16, engine=build_engine(trainer),
        preference=build_preference(method) if trainer.prefers else None,
    )  # fmt: skip


def build_engine(trainer: Trainer) -> Engine:
    """Return the loop semantics of a trainer preset."""
    return Engine(
        name=trainer.name,
        logits_alive_in_backward=trainer.logits_alive_in_backward,
        upcasts_logits=trainer.upcasts_logits,
        flattens_packed=trainer.flattens_packed,
    )


def build_preference(method: Method) -> Preference:
    """Return where TRL takes reference log-probabilities from unless told: an adapter is switched off for them.

    Source: trl trainer/dpo_trainer.py DPOTrainer.__init__ (1.16), ref_model None.
    """
    return Preference(reference="model" if method == "full" else "adapter")


def build_lora(shape: ModelShape, trainer: Trainer, method: Method, dtype: Dtype, rank: int = DEFAULT_RANK) -> Lora:
    """Return the default adapter: every attention and feed-forward matrix, alpha = 2 r."""
    adapter_dtype = trainer.qlora_adapter_dtype if method == "qlora" else trainer.lora_adapter_dtype
    # A bf16 adapter is the trainer's choice for bf16 runs; the gradient scaler of fp16 runs needs fp32.
    return Lora(
        r=rank, alpha=2.0 * rank, target_modules=default_targets(shape),
        dtype="fp32" if adapter_dtype != "fp32" and dtype != adapter_dtype else adapter_dtype,
    )  # fmt: skip


def build_quantization(trainer: Trainer) -> Quantization:
    """Return the default storage of a QLoRA base: nf4 with double quantisation."""
    return Quantization(kind="nf4", double_quant=True, upcast_rest=trainer.kbit_upcast)


def _choose_method(options: JobOptions, said: list[str]) -> Method:
    if options.quantization or options.double_quant is not None:
        if options.method not in (None, "qlora"):
            raise InvalidInput(f"quantization freezes the base: it needs method qlora, not {options.method}")
        if options.method is None:
            said.append("method qlora, since the base is quantised")
        return "qlora"
    if options.method is None:
        said.append("method lora (adapters on a 16-bit base)")
    return options.method or "lora"


def _choose_dtype(options: JobOptions, device: Device, said: list[str]) -> Dtype:
    if options.dtype is not None:
        return options.dtype
    capability = device.compute_capability
    if capability is not None and capability < BF16_CAPABILITY:
        said.append(f"dtype fp16: {device.name} has compute capability {capability[0]}.{capability[1]}, bf16 needs 8.0")
        return "fp16"
    said.append("dtype bf16")
    return "bf16"


def _choose_optimizer(options: JobOptions, said: list[str]) -> tuple[Optimizer, OptimizerKernel | None]:
    row = find_optimizer(options.optimizer or "adamw")
    wanted = (options.optimizer or "").strip().lower().replace("-", "_")
    # `adamw_torch` and `adamw_torch_fused` are one optimizer with two kernels; its own name leaves the kernel open.
    kernels: tuple[OptimizerKernel, ...] = get_args(OptimizerKernel)
    named = [kernel for kernel in kernels if row.hf.get(kernel) == wanted != row.name]
    if options.optimizer is None:
        said.append(f"optimizer adamw ({row.kernels[0]} kernel)")
    if named and options.optimizer_kernel not in (None, named[0]):
        raise InvalidInput(
            f"optimizer {options.optimizer} is the {named[0]} kernel, but optimizer_kernel {options.optimizer_kernel} "
            "was asked for; leave one of them out"
        )
    return row, named[0] if named else None


def _choose_lora(shape: ModelShape, trainer: Trainer, recipe: Recipe, options: JobOptions, said: list[str]) -> Lora:
    lora = build_lora(shape, trainer, recipe.method, recipe.compute_dtype, options.lora_r or DEFAULT_RANK)
    if options.lora_r is None:
        said.append(f"LoRA rank {lora.r}")
    if options.lora_alpha is None:
        said.append(f"LoRA alpha {lora.alpha:g}, twice the rank")
    else:
        lora = replace(lora, alpha=float(options.lora_alpha))
    lora = replace(lora, use_dora=bool(options.use_dora), use_rslora=bool(options.use_rslora))
    if options.lora_targets is None:
        said.append(f"LoRA on every attention and feed-forward matrix: {', '.join(lora.target_modules)}")
        return lora
    return replace(lora, target_modules=_known_targets(shape, split_targets(options.lora_targets)))


def _choose_virtual_tokens(method: Method, said: list[str]) -> int | None:
    if method not in _PROMPTED:
        return None
    said.append(f"{DEFAULT_VIRTUAL_TOKENS} virtual tokens")
    return DEFAULT_VIRTUAL_TOKENS


def _choose_preference(trainer: Trainer, recipe: Recipe, options: JobOptions, said: list[str]) -> Preference | None:
    if recipe.preference is None:
        if options.precompute_ref_log_probs is not None:
            raise InvalidInput(f"precompute_ref_log_probs needs trainer trl-dpo, not {trainer.name}")
        return None
    if options.packing:
        raise InvalidInput(f"{trainer.name} does not pack pairs of answers; leave packing out")
    if options.precompute_ref_log_probs:
        return Preference(reference="precomputed")
    said.append({"model": "reference a second model", "adapter": "reference the model without its adapter"}[
        recipe.preference.reference
    ])  # fmt: skip
    return recipe.preference


def _refuse_lora_of_full(options: JobOptions) -> None:
    for name in ("lora_r", "lora_alpha", "lora_targets", "use_dora", "use_rslora"):
        if options.method == "full" and getattr(options, name) is not None:
            raise InvalidInput(f"{name} needs method lora or qlora, not full", option=name)


def _known_targets(shape: ModelShape, names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names if shape.groups else ():
        if not target_linears(shape, (name,), False) and not target_linears(shape, (name,), True):
            known = {linear.name for linear, _ in target_linears(shape, ("all-linear",), False)}
            raise UnknownName(kind=f"LoRA target of {shape.name}", name=name, known=known)
    return names


def _choose_quantization(trainer: Trainer, method: Method, options: JobOptions, said: list[str]) -> Quantization | None:
    if method != "qlora":
        return None
    chosen = build_quantization(trainer)
    if options.quantization is None:
        said.append("base weights in nf4")
    kind = options.quantization or chosen.kind
    if kind == "int8":
        if options.double_quant:
            raise InvalidInput("double_quant quantises the scales of 4-bit weights; int8 has none")
        return replace(chosen, kind=kind, double_quant=False)
    if options.double_quant is None:
        said.append("scales of the 4-bit weights quantised once more (double quantisation)")
    return replace(chosen, kind=kind, double_quant=options.double_quant is not False)
