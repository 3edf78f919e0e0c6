"""Subjects from a model's config: the small copy, made-up sequences, and a loop by its name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from brim.checks.accumulation import WINDOW, Subject
from brim.checks.loops import accelerate_subject, plain_subject
from brim.checks.sequences import TOKENS, VOCABULARY, collate, make_rows
from brim.checks.small import build_small
from brim.checks.trainers import read_trainer
from brim.errors import ProbeFailed, UnknownName
from brim.losses.rules import IGNORED

LOOPS = ("hf", "sft", "dpo", "plain", "accelerate", "lightning")
SHARDINGS = ("ddp", "fsdp2")


def build_subject(
    config: Mapping[str, Any], architecture: str, loop: str, *, exactly: Any = None, num_ranks: int = 1,
    sharding: str = "ddp", equal_lengths: bool = False,
) -> Subject:  # fmt: skip
    """Return a model class under a loop, small and on the CPU.

    Args:
        config: as `config.json` has it.
        architecture: class of transformers, such as `T5ForConditionalGeneration`.
        loop: hf, sft, dpo, plain, accelerate or lightning.
        exactly: what makes the loop exact (`brim.guard` for trainers, `brim.accumulate` for plain loops, ...); the
            loop as installed if None.
        num_ranks: data-parallel ranks; this process is one of them.
        sharding: ddp or fsdp2, where there are several.
        equal_lengths: whether all made-up sequences are of one length, for a model that padding changes.

    Raises:
        UnknownName: no such loop or sharding. ProbeFailed: transformers has no such class, or it cannot be built small.
    """
    if loop not in LOOPS:
        raise UnknownName(kind="trainer", name=loop, known=LOOPS)
    if sharding not in SHARDINGS:
        raise UnknownName(kind="sharding", name=sharding, known=SHARDINGS)
    model = build_model(config, architecture)
    rows = make_rows(architecture, model.config, WINDOW + (3 if num_ranks == 1 else 4), equal_lengths=equal_lengths)
    _keep_acceptable(model, rows)
    if loop == "plain":
        return plain_subject(model, rows, collate, accumulate=exactly, num_ranks=num_ranks, sharding=sharding)
    if loop == "accelerate":
        return accelerate_subject(model, rows, collate, exactly=exactly, num_ranks=num_ranks, sharding=sharding)
    if loop == "lightning":
        from brim.checks.lightning_loop import lightning_subject

        return lightning_subject(model, rows, collate, exactly=exactly, num_ranks=num_ranks, sharding=sharding)
    make = {"hf": _hf_trainer, "sft": _sft_trainer, "dpo": _dpo_trainer}[loop](model, rows)
    return read_trainer(make, prepare=exactly, num_ranks=num_ranks, sharding=sharding)


def build_model(config: Mapping[str, Any], architecture: str) -> nn.Module:
    """Return a small model of a class of the installed transformers."""
    import transformers

    pair = bool(config.get("is_encoder_decoder"))
    architecture = _with_head(architecture, str(config.get("model_type", "")), pair=pair)
    kind = getattr(transformers, architecture, None)
    if kind is None or getattr(kind, "config_class", None) is None:
        raise ProbeFailed(f"transformers {transformers.__version__} has no {architecture} that can be built here")
    model = build_small(kind, config, kind.config_class, VOCABULARY)
    model.config.use_cache = False
    return model


def _with_head(architecture: str, model_type: str, *, pair: bool) -> str:
    """Return the class itself, or for one without a head the one that its type is pretrained with."""
    if "For" in architecture or "LMHead" in architecture:
        return architecture
    from transformers.models.auto import modeling_auto

    tables = ("SEQ_TO_SEQ_CAUSAL_LM",) if pair else ("MASKED_LM", "CAUSAL_LM")  # Bart's decoder has a causal head too
    names = (getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").get(model_type) for table in tables)
    return next((name for name in names if name), architecture)


def _keep_acceptable(model: nn.Module, rows: list[Any]) -> None:
    """Give the sequence without any target one, where the class's own code fails on it (decoders that look for one)."""
    for row in rows:
        labels = row.get("labels")
        if labels is None or not labels.dim() or bool(labels.ne(IGNORED).any()):
            continue
        try:
            with torch.no_grad():
                model(**collate([row]))
        except (RuntimeError, IndexError, ValueError):
            labels[-1] = TOKENS[0]


def _hf_trainer(model: Any, rows: list[Any]) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(_folder(), report_to=[], use_cpu=True, remove_unused_columns=False, max_steps=1)
        return Trainer(model, arguments, train_dataset=rows, data_collator=collate)

    return make


def _sft_trainer(model: Any, rows: list[Any]) -> Callable[[], Any]:
    def make() -> Any:
        from datasets import Dataset
        from transformers import DataCollatorForSeq2Seq
        from trl import SFTConfig, SFTTrainer

        made_up = [{key: row[key].tolist() for key in ("input_ids", "labels")} for row in rows]
        longest = "max_length" if "max_length" in SFTConfig.__dataclass_fields__ else "max_seq_length"
        arguments = SFTConfig(
            _folder(), report_to=[], use_cpu=True, max_steps=1, gradient_checkpointing=False, bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True}, **{longest: None},
        )  # fmt: skip
        tokenizer = make_tokenizer()
        # the default collator of old releases makes labels itself, and stumbles over given ones
        collator = DataCollatorForSeq2Seq(tokenizer) if longest == "max_seq_length" else None
        return SFTTrainer(model, arguments, data_collator=collator, train_dataset=Dataset.from_list(made_up),
                          processing_class=tokenizer)  # fmt: skip

    return make


def _dpo_trainer(model: Any, rows: list[Any]) -> Callable[[], Any]:
    def make() -> Any:
        import copy

        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        words = [[f"w{token}" for token in row["input_ids"].tolist()] for row in rows]
        pairs = [
            {"prompt": " ".join(one[:3]), "chosen": " ".join(one[3:]), "rejected": " ".join(reversed(one[4:]))}
            for one in words
        ]
        arguments = DPOConfig(
            _folder(), report_to=[], use_cpu=True, max_steps=1, gradient_checkpointing=False, bf16=False
        )
        reference = copy.deepcopy(model)
        return DPOTrainer(model, reference, arguments, train_dataset=Dataset.from_list(pairs),
                          processing_class=make_tokenizer())  # fmt: skip

    return make


def make_tokenizer() -> Any:
    """Return a tokenizer of made-up words, since none can be downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{token}": token for token in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def _folder() -> str:
    return os.path.join(tempfile.gettempdir(), "brim-verify")
