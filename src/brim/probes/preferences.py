"""Training on pairs of answers: TRL's own DPO loss, and the model its answers are compared with."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from brim.errors import MissingExtra, ProbeFailed
from brim.probes.checkpointing import checkpointing_options
from brim.probes.model import BuildModel, find_layers, give_tensors, prepare_model
from brim.spec.recipe import Recipe
from brim.spec.strategy import Strategy

if TYPE_CHECKING:
    from brim.probes.inputs import MakeInputs
    from brim.probes.tracker import StorageTracker

_OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
_BETA = 0.1


def prepare_reference(
    build_model: BuildModel, recipe: Recipe, strategy: Strategy, *, shorten: Callable[[torch.nn.Module], Any] | None
) -> torch.nn.Module | None:
    """Return the second, frozen model that answers are compared with, on the meta device; None where there is none.

    TRL is imported here, outside of any fake mode.

    Source: trl trainer/dpo_trainer.py DPOTrainer.__init__: the same weights once more, in the same dtype and storage,
    in evaluation mode; none with adapters, which are switched off instead, nor where its answers were precomputed.
    """
    if recipe.preference is None:
        return None
    _import_trl()
    if recipe.preference.reference != "model":
        return None
    bare = replace(recipe, method="full", lora=None, num_virtual_tokens=None)
    untouched = replace(strategy, activation_checkpointing="none", activation_offload=False)
    return prepare_model(build_model, bare, untouched, shorten=shorten).requires_grad_(False).eval()


def follow_reference(reference: torch.nn.Module | None, tracker: StorageTracker) -> None:
    """Give the reference model its tensors, and let the tracker take them for parameters."""
    if reference is None:
        return
    give_tensors(reference)
    tracker.follow(reference.named_parameters(), "parameter")
    tracker.follow(reference.named_buffers(), "buffer")
    for index, layer in enumerate(find_layers(reference) or ()):
        tracker.tag((*layer.parameters(), *layer.buffers()), index)


def pair_inputs(make_inputs: MakeInputs, recipe: Recipe) -> MakeInputs:
    """Return a maker of micro-batches of pairs: chosen answers above rejected ones, every token of them scored.

    Source: trl trainer/dpo_trainer.py DataCollatorForPreference.
    """
    if recipe.preference is None:
        return make_inputs
    precomputed = recipe.preference.reference == "precomputed"

    def make() -> Mapping[str, Any]:
        inputs = make_inputs()
        return inputs if "completion_mask" in inputs else _pair(inputs, precomputed)

    return make


def _pair(inputs: Mapping[str, Any], precomputed: bool) -> dict[str, Any]:
    others = sorted(set(inputs) - {"input_ids", "labels", "attention_mask"})
    if others:
        raise ProbeFailed(f"pairs of answers with {others[0]}: not traced; pass make_inputs that returns pairs")
    batch, length = inputs["input_ids"].shape
    names = ("attention_mask", "completion_mask")
    pairs = {"input_ids": torch.ones(2 * batch, length, dtype=torch.long)}
    pairs |= {name: torch.ones(2 * batch, length, dtype=torch.long) for name in names}
    if precomputed:
        pairs |= {name: torch.zeros(batch) for name in ("ref_chosen_logps", "ref_rejected_logps")}
    return pairs


def plan_preferences(
    model: Any, reference: Any, recipe: Recipe, strategy: Strategy, wrap: Callable[[Any], Any]
) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    """Return TRL's loss of a micro-batch of pairs, on these models.

    Args:
        model: the model that trains, its adapter included.
        reference: the second model, None where there is none.
        recipe: whose `preference` says where reference log-probabilities come from.
        strategy: whose checkpointing is switched off for the reference.
        wrap: returns a model's forward as the loop calls it, under autocast.

    """
    trl = _import_trl()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trl.utils.add_fused_lm_head(base, outputs=_OUTPUTS)
    trl.utils.disable_dropout_in_model(model)
    if reference is not None:
        trl.utils.add_fused_lm_head(reference)
        trl.utils.disable_dropout_in_model(reference)
    trainer = _stand_in(model, reference, recipe, strategy)
    _call_wrapped(model, wrap)
    if reference is not None:
        _call_wrapped(reference, wrap)
    return lambda inputs: trl.trainer._compute_loss(trainer, model, dict(inputs), False)


def _import_trl() -> Any:
    try:
        from trl.kernels import chunked_logprob
        from trl.trainer import utils
        from trl.trainer.dpo_trainer import DPOTrainer
    except ImportError:
        raise MissingExtra(package="trl", extra="train", purpose="--by trace with DPO") from None
    return SimpleNamespace(kernels=chunked_logprob, utils=utils, trainer=DPOTrainer)


def _call_wrapped(model: Any, wrap: Callable[[Any], Any]) -> None:
    """Source: accelerate accelerator.py prepare_model replaces the forward of both models."""
    model.forward = wrap(model.forward)


def _stand_in(model: Any, reference: Any, recipe: Recipe, strategy: Strategy) -> Any:
    """Return what DPOTrainer's loss asks of the trainer. Source: trl trainer/dpo_trainer.py __init__, _compute_loss."""
    assert recipe.preference is not None
    options = checkpointing_options(strategy, recipe.engine)
    text_config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    coefficient = getattr(text_config, "router_aux_loss_coef", 0.0)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), unwrap_model=lambda one: one, gather=lambda one: one,
        gather_for_metrics=lambda one: one,
    )  # fmt: skip
    return SimpleNamespace(
        model=model, ref_model=reference, accelerator=accelerator,
        args=SimpleNamespace(gradient_checkpointing_kwargs=options),
        precompute_ref_logps=recipe.preference.reference == "precomputed", ld_alpha=None,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=_BETA, label_smoothing=0.0,
        use_weighting=False, router_aux_loss_coef=coefficient,
        aux_loss_enabled=hasattr(text_config, "output_router_logits") and coefficient != 0.0,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip


@contextlib.contextmanager
def card_head(recipe: Recipe) -> Iterator[None]:
    """Let TRL's head run as it does on a card: Triton kernels write into the tiles, only scored positions are read.

    Source: trl kernels/chunked_logprob.py _forward_kernel, _backward_kernel, _addmm_fp32; trl trainer/utils.py
    add_fused_lm_head, `compact`.
    """
    if recipe.preference is None:
        yield
        return
    trl = _import_trl()
    replaced: list[tuple[Any, str, Any]] = [(trl.utils, "_use_triton", lambda _: True)]
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        replaced.append((trl.kernels, name, lambda *_, **__: None))
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, function in replaced:
            setattr(module, name, function)
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)
