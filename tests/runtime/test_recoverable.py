"""What recovery could not put back is refused before the first step, and the text says what would work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from brim.errors import InvalidInput, Unrecoverable
from brim.runtime.recover import Recovery
from brim.runtime.recover_loop import owns_gradients
from brim.runtime.recoverable import explain_unrecoverable


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def make(model: nn.Module, optimizer: Any = None, **options: Any) -> Recovery:
    return Recovery(model, optimizer or torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_what_can_be_put_back_is_taken(alone: None) -> None:
    for model in (build(), DistributedDataParallel(build()), fully_shard(build())):
        assert explain_unrecoverable(model, torch.optim.SGD(model.parameters(), lr=0.1)) is None


@pytest.mark.parametrize("name", ["reset_iter_state", "_get_fsdp_state"])
def test_an_fsdp2_without_what_recovery_needs(alone: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = fully_shard(build())
    monkeypatch.delattr(FSDPModule, name)
    with pytest.raises(Unrecoverable, match=r"torch 2\.13 or later, use DDP, or brim\.accumulate") as caught:
        make(model)
    assert isinstance(caught.value, InvalidInput) and caught.value.exit_code == 2


def test_a_group_of_parameters_that_has_other_parts(alone: None) -> None:
    model = fully_shard(build())
    group = model._get_fsdp_state()._fsdp_param_groups[0]
    del group._reduce_scatter_comm
    with pytest.raises(Unrecoverable, match=r"no FSDPParamGroup\._reduce_scatter_comm"):
        make(model)


def test_the_outermost_sharded_module_is_needed(alone: None) -> None:
    model = build()
    fully_shard(model[0])
    with pytest.raises(Unrecoverable, match="not the outermost one of FSDP2"):
        make(model)


def test_fsdp1(alone: None) -> None:
    with pytest.raises(Unrecoverable, match="wrap with fully_shard"):
        make(FullyShardedDataParallel(build(), device_id=torch.device("cpu")))


@pytest.mark.parametrize("what", ["static_graph", "hook"])
def test_a_ddp_that_reduces_in_its_own_way(alone: None, what: str) -> None:
    model = DistributedDataParallel(build(), static_graph=what == "static_graph")
    if what == "hook":
        model.register_comm_hook(None, lambda state, bucket: bucket.buffer())
    with pytest.raises(Unrecoverable, match=what):
        make(model)


def test_a_step_inside_backward() -> None:
    model = build()
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(Unrecoverable, match="inside backward"):
        make(model)


def test_an_optimizer_that_runs_the_model() -> None:
    model = build()
    with pytest.raises(Unrecoverable, match="LBFGS runs the model itself"):
        make(model, torch.optim.LBFGS(model.parameters()))


def test_a_scaler_of_sharded_gradients(alone: None) -> None:
    with pytest.raises(Unrecoverable, match="train in bf16"):
        make(fully_shard(build()), scaler=torch.amp.GradScaler("cpu"))


def test_a_trainer_goes_on_without_and_says_so_unless_it_was_asked(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = SimpleNamespace(distributed_type="DistributedType.DEEPSPEED", scaler=None)
    trainer = SimpleNamespace(accelerator=accelerator, is_in_train=True, optimizer=None, _recover_asked=False)
    with caplog.at_level(logging.WARNING):
        assert not owns_gradients(trainer, build())
    assert "would end this run: DEEPSPEED keeps gradients to itself" in caplog.text
    trainer._recover_asked = True
    with pytest.raises(Unrecoverable, match="or train with recover=False"):
        owns_gradients(trainer, build())
