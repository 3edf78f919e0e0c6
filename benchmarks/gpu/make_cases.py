#!/usr/bin/env python3
"""Write cases.jsonl and configs.json from brim's model cards: what to measure once a GPU is there.

    python benchmarks/gpu/make_cases.py

Cases are chosen to cover sizes, methods, lengths and capacities, not to agree with a prediction. "Expected" in the
notes is brim's formula at the time of writing; no predictor sees notes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from brim.cost.estimate import estimate
from brim.readers.hf_config import read_config
from brim.tables.read import find_card
from rows import read_row

HERE = Path(__file__).parent
# model, method, length, micro-batch, checkpointing, accumulation, GB, and what is not as usual
_CHOICES: tuple[tuple[str, str, int, int, str, int, int, dict[str, Any]], ...] = (
    ("HuggingFaceTB/SmolLM2-135M", "full", 512, 8, "none", 1, 8, {}),
    ("HuggingFaceTB/SmolLM2-135M", "full", 2048, 2, "none", 4, 8, {}),
    ("HuggingFaceTB/SmolLM2-135M", "full", 8192, 4, "none", 1, 8, {}),
    ("HuggingFaceTB/SmolLM2-135M", "full", 2048, 2, "none", 1, 24, {"attention": "eager"}),
    ("HuggingFaceTB/SmolLM2-360M", "full", 2048, 4, "full", 1, 16, {"autocast": True, "weight_dtype": "fp32"}),
    ("HuggingFaceTB/SmolLM2-360M", "lora", 4096, 4, "none", 1, 40, {}),
    ("openai-community/gpt2", "full", 1024, 8, "none", 1, 16, {}),
    ("openai-community/gpt2-xl", "full", 1024, 2, "full", 4, 24, {}),
    ("EleutherAI/pythia-410m", "full", 2048, 4, "none", 1, 16, {}),
    ("EleutherAI/pythia-1b", "full", 2048, 2, "none", 1, 16, {"optimizer": "adamw_torch"}),
    ("Qwen/Qwen2.5-0.5B", "full", 2048, 1, "none", 1, 16, {}),
    ("Qwen/Qwen2.5-0.5B", "full", 32768, 1, "full", 1, 24, {}),
    ("Qwen/Qwen2.5-0.5B", "lora", 8192, 2, "full", 4, 40, {}),
    ("google/gemma-3-270m", "full", 2048, 2, "none", 1, 24, {}),
    ("meta-llama/Llama-3.2-1B", "full", 2048, 1, "none", 1, 24, {}),
    ("meta-llama/Llama-3.2-1B", "full", 2048, 1, "none", 4, 24, {}),
    ("meta-llama/Llama-3.2-1B", "full", 2048, 1, "full", 1, 16, {}),
    ("meta-llama/Llama-3.2-1B", "full", 2048, 1, "full", 1, 16, {"optimizer": "adamw_bnb_8bit"}),
    ("meta-llama/Llama-3.2-1B", "full", 8192, 1, "full", 1, 40, {}),
    ("meta-llama/Llama-3.2-1B", "full", 2048, 1, "none", 1, 40, {"autocast": True, "weight_dtype": "fp32"}),
    ("meta-llama/Llama-3.2-1B", "full", 2048, 4, "none", 1, 8, {}),
    ("meta-llama/Llama-3.2-1B", "lora", 2048, 1, "none", 1, 16, {}),
    ("meta-llama/Llama-3.2-1B", "qlora", 1024, 1, "none", 1, 8, {}),
    ("Qwen/Qwen2.5-1.5B", "full", 2048, 1, "none", 1, 24, {}),
    ("Qwen/Qwen2.5-1.5B", "lora", 16384, 1, "full", 1, 40, {}),
    ("Qwen/Qwen3-1.7B", "full", 4096, 1, "full", 4, 24, {}),
    ("google/gemma-2-2b", "full", 2048, 1, "full", 1, 40, {}),
    ("google/gemma-2-2b", "lora", 2048, 1, "full", 1, 24, {}),
    ("meta-llama/Llama-3.2-3B", "full", 2048, 1, "full", 1, 40, {}),
    ("meta-llama/Llama-3.2-3B", "full", 2048, 1, "none", 1, 24, {}),
    ("meta-llama/Llama-3.2-3B", "qlora", 2048, 1, "full", 4, 8, {}),
    ("microsoft/Phi-3-mini-4k-instruct", "lora", 4096, 1, "full", 1, 16, {}),
    ("mistralai/Mistral-7B-v0.1", "lora", 2048, 2, "full", 1, 24, {}),
    ("mistralai/Mistral-7B-v0.1", "qlora", 512, 4, "none", 1, 24, {}),
    ("Qwen/Qwen2.5-7B", "lora", 2048, 1, "none", 1, 40, {}),
    ("Qwen/Qwen2.5-7B", "qlora", 2048, 1, "full", 1, 16, {}),
    ("Qwen/Qwen3-8B", "full", 2048, 1, "full", 1, 80, {}),
    ("meta-llama/Llama-3.1-8B", "full", 2048, 1, "full", 1, 80, {"optimizer": "adamw_bnb_8bit"}),
    ("meta-llama/Llama-3.1-8B", "full", 2048, 1, "full", 1, 40, {}),
    ("meta-llama/Llama-3.1-8B", "lora", 2048, 1, "full", 1, 24, {}),
    ("meta-llama/Llama-3.1-8B", "lora", 16384, 1, "full", 1, 80, {}),
    ("meta-llama/Llama-3.1-8B", "qlora", 2048, 2, "full", 4, 24, {}),
    ("meta-llama/Llama-3.1-8B", "qlora", 8192, 1, "full", 1, 24, {}),
    ("meta-llama/Llama-2-13b-hf", "lora", 4096, 1, "full", 1, 40, {}),
    ("meta-llama/Llama-2-13b-hf", "qlora", 4096, 1, "full", 1, 24, {}),
    ("Qwen/Qwen2.5-14B", "qlora", 2048, 1, "full", 1, 24, {}),
    ("mistralai/Mistral-Small-24B-Base-2501", "lora", 2048, 1, "full", 1, 80, {}),
    ("mistralai/Mistral-Small-24B-Base-2501", "qlora", 2048, 1, "full", 1, 24, {}),
    ("Qwen/Qwen2.5-32B", "qlora", 2048, 1, "full", 1, 40, {}),
    ("Qwen/Qwen2.5-32B", "lora", 2048, 1, "full", 1, 40, {}),
    ("meta-llama/Llama-3.1-70B", "qlora", 2048, 1, "full", 1, 80, {}),
    ("meta-llama/Llama-3.1-70B", "qlora", 1024, 1, "full", 1, 40, {}),
)  # fmt: skip
_MODEL_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "tie_word_embeddings", "hidden_act",
)  # fmt: skip
_MESH = {"dp_replicate": 1, "dp_shard": 1, "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "sp": False}
_TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
_FRAMEWORK = {"name": "plain PyTorch loop, transformers 5 model", "version": None, "date": None}


def make_case(choice: tuple[str, str, int, int, str, int, int, dict[str, Any]]) -> dict[str, Any]:
    """Return one case: a row of the truth files whose measurement is still missing."""
    name, method, length, micro, checkpointing, accumulation, capacity_gb, changes = choice
    words = "".join(f"/{value}" for value in changes.values() if value is not True)
    shape = f"{length}x{micro}x{accumulation}/{checkpointing}"
    adapts = method != "full"
    row = {
        "id": f"gpu/{name.rpartition('/')[2]}/{method}/{shape}{words}/{capacity_gb}gb",
        "group": f"gpu|{name}|{method}|{capacity_gb}", "weight": 1.0, "tier": "oracle", "model": describe_model(name),
        "method": method, "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear"} if adapts else None,
        "quantization": "bnb-nf4-dq" if method == "qlora" else None, "weight_dtype": "bf16", "compute_dtype": "bf16",
        "autocast": adapts, "grad_dtype": None, "master_weights": False, "optimizer": "adamw_torch_fused",
        "micro_batch_size": micro, "gradient_accumulation_steps": accumulation,
        "global_batch_size": micro * accumulation, "seq_len": length, "seq_len_kind": "exact", "packing": True,
        "activation_checkpointing": checkpointing, "checkpoint_detail": None, "attention": "sdpa", "compile": False,
        "loss": "dense", "kernels": None, "offload": "none", "mesh": _MESH, "zero_stage": 0, "n_gpus": 1,
        "gpu": {"name": None, "memory_bytes": capacity_gb * 10**9}, "framework": _FRAMEWORK,
        "extra": {"trainer": "plain", "zero_grad_set_to_none": True, "logits_alive_in_backward": False,
                  "kbit_upcast": False},
        "rank_measured": 0, "measured": None, "tokens_per_second": None, "source": None, "notes": None,
    }  # fmt: skip
    return {**row, **changes}


def describe_model(name: str) -> dict[str, Any]:
    """Return the model's numbers as the truth files have them."""
    card = find_card(name)
    assert card is not None, name
    known = {"name": card.id, **{key: card.config[key] for key in _MODEL_FIELDS if key in card.config}}
    known.setdefault("hidden_size", read_config(card.config, name=card.id).hidden_size)
    return {**known, "params": card.params}


def make_cases() -> list[dict[str, Any]]:
    """Return all cases; siblings share their group's weight, and notes say what the formula expects."""
    cases = [make_case(choice) for choice in _CHOICES]
    sizes = Counter(case["group"] for case in cases)
    for case in cases:
        case["weight"] = round(1 / sizes[case["group"]], 6)
        answer = estimate(*read_row(case))
        over = answer.device_bytes > case["gpu"]["memory_bytes"]
        case["notes"] = f"expected {answer.device_bytes / 1e9:.1f} GB: {'runs out of memory' if over else 'fits'}"
    return cases


def list_configs() -> dict[str, Any]:
    """Return the configs of all models of the cases, and a tiny one to try the script with."""
    cards = {choice[0]: find_card(choice[0]) for choice in _CHOICES}
    return {"tiny": _TINY, **{name: dict(card.config) for name, card in cards.items() if card is not None}}


def main() -> int:
    """Write both files."""
    lines = "".join(json.dumps(case) + "\n" for case in make_cases())
    (HERE / "cases.jsonl").write_text(lines, encoding="utf-8")
    (HERE / "configs.json").write_text(json.dumps(list_configs(), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
