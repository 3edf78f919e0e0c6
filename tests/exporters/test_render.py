"""Every target: what it says, what it refuses, what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from export_plans import make_plan, make_recipe, make_shape, with_ranks

import brim
from brim.errors import Inexpressible, InvalidFile, InvalidStrategy, UnknownName
from brim.exporters import Export, ExportFile, export_plan, list_targets, write_export
from brim.exporters.script import format_literal
from brim.tables.dialects import list_dialects

TARGETS = list_targets()
METHODS = ("full", "lora", "qlora")
DIALECTS = [pytest.param(row, id=f"{row.target}-{row.name}") for row in list_dialects()]


def script_of(export: Export) -> str:
    return export.files[0].text


def plan_for(row, **knobs):
    """Return a plan that a dialect can express."""
    return make_plan(row.target, loss_kernel=next(iter(row.loss_kernels)), **knobs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", TARGETS)
def test_script_compiles_and_names_the_batch(target: str, method: str) -> None:
    export = export_plan(make_plan(target, method=method, **with_ranks(target, 2)), target)
    text = script_of(export)
    compile(text, "train.py", "exec")
    assert "micro-batch 4 x accumulation 8 x 2 ranks" in text
    assert "effective batch  64 sequences" in text
    assert "WORLD_SIZE 2" in text and "17.00 GiB" in text
    assert "per_device_train_batch_size=4" in text and "gradient_accumulation_steps=8" in text
    assert export.settings["per_device_train_batch_size"] * export.settings["gradient_accumulation_steps"] * 2 == 64


@pytest.mark.parametrize("row", DIALECTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_dialect_exports(row, method: str) -> None:
    if row.target == "trl" and row.name != "trl-1.15" and method == "qlora":
        pytest.skip("nothing more to see")
    export = export_plan(plan_for(row, method=method), row.target, version=row.since)
    compile(script_of(export), "train.py", "exec")
    assert export.dialect == row.versions
    dtype = {**export.outside, **export.keywords.get("model_init_kwargs", {})}
    assert dtype[row.dtype] == "bfloat16"
    assert export.keywords[row.checkpointing] is True
    assert export.outside["num_processes"] == 1


def test_what_is_always_written_explicitly() -> None:
    words = export_plan(make_plan("trl", method="qlora"), "trl").settings
    assert words["model_init_kwargs"] == {"dtype": "bfloat16", "attn_implementation": "sdpa"}
    assert words["max_length"] == 1024
    assert words["gradient_checkpointing"] is True
    assert words["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert (words["bf16"], words["fp16"]) == (True, False)
    assert words["per_device_eval_batch_size"] == words["per_device_train_batch_size"] == 4
    assert words["average_tokens_across_devices"] is True
    assert (words["packing"], words["padding_free"], words["report_to"]) == (False, False, "none")
    assert words["learning_rate"] == 2e-4
    assert words["peft_config"] == {
        "r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    assert words["quantization_config"] == {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip
    assert "ddp_find_unused_parameters" not in words
    assert export_plan(make_plan("trl", method="full"), "trl").keywords["learning_rate"] == 2e-5


def test_no_checkpointing_is_said_too() -> None:
    plan = make_plan("trl", activation_checkpointing="none")
    assert export_plan(plan, "trl").keywords["gradient_checkpointing"] is False


def test_warmup_is_steps_when_known_and_a_share_in_the_words_of_the_dialect_otherwise() -> None:
    assert export_plan(make_plan("transformers", warmup_steps=7), "transformers").keywords["warmup_steps"] == 7
    plan = make_plan("transformers", warmup_steps=None)
    assert export_plan(plan, "transformers").keywords["warmup_steps"] == 0.03
    old = export_plan(plan, "transformers", version="4.57.6").keywords
    assert old["warmup_ratio"] == 0.03 and "warmup_steps" not in old


def test_old_and_new_words() -> None:
    plan = make_plan("transformers")
    assert "activation_checkpointing" in export_plan(plan, "transformers", version="5.23.0").keywords
    assert "gradient_checkpointing" in export_plan(plan, "transformers", version="5.22.0").keywords
    assert export_plan(plan, "transformers", version="4.50.1").outside["torch_dtype"] == "bfloat16"
    dense = make_plan("trl", loss_kernel="dense")
    assert export_plan(dense, "trl", version="0.12.2").keywords["max_seq_length"] == 1024
    assert export_plan(dense, "trl", version="0.17").keywords["max_length"] == 1024
    assert export_plan(dense, "trl", version="1.9.0").keywords["loss_type"] == "nll"
    assert export_plan(make_plan("trl"), "trl", version="1.9.0").keywords["loss_type"] == "chunked_nll"


@pytest.mark.parametrize(
    ("target", "knobs", "said"),
    [
        ("transformers", {"activation_checkpointing": "selective"}, "activation checkpointing; use none or full"),
        ("transformers", {"loss_kernel": "chunked"}, "plan again with --trainer transformers"),
        ("trl", {"loss_kernel": "dense"}, "it has chunked: plan again with --trainer trl"),
        ("trl", {"zero_stage": 2}, "export to deepspeed"),
        ("accelerate", {"packing": True}, "packing; export to trl"),
        ("accelerate", {"padding_free": True}, "turn padding_free off"),
        ("transformers", {"activation_offload": True, "activation_checkpointing": "none"}, "use full checkpointing"),
        ("unsloth", {"activation_offload": True, "seq_len": 256}, "offloads from 512 tokens on"),
        ("unsloth", {"attention_kernel": "eager"}, "it chooses flash or sdpa itself"),
        ("deepspeed", {"offload": "optimizer"}, "at ZeRO stage 0; use stage 1 or higher"),
        ("transformers", {"optimizer_kernel": "loop"}, "kernels with a name: fused (adamw_torch_fused), foreach"),
    ],
)  # fmt: skip
def test_refusals(target: str, knobs: dict, said: str) -> None:
    with pytest.raises(Inexpressible) as caught:
        export_plan(make_plan(target, **knobs), target)
    assert said in str(caught.value)


def test_old_dialect_is_named_in_the_refusal() -> None:
    with pytest.raises(Inexpressible, match=r"trl \(trl>=0.23,<1.4\) cannot express the chunked loss"):
        export_plan(make_plan("trl"), "trl", version="0.24.0")


def test_encoders_are_refused() -> None:
    encoder = make_shape("bert-base-uncased", architecture="BertForMaskedLM")
    group = replace(encoder.groups[0], stack="encoder", attention=replace(encoder.groups[0].attention, causal=False))
    with pytest.raises(Inexpressible, match="BertForMaskedLM"):
        export_plan(make_plan(shape=replace(encoder, groups=(group,))), "trl")


def test_unknown_target_and_version() -> None:
    with pytest.raises(UnknownName, match="did you mean trl"):
        export_plan(make_plan(), "tlr")
    with pytest.raises(UnknownName, match=r"known: trl>=1\.15"):
        export_plan(make_plan(), "trl", version="0.1")
    with pytest.raises(UnknownName, match="known: "):
        export_plan(make_plan(), "trl", version="newest")


def test_a_plan_whose_product_is_wrong_is_refused() -> None:
    with pytest.raises(InvalidStrategy, match="is 32 sequences, not the plan's effective batch 48"):
        export_plan(replace(make_plan(), effective_batch_size=48), "trl")


def test_target_names_in_any_case() -> None:
    assert export_plan(make_plan(), "TRL").target == "trl"


@pytest.mark.parametrize("name", ['we"ird"""\n\\import os', "a'b\"c", "名/モデル", "\x1b[31mred"])
def test_hostile_names_stay_text(name: str) -> None:
    text = script_of(export_plan(make_plan(name=name), "trl"))
    compile(text, "train.py", "exec")
    space: dict = {}
    exec(next(line for line in text.splitlines() if line.startswith("MODEL = ")), space)
    assert space["MODEL"] == name


