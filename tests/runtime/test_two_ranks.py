"""Two ranks under DDP, over gloo: with different numbers of micro-batches each, the step is that of the big batch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from runtime_toys import (
    EXACT,
    Recorder,
    build_llama,
    build_mixtral,
    cut,
    differ,
    make_rows,
    read_gradient,
    stack,
    train_whole,
)
from test_contrastive import build_clip, find_truth, make_pairs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_outputs import CausalLMOutput
from two_ranks import run_both, run_checks

from brim.runtime.accelerate_loop import exact_accelerate
from brim.runtime.accumulate import accumulate
from brim.runtime.contrastive import accumulate_contrastive
from brim.runtime.ranks import gather_numbers, share_from_first

ROWS = make_rows((4, 12, 12, 5, 12, 3, 9, 7, 12, 4), unlabelled=(3, 8, 9))
MINE = (slice(0, 3), slice(3, 10))
"""Rows of each rank: 3 micro-batches of 1 on one rank, 7 on the other, of which the last two have no label."""


def check_accumulate(rank: int) -> None:
    model = build_llama()
    truth = train_whole(model, stack(ROWS))
    wrapped = DistributedDataParallel(model)
    for each in (False, True):
        shares = []
        for micro in accumulate(stack(ROWS[MINE[rank]]), 1, model=wrapped, reduce_each=each):
            micro.backward(wrapped(**micro.inputs).loss)
            shares.append(float(micro.loss))
        assert differ(read_gradient(model), truth) <= EXACT
        mean = sum(row[0] for row in gather_numbers([sum(shares)])) / 2
        assert abs(mean - float(model(**stack(ROWS)).loss.detach())) < 1e-5
        wrapped.zero_grad()


def check_unlabelled_rank_repeats(rank: int) -> None:
    """The rank with fewer micro-batches ends on one without a label: what it repeats must not be 0 x NaN."""
    model = build_llama()
    truth = train_whole(model, stack(ROWS))
    wrapped = DistributedDataParallel(model)
    mine = ROWS[8:10] if rank else ROWS[:8]
    for micro in accumulate(cut(mine, 1), model=wrapped):
        micro.backward(wrapped(**micro.inputs).loss)
        assert float(micro.loss) == float(micro.loss)
    assert differ(read_gradient(model), truth) <= EXACT


def check_stock_mean_is_off(rank: int) -> None:
    model = build_llama()
    truth = train_whole(model, stack(ROWS))
    DistributedDataParallel(model)(**stack(ROWS[MINE[rank]])).loss.backward()
    assert differ(read_gradient(model), truth) > 0.02


def check_accelerate(rank: int) -> None:
    model = build_llama()
    order = [(0, 2, 2, 6), (2, 3, 6, 10)]  # windows: 2 + 4 and 1 + 4 micro-batches
    truth = [train_whole(model, stack(ROWS[a:b] + ROWS[c:d])) for a, b, c, d in order]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4 if rank else 2)
    recorder = Recorder(model)
    wrapped, optimizer = accelerator.prepare(model, recorder)
    mine = cut(ROWS[2:6] + ROWS[6:10], 1) if rank else cut(ROWS[:3], 1)
    with exact_accelerate(accelerator, wrapped, mine) as batches:
        for _ in range(2):
            for batch in batches:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(wrapped(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
    assert [differ(found, one) <= EXACT for found, one in zip(recorder.seen, truth * 2, strict=True)] == [True] * 4


def check_contrastive(rank: int) -> None:
    pairs, model = make_pairs(), build_clip()
    expected, truth = find_truth(model, pairs)
    wrapped = DistributedDataParallel(model)
    mine = {key: value[6:] if rank else value[:6] for key, value in pairs.items()}
    for _ in range(2):
        found = accumulate_contrastive(
            mine, 2, model=wrapped, encode=lambda part: wrapped(**part), loss=model.find_loss
        )
        assert torch.allclose(found, expected)
        assert differ(read_gradient(model), truth) <= EXACT
        wrapped.zero_grad()


def check_two_towers(rank: int) -> None:
    """Encoders called one by one through their own wrappers, the temperature outside of both."""
    pairs, model = make_pairs(), build_clip()
    _, truth = find_truth(model, pairs)
    mine = [{"values": pairs[key][6:] if rank else pairs[key][:6]} for key in ("text", "image")]
    towers = [DistributedDataParallel(tower) for tower in (model.text, model.image)]
    accumulate_contrastive(
        mine, 4, model=[*towers, model], loss=model.find_loss,
        encode=[lambda part: towers[0](**part), lambda part: towers[1](**part)],
    )  # fmt: skip
    assert differ(read_gradient(model), truth) <= EXACT


def check_lightning(rank: int) -> None:
    if find_spec("lightning") is None:
        return
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy
    from test_lightning import QUIET, STEPS, Job
    from torch.utils.data import DataLoader

    from brim.runtime.lightning import LightningExact

    for build in (build_llama, build_mixtral):
        model = build()
        mine = [ROWS[:5], ROWS[5:]]  # windows: 3 and 2 micro-batches of one row on each rank
        truth = []
        for start, stop in ((0, 3), (3, 5)):
            rows = [row for half in mine for row in half[start:stop]]
            model.config.output_router_logits = False
            plain = train_whole(model, stack(rows))
            if build is build_mixtral:
                model.config.output_router_logits = True
                sum(model(**stack([row])).aux_loss * 0.5 / len(rows) for row in rows).backward()
                plain += read_gradient(model)
                model.zero_grad()
            truth.append(plain)
        job = Job(model)
        strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
        trainer = pl.Trainer(
            **{**QUIET, "devices": 2}, strategy=strategy, max_epochs=1, accumulate_grad_batches=STEPS,
            callbacks=[LightningExact()], use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(job, DataLoader(mine[rank], batch_size=1, collate_fn=stack))
        assert [differ(found, one) <= EXACT for found, one in zip(job.recorder.seen, truth, strict=True)] == [True] * 2


class Routed(nn.Module):
    """Two experts; a sequence that starts with a 1 goes to the second one, which has no gradient without any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden, second = self.embed(input_ids), input_ids[:, 0] == 1
        for index, mask in enumerate((~second, second)):
            if mask.any():
                hidden = hidden.index_add(0, mask.nonzero().flatten(), self.experts[index](hidden[mask]))
        # FSDP2 looks for tensors in what is returned: an output of transformers shows them, an object of one's own not
        return CausalLMOutput(loss=nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten()))


