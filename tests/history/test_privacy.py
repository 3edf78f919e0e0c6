"""Nothing that lands in the store says whose run it was."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from observed import observe, read_workload

from brim.cost.estimate import peak_bytes
from brim.history.document import check, identify, write_line
from brim.history.privacy import _CLEANERS, _has_text, find_card_name, name_family, strip_names
from brim.history.rebuild import list_kinds
from brim.history.runs import Wanted, add_observation, forget, import_observations, list_observations
from brim.spec.observation import Observation
from brim.tables.read import list_cards

SECRETS = ("alice", "acme", "zanzibar", "/home", "payroll", "10.0.0.7")


def plant() -> Observation:
    """Return a run with a name in every place that takes a text."""
    run = observe()
    workload = run.workload
    recipe = workload.recipe
    assert recipe.lora is not None
    device = replace(
        workload.cluster.device, name="alice's zanzibar GPU", source="/home/alice/gpus", link="zanzibar-link"
    )
    group = workload.model.groups[0]
    odd = replace(group.attention.linears[0], name="/home/alice/q_proj")
    attention = replace(group.attention, linears=(odd, *group.attention.linears[1:]))
    model = replace(
        workload.model, name="/home/alice/acme-7b", model_type="acme_llama", architecture="ZanzibarForCausalLM",
        groups=(replace(group, attention=attention),),
    )  # fmt: skip
    return replace(
        run, device="host zanzibar", driver="550 by alice", problem="/home/alice/payroll.py: CUDA out of memory",
        versions=(("torch", "2.6.0+alice.10.0.0.7"), ("acme_train", "1.0"), ("trl", "zanzibar")),
        workload=replace(
            workload, model=model, task="payroll", data=replace(workload.data, name="acme/payroll"),
            batch=replace(workload.batch, reason="asked for by alice"),
            cluster=replace(workload.cluster, device=device),
            recipe=replace(
                recipe, optimizer="zanzibar", engine=replace(recipe.engine, name="acme-trainer"),
                lora=replace(recipe.lora, target_modules=("q_proj", "payroll_proj", "/home/alice/.*")),
            ),
        ),
    )  # fmt: skip


def read_raw(store: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(store.parent.iterdir())).lower()


def test_the_bytes_of_the_store_hold_no_name(store: Path) -> None:
    add_observation(observe(2))
    keep_open = sqlite3.connect(store)  # the log stays as long as somebody reads
    keep_open.execute("SELECT * FROM observations").fetchone()
    assert add_observation(plant()) is None
    raw = read_raw(store)
    assert [path.name for path in sorted(store.parent.iterdir())][:2] == ["history.sqlite", "history.sqlite-shm"]
    assert len(list_observations()) == 2 and b"q_proj" in raw
    planted = [secret for secret in SECRETS if secret.encode() in raw]
    keep_open.close()
    assert planted == []


def test_what_decides_the_formula_stays() -> None:
    for card in list_cards()[::3]:
        workload, strategy = read_workload(card.id, "h100", "full" if card.params < 10**9 else "lora")
        run = replace(observe(), workload=workload, strategy=strategy)
        stripped = strip_names(run)
        assert stripped.workload.model == workload.model, card.id
        private = replace(run, workload=replace(workload, model=replace(workload.model, name="./mine")))
        stripped = strip_names(private)
        assert "mine" not in write_line(stripped)
        assert peak_bytes(stripped.workload, strategy) == peak_bytes(workload, strategy), card.id


def test_a_model_that_is_not_public_becomes_its_family_and_size() -> None:
    run = observe()
    for name in ("/home/alice/llama", "acme/private-8b", "./x", "C:\\models\\x"):
        model = replace(run.workload.model, name=name)
        stripped = strip_names(replace(run, workload=replace(run.workload, model=model)))
        assert stripped.workload.model.name == "llama-32x4096"
        assert stripped.workload.model.model_type == "llama"
    named = replace(run.workload.model, name="meta-llama/llama-3.1-8b")
    assert strip_names(replace(run, workload=replace(run.workload, model=named))).workload.model.name == (
        "meta-llama/Llama-3.1-8B"
    )


def test_unknown_families_are_told_apart_without_being_named() -> None:
    first, second = name_family("acme_one"), name_family("acme_two")
    assert first != second and re.fullmatch("other-[0-9a-f]{6}", first) and name_family(first) == first
    assert name_family("mt5") == "mt5", "the formula counts by this name"


@pytest.mark.parametrize("make", [observe, plant])
def test_stripping_twice_changes_nothing(make: Any) -> None:
    once = check(strip_names(make()))
    assert strip_names(once) == once and check(once) == once
    assert identify(once) == identify(strip_names(check(once)))


def list_texts(kind: Any, seen: set[Any]) -> Iterator[tuple[type, str]]:
    """Yield every field that takes free text, in a record and in those within it."""
    if kind in seen:
        return
    seen.add(kind)
    if not is_dataclass(kind):
        for part in getattr(kind, "__args__", ()):
            yield from list_texts(part, seen)
        return
    for field, hint in list_kinds(kind):
        if _has_text(hint):
            yield kind, field.name
        else:
            yield from list_texts(hint, seen)


def test_every_text_is_cleaned_or_dropped() -> None:
    """A text that is not listed here is dropped: whoever adds a field decides whether it may stay."""
    dropped = {(kind.__name__, name) for kind, name in list_texts(Observation, set()) if (kind, name) not in _CLEANERS}
    assert dropped == {("DataProfile", "name"), ("BatchTarget", "reason"), ("Device", "source")}


def test_a_text_nobody_listed_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(_CLEANERS, (Observation, "driver"))
    assert strip_names(observe(driver="alice")).driver is None


@pytest.mark.parametrize(("said", "kept"), [
    ("CUDA out of memory. Tried to allocate 2.00 GiB by alice", "out of memory"), ("", ""),
    ("alice's disk", "did not fit"), ("3 allocator retries on zanzibar", "allocator retries"),
    ("spilled 2 GiB to /home/alice", "spill to host memory"),
])  # fmt: skip
def test_problems_keep_their_kind(said: str, kept: str) -> None:
    stripped = strip_names(observe(fits=not said, problem=said))
    assert stripped.problem == kept == strip_names(stripped).problem


@pytest.mark.parametrize(("release", "kept"), [
    ("2.6.0+cu124", "2.6.0+cu124"), ("2.6.0+alice", "2.6.0"), ("2.7.0.dev20250301+cu126", "2.7.0.dev20250301+cu126"),
    ("2.6.0a0+gitabcdef", "2.6.0a0"), ("1.0.0rc1", "1.0.0rc1"), ("alice", None),
])  # fmt: skip
def test_releases_keep_what_is_public(release: str, kept: str | None) -> None:
    versions = strip_names(observe(versions=(("torch", release),))).versions
    assert versions == ((("torch", kept),) if kept else ())


def test_times_are_utc_to_the_second() -> None:
    for text in ("2026-03-01T12:00:00Z", "2026-03-01T13:00:00.123+01:00", "2026-03-01T12:00:00"):
        assert strip_names(observe(finished=text)).finished == "2026-03-01T12:00:00Z"


@pytest.mark.parametrize(("device", "gib", "card"), [
    ("NVIDIA GeForce RTX 4090", 23.5, "rtx-4090"), ("NVIDIA GeForce RTX 4090", 16, "rtx-4090"), ("cpu", 2, "cpu"),
    ("NVIDIA Fantasy 9000", 777, "NVIDIA Fantasy 9000"),
])  # fmt: skip
def test_a_card_has_the_name_that_plans_give_it(device: str, gib: float, card: str) -> None:
    run = strip_names(observe(device=device, capacity_bytes=int(gib * 2**30)))
    assert find_card_name(run) == card


def test_what_is_forgotten_is_gone_from_the_bytes(store: Path) -> None:
    import_observations([observe(2, device="NVIDIA Fantasy 9000"), observe(1)])
    assert b"fantasy 9000" in read_raw(store)
    assert forget(Wanted(gpu="alice's")) == 0, "what is no card's name does not stand for all unknown cards"
    assert forget(Wanted(gpu="NVIDIA Fantasy 9000")) == 1
    assert b"fantasy 9000" not in read_raw(store)
    assert len(list_observations()) == 1 == forget(Wanted()) and list_observations() == ()


def test_runs_are_picked_by_card_model_and_day() -> None:
    import_observations([observe(micro, finished=f"2026-03-0{micro}T23:59:59Z") for micro in (1, 2, 4)])
    import_observations([observe(model="Qwen/Qwen2.5-0.5B", method="full")])
    assert len(list_observations(Wanted(model="qwen/qwen2.5-0.5b"))) == 1
    assert len(list_observations(Wanted(model="8B"))) == 3
    assert [run.finished[:10] for run in list_observations(Wanted(before="2026-03-02", gpu="RTX 4090"))] == [
        "2026-03-01", "2026-03-01",
    ]  # fmt: skip
    assert list_observations(Wanted(gpu="h100")) == ()
    assert forget(Wanted(model="8B", before="2026-03-02")) == 1 and len(list_observations()) == 3


def test_records_come_back_as_they_were() -> None:
    from brim.history.rebuild import rebuild

    for card in list_cards()[::7]:
        workload, strategy = read_workload(card.id, "h100:2", "lora")
        run = check(strip_names(replace(observe(), workload=workload, strategy=strategy)))
        document = json.loads(write_line(run))
        assert rebuild(Observation, document) == run
        assert rebuild(Observation, document | {"added_later": 1}) == run
        for broken in ({"strategy": 3}, {"kind": "guess"}, {"versions": [["a"]]}, {"num_steps": "3"}, {"fits": None}):
            with pytest.raises(ValueError):
                rebuild(Observation, document | broken)
    with pytest.raises(ValueError, match="lacks kind"):
        rebuild(Observation, {})
