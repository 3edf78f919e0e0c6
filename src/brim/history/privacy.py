"""A run without names: what costs memory and time stays, whose it was goes.

Every text of a record is dropped unless a cleaner is listed for it here, so that a field added tomorrow leaks nothing.
Cleaners keep what a table of brim's knows, releases, and names of matrices; anything else becomes a stand-in.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, is_dataclass, replace
from functools import cache
from hashlib import sha256
from typing import Any, Literal, Union, get_args, get_origin

from brim.cost.modeling import list_families
from brim.errors import UnknownName
from brim.history.document import read_time
from brim.history.rebuild import list_kinds
from brim.spec.model import ModelShape
from brim.spec.observation import Observation
from brim.spec.recipe import Lora
from brim.spec.workload import Workload
from brim.tables.read import (
    find_card,
    find_device,
    find_link,
    find_optimizer,
    find_task,
    find_trainer,
    list_cards,
    match_device,
)

OTHER = "other"
_SIZE = re.compile(r"\d{1,7}(\.\d{1,3})? ?[kmgt]?i?b?", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
_BUILD = r"(\+(cu|rocm|cpu|xpu)[\d.]{0,8})?"
_RELEASE = re.compile(r"\d{1,6}(\.(\d{1,8}|[a-z]{1,4}\d{1,8})){0,4}([a-z]{1,3}\d{1,4})?" + _BUILD)
_DRIVER_NAME = re.compile(
    r"(nvidia|amd|intel|tesla|quadro|geforce|radeon|apple)\b([A-Za-z0-9 .()+-]|(?<=\d)/(?=\d)){1,60}", re.IGNORECASE
)
_HASHED = re.compile(r"other-[0-9a-f]{6}")
_PACKAGES = frozenset({
    "accelerate", "bitsandbytes", "brim", "cuda", "datasets", "deepspeed", "flash-attn", "kernels", "liger-kernel",
    "lightning", "numpy", "peft", "python", "safetensors", "tokenizers", "torch", "torchao", "transformers", "triton",
    "trl", "unsloth", "unsloth_zoo", "xformers",
})  # fmt: skip
_HEADS = (
    "LMHeadModel", "Model", "ForCausalLM", "ForConditionalGeneration", "ForSequenceClassification",
    "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForImageClassification",
)  # fmt: skip
# Error texts name files and modules, so only their kind is kept; each kind's words are found in themselves.
_PROBLEMS = (
    (("out of memory", "outofmemory", "allocate "), "out of memory"),
    (("retries", "retry", "retried"), "allocator retries"),
    (("spill", "host memory"), "spill to host memory"),
    (("slow",), "slower than its neighbour"),
)


def strip_names(observation: Observation) -> Observation:
    """Return the run without names of people, machines, paths, data, or models that are not public.

    A model is named only if it is a built-in card; any other becomes its family and size, such as `llama-16x2048`.
    Stripping twice changes nothing.

    Raises:
        ValueError: `finished` is no time.
    """
    lora, shape = observation.workload.recipe.lora, observation.workload.model
    if lora is not None:
        known = {"all-linear", *(linear.name for group in shape.groups for linear in _list_linears(group))}
        targets = tuple(name for name in lora.target_modules if name in known) or (OTHER,)
        recipe = replace(observation.workload.recipe, lora=replace(lora, target_modules=targets))
        observation = replace(observation, workload=replace(observation.workload, recipe=recipe))
    return _strip(observation)


def name_family(model_type: str) -> str:
    """Return the family of models as history knows it: one that brim's tables know; others are told apart by a hash."""
    if model_type in _families() or _HASHED.fullmatch(model_type):
        return model_type
    return f"{OTHER}-{sha256(model_type.encode('utf-8', 'replace')).hexdigest()[:6]}"


def name_card(name: str) -> str:
    """Return a card's name in the table, a size, `cpu` for a capped one, or the words its driver uses."""
    if name.lower().startswith("cpu"):
        return "cpu"
    try:
        return find_device(name).name
    except UnknownName:
        return name if _SIZE.fullmatch(name) else _clean_driver_name(name)


def find_card_name(observation: Observation) -> str:
    """Return the card that a run was measured on, as plans name it."""
    capability = observation.workload.cluster.device.compute_capability
    row = match_device(observation.device, capability, observation.capacity_bytes)
    return name_card(observation.device) if row is None else row.name


def _list_linears(record: Any) -> Iterable[Any]:
    """Yield every matrix of a layer, wherever in it."""
    for value in (getattr(record, field.name) for field, _ in list_kinds(type(record))):
        for one in value if isinstance(value, tuple) else (value,):
            if is_dataclass(one):
                yield from (one,) if hasattr(one, "in_features") else _list_linears(one)