def check_unused_expert(rank: int) -> None:
    """Sharded, with an expert that gets no sequence on one rank, and one that gets none on either."""
    for first in (1, 5):
        tokens = torch.randint(3, 31, (8, 6), generator=torch.Generator().manual_seed(0))
        tokens[5, 0] = first  # a sequence of rank 1
        whole = {"input_ids": tokens, "labels": tokens.roll(1, 1)}
        model = Routed()
        truth = train_whole(model, whole)
        sharded = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        mine = {key: value[4 * rank : 4 * rank + 4] for key, value in whole.items()}
        for each in (False, True):
            for micro in accumulate(mine, 2, model=sharded, reduce_each=each):
                micro.backward(sharded(**micro.inputs).loss)
            grads = [parameter.grad.full_tensor().flatten().double() for parameter in sharded.parameters()]
            assert differ(torch.cat(grads), truth) <= EXACT
            sharded.zero_grad()


def check_sharing(rank: int) -> None:
    assert share_from_first({"rank": rank}) == {"rank": 0}
    assert gather_numbers([rank, 2.5]) == [[0, 2.5], [1, 2.5]]
    lone = [dist.new_group([one]) for one in range(2)][rank]
    assert share_from_first(rank, lone) == rank
    assert gather_numbers([rank], group=lone) == [[rank]]


CHECKS: tuple[Callable[[int], None], ...] = (
    check_accumulate, check_unlabelled_rank_repeats, check_stock_mean_is_off, check_accelerate, check_contrastive,
    check_unused_expert, check_two_towers, check_sharing, check_lightning,
)  # fmt: skip


def run_rank(rank: int, port: int) -> None:
    run_checks(rank, port, CHECKS)


def test_two_ranks_take_the_big_batchs_steps() -> None:
    run_both(run_rank, most_seconds=150)
