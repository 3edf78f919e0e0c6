"""Error texts: one line, both numbers, what would work; facts as attributes; the exit codes of the design."""

from __future__ import annotations

import pytest

from brim import errors
from brim.errors import (
    BrimError,
    CannotRecover,
    DoesNotFit,
    IndivisibleBatch,
    Inexpressible,
    InseparableLoss,
    InvalidConfig,
    InvalidFile,
    InvalidInput,
    InvalidSize,
    InvalidStrategy,
    MissingExtra,
    NotExact,
    ProbeFailed,
    TableError,
    UnknownName,
    Unreachable,
    Unrecoverable,
    UnsupportedModel,
)

LONG = "x" * 5_000 + "\n\x1b[31m"
# error, exit code, words its text must have
EXAMPLES = [
    (TableError("tables/gpus.toml, row 3"), 1, ["gpus.toml"]),
    (InvalidInput("no"), 2, []),
    (InvalidSize(text="24 potatoes"), 2, ["24 potatoes", "24GiB"]),
    (UnknownName(kind="GPU", name="rtx-4099", known=["rtx-4090", "t4"]), 2, ["rtx-4099", "rtx-4090"]),
    (UnknownName(kind="task", name="zzz", known=["chat"]), 2, ["zzz", "known: chat"]),
    (IndivisibleBatch(sequences=100, ranks=8, micro_batch_size=None, nearest=[96, 104]), 2, ["100", "8", "96", "104"]),
    (IndivisibleBatch(sequences=10, ranks=1, micro_batch_size=4, nearest=[8, 12]), 2, ["10", "4", "8", "12"]),
    (InvalidStrategy("a"), 2, []),
    (Inexpressible(target="trl", setting="zero_stage 2", advice="use deepspeed"), 2, ["trl", "zero_stage 2", "use"]),
    (UnsupportedModel(model="m", what="its layers"), 2, ["use --by trace"]),
    (InvalidConfig(source="config.json", path="hidden_size", problem="is -1"), 2, ["hidden_size", "-1"]),
    (InvalidFile(path="plan.json", problem="is a folder"), 2, ["plan.json", "folder"]),
    (MissingExtra(package="torch", extra="trace", purpose="--by trace"), 2, ["pip install 'brim[trace]'"]),
    (DoesNotFit("needs 30 GiB of 24 GiB", gap_bytes=6, at_moment="loss", relaxations=[1]), 3, ["30", "24"]),
    (
        CannotRecover(step=7, where="backward", micro_batch_size=1, reason="no checkpointing", saved="out/step-7",
                      relaxations=["--seq-len 1024"]),
        3, ["7 steps", "backward", "micro-batch 1", "no checkpointing", "out/step-7", "--seq-len 1024"],
    ),
    (Unrecoverable(reason="FSDP1: use FSDP2"), 2, ["FSDP1", "use FSDP2"]),
    (NotExact("differs"), 4, []),
    (InseparableLoss(reason="batch-norm", advice="freeze it"), 4, ["batch-norm", "freeze it"]),
    (ProbeFailed("died"), 5, []),
    (Unreachable("hub"), 6, []),
]


@pytest.mark.parametrize(("error", "code", "words"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_text_names_what_was_asked_and_what_would_work(error: BrimError, code: int, words: list[str]) -> None:
    assert error.exit_code == code
    assert all(word in str(error) for word in words)


def test_every_error_has_an_example() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BrimError)}
    assert kinds - {BrimError} == {type(error) for error, _, _ in EXAMPLES}


@pytest.mark.parametrize("error", [
    InvalidSize(text=LONG), UnknownName(kind="GPU", name=LONG, known=["t4"]), InvalidFile(path=LONG, problem="no"),
    UnsupportedModel(model=LONG, what="x"), InvalidConfig(source=LONG, path="x", problem="y"),
])  # fmt: skip
def test_the_users_words_are_shortened_and_harmless(error: BrimError) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 300


def test_facts_are_kept_for_json() -> None:
    error = IndivisibleBatch(sequences=100, ranks=8, micro_batch_size=None, nearest=[96, 104])
    assert error.facts == {"sequences": 100, "ranks": 8, "micro_batch_size": None, "nearest": [96, 104]}
    assert error.nearest == (96, 104)
