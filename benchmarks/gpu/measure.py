#!/usr/bin/env python3
"""Measure what training steps take on this GPU: allocated, reserved and device bytes, step time, out-of-memory.

    python measure.py                              all cases of cases.jsonl, rows appended to measured.jsonl
    python measure.py --only qlora --out rows.jsonl
    python measure.py --capacity 24                every case as on a 24 GB card
    python measure.py --dry-run                    what would run here, and what is missing for the rest
    python measure.py --device cpu --cases tiny.jsonl --out rows.jsonl     a smoke run without a GPU

Needs torch and transformers, peft for adapters, bitsandbytes for 4-bit bases and 8-bit optimizers; nothing of brim.
Weights are random and no hub is asked: configs.json has the models. Every case runs in a process of its own, so one
that dies or hangs costs only itself. A case that is in the output, or failed before, is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FRAMEWORK = "plain PyTorch loop, transformers 5 model"
Row = dict[str, Any]
Outcome = dict[str, Any]
_NARROW = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_STEPS, _WARM_STEPS = 4, 2


# --- One case, in a process of its own ---------------------------------------------------------------------------


def run_case(case: Row, device: str) -> Outcome:
    """Train a few optimizer steps and return what they took; `{"oom": true}` where the card was too small."""
    import torch

    outside = _cap(case, device) if device == "cuda" else 0
    try:
        model, optimizer = build(case, device)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = train(case, model, optimizer, device)
    except torch.OutOfMemoryError:
        return {"oom": True, **describe(device)}
    return {**read_counters(device, outside), **seconds, **describe(device)}


def _cap(case: Row, device: str) -> int:
    """Leave the process as much as a smaller card would, its context included; return bytes others hold here."""
    import torch

    torch.zeros(1, device=device)
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    others = max(0, case.get("others_bytes", 0))
    capacity = case["gpu"]["memory_bytes"]
    if capacity and capacity < total:
        share = (capacity - (context - others)) / total
        torch.cuda.set_per_process_memory_fraction(max(share, 0.0))
    return others


def build(case: Row, device: str) -> tuple[Any, Any]:
    """Return the model with random weights on the device, adapted and checkpointed as the case says, and AdamW."""
    import torch
    import transformers

    config = dict(json.loads((HERE / "configs.json").read_text(encoding="utf-8"))[case["model"]["name"]])
    kind = getattr(transformers, config["architectures"][0])
    known = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    known.use_cache = False
    dtype = getattr(torch, _NARROW[case["weight_dtype"]])
    with torch.device("meta"):
        model = kind._from_config(known, dtype=dtype, attn_implementation=case["attention"])
    materialise(model, device, case["quantization"])
    model.train()
    if case["activation_checkpointing"] == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case["lora"]:
        model = adapt(model, case["lora"])
    return model, make_optimizer(model, case["optimizer"])


def materialise(model: Any, device: str, quantization: str | None) -> None:
    """Give a model on the meta device random weights, one tensor at a time: a 4-bit base never exists in 16 bit."""
    import torch

    if quantization:
        _quantise(model, device, quantization)
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    values = torch.empty_like(parameter, device=device, requires_grad=False).normal_(0, 0.02)
                    made[id(parameter)] = torch.nn.Parameter(values, parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                value = 0.01 if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full_like(buffer, value, device=device)


def _quantise(model: Any, device: str, kind: str) -> None:
    """Replace every linear layer but the head by bitsandbytes' 4-bit one, as transformers does when it loads."""
    import bitsandbytes
    import torch

    quant_type, double = kind.split("-")[1], kind.endswith("-dq")
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear or linear is head:
                continue
            new = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype,
                compress_statistics=double, quant_type=quant_type, device="meta",
            )  # fmt: skip
            values = torch.empty_like(linear.weight, device=device, requires_grad=False).normal_(0, 0.02)
            new.weight = bitsandbytes.nn.Params4bit(
                values, requires_grad=False, compress_statistics=double, quant_type=quant_type, module=new
            ).to(device)
            if linear.bias is not None:
                new.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
            setattr(parent, name, new)
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def adapt(model: Any, lora: Row) -> Any:
    """Return the model under PEFT's adapter, in fp32 as PEFT makes it."""
    import peft

    config = peft.LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules=lora["target_modules"])
    return peft.get_peft_model(model, config)


