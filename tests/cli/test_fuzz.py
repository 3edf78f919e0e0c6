"""No input to any verb shows a traceback, and the exit code is one the design knows."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from brim.cli.app import VERBS, main
from brim.cli.options import FLAGS

CODES = {0, 2, 3, 6}
SLOW = settings(
    max_examples=120, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
odd_text = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=st.characters(codec="utf-8"), max_size=20),
    st.sampled_from([
        "", " ", "-", "--", "-1", "0", "1", "1e9", "nan", "inf", "9" * 30, "9" * 5000, "0x10", "½", "٣", "\x00",
        "\x1b[31m", "a/b", "../..", "/", "~", "None", "true", "7B", "8B", "999B", "24GiB", "0GiB", "t4", "t4:0",
        "t4:999999", "auto:", ":", "h100:2", "full", "qlora", "int8", "adamw", "chat", "x" * 300, "[red]", "%s", "{}",
        "\ud800",
    ]),
)  # fmt: skip
plain_values = st.sampled_from([
    "1", "2", "3", "7", "32", "100", "2048", "full", "lora", "qlora", "t4", "h100:8", "trl", "24GiB", "none", "sdpa",
    "chat", "adamw", "rule", "formula", "bf16", "q_proj",
])  # fmt: skip
flag_names = st.sampled_from([
    name for flag in FLAGS for name in (flag.name.replace("_", "-"), flag.name, *flag.aliases)
] + ["json", "no-packing", "model"])  # fmt: skip
flags = st.lists(st.tuples(flag_names, st.one_of(plain_values, odd_text)), max_size=5)


def run(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def check(words: list[str]) -> None:
    code, out, err = run(words)
    assert code in CODES, (words, code, err)
    assert "Traceback" not in out + err
    if code and "--json" not in words:
        assert err.startswith("error: ") and err.count("\n") == 1, (words, err)
    elif code:
        assert json.loads(out)["error"]["message"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@SLOW
@given(verb=st.sampled_from(["plan", "estimate"]), model=st.sampled_from(["8B", "gpt2", "mistral-7b"]), said=flags)
@example(verb="plan", model="8B", said=[("seq-len", "99999999999"), ("gpu", "t4")])
@example(verb="plan", model="8B", said=[("effective-batch-size", "16777216"), ("gpu", "h100:8")])
@example(verb="plan", model="gpt2", said=[("lora-targets", ",,,"), ("method", "lora"), ("gpu", "t4")])
def test_flags_of_a_job(verb: str, model: str, said: list[tuple[str, str]]) -> None:
    words = [verb, model, "--gpu", "rtx-4090"]
    check([*words, *(word for name, value in said for word in (f"--{name}", value))])


@SLOW
@given(st.lists(st.one_of(st.sampled_from([*VERBS, "--json", "-h", "--gpu", "--by"]), odd_text), max_size=5))
def test_any_words(words: list[str]) -> None:
    check(words)


@SLOW
@given(verb=st.sampled_from(VERBS), words=st.lists(odd_text, max_size=3))
def test_any_arguments_of_any_verb(verb: str, words: list[str]) -> None:
    check([verb, *words])


json_values: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=10), inner, max_size=3)),
    max_leaves=6,
)
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
numbers = st.one_of(st.integers(), st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, 10**400]), st.floats())


@SLOW
@given(
    changes=st.dictionaries(st.sampled_from(sorted(LLAMA)), st.one_of(numbers, json_values), max_size=3),
    dropped=st.sets(st.sampled_from(sorted(LLAMA)), max_size=2),
)
def test_any_config(tmp_path: Path, changes: dict[str, Any], dropped: set[str]) -> None:
    config = {key: value for key, value in {**LLAMA, **changes}.items() if key not in dropped}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    check(["plan", str(path), "--gpu", "t4"])


@SLOW
@given(raw=st.one_of(st.binary(max_size=200), json_values.map(lambda value: json.dumps(value).encode())))
@example(raw=b"[" * 100_000)
@example(raw=b'{"a":' * 50_000)
@example(raw=b"\xff\xfe{}")
@example(raw=b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}")
def test_any_file(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    for words in (["plan", str(path), "--gpu", "t4"], ["show", str(path)], ["export", str(path), "trl"]):
        check(words)


@SLOW
@given(data=st.data())
def test_any_change_of_a_saved_plan(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "plan.json"
    if not path.exists():
        assert run(["plan", "gpt2", "--gpu", "t4", "--out", str(path)])[0] == 0
    plan = json.loads(path.read_text())
    place: Any = plan
    while isinstance(place, (dict, list)) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.integers(0, 4)) == 0:
            place[key] = data.draw(st.one_of(numbers, json_values))
            break
        place = place[key]
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(plan), encoding="utf-8")
    check(["show", str(changed)])
    check(["export", str(changed), "trl", "--export-dir", str(tmp_path / "run")])
