"""The phases of a step, in the words of the formula where they mean the same."""

from __future__ import annotations

MODEL_PHASE = "model"
"""The model takes its memory; no moment of the step."""
FIRST_STEP = "first step"
"""All micro-batches before optimizer states are made."""
FORWARD, REFERENCE, LOSS = "forward of layers", "reference forward", "loss"
LOSS_BACKWARD, BACKWARD = "loss backward", "backward of layers"
OPTIMIZER_STEP, EVALUATION = "optimizer step", "evaluation"
END_OF_STEP = "end of step"
"""Between an optimizer step and the next micro-batch; no moment either."""
UNCOUNTED = (MODEL_PHASE, END_OF_STEP)
"""Phases that are no moments of the step."""