@pytest.mark.parametrize("value", ["a'b", 'a"b', "\n", "\\", (1,), [], {"a": ["b", None, 1.5]}, "\ud800", "\\'"])
def test_literals_read_back(value: object) -> None:
    assert eval(format_literal(value)) == value


def test_bare_sizes_export_the_card_they_stand_for() -> None:
    from brim.tables.read import list_sizes

    size = list_sizes()[0]
    assert f'MODEL = "{size.card}"' in script_of(export_plan(make_plan(name=size.name), "trl"))


def test_launch_lines() -> None:
    assert export_plan(make_plan("trl"), "trl").launch == "python train.py"
    two = {target: export_plan(make_plan(target, **with_ranks(target, 2)), target).launch for target in TARGETS}
    assert two["trl"] == two["transformers"] == two["unsloth"] == "torchrun --nproc-per-node 2 train.py"
    assert two["accelerate"] == "accelerate launch --config_file accelerate.yaml train.py"
    assert two["deepspeed"] == "deepspeed --no_local_rank --num_gpus 2 train.py"
    nodes = make_plan("trl", num_nodes=2, **with_ranks("trl", 16))
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d" in export_plan(nodes, "trl").launch


def test_replicas_say_how_ddp_runs() -> None:
    words = export_plan(make_plan("trl", **with_ranks("trl", 4)), "trl").settings
    assert words["ddp_find_unused_parameters"] is False and words["num_processes"] == 4


