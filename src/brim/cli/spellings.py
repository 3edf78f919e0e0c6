"""Hugging Face's words for the same things: flags and values that stand for an option of brim."""

from __future__ import annotations

from typing import Any

from brim.errors import InvalidInput

_VALUES = {
    "attention_kernel": {"flash_attention_2": "flash", "flash_attention_3": "flash"},
    "dtype": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"},
}  # fmt: skip
# flag, what it was set to -> the options it stands for
_STANDS_FOR: dict[tuple[str, bool], dict[str, str]] = {
    ("load_in_4bit", True): {"method": "qlora"},
    ("load_in_8bit", True): {"method": "qlora", "quantization": "int8"},
    ("bf16", True): {"dtype": "bf16"},
    ("fp16", True): {"dtype": "fp16"},
    ("gradient_checkpointing", True): {"activation_checkpointing": "full"},
    ("gradient_checkpointing", False): {"activation_checkpointing": "none"},
}
_STAND_INS = frozenset(flag for flag, _ in _STANDS_FOR)
# HF users load in 4 bit and then ask for LoRA: together that is QLoRA.
_AGREES = {("method", "qlora"): ("lora",)}


def spell_as_brim(said: dict[str, Any]) -> dict[str, Any]:
    """Return what was said, in brim's own options and values; what was not said is left out.

    Raises:
        InvalidInput: two flags that mean different things.
    """
    job = {name: value for name, value in said.items() if value is not None and name not in _STAND_INS}
    for option, values in _VALUES.items():
        if option in job:
            job[option] = values.get(job[option], job[option])
    for (flag, value), meanings in _STANDS_FOR.items():
        if said.get(flag) is value:
            for option, meaning in meanings.items():
                job[option] = _agree(job.get(option), option, meaning, flag if value else f"no_{flag}")
    return job


def _agree(given: Any, option: str, meaning: str, flag: str) -> str:
    if given not in (None, meaning, *_AGREES.get((option, meaning), ())):
        flag, option = flag.replace("_", "-"), option.replace("_", "-")
        raise InvalidInput(f"--{flag} means --{option} {meaning}, but --{option} {given} was asked for too")
    return meaning
