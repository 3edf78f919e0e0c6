"""The optimizer of a recipe over a model's trained parameters, and which of its states the allocator never sees."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from brim.errors import MissingExtra, ProbeFailed
from brim.probes.block_optimizers import BlockOptimizer
from brim.probes.composed_optimizers import MasterWeights, SideBySide
from brim.probes.dtypes import torch_dtype
from brim.spec.recipe import Recipe
from brim.spec.strategy import OptimizerKernel, Strategy
from brim.tables.read import find_optimizer

Groups = list[dict[str, Any]]

_OWN_LOOPS = ("accelerate", "plain")
_LEARNING_RATE = 1e-5
_MOMENTUM = 0.9
_BLOCK_OPTIMIZERS = {
    "adamw-8bit": (2, 8, False), "paged-adamw-8bit": (2, 8, True), "paged-adamw-32bit": (2, 32, True),
    "lion": (1, 32, False), "lion-8bit": (1, 8, False),
}  # fmt: skip
"""bitsandbytes' states per parameter, bits of each, and whether they are paged."""
_UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Source: transformers trainer.py get_decay_parameter_names."""


def make_optimizer(model: torch.nn.Module, recipe: Recipe, strategy: Strategy) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe over the trained parameters, in the kernel asked for, without states yet.

    Raises:
        ProbeFailed: nothing trains, or the optimizer takes no gradients of the recipe's dtype.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ProbeFailed("no parameter of the model trains; check the adapter's target modules")
    row, kernel = find_optimizer(recipe.optimizer), strategy.optimizer_kernel
    name, kernel = row.name, kernel if kernel in row.kernels else row.kernels[0]  # type: ignore[assignment]
    if recipe.gradient_dtype is not None:
        _set_gradient_dtype(trained, recipe, name, kernel)
    groups = _mark_roles(model, name, group_parameters(model, recipe))
    if recipe.master_weights:
        return MasterWeights(groups, lambda copied: _make(copied, name, kernel))
    return _make(groups, name, kernel)


def is_from_bitsandbytes(name: str) -> bool:
    """Return whether an optimizer, by its name in the table, is one of bitsandbytes', which is imitated here."""
    return name in _BLOCK_OPTIMIZERS


def group_parameters(model: torch.nn.Module, recipe: Recipe) -> Groups:
    """Return the trained parameters in the groups that the recipe's engine makes of them.

    foreach kernels run group by group and free what they hold in between.

    Source: transformers trainer.py create_optimizer: decayed parameters, then norms and biases.
    """
    named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    if recipe.engine.name.startswith(_OWN_LOOPS):
        return [{"params": [one for _, one in named]}]
    try:
        from transformers.trainer_pt_utils import get_parameter_names
    except ImportError:
        raise MissingExtra(package="transformers", extra="trace", purpose="--by trace") from None
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], _UNDECAYED))
    groups = [[one for name, one in named if (name in decayed) is decays] for decays in (True, False)]
    return [{"params": group, "weight_decay": 0.0} for group in groups if group]


def _set_gradient_dtype(trained: list[torch.nn.Parameter], recipe: Recipe, name: str, kernel: OptimizerKernel) -> None:
    """Autograd casts what arrives at a parameter to this dtype. Source: torch.Tensor.grad_dtype."""
    dtype = torch_dtype(recipe.gradient_dtype or recipe.weight_dtype)
    takes_others = name == "adafactor" or (name.startswith("sgd") and kernel != "fused") or recipe.master_weights
    if not takes_others and any(parameter.dtype != dtype for parameter in trained):
        text = f"gradients in {recipe.gradient_dtype}: {name} takes them in the weights' dtype; set master_weights"
        raise ProbeFailed(text, optimizer=name)
    if not hasattr(trained[0], "grad_dtype"):
        text = f"gradients in {recipe.gradient_dtype}: torch {torch.__version__} has no Tensor.grad_dtype; install 2.10"
        raise ProbeFailed(text)
    for parameter in trained:
        parameter.grad_dtype = dtype


def _mark_roles(model: torch.nn.Module, name: str, groups: Groups) -> Groups:
    """Return groups split where an optimizer treats parameters by what they are for."""
    tables = {id(one.weight) for one in model.modules() if isinstance(one, torch.nn.Embedding)}
    if name == "muon":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        tables |= {id(one) for one in head.parameters()} if head is not None else set()
        hidden = {id(one) for group in groups for one in group["params"] if one.ndim == 2} - tables
        return _split(groups, hidden, {"is_hidden": True}, {"is_hidden": False})
    # Source: transformers trainer.py create_optimizer, for 8-bit optimizers of bitsandbytes only.
    if name in _BLOCK_OPTIMIZERS and "weight_decay" in groups[0]:
        return _split(groups, tables, {"optim_bits": 32}, {})
    return groups


def _split(groups: Groups, chosen: set[int], those: dict[str, Any], others: dict[str, Any]) -> Groups:
    found: Groups = []
    for group in groups:
        for inside, settings in ((True, those), (False, others)):
            parameters = [one for one in group["params"] if (id(one) in chosen) is inside]
            found += [{**group, **settings, "params": parameters}] if parameters else []
    return found