def test_adapters_are_cast_where_the_library_would_choose_otherwise() -> None:
    assert "cast_adapters" not in script_of(export_plan(make_plan("trl", method="qlora"), "trl"))
    recipe = make_recipe("qlora", "trl", "fp16")
    fp32 = replace(recipe, lora=replace(recipe.lora, dtype="fp32"))
    assert "cast_adapters(trainer.model)" in script_of(export_plan(make_plan("trl", recipe=fp32), "trl"))


def test_deepspeed_numbers_multiply_and_nothing_is_auto() -> None:
    for stage, offload in ((0, "none"), (1, "optimizer"), (2, "none"), (3, "parameters")):
        plan = make_plan("deepspeed", offload=offload, **with_ranks("deepspeed", 8, stage))
        export = export_plan(plan, "deepspeed")
        config = json.loads(next(file.text for file in export.files if file.name == "ds_config.json"))
        product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 8
        assert config["train_batch_size"] == product == plan.effective_batch_size
        assert config["zero_optimization"]["stage"] == stage
        assert "auto" not in json.dumps(config)
        assert config == export.keywords["deepspeed"]
        assert ("offload_param" in config["zero_optimization"]) == (offload == "parameters")


def test_accelerate_yaml_is_accelerates_own() -> None:
    import yaml

    one, two = (export_plan(make_plan("accelerate", **with_ranks("accelerate", n)), "accelerate") for n in (1, 2))
    config = yaml.safe_load(next(file.text for file in two.files if file.name == "accelerate.yaml"))
    assert config == two.keywords["accelerate"]
    assert (config["num_processes"], config["distributed_type"]) == (2, "MULTI_GPU")
    assert one.keywords["accelerate"]["distributed_type"] == "NO"


def test_sample_has_32_rows_of_prompt_and_completion() -> None:
    text = next(file.text for file in export_plan(make_plan(), "trl").files if file.name == "sample.jsonl")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 32 == len({row["prompt"] for row in rows})
    assert all(set(row) == {"prompt", "completion"} and row["completion"] for row in rows)


@pytest.mark.parametrize("target", TARGETS)
def test_written_files(target: str, tmp_path: Path) -> None:
    export = export_plan(make_plan(target), target)
    paths = write_export(export, tmp_path / "new" / "folder")
    assert paths[0].name == "train.py"
    assert {path.name: path.read_text(encoding="utf-8") for path in paths} == {
        file.name: file.text for file in export.files
    }
    assert {path.name for path in paths[0].parent.iterdir()} == {path.name for path in paths}


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    export = export_plan(make_plan(), "trl")
    broken = replace(export, files=(*export.files, ExportFile(name="broken", text="\ud800")))
    with pytest.raises(InvalidFile):
        write_export(broken, tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidFile):
        write_export(export, tmp_path / "file" / "below")


def test_exporters_load_no_framework() -> None:
    code = "import sys, brim.exporters; print({'torch', 'transformers', 'trl', 'jinja2', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=True)
    assert done.stdout.strip() == "set()"


def test_deepspeed_refuses_a_full_bf16_plan_without_masters() -> None:
    plan = make_plan("deepspeed", recipe=make_recipe("full", "transformers"))
    with pytest.raises(Inexpressible, match="full fine-tuning in bf16 without master weights; it keeps fp32 master"):
        export_plan(plan, "deepspeed")
    export_plan(make_plan("deepspeed", recipe=make_recipe("full", "transformers", "fp32")), "deepspeed")


def test_what_does_not_accumulate_exactly_is_said_where_it_is_exported() -> None:
    plan = brim.plan("gpt2", gpu="24GiB", trainer="transformers", method="full", micro_batch_size=2)
    assert [text for text in export_plan(plan, "transformers").notes if "brim.guard(trainer) makes it exact" in text]
    exact = brim.plan("meta-llama/Llama-3.1-8B", gpu="24GiB", trainer="transformers", method="qlora")
    assert not [text for text in export_plan(exact, "transformers").notes if "brim.guard" in text]


def test_deepspeed_says_what_it_makes_of_adapters() -> None:
    (note,) = export_plan(make_plan("deepspeed", method="lora"), "deepspeed").notes
    assert note == (
        "DeepSpeed casts the adapters to bf16 and keeps fp32 copies of them and of their gradients: up to 4 bytes per "
        "trained parameter more than planned."
    )
