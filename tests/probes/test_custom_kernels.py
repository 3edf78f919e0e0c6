"""Stand-ins for kernel packages: shapes of transformers' own code, bytes of the packages' source, put back after."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.models.bamba import modeling_bamba
from transformers.models.mamba import modeling_mamba
from transformers.models.qwen3_next import modeling_qwen3_next

from brim.probes.custom_kernels import kernel_packages
from brim.probes.tracker import StorageTracker

BATCH, LENGTH = 2, 64


class Blocks(torch.nn.Module):
    """Holds a module of a modelling file, which is how the file is found."""

    def __init__(self, *blocks: torch.nn.Module) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)


def make_mamba() -> torch.nn.Module:
    config = transformers.MambaConfig(hidden_size=64, state_size=16, num_hidden_layers=1, vocab_size=32)
    return modeling_mamba.MambaMixer(config, 0)


def make_bamba() -> torch.nn.Module:
    config = transformers.BambaConfig(
        hidden_size=64, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=32,
        num_attention_heads=4, num_key_value_heads=4, vocab_size=32,
    )  # fmt: skip
    return modeling_bamba.BambaMixer(config, 0)


def make_delta() -> torch.nn.Module:
    config = transformers.Qwen3NextConfig(
        hidden_size=64, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, num_hidden_layers=1, vocab_size=32,
    )  # fmt: skip
    return modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0)


MAKERS = {"mamba": make_mamba, "bamba": make_bamba, "qwen3_next": make_delta}


@contextlib.contextmanager
def fake_block(name: str) -> Iterator[tuple[torch.nn.Module, StorageTracker, torch.Tensor]]:
    with torch.device("meta"):
        block = MAKERS[name]().train()
    with FakeTensorMode(), kernel_packages(block):
        for module in block.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = torch.nn.Parameter(torch.empty(parameter.shape))
        hidden = torch.zeros(BATCH, LENGTH, 64, requires_grad=True)
        yield block, StorageTracker(kind=FakeTensor, block_bytes=1), hidden


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_output_and_gradients_have_the_shapes_of_transformers_own_code(name: str, training: bool) -> None:
    with fake_block(name) as (block, _, hidden):
        out = block.train(training)(hidden)
        torch.autograd.backward(out.sum())
        shapes = {key: one.grad.shape for key, one in block.named_parameters() if one.grad is not None}
        found = out.shape, out.dtype, hidden.grad.shape
    real = MAKERS[name]().train(training)
    given = torch.zeros(BATCH, LENGTH, 64, requires_grad=True)
    made = real(given)
    made.sum().backward()
    assert found == (made.shape, made.dtype, given.grad.shape)
    assert shapes == {key: one.grad.shape for key, one in real.named_parameters() if one.grad is not None}


def _count_kept(name: str) -> int:
    """Bytes alive between forward and backward: made inside, the output aside."""
    with fake_block(name) as (block, tracker, hidden):
        with tracker:
            out = block(hidden)
        assert out.requires_grad
        live = {event.key for event in tracker.events if event.num_bytes > 0}
        live -= {event.key for event in tracker.events if event.num_bytes < 0}
        live -= set(tracker.keys_of((*block.parameters(), hidden, out)))
        return sum(tracker.storages[key].num_bytes for key in live)


def test_mamba_keeps_what_its_source_says() -> None:
    """xz, the small projections, B and C, 2 states per 2048 tokens, and the scan's output; no state per token."""
    inner, state, rank, element = 128, 16, 4, 4
    rows = BATCH * LENGTH
    xz, x_dbl, scanned = rows * 2 * inner, rows * (rank + 2 * state), rows * inner
    states = BATCH * inner * 1 * 2 * state
    tensors = xz + x_dbl + 2 * rows * state + scanned + states
    weights = 2 * inner * state  # A = -exp(A_log), and exp's own result
    assert _count_kept("mamba") == pytest.approx(element * (tensors + weights), rel=0.01)


def test_mamba2_keeps_its_input_and_the_scans_output() -> None:
    heads, width, state, element = 8, 16, 16, 4
    rows = BATCH * LENGTH
    whole = rows * (2 * heads * width + 2 * state + heads)
    out, deviations = rows * heads * width, rows
    assert _count_kept("bamba") == pytest.approx(element * (whole + out + deviations), rel=0.01)


def test_no_state_per_chunk_is_kept_by_the_delta_rule() -> None:
    kept = _count_kept("qwen3_next")
    states = BATCH * 1 * 4 * 16 * 16 * 4
    with fake_block("qwen3_next") as (block, tracker, hidden), tracker:
        block(hidden)
    assert any(one.num_bytes == states for one in tracker.storages.values())
    live = {event.key for event in tracker.events if event.num_bytes > 0}
    live -= {event.key for event in tracker.events if event.num_bytes < 0}
    assert kept > 0 and not any(tracker.storages[key].shape == (BATCH, 1, 4, 16, 16) for key in live)


def test_functions_are_named_and_put_back() -> None:
    before = modeling_mamba.mamba_inner_fn, modeling_bamba.causal_conv1d_fn
    with torch.device("meta"):
        blocks = Blocks(make_mamba(), make_bamba())
    with pytest.raises(RuntimeError), kernel_packages(blocks) as notes:
        assert modeling_mamba.mamba_inner_fn is not before[0]
        assert any("mamba-ssm" in note for note in notes) and any("causal-conv1d" in note for note in notes)
        raise RuntimeError
    assert before == (modeling_mamba.mamba_inner_fn, modeling_bamba.causal_conv1d_fn)
