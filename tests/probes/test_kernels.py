"""The card decides the attention kernel, and what a card refuses the trace refuses."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from brim.cost.attention_kernels import choose_kernel
from brim.errors import ProbeFailed
from brim.probes.kernels import card_kernels, list_workspaces, read_call
from brim.probes.tracker import StorageTracker
from brim.tables.read import find_device

A100, T4, A6000 = (8, 0), (7, 5), (8, 6)


def choose(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, capability: tuple[int, int], grouped: bool = True
) -> str:
    call = read_call(query, key, key, mask, dropout=0.0, causal=True, grouped=grouped, capability=capability)
    return choose_kernel(call)


def meta(heads: int = 8, length: int = 128, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(2, heads, length, width, dtype=dtype, device="meta")


@pytest.mark.parametrize(("query", "key", "masked", "capability", "kernel"), [
    (meta(), meta(), False, A100, "flash"),
    (meta(), meta(2), False, A100, "flash"),
    (meta(), meta(2), True, A100, "math"),
    (meta(), meta(), True, A100, "efficient"),
    (meta(), meta(), False, T4, "math"),
    (meta(dtype=torch.float16), meta(dtype=torch.float16), False, T4, "efficient"),
    (meta(dtype=torch.float32), meta(dtype=torch.float32), False, A100, "efficient"),
    (meta(dtype=torch.float32), meta(2, dtype=torch.float32), False, A100, "math"),
    (meta(width=512), meta(width=512), False, A100, "efficient"),
    (meta(length=64), meta(), False, A100, "efficient"),
])  # fmt: skip
def test_the_kernel_is_the_cards(query, key, masked, capability, kernel) -> None:  # type: ignore[no-untyped-def]
    mask = torch.empty(1, 1, 128, 128, device="meta") if masked else None
    assert choose(query, key, mask, capability) == kernel


def test_fewer_key_heads_that_the_kernel_is_not_told_of_are_multiplied_out() -> None:
    """Falcon-7B calls attention with one key head, and no word of it."""
    assert choose(meta(), meta(1), None, A100, grouped=False) == "math"


def test_wide_heads_have_no_flash_backward_on_consumer_cards() -> None:
    query = meta(width=224).requires_grad_()
    assert choose(query, query, None, A6000) == "efficient"
    assert choose(query, query, None, A100) == "flash"


@pytest.mark.parametrize(("dtype", "gpu", "words"), [
    (torch.float32, "a100-80gb", "fp32"), (torch.float16, "t4", "7.5 is below 8.0"),
])  # fmt: skip
def test_flash_is_refused_where_the_card_refuses_it(dtype: torch.dtype, gpu: str, words: str) -> None:
    with card_kernels(find_device(gpu), "flash"), FakeTensorMode():
        query = torch.zeros(1, 2, 16, 64, dtype=dtype)
        with pytest.raises(ProbeFailed, match=words):
            torch.nn.functional.scaled_dot_product_attention(query, query, query)


def test_functions_are_put_back() -> None:
    before = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.dropout
    with pytest.raises(RuntimeError), card_kernels(find_device("a100-80gb"), "sdpa"):
        raise RuntimeError
    assert before == (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.dropout)


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_no_scores_are_kept(attention: str) -> None:
    tracker = StorageTracker(kind=FakeTensor)
    with card_kernels(find_device("a100-80gb"), attention), FakeTensorMode(), tracker:  # type: ignore[arg-type]
        query = torch.zeros(1, 2, 1024, 64, dtype=torch.bfloat16, requires_grad=True)
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        torch.autograd.backward(out.sum())
    assert max(storage.num_bytes for storage in tracker.storages.values()) <= 4 * query.numel()


def test_a_boolean_mask_becomes_an_additive_one_for_each_call() -> None:
    tracker = StorageTracker(kind=FakeTensor)
    with card_kernels(find_device("a100-80gb"), "sdpa"), FakeTensorMode():
        query = torch.zeros(1, 2, 128, 64, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.zeros(1, 1, 128, 128, dtype=torch.bool)
        with tracker:
            out = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    masks = [storage for storage in tracker.storages.values() if storage.shape == (1, 1, 128, 128)]
    assert [storage.dtype for storage in masks][:1] == ["bfloat16"]
    assert out.shape == query.shape


def test_dropout_keeps_a_boolean_mask() -> None:
    tracker = StorageTracker(kind=FakeTensor)
    with card_kernels(find_device("a100-80gb"), "sdpa"), FakeTensorMode(), tracker:
        x = torch.zeros(1024, requires_grad=True)
        y = torch.nn.functional.dropout(x, 0.1)
    assert y.shape == x.shape
    assert any(storage.dtype == "bool" and storage.num_bytes == 1024 for storage in tracker.storages.values())


def test_flash_holds_its_buffers_side_by_side() -> None:
    """One block for all would ask the pool for a size that the card's kernel never asks for."""
    query, key = meta(8, 256, 128), meta(2, 256, 128)
    operator = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    rows, expanded = 2 * 8 * 256, 2 * 256 * 8 * 128 * 2
    assert list_workspaces(operator, (query, query, key, key), None) == [rows * 4, rows * 128 * 4, expanded, expanded]
    assert list_workspaces(operator, (query, query, query, query), None) == [rows * 4, rows * 128 * 4]
