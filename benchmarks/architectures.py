"""Which architectures of the installed transformers trace: every model type with every head that is trained.

Each is built from its default config, cut to a few layers and otherwise at full width: tensors hold no data, so width
is free. One full-training step is traced. Run: python benchmarks/architectures.py
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from brim.errors import BrimError, ProbeFailed
from brim.probes.trace import trace
from brim.spec.data import DataProfile
from brim.spec.device import Cluster
from brim.spec.model import ModelShape
from brim.spec.recipe import Engine, Recipe
from brim.spec.strategy import Strategy
from brim.spec.workload import BatchTarget, Workload
from brim.tables.read import find_device

RESULTS = Path(__file__).parent / "results" / "architectures.md"
HEADS = {
    "causal language model": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked language model": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "multiple choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "image and text to text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "semantic segmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "object detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "connectionist temporal classification": "MODEL_FOR_CTC_MAPPING_NAMES",
    "audio classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "video classification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
}  # fmt: skip
_DEPTH = 2
_LENGTH, _BATCH, _SECONDS, _LONGEST = 128, 2, 60, 1 << 15
_DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "num_encoder_layers",
    "encoder_layers", "decoder_layers", "depth", "num_blocks", "encoder_num_hidden_layers",
    "decoder_num_hidden_layers", "num_hidden_groups",
)  # fmt: skip
_DTYPE_WORDS = ("expected scalar type", "Unsupported dtype", "should be the same", "expected m1 and m2")
_IMAGES = {"vision_config": {"image_size": 896}}
_GLM = {"text_config": {"rope_parameters": {
    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5,
}}}  # fmt: skip
_RESNET = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_kwargs": None,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"],
                        "out_indices": [2, 3, 4]},
}  # fmt: skip
_DETRS = ("detr", "conditional_detr", "deformable_detr", "dab-detr", "table-transformer")
_NEEDED: dict[str, dict[str, Any]] = {
    "gemma3": _IMAGES, "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16]}, "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 12}, "longcat_flash": {"n_routed_experts": 16}, "esm": {"vocab_size": 33},
    "openai_privacy_filter": {"num_local_experts": 16},
    "voxtral": {"audio_token_id": 24},
    "perceiver": {"max_position_embeddings": _LENGTH}, "lfm2_moe": {"num_hidden_layers": 4},
    "qwen2_vl": {"vision_config": {"hidden_size": 8192}},
    "aria": {"vision_config": {"image_size": 490, "patch_size": 14}},
    "llama4": {"vision_config": {
        "hidden_size": 1408, "intermediate_size": 5632, "num_attention_heads": 16, "vision_output_dim": 4096,
        "image_size": 336,
    }},
    "mllama": {
        "vision_config": {"intermediate_layers_indices": [1], "vision_output_dim": 2560},
        "text_config": {"num_hidden_layers": 4, "cross_attention_layers": [3]},
    },
    "idefics3": {"vision_config": {"image_size": 364, "patch_size": 14}},
    "smolvlm": {"vision_config": {"image_size": 512, "patch_size": 16}, "scale_factor": 4},
    "modernvbert": {"vision_config": {"image_size": 512, "patch_size": 16}},
    "ultravbert": {"vision_config": {"image_size": 512, "patch_size": 16}},
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), _GLM), "glm4v_moe": {"text_config": {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5,
    }, "head_dim": 128}},
    "t5gemma2": {"encoder": _IMAGES}, "janus": {"vision_config": {"projection_dim": 4096}},
    "ovis2": {"hidden_size": 4096}, "lw_detr": {"backbone_config": {"num_hidden_layers": 10}},
    "shieldgemma2": _IMAGES, **dict.fromkeys(_DETRS, _RESNET),
    "rf_detr": {"backbone_config": {"num_hidden_layers": 12}},
    "aya_vision": {"vision_config": {"num_attention_heads": 16, "image_size": 364, "patch_size": 14}},
    "chameleon": {"vocabulary_map": {"<image>": 8711, "IMGIMGAZ": 4, "IMGIMGBZ": 5}},
    "emu3": {"vocabulary_map": {"<image>": 151851, "<|visual token 000000|>": 4, "<|visual token 000001|>": 5}},
    "blip-2": {"image_token_index": 50265}, "instructblip": {"image_token_index": 50265},
    "instructblipvideo": {"video_token_index": 50265},
}  # fmt: skip
"""What a default config lacks or has wrong: checkpoints of the model set it."""


class Case(NamedTuple):
    """A model type under a head."""

    head: str
    model_type: str
    architecture: str


class Row(NamedTuple):
    """What came of a case."""

    case: Case
    outcome: str
    """`traced`, or why not."""
    seconds: float


def list_cases() -> Iterator[Case]:
    """Yield every model type of transformers under every head that is trained."""
    for head, mapping in HEADS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in names if isinstance(names, (list, tuple)) else (names,):
                if model_type in configuration_auto.CONFIG_MAPPING_NAMES:
                    yield Case(head, model_type, name)


def shrink_config(model_type: str) -> Any:
    """Return the default config of a model type, cut to the fewest layers that hold every kind of layer."""
    kind = configuration_auto.CONFIG_MAPPING[model_type]
    changes = _shallow(kind(**_with_images(kind)))
    for name, value in _NEEDED.get(model_type, {}).items():
        changes[name] = changes.get(name, {}) | value if isinstance(value, dict) else value
    return kind(**changes)


def _with_images(kind: Any) -> dict[str, Any]:
    """Parts for images that a default config leaves out and every checkpoint has."""
    parts = {name: part for name, part in kind.sub_configs.items() if "vision" in name and "Auto" not in part.__name__}
    bare = kind() if parts else None
    return {name: part() for name, part in parts.items() if getattr(bare, name, None) is None}


def _own_numbers(config: Any) -> dict[str, Any]:
    """What a part of a config says otherwise than its own class would."""
    told, left = config.to_diff_dict(), ("transformers_version", "architectures", "dtype", "per_layer_config")
    return {name: one for name, one in told.items() if name not in left}


def _shallow(config: Any) -> dict[str, Any]:
    found = _fill_in(config)
    depth = _count_needed(config)
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            found[name] = {"model_type": value.model_type} | _own_numbers(value) | _shallow(value)
            text = vars(config).get("text_config")
            if "out_hidden_size" in vars(value) and text is not None and hasattr(text, "hidden_size"):
                found[name]["out_hidden_size"] = text.hidden_size
        elif config.attribute_map.get(name, name) in _DEPTHS and isinstance(value, int) and value > depth:
            found[name] = depth
        elif _lists_layers(config, name, value):
            found[name] = value[:depth]
    return found


def _fill_in(config: Any) -> dict[str, Any]:
    """Numbers that stand open in a default config and in no checkpoint's."""
    given = vars(config)  # an attribute that differs by layer refuses to be read
    heads = given.get("num_attention_heads")
    found: dict[str, Any] = {}
    if given.get("pad_token_id", 0) is None:
        found["pad_token_id"] = 0
    if isinstance(heads, int) and given.get("num_key_value_heads", 0) is None:
        found["num_key_value_heads"] = heads
    if isinstance(heads, int) and given.get("head_dim", 0) is None:
        found["head_dim"] = config.hidden_size // heads
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        found["decoder_start_token_id"] = 0
    return found