def _strip(record: Any) -> Any:
    """Return a record with each of its texts cleaned, those of inner records too."""
    kind = type(record)
    found = {}
    for field, hint in list_kinds(kind):
        value = getattr(record, field.name)
        if _has_text(hint):
            clean = _CLEANERS.get((kind, field.name))
            found[field.name] = clean(value, record) if clean is not None else _blank(field, hint)
        elif isinstance(value, tuple):
            found[field.name] = tuple(_strip(one) if is_dataclass(one) else one for one in value)
        else:
            found[field.name] = _strip(value) if is_dataclass(value) else value
    return kind(**found)


def _has_text(hint: Any) -> bool:
    """Whether free text may stand in a field: not in one whose words are listed."""
    if hint is str:
        return True
    if get_origin(hint) in (tuple, Union, types.UnionType) and get_origin(hint) is not Literal:
        return any(_has_text(part) for part in get_args(hint))
    return False


def _blank(field: Any, hint: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return "" if hint is str else None if types.NoneType in get_args(hint) else ()


@cache
def _families() -> frozenset[str]:
    return list_families() | {str(card.config.get("model_type")) for card in list_cards()}


@cache
def _architectures() -> frozenset[str]:
    """Return the names that transformers puts before a head in the classes of built-in cards: `Llama`, `Bart` ..."""
    names = (name for card in list_cards() for name in card.config.get("architectures", ()))
    return frozenset(name.removesuffix(_find_head(name)) for name in names)


def _find_head(name: str) -> str:
    return next((head for head in _HEADS if name.endswith(head)), "")


def _clean_model(name: str, shape: ModelShape) -> str:
    card = find_card(name)
    if card is not None:
        return card.id
    return f"{name_family(shape.model_type)}-{shape.num_hidden_layers}x{shape.hidden_size}"


def _clean_architecture(name: str, shape: ModelShape) -> str:
    head = _find_head(name)
    return name if head and name.removesuffix(head) in _architectures() else head or OTHER


def _clean_driver_name(name: str, _: Any = None) -> str:
    if name.lower().startswith("cpu"):
        return "cpu"
    return name if _DRIVER_NAME.fullmatch(name) else OTHER


def _clean_release(release: str | None, _: Any = None) -> str | None:
    return release if release is not None and _RELEASE.fullmatch(release) else None


def _clean_versions(versions: tuple[tuple[str, str], ...], _: Any) -> tuple[tuple[str, str], ...]:
    kept = {name: _clean_release(release) or _clean_release(release.partition("+")[0]) for name, release in versions}
    return tuple((name, release) for name, release in sorted(kept.items()) if name in _PACKAGES and release)


def _clean_problem(text: str, _: Any) -> str:
    folded = text.lower()
    return text and next((said for words, said in _PROBLEMS if any(word in folded for word in words)), "did not fit")


def _clean_time(text: str, _: Any) -> str:
    return read_time(text).strftime("%Y-%m-%dT%H:%M:%SZ")


def _clean_name(name: str, _: Any) -> str:
    return name if _NAME.fullmatch(name.replace("-", "_")) else OTHER


def _clean_names(names: tuple[str, ...], _: Any) -> tuple[str, ...]:
    return tuple(_clean_name(name, _) for name in names)


def _from_table(find: Callable[[str], Any]) -> Callable[[str, Any], str]:
    def clean(name: str, _: Any) -> str:
        try:
            return find(name).name
        except UnknownName:
            return OTHER

    return clean


def _list_cleaners() -> dict[tuple[type, str], Callable[[Any, Any], Any]]:
    from brim.spec import device, model, recipe

    return {
        (Observation, "finished"): _clean_time, (Observation, "device"): _clean_driver_name,
        (Observation, "driver"): _clean_release, (Observation, "versions"): _clean_versions,
        (Observation, "problem"): _clean_problem, (Workload, "task"): _from_table(find_task),
        (ModelShape, "name"): _clean_model, (ModelShape, "architecture"): _clean_architecture,
        (ModelShape, "model_type"): lambda name, _: name_family(name), (model.Linear, "name"): _clean_name,
        (model.Embedding, "name"): _clean_name, (model.Mlp, "hidden_act"): _clean_name,
        (model.Moe, "hidden_act"): _clean_name, (model.Moe, "separate_names"): _clean_names,
        (device.Device, "name"): lambda name, _: name_card(name),
        (device.Device, "vendor"): _clean_name,
        (device.Device, "link"): lambda name, _: name and _from_table(find_link)(name, _),
        (recipe.Recipe, "optimizer"): _from_table(find_optimizer), (recipe.Engine, "name"): _from_table(find_trainer),
        (Lora, "target_modules"): _clean_names,
    }  # fmt: skip


_CLEANERS = _list_cleaners()
