"""Where a model is looked for, in which order, and what happens when the file is broken or the hub is away."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brim.errors import BrimError, InvalidConfig, InvalidFile, UnknownName, Unreachable
from brim.readers import hub, sources
from brim.readers.json_file import LARGEST_BYTES
from brim.readers.sources import read_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
}  # fmt: skip
ID = "some-owner/some-model"
CARD = "meta-llama/Llama-3.1-8B"
REVISION = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """The two calls brim makes, and how often each was made."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None
        self.size = 1000
        self.file = ""

    def get_hf_file_metadata(self, url: str, timeout: float) -> SimpleNamespace:
        assert timeout <= 5
        self.calls.append(url)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(size=self.size)

    def hf_hub_download(self, name: str, filename: str, etag_timeout: float) -> str:
        assert filename == "config.json"
        return self.file


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    """A hub that answers with a small Llama, and an empty cache."""
    fake = FakeHub()
    fake.file = str(tmp_path / "downloaded.json")
    Path(fake.file).write_text(json.dumps(LLAMA), encoding="utf-8")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fake.get_hf_file_metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


def write_config(folder: Path, text: str | bytes | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    data = json.dumps(LLAMA) if text is None else text
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def cache_model(cache: Path, name: str, revision: str = REVISION) -> None:
    folder = cache / ("models--" + name.replace("/", "--"))
    write_config(folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)


def http_error(kind: type[Exception], status: int) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} for that url")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


# --- order -----------------------------------------------------------------------------------------------------------


def test_a_folder_and_its_config_give_the_same_shape(tmp_path: Path, online: FakeHub) -> None:
    path = write_config(tmp_path / "model")
    folder, sentence = read_model(str(tmp_path / "model"))
    file, _ = read_model(str(path))
    assert folder.groups == file.groups and folder.num_hidden_layers == 3
    assert sentence.startswith("model read from ") and not online.calls


def test_a_card_needs_no_hub(online: FakeHub) -> None:
    shape, sentence = read_model(CARD.upper())
    assert shape.name == CARD and "built-in card" in sentence
    assert not online.calls


def test_a_bare_size_names_its_card(online: FakeHub) -> None:
    shape, sentence = read_model("7B")
    assert sentence == f"7B stands for {shape.name}, a built-in card"


def test_a_stray_file_does_not_hide_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").write_text("notes")
    (tmp_path / "7B").mkdir()
    assert "built-in card" in read_model("gpt2")[1]
    assert "built-in card" in read_model("7B")[1]


def test_the_cache_comes_before_the_hub(online: FakeHub, tmp_path: Path) -> None:
    cache_model(tmp_path / "hub", ID)
    shape, sentence = read_model(ID)
    assert shape.name == ID and "local Hugging Face cache" in sentence
    assert not online.calls


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_where_huggingface_hub_puts_it(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    below = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub", "HOME": ".cache/huggingface/hub"}.get(variable, ".")
    monkeypatch.setenv(variable, str(tmp_path))
    cache_model(tmp_path / below, ID)
    assert hub.find_cached_config(ID) is not None


def test_refresh_asks_the_hub_first(online: FakeHub, tmp_path: Path) -> None:
    cache_model(tmp_path / "hub", ID)
    assert "hub" in read_model(ID, refresh=True)[1]
    shape, sentence = read_model("7B", refresh=True)
    assert shape.name in sentence and sentence.endswith("from the Hugging Face hub")
    assert len(online.calls) == 2


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_the_hub_is_asked_last(online: FakeHub) -> None:
    shape, sentence = read_model(ID)
    assert shape.name == ID and sentence == f"{ID}, read from the Hugging Face hub"
    assert ID in online.calls[0]


@pytest.mark.parametrize("error", [OSError("Network is unreachable"), TimeoutError(), RuntimeError("odd\nlong story")])
def test_no_network_is_one_line_and_exit_code_6(online: FakeHub, error: Exception) -> None:
    online.error = error
    with pytest.raises(Unreachable, match="works offline: a built-in card") as caught:
        read_model("meta-llama/Llama-3.1-8")
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)
    assert CARD in str(caught.value)
    assert len(online.calls) == 1


def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = threading.Event()
    with pytest.raises(TimeoutError, match="no answer"):
        hub._within(0.01, lambda: str(silence.wait(5)))
    silence.set()


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_what_to_do(online: FakeHub, status: int) -> None:
    online.error = http_error(hub_errors.GatedRepoError, status)
    with pytest.raises(Unreachable, match=r"accept the licence .* HF_TOKEN"):
        read_model(ID)