def _lists_layers(config: Any, name: str, value: Any) -> bool:
    layers = vars(config).get("num_hidden_layers", vars(config).get("num_layers"))
    return isinstance(value, list) and "layer" in name and len(value) > _DEPTH and len(value) == layers


def _count_needed(config: Any) -> int:
    period = max((value for name, value in vars(config).items() if _is_period(name, value)), default=0)
    needed = [_DEPTH, period]
    for name, value in vars(config).items():
        if _lists_layers(config, name, value) and isinstance(value[0], (str, int)):
            needed.append(1 + max(value.index(kind) for kind in set(value)))
    return max(needed)


def _is_period(name: str, value: Any) -> bool:
    return isinstance(value, int) and name.endswith(("_period", "_interval")) and 1 < value <= 8


def trace_case(case: Case, length: int = _LENGTH, dtype: str = "bf16") -> int:
    """Return the peak bytes of one training step of a shallow model.

    Raises:
        ProbeFailed: it does not trace.
    """
    config = find_config(case)
    workload, strategy = plan_case(case, length, dtype)
    kind = getattr(transformers, case.architecture)
    weights = torch.bfloat16 if dtype == "bf16" else torch.float32
    try:
        found = trace(workload, strategy, lambda: kind._from_config(config, dtype=weights), fold=False)
    except ProbeFailed as error:
        needed = error.facts.get("num_tokens", 0)
        if length <= needed < _LONGEST:
            return trace_case(case, needed + _LENGTH, dtype)
        raise
    return found.peak_allocated_bytes


def find_config(case: Case) -> Any:
    """Return the shallow config that a class takes: of a composed one, the part it is made for."""
    config, wanted = shrink_config(case.model_type), getattr(transformers, case.architecture).config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [one for one in vars(config).values() if isinstance(one, wanted)]
    return parts[0] if parts else config


