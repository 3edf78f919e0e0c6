"""Scripts of blocks: storages handed on, everything else given back, nothing of no size."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from time_jobs import job, way

from brim.cost.blocks import Block, cost_head, cost_layer
from brim.cost.scripts import Act, Player, Script, find_last_large, write_script
from brim.cost.setting import read_setting

MODELS = ("gpt2", "meta-llama/Llama-3.1-8B", "google/gemma-2-2b", "mistralai/Mixtral-8x7B-v0.1")
FEW = settings(max_examples=30, deadline=None)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Draw a layer or a head of a model."""
    workload = job(
        model=draw(st.sampled_from(MODELS)), method=draw(st.sampled_from(["full", "lora", "qlora"])),
        autocast=draw(st.booleans()),
    )  # fmt: skip
    attention, kernels = draw(st.sampled_from(["eager", "sdpa"])), draw(st.sampled_from(["none", "liger"]))
    setting = read_setting(workload, way(attention_kernel=attention, layer_kernels=kernels))
    loss = draw(st.sampled_from([None, "dense", "chunked", "fused"]))
    if loss is None:
        return cost_layer(workload.model.groups[0], setting, "none")
    return cost_head(workload.model, setting, workload.recipe.engine, loss)


def left(acts: tuple[Act, ...], held: dict[int, int]) -> dict[int, int]:
    """Return what is there after some acts; an act on what is not there is an error."""
    for number, size in acts:
        if size:
            assert number not in held
            held[number] = size
        else:
            del held[number]
    return held


@FEW
@given(blocks(), st.integers(1, 4096))
def test_only_what_is_handed_on_is_left(block: Block, tokens: int) -> None:
    """Forward leaves output and kept storages, backward the gradient of the input, evaluation the output."""
    script = write_script(block, tokens)
    after = left(script.forward, {})
    assert after == dict([*script.kept, script.output])
    del after[script.output[0]]
    if script.stream is not None:
        after[script.stream] = script.stream_bytes
    end = left(script.backward, after | dict([script.gradient]))
    assert end == {script.stream_gradient: script.stream_bytes}
    assert left(script.evaluation, {}) == dict([script.evaluation_output])


@FEW
@given(blocks(), st.integers(1, 4096))
def test_a_script_allocates_what_its_events_do(block: Block, tokens: int) -> None:
    """The highest point of the forward pass is the block's, its input apart."""
    script = write_script(block, tokens)
    for acts, instants in ((script.forward, block.forward), (script.evaluation, block.evaluation)):
        live = peak = 0
        held: dict[int, int] = {}
        for number, size in acts:
            live += size or -held.pop(number)
            held |= {number: size} if size else {}
            peak = max(peak, live)
        stream = script.stream_bytes if script.stream is not None and acts is script.forward else 0
        assert peak + stream == max(instant.kept.at(tokens) + instant.passing.at(tokens) for instant in instants)


def test_the_gradient_of_the_output_matrix_meets_that_of_the_logits() -> None:
    """It is made before the last storage of the logits' size goes."""
    workload = job()
    head = cost_head(workload.model, read_setting(workload, way()), workload.recipe.engine, "dense")
    script = write_script(head, 2048)
    split = find_last_large(script)
    before = left(script.backward[:split], dict([*script.kept, script.gradient]) | stream_of(script))
    assert max(before.values()) == 2 * 2048 * 128_256
    assert max(left(script.backward[split:], dict(before)).values()) == script.stream_bytes


def stream_of(script: Script) -> dict[int, int]:
    """Return the input as a storage, where the block keeps it."""
    return {} if script.stream is None else {script.stream: script.stream_bytes}


def test_a_player_names_storages_itself() -> None:
    """Names never collide, sizes of nothing are left out, held storages are spread among acts."""
    player = Player(capacity_bytes=None, expandable=False)
    names = player.hold(512, 0, 1024)
    assert len(names) == 2 and player.allocated_bytes == 1536
    workload = job()
    block = cost_layer(workload.model.groups[0], read_setting(workload, way()), "none")
    script = write_script(block, 16)
    base = player.name(script)
    player.play(script.forward, base)
    more = player.play_among([(number, 0) for number, _ in (*script.kept, script.output)], base, [512, 512, 512])
    assert len({*names, *more}) == 5
    player.drop(names)
    player.drop(more)
    assert (player.allocated_bytes, names, more) == (0, [], [])


def test_scripts_scale_with_tokens() -> None:
    """Twice the tokens, the same acts, no smaller storage."""
    workload = replace(job())
    block = cost_layer(workload.model.groups[0], read_setting(workload, way()), "none")
    one, two = write_script(block, 100), write_script(block, 200)
    assert [number for number, _ in one.forward] == [number for number, _ in two.forward]
    assert all(small <= large for (_, small), (_, large) in zip(one.forward, two.forward, strict=True))
