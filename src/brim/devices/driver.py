"""What drives the card."""

from __future__ import annotations

import importlib.util


def read_driver(on_cpu: bool) -> str | None:
    """Return the release of the GPU's driver; None on a CPU, or where NVML is not there to ask."""
    if on_cpu or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        found = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    return found.decode() if isinstance(found, bytes) else str(found)  # bytes before bindings 11.5
