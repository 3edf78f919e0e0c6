"""A job of a tiny Llama on a CPU held to a size, and scripts as users write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import brim
from brim.planner.record import Plan
from brim.trials.request import Request
from brim.units import MIB

LENGTH, VOCABULARY = 32, 256
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "hidden_act": "silu", "pad_token_id": 0,
}  # fmt: skip
JOB: dict[str, Any] = {
    "seq_len": LENGTH, "effective_batch_size": 8, "dtype": "fp32", "method": "full", "trainer": "transformers",
    "history": False,
}  # fmt: skip


def write_model(folder: Path, **changes: Any) -> str:
    """Write the config of the tiny model and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    return str(folder)


def make_plan(folder: Path, capacity: str = "64MiB", **changes: Any) -> Plan:
    """Return a plan of the tiny job."""
    return brim.plan(write_model(folder / "model"), gpu=f"cpu:{capacity}", **(JOB | changes))


def make_request(plan: Plan, capacity_bytes: int = 64 * MIB, script: str | None = None) -> Request:
    """Return the request that runs a plan's strategy."""
    return Request(plan=plan, config=CONFIG, capacity_bytes=capacity_bytes, on_cpu=True, script=script)


SCRIPT = '''
import os, signal, time
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

HERE = os.path.dirname(os.path.abspath(__file__))
LENGTHS = (10, 30, 50, 20, 15, 8)


class Loud(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        open(os.path.join(HERE, "loud"), "w").close()


class Mine(Trainer):
    def training_step(self, *args, **kwargs):
        BEFORE_STEP
        return super().training_step(*args, **kwargs)


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    fill = lambda row, value: list(row["input_ids"]) + [value] * (longest - len(row["input_ids"]))
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    ids, labels = [fill(row, 0) for row in rows], [fill(row, -100) for row in rows]
    return {name: torch.tensor(one) for name, one in
            (("input_ids", ids), ("labels", labels), ("attention_mask", mask))}


def make_trainer():
    torch.manual_seed(0)
    weights = os.path.join(HERE, "weights.pt")
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=256, max_position_embeddings=128))
    if os.path.exists(weights):
        model.load_state_dict(torch.load(weights))
    rows = [{"input_ids": list(range(3, 3 + n))} for n in LENGTHS]
    arguments = TrainingArguments(os.path.join(HERE, "out"), per_device_train_batch_size=2, save_steps=1,
        eval_strategy="steps", eval_steps=1, logging_steps=1, use_cpu=True, report_to=[], remove_unused_columns=False,
        learning_rate=1.0)
    return Mine(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate, callbacks=[Loud()])
'''
"""A trainer that would save, evaluate and call back at every step, with a learning rate that ruins the weights."""


def write_script(folder: Path, before_step: str = "pass") -> str:
    """Write a user's script and return how it is named to brim."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.py"
    path.write_text(SCRIPT.replace("BEFORE_STEP", before_step), encoding="utf-8")
    return f"{path}:make_trainer"