def plan_case(case: Case, length: int = _LENGTH, dtype: str = "bf16") -> tuple[Workload, Strategy]:
    """Return full training of a model brim's formula need not know."""
    shape = ModelShape(
        name=case.model_type, model_type=case.model_type, architecture=case.architecture, hidden_size=1, vocab_size=1,
        max_position_embeddings=None, tie_word_embeddings=False, embeddings=(), groups=(), head=(),
        final_norm="rmsnorm",
    )  # fmt: skip
    batch = BatchTarget(sequences=2, tokens=256, low=1, high=2, min_useful=1, max_useful=2, reason="benchmark")
    workload = Workload(
        model=shape, data=DataProfile(seq_len=length, packing=True), batch=batch, task="fine-tuning",
        recipe=Recipe(
            method="full", weight_dtype=dtype, compute_dtype=dtype,  # type: ignore[arg-type]
            engine=Engine(name="transformers", evaluates=False),
        ),
        cluster=Cluster(device=find_device("h100-80gb")),
    )  # fmt: skip
    return workload, Strategy(micro_batch_size=_BATCH, gradient_accumulation_steps=1)


def run_cases(cases: list[Case]) -> Iterator[Row]:
    """Yield what comes of each case; none may take more than a minute."""
    signal.signal(signal.SIGALRM, _give_up)
    for case in cases:
        started = time.monotonic()
        signal.alarm(_SECONDS)
        try:
            outcome = _try_dtypes(case)
        except BrimError as error:
            outcome = str(error)
        except Exception as error:  # the default config, cut short, is refused by the model's own constructor
            outcome = f"no tiny config: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        finally:
            signal.alarm(0)
        yield Row(case, outcome[:300].replace("|", "/"), time.monotonic() - started)


def _try_dtypes(case: Case) -> str:
    """Some code runs in fp32 alone, on a card too."""
    try:
        trace_case(case)
    except ProbeFailed as error:
        if not any(words in str(error) for words in _DTYPE_WORDS):
            raise
        trace_case(case, dtype="fp32")
    return "traced"


def _give_up(_: int, __: FrameType | None) -> None:
    raise TimeoutError(f"more than {_SECONDS} s")


def write_table(rows: list[Row]) -> str:
    """Return the report: shares by head, then everything that does not trace and why."""
    traced = Counter(row.case.head for row in rows if row.outcome == "traced")
    total = Counter(row.case.head for row in rows)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    lines = [
        "# Architectures that trace", "",
        f"{versions}, Python {platform.python_version()}, {machine}. Every model type under every head that is trained,"
        " default config cut to two layers, full training in bf16, one step. One run of `benchmarks/architectures.py`,"
        f" {sum(row.seconds for row in rows) / 60:.0f} minutes.", "",
        "| head | traced | of | share |", "|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {head} | {traced[head]} | {total[head]} | {traced[head] / total[head]:.0%} |" for head in total]
    done, count, everything = sum(traced.values()), len(rows), len(list(list_cases()))
    if count < everything:
        lines.insert(4, f"The run was cut off after {count} of {everything} cases.\n")
    lines += [f"| all | {done} | {count} | {done / max(count, 1):.0%} |", "", "## What does not trace, and why", ""]
    lines += ["| head | model type | class | reason |", "|---|---|---|---|"]
    lines += [
        f"| {row.case.head} | {row.case.model_type} | {row.case.architecture} | {row.outcome} |"
        for row in rows if row.outcome != "traced"
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def _run_head(head: str, only: str, rows: Path) -> None:
    with rows.open("a", encoding="utf-8") as out:
        for row in run_cases([case for case in list_cases() if case.head == head and only in " ".join(case)]):
            print("\t".join((*row.case, row.outcome, f"{row.seconds:.2f}")), file=out, flush=True)


def read_rows(path: Path) -> list[Row]:
    """Return the rows a run has written so far, in order."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        *case, outcome, seconds = line.split("\t")
        rows.append(Row(Case(*case), outcome, float(seconds)))
    return rows


def main() -> None:
    """Trace everything, one head after the other in a process of its own, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose head, model type or class contains this")
    parser.add_argument("--rows", type=Path, default=Path("architectures.tsv"), help="where rows go as they come")
    parser.add_argument("--head", help="run this head alone and write rows only")
    parser.add_argument("--table", action="store_true", help="run nothing: write the table of the rows there are")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if given.head is not None:
        _run_head(given.head, given.only, given.rows)
        return
    if not given.table:
        given.rows.write_text("", encoding="utf-8")
        command = [sys.executable, __file__, "--only", given.only, "--rows", str(given.rows), "--head"]
        for head in HEADS:
            subprocess.run([*command, head], stderr=subprocess.DEVNULL, check=False)
    order = {case: index for index, case in enumerate(list_cases())}
    table = write_table(sorted(read_rows(given.rows), key=lambda row: order[row.case]))
    if given.only:
        print(table)
    else:
        RESULTS.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
