"""Tapes from the last layer to the loss: final norm, output matrix, cross-entropy.

The logits chain is often the peak: one sequence of 4,096 tokens times 128,256 vocabulary entries is 2.1 GB in fp32.
"""

from __future__ import annotations

from brim.cost.dropout_masks import drop_out
from brim.cost.layers import stream_bytes
from brim.cost.norms import normalise
from brim.cost.projection import project
from brim.cost.setting import Setting
from brim.cost.tape import ZERO, Tape, Tensor, fixed, per_token
from brim.spec.device import BLOCK_BYTES
from brim.spec.model import Linear, ModelShape
from brim.spec.recipe import Engine
from brim.spec.strategy import LossKernel

# trl/trainer/utils.py _CHUNKED_LOGPROB_CHUNK_SIZE and trl/kernels/chunked_logprob.py TOKEN_CHUNK_SIZE (trl 1.16)
CHUNK_VOCABULARY = 32_768
CHUNK_TOKENS = 4_096


def record_head(shape: ModelShape, setting: Setting, engine: Engine, loss: LossKernel) -> tuple[Tape, Tensor]:
    """Return the tape from the last layer's output to the loss, and that output."""
    tape = Tape()
    stream = Tensor("last layer output", per_token(shape.hidden_size * stream_bytes(shape.final_norm, setting)))
    normed = stream
    if setting.code.norm_order != "after":  # BERT's and BART's layers end in a normalisation of their own
        normed = normalise(tape, stream, shape.hidden_size, shape.final_norm, setting)
    if setting.code.drops_output:
        normed = drop_out(tape, normed, shape.hidden_size, setting.dropout.hidden_dropout)
    normed.held = True  # the model's forward holds its last hidden state until it returns
    if not shape.head or _pools(shape):
        _pool(tape, normed, shape, setting)
        return tape, stream
    x = normed
    for linear in shape.head[:-1]:
        x = project(tape, x, linear, setting)
    output = shape.head[-1]
    if loss == "dense":
        _dense(tape, x, output, shape, setting, engine)
    elif loss == "chunked":
        (_kept_chunks if engine.keeps_loss_chunks else _chunked)(tape, x, output, setting, engine)
    else:
        _fused(tape, x, output, setting)
    return tape, stream


def _pools(shape: ModelShape) -> bool:
    """Whether the head reads one position of a sequence: classes of encoders and of images."""
    encodes = all(group.stack != "decoder" for group in shape.groups)
    return encodes and shape.architecture.endswith(("ForSequenceClassification", "ForImageClassification"))


def _pool(tape: Tape, x: Tensor, shape: ModelShape, setting: Setting) -> None:
    """One position of each sequence, whose logits take one block; gradients of the head's matrices take more."""
    trained = sum(linear.num_parameters for linear in shape.head) if setting.trains_base else 0
    tape.op("pooling", [x], fixed(BLOCK_BYTES), weight_grad=fixed(setting.weight_bytes * trained))


def _dense(
    tape: Tape, x: Tensor, linear: Linear, shape: ModelShape, setting: Setting, engine: Engine
) -> None:
    """All logits at once: 16-bit product, fp32 copy, log-softmax kept for backward.

    Source: transformers loss/loss_utils.py ForCausalLMLoss; aten nll_loss and log_softmax backward each make a
    tensor of the logits' shape. Before 4.50 the shifted logits were copied once more.
    """
    c, vocabulary = setting.compute_bytes, linear.out_features
    logits = project(tape, x, linear, setting, is_output=True)
    logits.held = not engine.frees_narrow_logits
    if shape.logit_softcap:
        logits.held = False  # one variable takes each result in turn; models/gemma2 Gemma2ForCausalLM.forward
        for step in ("softcap scale", "softcap tanh", "softcap"):
            logits = tape.op(step, [logits], per_token(c * vocabulary), saves_output=step == "softcap tanh")
        logits.held = not engine.frees_narrow_logits
    wide = c
    if engine.upcasts_logits and c < 4:
        wide, logits = 4, tape.op("logits fp32", [logits], per_token(4 * vocabulary), held=True)
    if engine.copies_shifted_logits:
        logits = tape.op("logits shift", [logits], per_token(wide * vocabulary), grad_scratch=ZERO)
    if setting.loss_in_place:  # the kernel keeps a log-sum-exp and writes the gradient over the logits
        tape.op("cross-entropy", [logits], per_token(4), saves=[logits], grad_in_place=True)
        return
    log_probabilities = tape.op("log-softmax", [logits], per_token(wide * vocabulary), saves_output=True)
    tape.op("nll", [log_probabilities], per_token(4))


def _kept_chunks(tape: Tape, x: Tensor, linear: Linear, setting: Setting, engine: Engine) -> None:
    """Logits in chunks whose log-probabilities are all kept: only the temporaries are a chunk's.

    Source: lit_gpt/utils.py chunked_cross_entropy; torchtune modules/loss/ce_chunked_output_loss.py.
    """
    c, vocabulary = setting.compute_bytes, linear.out_features
    logits = project(tape, x, linear, setting, is_output=True)
    logits.held = not engine.frees_narrow_logits
    if engine.frees_narrow_logits:  # a wrapper casts the whole output: Lightning Fabric plugins/precision/half.py
        logits = tape.op("logits fp32", [logits], per_token(4 * vocabulary), held=True)
    wide = 4 if engine.upcasts_logits else c
    kept = tape.op("chunk log-softmax", [logits], per_token(wide * vocabulary), saves_output=True)
    tape.op("chunked loss", [kept], per_token(4))


def _chunked(tape: Tape, x: Tensor, linear: Linear, setting: Setting, engine: Engine) -> None:
    """Logits in tiles of 4,096 tokens x 32,768 entries, recomputed in backward; gradients accumulate in fp32.

    Source: trl/kernels/chunked_logprob.py _ChunkedLogProbFunction (1.16).
    """
    c, hidden = setting.compute_bytes, linear.in_features
    tile = fixed(c * CHUNK_TOKENS * CHUNK_VOCABULARY)  # whatever the vocabulary
    kept = tape.op("scored positions", [x], per_token(c * hidden))
    weight_grad = linear.num_parameters if setting.trains_base else 0
    tape.op(
        "chunked loss", [kept], per_token(4 * 8), saves=[kept], scratch=tile,
        grad_scratch=tile + per_token(4 * hidden) + fixed(4 * weight_grad),
        weight_grad=fixed(setting.weight_bytes * weight_grad),
    )  # fmt: skip


def _fused(tape: Tape, x: Tensor, linear: Linear, setting: Setting) -> None:
    """Logits never stored: gradients are computed in the forward pass, chunk by chunk, and kept.

    Source: Liger-Kernel ops/fused_linear_cross_entropy.py: as many chunks as the vocabulary is times wider than the
    hidden size, so one chunk's logits take about the bytes of the input; the input's gradient is stored.
    """
    c, hidden = setting.compute_bytes, linear.in_features
    weight_grad = linear.num_parameters if setting.trains_base else 0
    chunk = per_token(2 * c * hidden + 4 * hidden)
    stored = tape.op("fused loss gradient", (), per_token(c * hidden), saves_output=True, needs_grad=True)
    tape.op(
        "fused loss", [x], per_token(4), saves=[stored], scratch=chunk + fixed(setting.weight_bytes * weight_grad),
        weight_grad=fixed(setting.weight_bytes * weight_grad),
    )  # fmt: skip
