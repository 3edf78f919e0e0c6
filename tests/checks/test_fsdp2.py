"""Accelerate's FSDP2 on the CPU: which layers it shards, and what it cannot shard."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import transformers
from accelerate.utils import DistributedType

from brim.checks.fsdp2 import sharding_on_cpu
from brim.checks.subjects import build_model
from brim.errors import ProbeFailed


def fake_accelerator(error: Exception | None = None) -> SimpleNamespace:
    def prepare(*objects: object) -> tuple[object, ...]:
        if error is not None:
            raise error
        return objects

    return SimpleNamespace(state=SimpleNamespace(distributed_type=DistributedType.MULTI_CPU), prepare=prepare)


@pytest.mark.parametrize(("architecture", "layers"), [
    ("LlamaForCausalLM", ["LlamaDecoderLayer"]),
    ("BertForSequenceClassification", ["BertLayer"]),  # not BertEmbeddings, whose embedding is sharded apart
])  # fmt: skip
def test_layers_are_sharded_one_by_one(architecture: str, layers: list[str]) -> None:
    model = build_model(getattr(transformers, architecture).config_class().to_dict(), architecture)
    accelerator = fake_accelerator()
    with sharding_on_cpu(accelerator, model):
        assert accelerator.state.distributed_type == DistributedType.FSDP
        assert accelerator.state.fsdp_plugin.fsdp_version == 2
        assert accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap == layers
        assert accelerator.prepare(model) == (model,)
    assert accelerator.state.distributed_type == DistributedType.MULTI_CPU


def test_what_cannot_be_sharded_is_told() -> None:
    model = build_model(transformers.LlamaConfig().to_dict(), "LlamaForCausalLM")
    accelerator = fake_accelerator(NotImplementedError("no embeddings"))
    told = r"cannot shard LlamaForCausalLM by FSDP2: NotImplementedError: no embeddings"
    with pytest.raises(ProbeFailed, match=told), sharding_on_cpu(accelerator, model):
        accelerator.prepare(model)
    shared = ValueError("Parameter 'a' is shared with a parameter already managed by another FSDP group.")
    with pytest.raises(ProbeFailed, match="is shared with"), sharding_on_cpu(fake_accelerator(), model):
        raise shared
    with pytest.raises(ValueError, match="another matter"), sharding_on_cpu(fake_accelerator(), model):
        raise ValueError("another matter")
