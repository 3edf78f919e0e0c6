"""The time law: its order relations, what it refuses, and its speed."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from time_jobs import job, way

from brim.cost.collectives import gather_seconds
from brim.cost.rates import attention_fraction, matmul_peak, read_rates
from brim.cost.steptime import seconds, step_time
from brim.errors import UnsupportedModel
from brim.spec.device import Cluster, Device
from brim.spec.recipe import Lora
from brim.spec.strategy import Mesh
from brim.spec.workload import Workload
from brim.tables.read import find_device, list_devices

MODELS = ("gpt2", "meta-llama/Llama-3.1-8B", "google/gemma-2-2b", "mistralai/Mixtral-8x7B-v0.1", "google-t5/t5-small")
GPUS = ("t4", "rtx-4090", "a100-80gb", "h100", "mi300x")
METHODS = ("full", "lora", "qlora")
jobs = st.builds(
    job, model=st.sampled_from(MODELS), gpu=st.sampled_from(GPUS), method=st.sampled_from(METHODS),
    seq_len=st.sampled_from([64, 512, 2048]), autocast=st.booleans(),
)  # fmt: skip
ways = st.builds(
    way, micro_batch_size=st.integers(1, 64), gradient_accumulation_steps=st.integers(1, 16),
    activation_checkpointing=st.sampled_from(["none", "selective", "full"]),
    attention_kernel=st.sampled_from(["eager", "sdpa", "flash"]),
    loss_kernel=st.sampled_from(["dense", "chunked", "fused"]),
    layer_kernels=st.sampled_from(["none", "liger", "unsloth"]),
)  # fmt: skip


def speed(workload: Workload, **knobs: object) -> float:
    timed = step_time(workload, way(**knobs))
    assert timed is not None
    return timed.tokens_per_second_per_device


@given(jobs, ways)
def test_the_parts_make_the_step(workload: Workload, strategy) -> None:
    timed = step_time(workload, strategy)
    assert timed is not None
    whole = timed.fixed_seconds + strategy.gradient_accumulation_steps * timed.micro_batch_seconds
    assert timed.step_seconds == pytest.approx(whole)
    assert timed.step_seconds == seconds(workload, strategy)
    assert timed.fixed_seconds >= 0 and timed.micro_batch_seconds > 0


@given(jobs, ways)
def test_more_checkpointing_is_never_faster(workload: Workload, strategy) -> None:
    none, selective, full = (
        seconds(workload, replace(strategy, activation_checkpointing=kind)) for kind in ("none", "selective", "full")
    )
    assert none <= selective <= full


@given(jobs, ways, st.integers(2, 8))
def test_a_larger_micro_batch_never_lowers_tokens_per_second(workload: Workload, strategy, factor: int) -> None:
    larger = replace(strategy, micro_batch_size=strategy.micro_batch_size * factor)
    assert step_time(workload, larger).tokens_per_second_per_device >= (
        step_time(workload, strategy).tokens_per_second_per_device * (1 - 1e-9)
    )


@given(jobs, ways)
def test_accumulation_instead_of_micro_batch_is_never_faster(workload: Workload, strategy) -> None:
    sequences = strategy.micro_batch_size * strategy.gradient_accumulation_steps
    split = replace(strategy, micro_batch_size=1, gradient_accumulation_steps=sequences)
    assert seconds(workload, split) >= seconds(workload, strategy) * (1 - 1e-9)


@given(jobs, ways)
def test_longer_sequences_take_longer(workload: Workload, strategy) -> None:
    data = replace(workload.data, seq_len=2 * workload.data.seq_len)
    assert seconds(replace(workload, data=data), strategy) >= seconds(workload, strategy)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", MODELS[:4])
def test_adapters_are_faster_than_full_training(model: str, gpu: str) -> None:
    knobs = {"micro_batch_size": 8, "layer_kernels": "unsloth"}
    assert speed(job(model=model, gpu=gpu, method="lora"), **knobs) > speed(job(model=model, gpu=gpu), **knobs)


def test_quantised_weights_are_slower_while_micro_batches_are_small() -> None:
    plain, packed = job(method="lora", seq_len=512), job(method="qlora", seq_len=512)
    small, large = (speed(packed, micro_batch_size=b) / speed(plain, micro_batch_size=b) for b in (1, 64))
    assert small < 0.9 and small < large < 1


def test_fused_kernels_help_where_traffic_counts() -> None:
    assert speed(job(), layer_kernels="liger") > speed(job())


def test_eager_attention_is_quadratic_traffic() -> None:
    short, long = (
        speed(job(seq_len=s), micro_batch_size=1, attention_kernel="eager") / speed(job(seq_len=s), micro_batch_size=1)
        for s in (512, 8192)
    )
    assert long < short < 1


def test_a_sliding_window_saves_time_only_in_a_kernel_that_skips() -> None:
    gemma = job(model="google/gemma-2-2b", seq_len=8192)
    assert speed(gemma, attention_kernel="flash") > speed(gemma, attention_kernel="sdpa")


@pytest.mark.parametrize("rate", ["memory_bytes_per_second", "bf16_flops_per_second"])
def test_no_rates_no_time(rate: str) -> None:
    workload = job()
    device = replace(workload.cluster.device, fp32_flops_per_second=None, **{rate: None})
    unknown = replace(workload, cluster=Cluster(device=device))
    assert step_time(unknown, way()) is None and seconds(unknown, way()) is None


def test_a_size_alone_has_no_time() -> None:
    workload = replace(job(), cluster=Cluster(device=Device(name="24GiB", capacity_bytes=24 * 2**30)))
    assert step_time(workload, way()) is None


@pytest.mark.parametrize("knobs", [{"mesh": Mesh(tp=2)}, {"mesh": Mesh(pp=2)}, {"offload": "optimizer"}])
def test_what_is_not_modelled_is_not_guessed(knobs: dict) -> None:
    assert step_time(job(devices=2), way(**knobs)) is None


def test_several_nodes_are_not_guessed() -> None:
    workload = job(devices=8)
    workload = replace(workload, cluster=replace(workload.cluster, num_nodes=2))
    assert step_time(workload, way(mesh=Mesh(dp_replicate=16))) is None


def test_dora_is_refused() -> None:
    lora = Lora(r=8, alpha=8, target_modules=("q_proj",), use_dora=True)
    with pytest.raises(UnsupportedModel, match="DoRA"):
        step_time(job(method="lora", lora=lora), way())


def test_replicas_add_devices_and_lose_a_little() -> None:
    alone, together = job(gpu="rtx-4090", method="lora"), job(gpu="rtx-4090", method="lora", devices=4)
    full = job(gpu="rtx-4090", devices=4)
    mesh = Mesh(dp_replicate=4)
    assert 0.98 < speed(together, mesh=mesh) / speed(alone) <= 1
    assert speed(full, mesh=mesh, micro_batch_size=1) < 0.75 * speed(job(gpu="rtx-4090"), micro_batch_size=1)


def test_accumulation_hides_the_all_reduce() -> None:
    workload, mesh = job(gpu="rtx-4090", devices=4), Mesh(dp_replicate=4)
    often, seldom = (speed(workload, mesh=mesh, gradient_accumulation_steps=m) for m in (1, 32))
    assert seldom > often


def test_the_ring_law() -> None:
    """1 GiB over 8 H100 by torch 2.13's comm_analysis: all-gather 2.6 ms (facts/scale.md 3.3)."""
    cluster = Cluster(device=find_device("h100"), devices_per_node=8)
    assert gather_seconds(2**30, 8, cluster) == pytest.approx(2.6e-3, rel=0.03)
    assert gather_seconds(2**30, 1, cluster) == 0


