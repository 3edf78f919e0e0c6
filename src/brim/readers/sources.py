"""From what the user calls a model to its shape: a folder or file, a built-in card, the cache, the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from brim.errors import InvalidFile, UnknownName, quoted
from brim.readers.bare_size import find_size
from brim.readers.hf_config import read_config
from brim.readers.hub import download_config, find_cached_config, is_hub_name
from brim.readers.json_file import read_json_object
from brim.readers.untabled import read_any_config
from brim.spec.model import ModelShape
from brim.tables.read import Card, find_card, list_cards


def read_model(name: str, *, refresh: bool = False) -> tuple[ModelShape, str]:
    """Return the shape of a model, and one sentence that says where it was read.

    A folder or file comes first, then a built-in card, the local cache, the hub; so the same name gives
    the same shape on every machine, and a card needs no network. No weights are read, no code is run.

    Args:
        name: a folder with a config.json, a config.json, a hub id, or a bare size such as `7B`.
        refresh: ask the hub before cards and cache.

    Raises:
        UnknownName: no such model. Unreachable: the hub did not answer, or the model is gated.
        InvalidFile, InvalidConfig: the file is broken. UnsupportedModel: the formula does not know it.
    """
    shape, sentence, _ = read_checkpoint(name, refresh=refresh)
    return shape, sentence


def read_checkpoint(
    name: str, *, refresh: bool = False, known_only: bool = True
) -> tuple[ModelShape, str, Mapping[str, Any]]:
    """Return what `read_model` does, and the config; that of a built-in model says nothing about storage.

    Args:
        name, refresh: as for `read_model`.
        known_only: refuse architectures that the formula does not know; else their shape has no layers.

    Raises:
        as `read_model`.
    """
    size = find_size(name) if not os.path.lexists(name) else None
    card = find_card(size or name)
    read = read_config if known_only else read_any_config
    path = _local_path(name, card)
    if path is not None:
        config = read_json_object(path)
        return read(config, name=name), f"model read from {quoted(path)[1:-1]}", config
    if refresh:
        return _from_hub(card.id if card else name, card, read)
    if card is not None:
        return read_config(card.config, name=card.id), _card_sentence(name, card), card.config
    cached = find_cached_config(name)
    if cached is not None:
        config = read_json_object(cached)
        return read(config, name=name), f"{name}, read from the local Hugging Face cache", config
    return _from_hub(name, None, read)


def _local_path(name: str, card: Card | None) -> str | None:
    """Return the config file a path means; None if the text means no path, or a card of the same name."""
    path = os.path.expanduser(name) if name.startswith("~/") else name
    if not os.path.lexists(path):
        _refuse_missing_file(name)
        return None
    config = os.path.join(path, "config.json")
    if os.path.isdir(path) and (os.path.lexists(config) or card is None):
        if not os.path.lexists(config) and os.access(path, os.X_OK):
            raise InvalidFile(path=name, problem="is a folder without a config.json")
        return config
    # A stray file called `7b` must not hide the card of that name.
    return path if card is None or path.endswith(".json") else None


def _refuse_missing_file(name: str) -> None:
    if name.endswith(".json") or name.startswith(("/", "./", "../", "~/")):
        raise InvalidFile(path=name, problem="there is no such file or folder")


def _card_sentence(name: str, card: Card) -> str:
    if name.strip().lower() == card.id.lower():
        return f"{card.id}, a built-in card"
    return f"{quoted(name.strip())[1:-1]} stands for {card.id}, a built-in card"


def _from_hub(
    name: str, card: Card | None, read: Callable[..., ModelShape]
) -> tuple[ModelShape, str, Mapping[str, Any]]:
    # Repositories without an owner are old and all have one by now; a bare word is far more often a typing error.
    if not is_hub_name(name) or "/" not in name:
        hint = "give a hub id (owner/name), a folder, or a config.json; `brim models` lists the built-in cards"
        raise UnknownName(kind="model", name=name, known=_known_names(), hint=hint)
    config = read_json_object(download_config(name, _known_names()))
    if card is not None:  # planned as trained: the hub may hold it in a format for inference
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    return read(config, name=name), f"{name}, read from the Hugging Face hub", config


def _known_names() -> list[str]:
    return [text for card in list_cards() for text in (card.id, *card.aliases)]