def _make(groups: Groups, name: str, kernel: OptimizerKernel) -> torch.optim.Optimizer:
    how: dict[str, Any] = {"lr": _LEARNING_RATE, "foreach": kernel == "foreach", "fused": kernel == "fused"}
    if name in _BLOCK_OPTIMIZERS:
        num_states, bits, paged = _BLOCK_OPTIMIZERS[name]
        return BlockOptimizer(groups, num_states=num_states, bits=bits, paged=paged)
    if name == "adamw":
        return torch.optim.AdamW(groups, **how)
    if name in ("sgd", "sgd-momentum"):
        return torch.optim.SGD(groups, momentum=_MOMENTUM if name == "sgd-momentum" else 0.0, **how)
    if name == "adafactor":
        return _make_adafactor(groups)
    if name == "muon":
        return _make_muon(groups, how)
    raise ProbeFailed(f"optimizer {name}: not traced yet; use --by formula", what=name)


def _make_adafactor(groups: Groups) -> torch.optim.Optimizer:
    """Source: transformers trainer_optimizer.py _get_adafactor."""
    try:
        from transformers.optimization import Adafactor
    except ImportError:
        raise MissingExtra(package="transformers", extra="trace", purpose="--by trace with Adafactor") from None
    optimizer = Adafactor(groups, lr=_LEARNING_RATE, scale_parameter=False, relative_step=False)
    optimizer.state = _FactoredStates()  # type: ignore[assignment]
    return optimizer


class _FactoredStates(dict[torch.Tensor, dict[str, Any]]):
    """Adafactor's first states, made from the parameter: its own, made from nothing, would belong to no layer."""

    def __missing__(self, parameter: torch.Tensor) -> dict[str, Any]:
        shape = parameter.shape
        factors = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        shapes = factors if len(shape) >= 2 else {"exp_avg_sq": shape}
        made = {name: parameter.new_zeros(size, dtype=torch.float32) for name, size in shapes.items()}
        self[parameter] = {"step": 0, "RMS": 0, **made}
        return self[parameter]


def _make_muon(groups: Groups, how: dict[str, Any]) -> torch.optim.Optimizer:
    """Muon for the matrices of hidden layers, AdamW for everything else.

    Source: torch/optim/_muon.py: two-dimensional parameters of hidden layers only; embeddings and biases by AdamW.
    """
    hidden = [group for group in groups if group["is_hidden"]]
    others = [group for group in groups if not group["is_hidden"]]
    parts: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden, lr=_LEARNING_RATE)] if hidden else []
    parts += [torch.optim.AdamW(others, **how)] if others else []
    return SideBySide(parts)


def start_states(optimizer: torch.optim.Optimizer, *, resumes: bool) -> None:
    """Make what exists before the first step: master weights, and all states if the run goes on from a checkpoint."""
    if resumes:
        load_states(optimizer)
    elif isinstance(optimizer, MasterWeights):
        optimizer.start()


def load_states(optimizer: torch.optim.Optimizer) -> None:
    """Make all states as reading a checkpoint makes them.

    Nothing else is on the card meanwhile: the checkpoint is read on the host and each state goes to the card by
    itself, in the dtype of its parameter; only the groups are copied beforehand, which hold no state. Loaded with
    `torch.load`'s own default, the checkpoint's tensors are on the card and become the states without a copy.

    Source: transformers trainer.py _load_optimizer_and_scheduler (map_location cpu on one device);
    accelerate/accelerator.py load_state (likewise); torch/optim/optimizer.py load_state_dict,
    _process_value_according_to_param_policy.
    """
    for part in _list_parts(optimizer):
        if isinstance(part, BlockOptimizer):
            part.load()
            continue
        described = _describe_states(part)
        for parameter, state in described.items():
            part.state[parameter] = {key: _load(parameter, key, one) for key, one in state.items()}


def _list_parts(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that hold states."""
    if isinstance(optimizer, MasterWeights):
        return _list_parts(optimizer.start())
    return list(optimizer.parts) if isinstance(optimizer, SideBySide) else [optimizer]


def _describe_states(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    """Return states as the optimizer's own step makes them, on the meta device, by parameter."""
    with _disable_current_modes():
        twin = copy.copy(optimizer)
        twins = {one: _describe(one) for group in optimizer.param_groups for one in group["params"]}
        twin.state = defaultdict(dict)
        twin.param_groups = [
            {**group, "foreach": False, "fused": False, "params": [twins[one] for one in group["params"]]}
            for group in optimizer.param_groups
        ]
        twin.step()
    return {one: twin.state[other] for one, other in twins.items()}


def _describe(parameter: torch.Tensor) -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"))
    if getattr(parameter, "grad_dtype", parameter.dtype) != parameter.dtype:
        made.grad_dtype = parameter.grad_dtype
    made.grad = torch.empty(made.shape, dtype=getattr(made, "grad_dtype", made.dtype), device="meta")
    return made


def _load(parameter: torch.Tensor, key: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    dtype = value.dtype if key == "step" else parameter.dtype
    return torch.zeros(value.shape, dtype=dtype, device=parameter.device)


def host_states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the states that a card's allocator never sees: counts of steps on the host, and paged states.

    Source: torch/optim/adamw.py _init_group: `step` is a tensor of the host unless the kernel is fused or capturable;
    bitsandbytes functional.py get_paged: cudaMallocManaged.
    """
    found = list(paged_states(optimizer))
    for part in _list_parts(optimizer):
        for group in part.param_groups:
            if not group.get("fused") and not group.get("capturable"):
                counts = (part.state[one].get("step") for one in group["params"] if one in part.state)
                found += [one for one in counts if isinstance(one, torch.Tensor)]
    return found


def paged_states(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield the states in managed memory: on the device while they fit, but outside the allocator."""
    for part in _list_parts(optimizer):
        for state in part.state.values():
            yield from (one for one in state.values() if getattr(one, "is_paged", False))
