"""Exports held against the installed frameworks: config classes instantiated, scripts run on the CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from export_plans import make_plan, make_recipe, with_ranks

from brim.exporters import export_plan, write_export

SMALL = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "seq_len": 96, "method": "lora"}
KNOBS = [{"activation_checkpointing": kind} for kind in ("none", "full")]


@pytest.mark.parametrize("knobs", KNOBS)
def test_training_arguments_reads_the_numbers_back(knobs: dict, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.23")
    words = export_plan(make_plan("transformers", **knobs), "transformers").keywords
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **words)
    assert arguments.train_batch_size == arguments.eval_batch_size == 4
    assert arguments.gradient_accumulation_steps == 8
    assert arguments.activation_checkpointing is (knobs["activation_checkpointing"] == "full")
    assert arguments.average_tokens_across_devices is True
    assert (arguments.warmup_steps, arguments.num_train_epochs, arguments.report_to) == (5, 2.0, [])
    assert arguments.optim == "adamw_torch_fused" and arguments.bf16 is True


@pytest.mark.parametrize("knobs", [*KNOBS, {"activation_checkpointing": "selective"}])
def test_sft_config_reads_the_numbers_back(knobs: dict, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16")
    words = export_plan(make_plan("trl", **knobs), "trl").keywords
    config = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, **words)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 8)
    assert (config.max_length, config.packing, config.padding_free, config.loss_type) == (1024, False, False, "nll")
    assert config.gradient_checkpointing is (knobs["activation_checkpointing"] != "none")
    assert config.model_init_kwargs == {"dtype": "bfloat16", "attn_implementation": "sdpa"}


def test_lora_config_takes_the_words() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**export_plan(make_plan("trl"), "trl").outside["peft_config"])
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (16, 32, {"q_proj", "v_proj"})


def test_accelerate_reads_its_yaml(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate.commands.config.config_args import load_config_from_file

    export = export_plan(make_plan("accelerate", **with_ranks("accelerate", 2)), "accelerate")
    path = next(path for path in write_export(export, tmp_path) if path.suffix == ".yaml")
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.mixed_precision) == (2, "bf16")
    assert config.distributed_type.value == "MULTI_GPU"


def test_trl_script_trains_two_steps(tiny_model: Path, tmp_path: Path, run_script) -> None:
    pytest.importorskip("trl", minversion="1.16")
    plan = make_plan("trl", activation_checkpointing="selective", **SMALL)
    write_export(export_plan(plan, "trl"), tmp_path)
    done = run_script(["train.py", "--model", str(tiny_model), "--max-steps", "2", "--output-dir", "out"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "effective batch 4 sequences = 2 x 2 x 1" in done.stdout
    assert "dry run on the CPU" in done.stdout
    assert done.stdout.count("'grad_norm'") == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_scripts_refuse_in_one_line(tiny_model: Path, tmp_path: Path, run_script) -> None:
    pytest.importorskip("trl", minversion="1.16")
    write_export(export_plan(make_plan("trl", method="qlora"), "trl"), tmp_path)
    several = run_script(["train.py"], WORLD_SIZE="2", RANK="0")
    assert several.returncode == 2
    assert several.stderr == (
        "error: planned for WORLD_SIZE 1, started with 2: that changes the effective batch\n"
    )
    quantised = run_script(["train.py", "--model", str(tiny_model)])
    assert quantised.returncode == 2
    assert quantised.stderr.startswith("error: QLoRA needs a CUDA GPU and bitsandbytes")
    assert quantised.stderr.count("\n") == 1
    script = tmp_path / "train.py"
    script.write_text(script.read_text().replace("gradient_accumulation_steps=8", "gradient_accumulation_steps=4"))
    edited = run_script(["train.py"])
    assert edited.stderr == "error: micro-batch 4 x accumulation 4 x 1 ranks is not 32\n"
    script.write_text(script.read_text().replace("gradient_accumulation_steps=4", "gradient_accumulation_steps=8"))
    script.write_text(script.read_text().replace('"trl>=1.15"', '"trl>=99"'))
    assert "this script is written for trl>=99" in run_script(["train.py"]).stderr


@pytest.fixture
def accelerate_script(tmp_path: Path) -> Iterator[ModuleType]:
    """Return the exported loop as a module."""
    pytest.importorskip("accelerate")
    recipe = make_recipe("full", "accelerate", "fp32")
    plan = make_plan("accelerate", recipe=recipe, activation_checkpointing="none", seq_len=96)
    path = write_export(export_plan(plan, "accelerate"), tmp_path)[0]
    spec = importlib.util.spec_from_file_location("exported_loop", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["exported_loop"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["exported_loop"]


def test_accelerate_accumulation_is_exact(accelerate_script: ModuleType, tiny_model: Path) -> None:
    """The gradient of 8 micro-batches of 1 is that of one micro-batch of 8, though lengths differ."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

    script, accelerator = accelerate_script, Accelerator(cpu=True)
    tokenizer = script.load_tokenizer(str(tiny_model))
    rows = [{"prompt": "what is this ", "completion": "three things " * (size + 1)} for size in range(8)]
    tokens = [script.tokenize(row, tokenizer) for row in rows]
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    gradients, losses = [], []
    for micro in (8, 2, 1):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        window = [collate(tokens[start : start + micro]) for start in range(0, 8, micro)]
        losses.append(script.train_step(accelerator, accelerator.prepare(model), window))
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() < 2e-5 * gradients[0].norm()
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)


def test_only_completions_are_targets(accelerate_script: ModuleType, tiny_model: Path) -> None:
    script = accelerate_script
    tokenizer = script.load_tokenizer(str(tiny_model))
    row = script.tokenize({"prompt": "what is this ", "completion": "a text"}, tokenizer)
    targets = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(targets) == "a text</s>"
    assert row["input_ids"][-len(targets) :] == targets
    talk = [{"role": "user", "content": "list three"}, {"role": "assistant", "content": "one two"}]
    row = script.tokenize({"messages": talk}, tokenizer)
    assert tokenizer.decode([token for token in row["labels"] if token != -100]) == " one two</s>"
    whole = script.tokenize({"text": "translate"}, tokenizer)
    assert tokenizer.decode([token for token in whole["labels"] if token != -100]) == "translate</s>"
    assert len(script.tokenize({"prompt": "", "completion": "three " * 500}, tokenizer)["input_ids"]) == 96


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "knobs"),
    [
        ("transformers", {}),
        ("transformers", {"padding_free": True, "activation_checkpointing": "none"}),
        ("accelerate", {"activation_checkpointing": "selective"}),
        ("trl", {"padding_free": True, "activation_checkpointing": "full"}),
        ("trl", {"packing": True, "activation_checkpointing": "none"}),
    ],
)
def test_other_scripts_train_two_steps(target: str, knobs: dict, tiny_model: Path, tmp_path: Path, run_script) -> None:
    pytest.importorskip("trl", minversion="1.16")
    write_export(export_plan(make_plan(target, **SMALL, **knobs), target), tmp_path)
    done = run_script(["train.py", "--model", str(tiny_model), "--max-steps", "2", "--output-dir", "out"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["trl", "transformers", "accelerate"])
def test_two_ranks_train(target: str, tiny_model: Path, tmp_path: Path, run_script) -> None:
    pytest.importorskip("trl", minversion="1.16")
    write_export(export_plan(make_plan(target, **SMALL, **with_ranks(target, 2)), target), tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["train.py", "--model", str(tiny_model), "--max-steps", "2", "--output-dir", "out"]
    done = run_script([*launcher, *arguments])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "effective batch 8 sequences = 2 x 2 x 2" in done.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
