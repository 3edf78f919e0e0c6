"""Attention by plain products: PyTorch's own result, gradients and bytes, and never in autocast's dtype."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from meter import measure_peak
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from brim.probes.kernels import card_kernels, list_workspaces
from brim.probes.plain_attention import attend_plainly
from brim.probes.tracker import StorageTracker
from brim.tables.read import find_device

HEADS, LENGTH, WIDTH = 8, 256, 32
CASES = {
    "one key head, masked": (1, True, False, torch.bfloat16),
    "one key head, masked, fp32": (1, True, False, torch.float32),
    "grouped, causal": (2, False, True, torch.float16),
    "grouped, causal, fp32": (2, False, True, torch.float32),
}
Attend = Callable[..., torch.Tensor]


def inputs(name: str) -> tuple[torch.Tensor, ...]:
    key_heads, masked, _, dtype = CASES[name]
    tensors = [
        torch.randn(2, heads, LENGTH, WIDTH, dtype=dtype, requires_grad=True) for heads in (HEADS, key_heads, key_heads)
    ]
    return (*tensors, torch.randn(2, 1, LENGTH, LENGTH, dtype=dtype)) if masked else tuple(tensors)


def torchs_own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, *rest: object):  # type: ignore[no-untyped-def]
    dropout, causal, scale, grouped = rest
    operator = torch.ops.aten._scaled_dot_product_attention_math.default
    return operator(query, key, value, mask, dropout, causal, None, scale=scale, enable_gqa=grouped)[0]


def run(attend: Attend, name: str, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    _, masked, causal, _ = CASES[name]
    tensors = [one * 1 for one in given[:3]]  # no leaves, whose gradients autograd may copy
    out = attend(*tensors, given[3] if masked else None, 0.0, causal, 0.25, not masked)
    torch.autograd.backward(out, torch.ones_like(out))
    return out


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_torchs(name: str) -> None:
    found = []
    for attend in (attend_plainly, torchs_own):
        torch.manual_seed(0)
        given = inputs(name)
        found.append([run(attend, name, given), *(one.grad for one in given[:3])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors_take_what_real_ones_do(name: str) -> None:
    """PyTorch's function on real tensors, beside this one on fake ones; equal but for scalars."""
    given = inputs(name)
    real = measure_peak(lambda: run(torchs_own, name, given))
    tracker = StorageTracker(list_workspaces, kind=FakeTensor, block_bytes=1)
    with FakeTensorMode():
        given = inputs(name)
        with tracker:
            run(attend_plainly, name, given)
    gc.collect()
    live = highest = 0
    for event in tracker.events:
        live += event.num_bytes
        highest = max(highest, live)
    assert highest == pytest.approx(real, rel=0.002)


def test_autocast_stays_outside() -> None:
    """CUDA's autocast casts what the function is given, and is off inside: scores stay fp32."""
    tracker = StorageTracker(kind=FakeTensor)
    with card_kernels(find_device("a100-80gb"), "sdpa"), FakeTensorMode(), tracker:
        query, key, _, mask = inputs("one key head, masked, fp32")
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.nn.functional.scaled_dot_product_attention(query, key, key, mask)
        assert out.dtype == torch.bfloat16
    products = [one for one in tracker.storages.values() if "bmm" in one.op]
    assert {one.dtype for one in products} == {"float32"}