def test_a_model_the_hub_does_not_know(online: FakeHub) -> None:
    online.error = http_error(hub_errors.RepositoryNotFoundError, 404)
    with pytest.raises(UnknownName, match="no such public model") as caught:
        read_model("meta-llama/Llama-3.1-8BB")
    assert CARD in caught.value.close_matches


def test_a_repository_without_a_config(online: FakeHub) -> None:
    online.error = http_error(hub_errors.RemoteEntryNotFoundError, 404)
    with pytest.raises(InvalidFile, match=r"no config\.json"):
        read_model(ID)


def test_a_huge_config_is_not_fetched(online: FakeHub) -> None:
    online.size = 10**8
    with pytest.raises(InvalidConfig, match="at most"):
        read_model(ID)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_never_asks(online: FakeHub, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UnknownName, match="switched off"):
        read_model(ID)
    assert not online.calls


@pytest.mark.parametrize(
    "name", ["lama-3-8b", "", " ", "a/b/c", "../../etc", "a--b/c", "owner/..", "x" * 300, "a\0b", "~\0"]
)
def test_what_is_no_hub_name_is_never_asked(online: FakeHub, name: str) -> None:
    with pytest.raises(BrimError) as caught:
        read_model(name)
    assert caught.value.exit_code == 2 and not online.calls


# --- the cache is not trusted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/../b", "/etc", "a/b/c", "..", "a--b", "a/b--c", ".hidden/x", "a\n/b"])
def test_names_cannot_leave_the_cache(name: str) -> None:
    assert hub.find_cached_config(name) is None


@pytest.mark.parametrize("revision", ["../../../elsewhere", "", "a/b", "x" * 100, "\xff"])
def test_references_cannot_leave_the_cache(online: FakeHub, tmp_path: Path, revision: str) -> None:
    cache_model(tmp_path / "hub", ID)
    write_config(tmp_path / "hub" / "elsewhere")
    (tmp_path / "hub" / "models--some-owner--some-model" / "refs" / "main").write_text(revision, encoding="utf-8")
    assert hub.find_cached_config(ID) is None


# --- broken files ----------------------------------------------------------------------------------------------------

BROKEN = {
    "empty": b"",
    "binary": bytes(range(256)),
    "utf-16": json.dumps(LLAMA).encode("utf-16"),
    "cut": json.dumps(LLAMA)[:-10].encode(),
    "a list": b"[]",
    "a number": b"7",
    "NaN": b'{"hidden_size": NaN}',
    "Infinity": b'{"hidden_size": -Infinity}',
    "beyond a float": b'{"hidden_size": 1e999}',
    "beyond an integer": b'{"hidden_size": ' + b"9" * 10_000 + b"}",
    "deep list": b"[" * 200_000,
    "deep object": b'{"a":' * 200_000,
    "too large": b" " * (LARGEST_BYTES + 1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_one_line(tmp_path: Path, what: str) -> None:
    path = write_config(tmp_path, BROKEN[what])
    with pytest.raises(InvalidConfig) as caught:
        read_model(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_sparse_100_mb_file_is_refused_before_reading(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    os.truncate(path, 100_000_000)
    with pytest.raises(InvalidConfig, match=r"95\.4 MiB"):
        read_model(str(path))


def test_of_a_repeated_key_the_last_counts(tmp_path: Path) -> None:
    text = json.dumps(LLAMA)[:-1] + ', "num_hidden_layers": 5}'
    assert read_model(str(write_config(tmp_path, text)))[0].num_hidden_layers == 5


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"without a config\.json"):
        read_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "no-such.json", "~/no/such"])
def test_a_path_to_nothing(name: str) -> None:
    with pytest.raises(InvalidFile, match="no such file"):
        read_model(name)


def test_a_broken_link(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(InvalidFile, match="cannot be read"):
            read_model(str(path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_forbidden_file(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    path.chmod(0)
    with pytest.raises(InvalidFile, match="Permission denied"):
        read_model(str(path))


def test_a_permission_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = write_config(tmp_path)
    monkeypatch.setattr("brim.readers.regular_file.os.open", refuse)
    with pytest.raises(InvalidFile, match="Permission denied"):
        read_model(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InvalidFile, match="no regular file"):
        read_model(str(tmp_path))


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no device files here")
def test_a_device_is_refused() -> None:
    with pytest.raises(InvalidFile, match="no regular file"):
        read_model("/dev/zero")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BrimError):
        read_model(str(write_config(tmp_path, data)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=60))
def test_no_name_raises_anything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try:
        shape, sentence = sources.read_model(name)
    except BrimError as error:
        assert error.exit_code in (2, 6)
    else:
        assert shape.groups and sentence
