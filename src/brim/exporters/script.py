"""From words to a script: the head every script shares, literals, and the template engine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from brim.exporters.record import ExportFile, name_requirements
from brim.exporters.words import cpu_loading, cpu_training
from brim.planner.record import Plan
from brim.tables.dialects import Dialect
from brim.tables.read import find_card
from brim.units import format_size

SCRIPT_NAME = "train.py"
SAMPLE_NAME = "sample.jsonl"
MASTER_PORT = 29500
LONGEST_LINE = 110

COMMENTS = {
    "per_device_train_batch_size": "micro-batch: sequences per GPU per forward",
    "per_device_eval_batch_size": "the same, as planned",
    "gradient_accumulation_steps": "micro-batches per optimizer step",
    "max_length": "tokens; longer sequences are cut",
    "max_seq_length": "tokens; longer sequences are cut",
    "learning_rate": "a usual start for {method}; tune it on your data",
    "num_train_epochs": "passes over the data, unless --max-steps is given",
    "warmup_ratio": "share of the run",
    "warmup_steps": "optimizer steps of the planned run; a number below 1 is a share of the run",
    "average_tokens_across_devices": "the loss is one mean over all tokens of the effective batch",
    "activation_checkpointing": "activations: {checkpointing} recomputation",
    "gradient_checkpointing": "activations: {checkpointing} recomputation",
    "use_gradient_checkpointing": '"unsloth": recompute and keep layer inputs in host memory',
    "optim": "{optimizer}",
    "loss_type": "{loss} loss",
    "dtype": "dtype the weights are loaded in",
    "torch_dtype": "dtype the weights are loaded in",
    "logging_steps": "optimizer steps",
    "report_to": "nothing leaves this machine",
}


def render_script(template: str, plan: Plan, dialect: Dialect, words: Mapping[str, Any]) -> ExportFile:
    """Return the script of a template.

    Args:
        template: file name in `templates/`.
        plan: what the head of the script describes.
        dialect: versions the script is for.
        words: what the template prints: `training`, `loading` and `outside` mappings, the launch line, its own flags.
    """
    parts = {**_head_facts(plan, dialect), **_shared_parts(plan, dialect, words), **words}
    text = _templates().get_template(template).render(parts)
    return ExportFile(name=SCRIPT_NAME, text=text)


def sample_file() -> ExportFile:
    """Return the bundled dataset: 32 prompt and completion rows."""
    text = files("brim.exporters").joinpath(SAMPLE_NAME).read_text(encoding="utf-8")
    return ExportFile(name=SAMPLE_NAME, text=text)


def name_allocator(plan: Plan) -> str:
    """Return what stands before a launch line for the plan's allocator.

    Source: docs.pytorch.org notes/cuda, PYTORCH_CUDA_ALLOC_CONF.
    """
    native = plan.strategy.allocator == "native"
    return "" if native else f"PYTORCH_CUDA_ALLOC_CONF={plan.strategy.allocator}:True "


def launch_torchrun(plan: Plan) -> str:
    """Return the line that starts one process per rank; plain python for one."""
    return name_allocator(plan) + _launch_ranks(plan)


def _launch_ranks(plan: Plan) -> str:
    ranks = plan.strategy.mesh.data_parallel_size
    nodes = plan.workload.cluster.num_nodes
    if ranks == 1:
        return f"python {SCRIPT_NAME}"
    if nodes == 1:
        return f"torchrun --nproc-per-node {ranks} {SCRIPT_NAME}"
    here = f"--nnodes {nodes} --nproc-per-node {plan.workload.cluster.devices_per_node}"
    return f"torchrun {here} --rdzv-backend c10d --rdzv-endpoint HEAD_NODE:{MASTER_PORT} {SCRIPT_NAME}"


def loadable_name(plan: Plan) -> str:
    """Return what from_pretrained takes: the id of the built-in card, or the name or folder the user gave."""
    card = find_card(plan.workload.model.name)
    return plan.workload.model.name if card is None else card.id


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    engine = Environment(
        loader=PackageLoader("brim.exporters"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    engine.filters["literal"] = format_literal
    engine.filters["block"] = format_block
    engine.filters["plain"] = plain
    return engine


def format_literal(value: object) -> str:
    """Return a value as Python source on one line, texts in double quotes where they have none inside."""
    if isinstance(value, str):
        text = repr(value)
        return text if '"' in text or "\\'" in text else f'"{text[1:-1]}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{format_literal(key)}: {format_literal(value[key])}" for key in value) + "}"
    if isinstance(value, list | tuple):
        inside = ", ".join(format_literal(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    return repr(value)


def format_block(words: Mapping[str, Any], said: Mapping[str, str]) -> str:
    """Return a mapping as the inside of `dict(...)`, one keyword a line, with comments."""
    return "\n".join(_format_keyword(word, value, said) for word, value in words.items())


def _format_keyword(word: str, value: object, said: Mapping[str, str]) -> str:
    remark = COMMENTS.get(word, "").format_map(said)
    line = f"    {word}={format_literal(value)},"
    if len(line) > LONGEST_LINE and isinstance(value, list):
        items = "".join(f"        {format_literal(item)},\n" for item in value)
        line = f"    {word}=[\n{items}    ],"
    elif len(line) > LONGEST_LINE and isinstance(value, Mapping):
        items = "".join(f"        {format_literal(key)}: {format_literal(value[key])},\n" for key in value)
        line = f"    {word}={{\n{items}    }},"
    return f"{line}  # {remark}" if remark else line


def plain(text: object) -> str:
    """Return text fit for a comment: one line, printable."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))[:200]