def make_optimizer(model: Any, name: str) -> Any:
    """Return AdamW over what trains: PyTorch's foreach or fused kernel, or bitsandbytes' 8-bit one."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw_bnb_8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(trained, lr=1e-5)
    fused = name == "adamw_torch_fused"
    return torch.optim.AdamW(trained, lr=1e-5, fused=fused, foreach=not fused)


def train(case: Row, model: Any, optimizer: Any, device: str) -> Outcome:
    """Run optimizer steps; return median seconds of a micro-batch and of what a step costs besides."""
    micro, update = [], []
    for index in range(_STEPS + _WARM_STEPS):
        times = list(_time_step(case, model, optimizer, device))
        if index >= _WARM_STEPS:
            micro += times[:-1]
            update.append(times[-1])
    micro_seconds, fixed_seconds = statistics.median(micro), statistics.median(update)
    return {
        "micro_batch_seconds": micro_seconds, "fixed_seconds": fixed_seconds,
        "step_seconds": fixed_seconds + case["gradient_accumulation_steps"] * micro_seconds,
    }  # fmt: skip


def _time_step(case: Row, model: Any, optimizer: Any, device: str) -> Iterator[float]:
    """Yield the seconds of each micro-batch and of the update; logits are dropped before the backward pass."""
    import torch

    count = case["gradient_accumulation_steps"]
    narrow = getattr(torch, _NARROW[case["compute_dtype"]])
    for _ in range(count):
        start = _now(device)
        shape = (case["micro_batch_size"], case["seq_len"])
        ids = torch.randint(0, case["model"]["vocab_size"], shape, device=device)
        with torch.autocast(device, narrow, enabled=case["autocast"]):
            loss = model(input_ids=ids, labels=ids).loss / count
        loss.backward()
        del loss, ids
        yield _now(device) - start
    start = _now(device)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    yield _now(device) - start


def _now(device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def read_counters(device: str, others_bytes: int) -> Outcome:
    """Return the counters: the allocator's two peaks and the card's use, or the process's memory without a card."""
    import torch

    if device == "cuda":
        free, total = torch.cuda.mem_get_info()  # what is reserved stays so to the end: the end is the peak
        return {
            "allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved(),
            "device": total - free - others_bytes,
        }  # fmt: skip
    import resource

    return {"unspecified": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def describe(device: str) -> Outcome:
    """Return the card, its driver and the versions of what ran."""
    import torch

    names = ("torch", "transformers", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {found}" for name in names if (found := _version(name)))
    if device != "cuda":
        return {"gpu": None, "memory_bytes": None, "version": f"{versions}, Python {platform.python_version()}"}
    card = torch.cuda.get_device_properties(0)
    return {
        "gpu": card.name, "memory_bytes": card.total_memory,
        "version": f"{versions}, CUDA {torch.version.cuda}, driver {_query('driver_version')}",
    }  # fmt: skip


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _query(field: str) -> str:
    """Return one field of nvidia-smi for the first card; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# --- All cases ---------------------------------------------------------------------------------------------------


def make_rows(case: Row, outcome: Outcome) -> list[Row]:
    """Return the rows of a case in the schema of ../truth/README.md: one a counter, or one that ran out of memory."""
    capacity = case["gpu"]["memory_bytes"] or outcome["memory_bytes"]
    filled = {
        **case,
        "gpu": {"name": outcome["gpu"], "memory_bytes": capacity},
        "framework": {
            "name": FRAMEWORK, "version": outcome["version"], "date": datetime.date.today().isoformat(),
        },
        "source": "benchmarks/gpu/measure.py",
    }  # fmt: skip
    if outcome.get("oom"):
        return [{**filled, "id": f"{case['id']}#oom", "tier": "oom", "measured": {"oom": True}}]
    if outcome["gpu"] is None:
        filled |= {"tier": "weak", "notes": "smoke run on a CPU: resident memory of the process, no GPU measurement"}
    filled["tokens_per_second"] = _count_tokens(case, outcome)
    times = {key: outcome[key] for key in ("micro_batch_seconds", "fixed_seconds", "step_seconds")}
    meters = [meter for meter in ("allocated", "reserved", "device", "unspecified") if meter in outcome]
    return [
        {**filled, "id": f"{case['id']}#{meter}", "weight": case["weight"] / len(meters),
         "measured": {"meter": meter, "low_bytes": outcome[meter], "high_bytes": outcome[meter], **times}}
        for meter in meters
    ]  # fmt: skip


def _count_tokens(case: Row, outcome: Outcome) -> Row:
    tokens = case["micro_batch_size"] * case["gradient_accumulation_steps"] * case["seq_len"]
    speed = tokens / outcome["step_seconds"]
    return {"low": speed, "high": speed, "basis": "step time"}


def find_obstacle(case: Row, total_bytes: int | None) -> str | None:
    """Return why a case cannot run here, None if it can.

    Args:
        case: the case.
        total_bytes: what the card has; None without a card.
    """
    needed = ["peft"] if case["lora"] else []
    needed += ["bitsandbytes"] if case["quantization"] or case["optimizer"] == "adamw_bnb_8bit" else []
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}"
    capacity = case["gpu"]["memory_bytes"]
    if total_bytes is not None and capacity and capacity > total_bytes * 1.02:
        return f"needs a card of {capacity / 1e9:.0f} GB, this one has {total_bytes / 1e9:.0f} GB"
    return None


def run_alone(case: Row, device: str, timeout_seconds: float) -> Outcome:
    """Run a case in a child process; return its outcome, or `{"failed": why}` where it died or hung."""
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder, "case.json"), Path(folder, "outcome.json")
        question.write_text(json.dumps(case), encoding="utf-8")
        command = [sys.executable, __file__, "--child", str(question), str(answer), "--device", device]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"no answer within {timeout_seconds:g} s"}
        if answer.exists():
            return json.loads(answer.read_text(encoding="utf-8"))
        lines = ended.stderr.strip().splitlines() or ["no message"]
        return {"failed": f"exit status {ended.returncode}: {lines[-1]}"}


def read_lines(path: Path) -> list[Row]:
    """Return the objects of a JSON-lines file, none if it is not there; a line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_lines(path: Path, rows: Iterable[Row]) -> None:
    """Append objects to a JSON-lines file at once, on a line of their own whatever stands before."""
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        text = file.read()
        start = "\n" if text and not text.endswith("\n") else ""
        file.write(start + "".join(json.dumps(row) + "\n" for row in rows))


def measure(cases: Sequence[Row], options: argparse.Namespace) -> int:
    """Run what has not run, append rows and failures, and return how many cases failed."""
    failures = options.out.with_suffix(".failed.jsonl")
    done = {row["id"].partition("#")[0] for row in read_lines(options.out)}
    done |= {row["id"] for row in read_lines(failures)} if not options.retry else set()
    total = _query("memory.total") if options.device == "cuda" else ""
    num_failed = 0
    for case in cases:
        obstacle = find_obstacle(case, int(float(total)) * 2**20 if total else None)
        if case["id"] in done or obstacle or options.dry_run:
            print(f"{case['id']}: {'done' if case['id'] in done else obstacle or 'would run'}", flush=True)
            continue
        used = _query("memory.used") if options.device == "cuda" else ""
        case = {**case, "others_bytes": int(float(used)) * 2**20 if used else 0}
        outcome = run_alone(case, options.device, options.timeout)
        del case["others_bytes"]
        if "failed" in outcome:
            num_failed += 1
            append_lines(failures, [{"id": case["id"], **outcome}])
        else:
            append_lines(options.out, make_rows(case, outcome))
        print(f"{case['id']}: {_summarise(outcome)}", flush=True)
    return num_failed


def _summarise(outcome: Outcome) -> str:
    if "failed" in outcome:
        return f"failed, {outcome['failed']}"
    if outcome.get("oom"):
        return "out of memory"
    meters = [meter for meter in ("allocated", "reserved", "device", "unspecified") if meter in outcome]
    return ", ".join(f"{meter} {outcome[meter] / 2**30:.2f} GiB" for meter in meters)


def cap_cases(cases: Iterable[Row], capacity_gb: float | None) -> list[Row]:
    """Return the cases as on a card of so many GB (1e9 bytes), under names of their own."""
    if capacity_gb is None:
        return list(cases)
    return [
        {**case, "id": f"{case['id']}/on-{capacity_gb:g}gb",
         "gpu": {**case["gpu"], "memory_bytes": round(capacity_gb * 1e9)}}
        for case in cases
    ]  # fmt: skip


def main() -> int:
    """Run the command line; the exit status is 1 where a case failed otherwise than by running out of memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=Path, default=HERE / "cases.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "measured.jsonl")
    parser.add_argument("--only", default="", help="cases whose id has this word")
    parser.add_argument("--capacity", type=float, help="GB (1e9 bytes) to leave each case, as a smaller card would")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a case may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="run nothing, say what would")
    parser.add_argument("--retry", action="store_true", help="run again what failed before")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("CASE", "OUTCOME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case = json.loads(options.child[0].read_text(encoding="utf-8"))
        options.child[1].write_text(json.dumps(run_case(case, options.device)), encoding="utf-8")
        return 0
    cases = cap_cases(read_lines(options.cases), options.capacity)
    return 1 if measure([case for case in cases if options.only in case["id"]], options) else 0


if __name__ == "__main__":
    sys.exit(main())
