"""What a process takes besides the model: inputs, library workspaces, the context."""

from __future__ import annotations

from dataclasses import replace

import pytest
from time_jobs import job, way

from brim.cost.overhead import context_bytes, held_logits, input_bytes, unpacking_bytes, workspace_bytes
from brim.cost.setting import read_setting
from brim.spec.device import Device
from brim.spec.recipe import Engine, Lora
from brim.tables.read import find_device, list_devices
from brim.units import GIB, KIB, MIB

BEFORE_HOPPER = 8320 * KIB


@pytest.mark.parametrize(
    ("gpu", "one"),
    [("t4", BEFORE_HOPPER), ("a100-80gb", BEFORE_HOPPER), ("rtx-4090", BEFORE_HOPPER), ("h100", 32 * MIB)],
)
def test_two_threads_have_a_workspace_each(gpu: str, one: int) -> None:
    """cuBLAS takes 8.125 MiB a handle before Hopper and 32 MiB from it on, for forward and autograd's thread."""
    assert workspace_bytes(find_device(gpu)) == 2 * one


def test_newer_cards_have_larger_contexts() -> None:
    """The context grows from Volta to Hopper; a card without capability gets a figure between."""
    contexts = [context_bytes(find_device(gpu)) for gpu in ("t4", "a100-80gb", "h100")]
    assert contexts == sorted(contexts)
    unknown = context_bytes(Device(name="24GiB", capacity_bytes=24 * GIB))
    assert contexts[0] < unknown < contexts[-1]


@pytest.mark.parametrize("device", list_devices(), ids=lambda device: device.name)
def test_every_card_leaves_room_for_work(device: Device) -> None:
    """Context and workspaces are a small part of any card in the table."""
    taken = context_bytes(device) + workspace_bytes(device)
    assert 150 * MIB < taken < 0.2 * device.capacity_bytes


def test_inputs_are_three_integers_a_token_twice() -> None:
    """Ids, labels and mask in int64, of this micro-batch and the next one."""
    assert input_bytes(read_setting(job(), way())).at(1000) == 2 * 3 * 8 * 1000


def test_a_mask_is_a_row_of_the_sequence_a_token() -> None:
    """Eager attention adds a mask in the compute dtype; SDPA has a boolean one only where sequences are padded."""
    padded = replace(job(), data=replace(job().data, packing=False))
    plain = input_bytes(read_setting(job(), way()))
    sdpa, eager = (input_bytes(read_setting(padded, way(4, attention_kernel=kernel))) for kernel in ("sdpa", "eager"))
    flash = input_bytes(read_setting(padded, way(4)))
    assert flash == plain
    assert (sdpa - plain).at(1) == 2048
    assert (eager - plain).at(1) == 2 * 2048


@pytest.mark.parametrize(
    ("alive", "loss", "replaced", "size_bytes"),
    [(True, "dense", False, 2), (True, "dense", True, 4), (True, "chunked", False, 0), (False, "dense", True, 0)],
)
def test_a_variable_holds_the_logits_it_was_given(alive: bool, loss: str, replaced: bool, size_bytes: int) -> None:
    """The loop keeps what the model returned: 16-bit logits, or the fp32 copy a wrapper made of them."""
    workload = job(engine=Engine(name="plain", logits_alive_in_backward=alive, frees_narrow_logits=replaced))
    strategy = way(loss_kernel=loss)
    assert held_logits(workload, strategy, read_setting(workload, strategy)).at(1) == size_bytes * 128_256


def test_an_unpacking_buffer_is_as_large_as_the_largest_adapted_matrix() -> None:
    """112 MiB in bf16 for 14,336 x 4,096, and a fp32 scale for each 64 of its elements."""
    lora = Lora(r=16, alpha=32, target_modules=("q_proj", "up_proj"))
    workload = job(method="qlora", lora=lora)
    setting = read_setting(workload, way(layer_kernels="unsloth"))
    assert unpacking_bytes(workload.model, setting) == 14336 * 4096 * 2 + 14336 * 4096 // 64 * 4
    assert unpacking_bytes(workload.model, read_setting(workload, way())) == 0
