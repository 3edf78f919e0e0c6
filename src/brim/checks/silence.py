"""Keep what other packages say while they are run out of a report."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.util import find_spec


@contextmanager
def silenced() -> Iterator[None]:
    """Show no message of other packages, no warning, no progress bar and no standard output while entered; errors are
    raised as ever."""
    import transformers

    with ExitStack() as after:
        after.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        transformers.logging.set_verbosity_error()
        after.callback(logging.disable, logging.root.manager.disable)
        logging.disable(max(logging.root.manager.disable, logging.WARNING))
        _hide_bars(after)
        nowhere = after.enter_context(open(os.devnull, "w", encoding="utf-8"))
        after.enter_context(redirect_stdout(nowhere))
        after.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def _hide_bars(after: ExitStack) -> None:
    """Switch the progress bars of datasets off, where it is installed, until the end."""
    if find_spec("datasets") is None:
        return
    import datasets

    if not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
        after.callback(datasets.enable_progress_bars)
