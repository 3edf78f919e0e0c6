"""Small copies and made-up sequences of the classes that the exactness table has."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from brim.checks import diagnose  # noqa: E402
from brim.checks.sequences import collate, make_rows  # noqa: E402
from brim.checks.small import shrink_config  # noqa: E402
from brim.checks.subjects import build_model  # noqa: E402

CLASSES = (
    "GPTJForCausalLM", "GPTNeoForCausalLM", "NemotronForCausalLM", "XLNetLMHeadModel", "Mamba2ForCausalLM",
    "DebertaV2ForSequenceClassification", "SwinForImageClassification", "ResNetForImageClassification",
    "Wav2Vec2ForSequenceClassification", "BertForPreTraining", "ElectraForPreTraining",
)  # fmt: skip


@pytest.mark.parametrize("architecture", CLASSES)
def test_a_class_with_keys_of_its_own_is_built_small_and_has_a_loss(architecture: str) -> None:
    kind: Any = getattr(transformers, architecture)
    model = build_model(kind.config_class().to_dict(), architecture)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    assert torch.isfinite(model(**collate(make_rows(architecture, model.config, 4)[:3])).loss)


def test_values_per_layer_are_cut_with_the_layers() -> None:
    small = shrink_config({"num_hidden_layers": 5, "intermediate_size": [128, 128, 256, 256, 256]})
    assert small == {"num_hidden_layers": 2, "intermediate_size": [64, 64]}


def test_a_state_space_stays_as_wide_as_its_heads() -> None:
    small = shrink_config({"hidden_size": 4096, "expand": 2, "num_heads": 128, "head_dim": 64})
    assert small["hidden_size"] * small["expand"] == small["num_heads"] * small["head_dim"]


def test_rows_of_one_length() -> None:
    model = build_model(transformers.BertConfig().to_dict(), "BertForQuestionAnswering")
    rows = make_rows("BertForQuestionAnswering", model.config, 8, equal_lengths=True)
    assert len({len(row["input_ids"]) for row in rows}) == 1


def test_every_cause_has_a_short_name() -> None:
    both = f"{diagnose.NOT_DIVIDED} (gradient x 8), and {diagnose.MEAN_OF_MEANS}"
    assert diagnose.identify_cause(both) == ("not_divided", "mean_of_means")
    assert diagnose.identify_cause("micro-batches weigh 1.2, 0.8 times what they should") == ("scaled",)
