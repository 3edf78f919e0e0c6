"""The user's own trainer: `train.py:make_trainer`, read from a script that is run as a module."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from brim.errors import BrimError, InvalidFile, InvalidInput, UnknownName


def is_script(text: str) -> bool:
    """Return whether a text names a function in a Python file, such as `train.py:make_trainer`."""
    path, _, function = text.rpartition(":")
    return path.endswith(".py") and function.isidentifier()


def load_factory(text: str) -> Callable[[], Any]:
    """Return the function that a text names. The script is run, with `__name__` other than `__main__`.

    Raises:
        InvalidFile: no such file. UnknownName: no such function. InvalidInput: the script fails while it is read, or
            later the function that is returned.
    """
    path, _, name = text.rpartition(":")
    if not os.path.isfile(path):
        raise InvalidFile(path=path, problem="is no file; write train.py:make_trainer")
    specification = importlib.util.spec_from_file_location("brim_verified_script", path)
    if specification is None or specification.loader is None:
        raise InvalidFile(path=path, problem="is no Python file")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # classes of the script must be found again when they are copied
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise InvalidInput(f"{path} fails while it is read: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [word for word, value in vars(module).items() if callable(value) and _is_own(module, word, value)]
        raise UnknownName(kind=f"function in {path}", name=name, known=known)
    return _telling(factory, text)


def _is_own(module: Any, word: str, value: Any) -> bool:
    """Return whether a script defines a name and does not only import it."""
    return not word.startswith("_") and getattr(value, "__module__", None) == module.__name__


def _telling(factory: Callable[[], Any], text: str) -> Callable[[], Any]:
    """Return a function of a script, whose own errors are told as the script's."""

    def make() -> Any:
        try:
            return factory()
        except BrimError:
            raise
        except Exception as error:
            raise InvalidInput(f"{text} fails: {type(error).__name__}: {error}") from error

    return make


def is_plan(subject: object) -> bool:
    """Return whether a subject names a saved plan, not a model's config."""
    return isinstance(subject, str) and subject.endswith(".json") and not subject.endswith("config.json")
