"""Tiny models: a second thread costs more than it computes, and imported modules are no garbage to look through."""

import gc
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def imports_are_no_garbage() -> Iterator[None]:
    """Recovery collects garbage after each out-of-memory: a third of a second for what transformers imports."""
    gc.freeze()
    yield
    gc.unfreeze()
