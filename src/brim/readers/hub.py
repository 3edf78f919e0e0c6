"""The Hugging Face hub and its cache on this machine: where is a repository's config.json?"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import NoReturn

from brim.errors import BrimError, InvalidFile, UnknownName, Unreachable, quoted
from brim.readers.json_file import refuse_large

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"{_PART}(?:/{_PART})?")
_REVISION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TRUE = {"1", "on", "yes", "true"}
_ANSWER_SECONDS = 5.0
"""How long the hub may take to answer a question about a file."""
_GIVE_UP_SECONDS = 10.0
"""When to stop waiting altogether: a resolver without network can block far beyond any socket timeout."""
_OFFLINE_CHOICES = "works offline: a built-in card (`brim models`), a folder, or a config.json"


def is_hub_name(name: str) -> bool:
    """Return whether a text can be the name of a hub repository, with or without its owner.

    Such a name holds no `..`, no `--`, at most one `/` and no other separator, so it is safe in a path.
    """
    return bool(_NAME.fullmatch(name)) and ".." not in name and "--" not in name and not name.endswith((".git", "."))


def is_offline() -> bool:
    """Return whether the user switched the hub off (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    switch = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return switch.lower() in _TRUE


def find_cached_config(name: str) -> str | None:
    """Return the path of a repository's config.json in the local cache, None if it is not there.

    Reads the cache's layout itself: importing huggingface_hub takes longer than all of brim's planning.

    Source: huggingface_hub 2.4 constants.py (folders), file_download.py (models--owner--name/refs, snapshots).
    """
    if not is_hub_name(name):
        return None
    folder = os.path.join(_cache_folder(), "models--" + name.replace("/", "--"))
    try:
        with open(os.path.join(folder, "refs", "main"), encoding="ascii") as file:
            revision = file.read(65).strip()
    except (OSError, ValueError):
        return None
    if not _REVISION.fullmatch(revision):
        return None
    path = os.path.join(folder, "snapshots", revision, "config.json")
    return path if os.path.isfile(path) else None


def download_config(name: str, known: Iterable[str]) -> str:
    """Return the path of a repository's config.json after asking the hub for its newest version.

    Honours HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, HF_TOKEN, HF_ENDPOINT and the cache folders.

    Args:
        name: hub id.
        known: names to suggest when there is no such repository.

    Raises:
        UnknownName: the hub is switched off, or has no such repository.
        Unreachable: no answer in ten seconds, or the repository is gated.
        InvalidConfig: the config is over 5 MB. InvalidFile: the repository has none.
    """
    if is_offline():
        hint = f"not in the local cache, and the hub is switched off (HF_HUB_OFFLINE); {_OFFLINE_CHOICES}"
        raise UnknownName(kind="model", name=name, known=known, hint=hint)
    try:
        return _within(_GIVE_UP_SECONDS, lambda: _download(name))
    except BrimError:
        raise
    except Exception as error:  # each hub version has its own network library, and that its own errors
        _explain(error, name, known)


def _cache_folder() -> str:
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(caches, "huggingface")
    return os.path.expandvars(os.path.expanduser(given or os.path.join(home, "hub")))


def _download(name: str) -> str:
    import huggingface_hub as hub

    # Its size first, so that a huge file is refused rather than fetched; this call never retries.
    metadata = hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"), timeout=_ANSWER_SECONDS)
    refuse_large(metadata.size or 0, name)
    return hub.hf_hub_download(name, "config.json", etag_timeout=_ANSWER_SECONDS)


def _within(seconds: float, call: Callable[[], str]) -> str:
    """Return what a call returns, or raise what it raises, but wait no longer than that."""
    answers: list[str] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(call())
        except Exception as error:  # handed to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="brim-hub", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer in {seconds:.0f} seconds")
    return answers[0]


def _explain(error: Exception, name: str, known: Iterable[str]) -> NoReturn:
    # By name, not by class: the classes' homes moved between hub versions, and the gated error is also "not found".
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in kinds or (status == 403 and "EntryNotFoundError" not in kinds):
        text = (
            f"the hub does not give out {quoted(name)}: accept the licence on its page, then set HF_TOKEN "
            f"or run `hf auth login`; {_OFFLINE_CHOICES}"
        )
        raise Unreachable(text, name=name, status=status) from None
    if "RepositoryNotFoundError" in kinds:
        hint = "the hub has no such public model; if it is private, set HF_TOKEN"
        raise UnknownName(kind="model", name=name, known=known, hint=hint) from None
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        raise InvalidFile(path=name, problem="this hub repository has no config.json") from None
    raise _unreachable(error, name, known) from None


def _unreachable(error: Exception, name: str, known: Iterable[str]) -> Unreachable:
    first_line = (str(error).strip().splitlines() or [""])[0]
    reason = quoted(first_line)[1:-1] or type(error).__name__
    close = get_close_matches(name[:200], list(known), n=3, cutoff=0.7)
    advice = f"; built-in cards like it: {', '.join(close)}" if close else ""
    text = f"hub not reachable: {reason}; {_OFFLINE_CHOICES}{advice}"
    return Unreachable(text, name=name, close_matches=close)
