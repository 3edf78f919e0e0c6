"""Bare sizes: how people write them, and what is nearest to one that no model has."""

from __future__ import annotations

import pytest

from brim.errors import UnknownName
from brim.readers.bare_size import find_size
from brim.readers.sources import read_model
from brim.tables.read import find_card, list_cards, list_sizes


@pytest.mark.parametrize(("name", "size"), [
    ("7B", "7B"), ("7.0B", "7B"), (" 7b ", "7B"), ("7.B", "7B"), ("0.1B", "100M"), (".5b", "0.5B"), ("500M", "0.5B"),
    ("135M", "135M"), ("0.135B", "135M"), ("1000M", "1B"), ("1000B", "1T"), ("8 B", "8B"),
    ("llama-7b", None), ("7", None), ("B", None), ("", None), ("7GB", None), ("٣B", None),
])  # fmt: skip
def test_sizes_are_numbers(name: str, size: str | None) -> None:
    assert find_size(name) == size


@pytest.mark.parametrize(("name", "nearest"), [
    ("17B", "nearest 16B and 20B"), ("5T", "nearest 1T;"), ("0.01B", "nearest 60M;"), ("0B", "nearest 60M;"),
])  # fmt: skip
def test_an_unknown_size_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownName) as refused:
        read_model(name)
    assert f"no card of {name}; {nearest}" in str(refused.value)


def test_every_size_is_about_its_card() -> None:
    factor = {"M": 1e6, "B": 1e9, "T": 1e12}
    cards = {card.id: card for card in list_cards()}
    for size in list_sizes():
        said = float(size.name[:-1]) * factor[size.name[-1]]
        assert 0.75 * said <= cards[size.card].params <= 1.31 * said, size
        assert find_size(size.name) == size.name and find_card(size.name) is cards[size.card]


@pytest.mark.parametrize("name", ["6B", "6.7B", "135M", "350M", "2B", "2.7B", "7.0B", "0.1B"])
def test_a_size_resolves_and_is_named(name: str) -> None:
    shape, sentence = read_model(name)
    assert sentence == f"{name} stands for {shape.name}, a built-in card"
