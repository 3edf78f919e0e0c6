from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_toys import GIB, MIB, make_job, toy_answerer

from brim.errors import BrimError, InvalidFile, UnknownName
from brim.planner.document import describe_estimates, describe_plan, read_plan, schema
from brim.planner.plan import plan_workload
from brim.planner.record import Plan

TOP_LEVEL = [
    "workload", "strategy", "effective_batch_size", "effective_batch_tokens", "estimate", "budget_bytes",
    "capacity_bytes", "reasons", "warnings", "schedule", "rejected", "schema_version", "brim_version",
]  # fmt: skip


def make_plan(timed: bool = True, mib: int = 300, **options: Any) -> Plan:
    job = make_job(**options)
    answerer = toy_answerer(sequence_bytes=mib * MIB, timed=timed, budget_bytes=60 * GIB)
    return plan_workload(job.workload, job.fixed, answerer, assumptions=job.assumptions, brim_version="0.1.0")


PLANS = st.builds(
    make_plan,
    timed=st.booleans(),
    mib=st.integers(1, 700),
    model=st.sampled_from(["7B", "gpt2", "mistralai/Mixtral-8x7B-v0.1", "google/vit-base-patch16-224", "gemma-2-2b"]),
    gpu=st.sampled_from(["24GiB", "rtx-4090", "h100:8"]),
    method=st.sampled_from(["full", "lora", "qlora"]),
    dataset_size=st.none() | st.integers(1, 10**6),
    epochs=st.none() | st.sampled_from([1, 3, 0.5]),
    optimizer=st.sampled_from(["adamw", "paged_adamw_8bit", "sgd"]),
)


@settings(max_examples=60, deadline=None)
@given(plan=PLANS)
def test_reading_back_gives_an_equal_plan(plan: Plan) -> None:
    document = describe_plan(plan)
    text = json.dumps(document)
    assert read_plan(text, path="plan.json") == plan
    assert json.loads(text) == document


VALIDATOR = jsonschema.Draft202012Validator


@settings(max_examples=15, deadline=None)
@given(plan=PLANS)
def test_the_document_validates_against_its_schema(plan: Plan) -> None:
    VALIDATOR(schema("plan")).validate(json.loads(json.dumps(describe_plan(plan))))
    VALIDATOR(schema("estimate")).validate(json.loads(json.dumps(describe_estimates([plan.estimate] * 2))))


def test_schemas_are_schemas_and_refuse() -> None:
    for what in ("plan", "estimate"):
        VALIDATOR.check_schema(schema(what))
    document = describe_plan(make_plan()) | {"surprise": 1}
    assert not VALIDATOR(schema("plan")).is_valid(document)
    with pytest.raises(UnknownName, match="unknown schema 'plam'; did you mean plan"):
        schema("plam")


def test_the_record_others_read() -> None:
    document = describe_plan(make_plan())
    assert set(TOP_LEVEL) <= set(document)
    estimate = document["estimate"]
    assert {
        "source", "peak_allocated_bytes", "peak_reserved_bytes", "device_bytes", "peak_moment", "moments",
        "step_seconds", "tokens_per_second_per_device", "margin_bytes",
    } <= set(estimate)  # fmt: skip
    assert {"name", "ledger", "total_bytes"} == set(estimate["moments"][0])
    assert estimate["moments"][0]["total_bytes"] == sum(estimate["moments"][0]["ledger"].values())
    assert {"strategy", "over_bytes", "reason"} <= set(document["rejected"][0])
    assert {"code", "text"} == set(document["warnings"][0])
    assert describe_plan(make_plan(timed=False))["estimate"]["step_seconds"] is None


def refused(text: str) -> str:
    with pytest.raises(InvalidFile) as error:
        read_plan(text, path="plan.json")
    assert "\n" not in str(error.value)
    return str(error.value)


def changed(*path: Any, value: Any) -> str:
    document = describe_plan(make_plan())
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'plan.json': is no JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[1]", "'plan.json': is no plan: not a JSON object"),
        ("{}", "'plan.json': is no plan: it has no schema_version"),
        ('{"schema_version": 99}', "'plan.json': has schema version 99, this brim reads up to 1"),
        ('{"schema_version": NaN}', "'plan.json': is no JSON: NaN is no number"),
        ("[" * 100_000, "'plan.json': is no JSON: "),
        (changed("strategy", "micro_batch_size", value="3"),
         "'plan.json': strategy.micro_batch_size: Input should be a valid integer"),
        (changed("strategy", "micro_batch_size", value=0), "'plan.json': micro_batch_size must be at least 1, not 0"),
        (changed("strategy", "micro_batch_size", value=3), "'plan.json': micro-batch 3 x accumulation "),
        (changed("workload", "data", "seq_len", value=10**400), "'plan.json': holds a number beyond 2**80"),
        (changed("workload", "model", "name", value="a\nimport os"), "'plan.json': holds unprintable text: "),
        (changed("strategy", "surprise", value=1), "'plan.json': strategy.surprise: "),
        (changed("strategy", "mesh", "dp_replicate", value=-1), "'plan.json': mesh.dp_replicate must be at least 1"),
    ],
)  # fmt: skip
def test_a_broken_file_gives_one_line(text: str, message: str) -> None:
    assert refused(text).startswith(message)


BASE = describe_plan(make_plan())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=2) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_file_gives_a_traceback(data: st.DataObject) -> None:
    document: Any = copy.deepcopy(BASE)
    target, depth = document, data.draw(st.integers(0, 4))
    for _ in range(depth + 1):
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = data.draw(st.sampled_from(keys))
        inner = target[key]
        if not isinstance(inner, (dict, list)) or not inner:
            break
        parent, target = target, inner
    parent = target if not isinstance(inner, (dict, list)) or not inner else parent
    if data.draw(st.booleans()) and isinstance(parent, dict):
        del parent[key]
    else:
        parent[key] = data.draw(JSON)
    try:
        assert isinstance(read_plan(json.dumps(document), path="plan.json"), Plan)
    except BrimError as error:
        assert "\n" not in str(error)
