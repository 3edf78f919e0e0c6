"""Typed, bounded access to the keys of an untrusted `config.json`.

Every getter either returns a value that can be meant or raises `InvalidConfig` naming the key. Values
are never turned into text before their type and size are known: a hostile config may hold lists nested
so deeply that `str` fails, or numbers too long to print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from brim.errors import InvalidConfig, UnsupportedModel, quoted

LARGEST_DIM = 2**31
LARGEST_NUM_LAYERS = 10_000
LARGEST_NUM_EXPERTS = 100_000
LARGEST_NUM_LABELS = 1_000_000
_LONGEST_TEXT = 200
_DTYPES: dict[str, Literal["fp32", "bf16", "fp16"]] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_KINDS: tuple[tuple[type, str], ...] = ((Mapping, "an object"), (list, "a list"), (tuple, "a list"))


def describe(value: object) -> str:
    """Return a short text for any value found in a config; never fails and never walks into it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value) if abs(value) <= 2**63 else "a number beyond 2**63"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return quoted(value[:_LONGEST_TEXT])
    return next((kind for type_, kind in _KINDS if isinstance(value, type_)), "no JSON value")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFields:
    """The keys of one config object, under canonical names, with the defaults of its `model_type`."""

    source: str
    """Name of the model, for messages."""
    model_type: str
    """Architecture the keys belong to."""
    values: Mapping[str, Any]
    """Values as given."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """transformers' own value of each key that may be absent; a key in neither is required."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spelling of a key -> canonical name (transformers' `attribute_map`)."""
    prefix: str = ""
    """Path of this object inside the config, for messages."""

    def refuse(self, key: str, problem: str) -> NoReturn:
        """Raise `InvalidConfig` for a key, spelled as the config spells it."""
        spelled = next((name for name in self._spellings(key) if name in self.values), key)
        raise InvalidConfig(source=self.source, path=self.prefix + spelled, problem=problem)

    def _spellings(self, key: str) -> tuple[str, ...]:
        """Return the canonical name of a key, then its aliases."""
        return key, *(alias for alias, canonical in self.aliases.items() if canonical == key)

    def unsupported(self, what: str) -> NoReturn:
        """Raise `UnsupportedModel` for a feature."""
        raise UnsupportedModel(model=self.source, what=what)

    def get(self, key: str) -> Any:
        """Return the raw value of a canonical key: as given, or transformers' default.

        Raises:
            InvalidConfig: two spellings of the key disagree, or a required key is absent.
        """
        given = [name for name in self._spellings(key) if name in self.values]
        if not given:
            if key not in self.defaults:
                self.refuse(key, "is missing")
            return self.defaults[key]
        first = self.values[given[0]]
        for other in given[1:]:
            if not _same(first, self.values[other]):
                self.refuse(given[0], f"and {other} disagree")
        return first

    def has(self, key: str) -> bool:
        """Return whether the config gives a value other than null."""
        return any(self.values.get(name) is not None for name in self._spellings(key))

    def number(self, key: str, *, at_least: int = 1, at_most: int = LARGEST_DIM) -> int:
        """Return a whole number within bounds.

        Raises:
            InvalidConfig: absent and required, not a whole number, or out of bounds.
        """
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            self.refuse(key, f"must be a whole number, not {describe(value)}")
        if not at_least <= value <= at_most:
            self.refuse(key, f"must be between {at_least} and {at_most}, not {describe(value)}")
        return value

    def optional_number(self, key: str, *, at_least: int = 1, at_most: int = LARGEST_DIM) -> int | None:
        """Return a whole number within bounds, or None if the key is null."""
        return None if self.get(key) is None else self.number(key, at_least=at_least, at_most=at_most)

    def fraction(self, key: str, default: float) -> float:
        """Return a number from 0 to 1; null means 0."""
        value = self.values.get(key, default)
        if value is None:
            return 0.0
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            self.refuse(key, f"must be a number from 0 to 1, not {describe(value)}")
        return float(value)

    def flag(self, key: str | bool) -> bool:
        """Return a yes or no: the constant itself, or the value of the key (null means no)."""
        if isinstance(key, bool):
            return key
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, f"must be true or false, not {describe(value)}")
        return bool(value)

    def text(self, key: str) -> str:
        """Return a text of at most 200 characters."""
        value = self.get(key)
        if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_TEXT:
            self.refuse(key, f"must be a short text, not {describe(value)}")
        return value

    def pair(self, key: str) -> tuple[int, int]:
        """Return two whole numbers: a list of two, or one number twice (image and patch sizes)."""
        value = self.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str):
            number = self.number(key)
            return number, number
        if len(value) != 2:
            self.refuse(key, f"must be a number or two, not a list of {len(value)}")
        first, second = (self.entry(key, item) for item in value)
        return first, second

    def entry(self, key: str, item: object, *, at_least: int = 1) -> int:
        """Return one whole number of a list."""
        if not isinstance(item, int) or isinstance(item, bool) or not at_least <= item <= LARGEST_DIM:
            self.refuse(key, f"must hold whole numbers from {at_least} to {LARGEST_DIM}, not {describe(item)}")
        return item

    def listing(self, key: str, *, length: int | None = None) -> Sequence[Any] | None:
        """Return a list of the expected length (at most 10,000 if None is expected), or None if null or absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            self.refuse(key, f"must be a list, not {describe(value)}")
        if length is not None and len(value) != length:
            self.refuse(key, f"has {len(value)} entries for {length} layers")
        if len(value) > LARGEST_NUM_LAYERS:
            self.refuse(key, f"has {len(value)} entries; at most {LARGEST_NUM_LAYERS} can be meant")
        return value

    def native_dtype(self, *parts: ConfigFields) -> Literal["fp32", "bf16", "fp16"]:
        """Return the dtype of the checkpoint: `dtype`, else `torch_dtype`, here or in a part; fp32 if none says."""
        for fields in (self, *parts):
            for key in ("dtype", "torch_dtype"):
                if fields.values.get(key) is not None:
                    dtype = fields.text(key).removeprefix("torch.")
                    if dtype not in _DTYPES:
                        fields.unsupported(f"dtype {dtype[:40]}")
                    return _DTYPES[dtype]
        return "fp32"

    def num_layers(self, key: str = "num_hidden_layers", *, at_least: int = 1) -> int:
        """Return a number of layers."""
        return self.number(key, at_least=at_least, at_most=LARGEST_NUM_LAYERS)

    def num_labels(self) -> int:
        """Return the classes of a classification head: `num_labels`, else entries of `id2label`, else the default."""
        labels = self.values.get("id2label")
        if labels is None or self.has("num_labels"):
            return self.number("num_labels", at_most=LARGEST_NUM_LABELS)
        if not isinstance(labels, Mapping):
            self.refuse("id2label", f"must be an object, not {describe(labels)}")
        if not 0 < len(labels) <= LARGEST_NUM_LABELS:
            self.refuse("id2label", f"has {len(labels)} entries")
        return len(labels)

    def child(self, key: str, *, model_type: str, defaults: Mapping[str, Any]) -> ConfigFields:
        """Return the fields of a nested config object; absent or null means all defaults."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(key, f"must be an object, not {describe(value)}")
        if value and value.get("model_type") not in (None, model_type):
            self.unsupported(f"{key} of model_type {describe(value['model_type'])}")
        return ConfigFields(
            source=self.source,
            model_type=model_type,
            values=value or {},
            defaults=defaults,
            prefix=f"{self.prefix}{key}.",
        )


def _same(first: object, second: object) -> bool:
    """Return whether two scalars agree; anything deeper counts as different, so that nothing is walked."""
    return type(first) is type(second) and isinstance(first, (int, float, str, type(None))) and first == second
