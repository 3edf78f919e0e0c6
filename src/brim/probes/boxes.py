"""Object detection: targets with boxes, and who stands in for the solver that matches them with predictions."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import torch

BOXES_PER_IMAGE = 8
"""Objects in an image. Source: 7.3 a picture in COCO train2017 (Lin et al. 2014, Microsoft COCO, section 5)."""
_NOTE = f"images hold {BOXES_PER_IMAGE} boxes; boxes are matched with predictions in order, as scipy would by cost"


def make_targets(batch: int, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Return the targets of a micro-batch as processors of DETR's kind make them: classes and boxes, image by image."""
    return [
        {
            "class_labels": torch.zeros(BOXES_PER_IMAGE, dtype=torch.long),
            "boxes": torch.full((BOXES_PER_IMAGE, 4), 0.5, dtype=dtype),
            "image_id": torch.tensor([index]), "orig_size": torch.tensor([480, 640]),
        }
        for index in range(batch)
    ]  # fmt: skip


def reads_targets(model: Any) -> bool:
    """Whether a model's labels are boxes."""
    return type(model).__name__.endswith("ForObjectDetection")


@contextlib.contextmanager
def match_in_order(model: Any) -> Iterator[list[str]]:
    """Replace the solver of assignments in transformers' detection losses, and yield what to say about it.

    Scipy reads costs that nobody knows, on the host; who is matched changes no tensor's size.

    Source: transformers loss/loss_for_object_detection.py HungarianMatcher and those of its kind.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = _loss_modules() if reads_targets(base) else []
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(_replaced(module, _functions()))
            for kind in vars(module).values():
                if isinstance(kind, type) and issubclass(kind, torch.nn.Module) and kind.__module__ == module.__name__:
                    stack.enter_context(_replaced(kind, {"to": _stay}))
        yield [_NOTE] if modules else []


@contextlib.contextmanager
def _replaced(owner: Any, names: dict[str, Any]) -> Iterator[None]:
    kept = {name: vars(owner)[name] for name in names if name in vars(owner)}
    for name, value in names.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in names:
            if name in kept:
                setattr(owner, name, kept[name])
            else:
                delattr(owner, name)


def _functions() -> dict[str, Any]:
    """What the losses take from scipy, and from transformers' image code only where PIL is installed."""
    from transformers.image_transforms import center_to_corners_format, corners_to_center_format

    return {
        "linear_sum_assignment": _assign_in_order, "requires_backends": lambda *_: None,
        "center_to_corners_format": center_to_corners_format, "corners_to_center_format": corners_to_center_format,
    }  # fmt: skip


def _stay(criterion: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
    """A loss is on the device already, and fake parameters that are followed do not move."""
    return criterion


def _loss_modules() -> list[Any]:
    import transformers.loss

    names = [one.name for one in pkgutil.iter_modules(transformers.loss.__path__, "transformers.loss.")]
    return [importlib.import_module(name) for name in names if name.startswith("transformers.loss.loss_")]


def _assign_in_order(costs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of an assignment, rows ascending. Source: scipy.optimize.linear_sum_assignment, its answer."""
    count = min(costs.shape)
    return torch.arange(count), torch.arange(count)