def test_the_optimizer_is_paid_once_a_step() -> None:
    """Fused AdamW in fp32: 28 bytes a parameter, and clipping's 12; 28 are 8 to 9 ms per billion on H100."""
    workload = job(gpu="h100", weight_dtype="fp32", autocast=True)
    timed = step_time(workload, way(4))
    sums = 12 * 8.03 / (3350 * 0.85)
    assert timed.fixed_seconds + sums == pytest.approx(40 * 8.03 / (3350 * 0.85), rel=0.01)


def test_unfused_optimizers_are_slower() -> None:
    assert speed(job(), optimizer_kernel="foreach") < speed(job())


def test_muon_pays_for_its_iterations() -> None:
    assert speed(job(optimizer="muon"), optimizer_kernel="loop") < speed(job(), optimizer_kernel="fused")


def test_paged_states_cost_nothing_while_they_fit() -> None:
    fits = speed(job(optimizer="paged-adamw-8bit", model="gpt2"))
    assert fits == pytest.approx(speed(job(optimizer="adamw-8bit", model="gpt2")), rel=0.05)
    assert speed(job(optimizer="paged-adamw-32bit", gpu="rtx-4090")) < 0.5 * speed(job(gpu="rtx-4090"))


@pytest.mark.parametrize(
    ("gpu", "low", "high"), [("a100-80gb", 0.5, 0.73), ("h100", 0.3, 0.37), ("rtx-4090", 0.7, 1.0)]
)
def test_attention_reaches_the_published_share(gpu: str, low: float, high: float) -> None:
    """FlashAttention-2 (arXiv 2307.08691): 50 to 73 % on A100, 34 % on H100."""
    device = find_device(gpu)
    assert low <= attention_fraction(device, device.bf16_flops_per_second, 128) <= high


def test_bf16_without_units_runs_at_the_fp32_rate() -> None:
    device = find_device("t4")
    assert matmul_peak(device, job().recipe) == device.fp32_flops_per_second
    assert matmul_peak(device, job(weight_dtype="fp16").recipe) == device.fp16_flops_per_second


@pytest.mark.parametrize("device", list_devices(), ids=lambda device: device.name)
def test_no_device_is_faster_than_its_data_sheet(device: Device) -> None:
    rates = read_rates(device, job().recipe)
    assert rates is not None
    assert rates.matmul_flops_per_second < rates.peak_flops_per_second
    assert rates.bytes_per_second < device.memory_bytes_per_second


def test_the_search_can_ask_ten_thousand_times_a_second() -> None:
    workload = job()
    strategies = [way(b, m) for b in range(1, 33) for m in range(1, 33)]
    seconds(workload, strategies[0])
    start = time.process_time()  # the tests share the processor
    for strategy in strategies:
        seconds(workload, strategy)
    assert len(strategies) / (time.process_time() - start) > 10_000


@settings(max_examples=20)
@given(jobs, ways)
def test_the_same_question_has_the_same_answer(workload: Workload, strategy) -> None:
    assert step_time(workload, strategy) == step_time(replace(workload), replace(strategy))