def _head_facts(plan: Plan, dialect: Dialect) -> dict[str, Any]:
    """Return what the head and the shared parts of every script print."""
    workload, strategy = plan.workload, plan.strategy
    estimate, cluster, recipe = plan.estimate, workload.cluster, workload.recipe
    return {
        "brim_version": plain(plan.brim_version) or "(unreleased)",
        "model": loadable_name(plan),
        "requirements": name_requirements(plan, dialect) + _quantizer(plan),
        "checked": dialect.requires + (("peft",) if recipe.lora is not None else ()),
        "micro": strategy.micro_batch_size,
        "accumulation": strategy.gradient_accumulation_steps,
        "ranks": strategy.mesh.data_parallel_size,
        "effective": plan.effective_batch_size,
        "cluster_text": plain(f"{cluster.num_devices} x {cluster.device.name}"),
        "seq_len": workload.data.seq_len,
        "dataset": workload.data.name,
        "recipe": recipe,
        "strategy": strategy,
        "peak_text": f"{format_size(estimate.peak_allocated_bytes)} allocated, {format_size(estimate.device_bytes)} "
        f"on the device, at: {plain(estimate.peak_moment)} ({estimate.source})",
        "said": _remarks(plan),
    }  # fmt: skip


def _shared_parts(plan: Plan, dialect: Dialect, words: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the shared parts of the scripts print, from the words of the export."""
    outside, quantization = words["outside"], plan.workload.recipe.quantization
    return {
        "lora": outside.get("peft_config"),
        "quantization": outside.get("quantization_config"),
        "quantized": "quantization_config" in outside,
        "upcast_rest": quantization is not None and quantization.upcast_rest,
        "max_length": outside.get("max_length"),
        "environment": {name: value for name, value in outside.items() if name.isupper()},
        "cpu_training": cpu_training(words["training"], dialect),
        "cpu_loading": cpu_loading(words["loading"], dialect),
        "loads_tokenizer": True,
        "gpu_only": "",
        "early_imports": (),
        "late_imports": (),
    }


def _remarks(plan: Plan) -> dict[str, str]:
    strategy = plan.strategy
    return {
        "method": {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[plan.workload.recipe.method],
        "checkpointing": {"none": "no", "selective": "all but attention:", "full": "full"}[
            strategy.activation_checkpointing
        ],
        "optimizer": f"{plan.workload.recipe.optimizer}, {strategy.optimizer_kernel} kernel",
        "loss": strategy.loss_kernel,
    }


def _quantizer(plan: Plan) -> tuple[str, ...]:
    """Return what reads the quantised base, or makes the optimizer's states small."""
    quantization, optimizer = plan.workload.recipe.quantization, plan.workload.recipe.optimizer
    if quantization is not None and quantization.kind == "gptq-int4":
        return ("gptqmodel", "optimum")
    stored = quantization is not None
    return ("bitsandbytes",) if stored or any(part in optimizer for part in ("8bit", "paged", "lion")) else ()
