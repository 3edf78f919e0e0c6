"""The machine around brim: versions without importing anything, GPUs as the driver names them, settings."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec

from brim import __version__
from brim.errors import BrimError
from brim.units import format_size
from brim.versions import find_version

PACKAGES = (
    "typer", "rich", "pydantic", "pyyaml", "jinja2", "huggingface_hub", "torch", "transformers", "trl", "peft",
    "accelerate", "bitsandbytes", "datasets", "tokenizers", "unsloth", "deepspeed", "liger-kernel", "flash-attn",
    "nvidia-ml-py",
)  # fmt: skip
# Settings that decide what is found or how memory is allocated; a secret is only said to be there.
SETTINGS = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "NO_COLOR",
    "BRIM_HISTORY",
)  # fmt: skip
_SHOWN = frozenset({
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
})  # fmt: skip


def read_surroundings() -> dict[str, str]:
    """Return the facts of this installation, in reading order."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {"brim": __version__, **{name: read_version(name) for name in PACKAGES}}
    return {**facts, "gpu": _read_gpus(), **{name: _read_setting(name) for name in SETTINGS}}


def read_version(package: str) -> str:
    """Return the installed version of a package, `-` if it is not installed."""
    return find_version(package) or "-"


def _read_setting(name: str) -> str:
    value = os.environ.get(name)
    return "-" if value is None else value if name in _SHOWN else "set"


def _read_gpus() -> str:
    if find_spec("pynvml") is None:
        return "unknown: nvidia-ml-py is not installed (pip install 'brim[gpu]')"
    from brim.readers.nvml import read_live_devices

    try:
        devices, teller = read_live_devices()
    except BrimError as error:
        return str(error)
    sizes = (f"{row.name} {format_size(row.total_bytes)}, {format_size(row.free_bytes)} free" for row in devices)
    return f"{'; '.join(sizes)} ({teller})"
