"""Tapes of attention: projections, positions, and the kernel.

Read from transformers 5.23 models/*/modeling_*.py and integrations/sdpa_attention.py, and torch 2.13.
Leaves out: fused kernels keep the seed of attention's dropout, 16 bytes.
"""

from __future__ import annotations

from brim.cost.attention_kernels import AttentionCall, choose_kernel
from brim.cost.dropout_masks import drop_out
from brim.cost.norms import normalise
from brim.cost.plain_attention import attend_plainly
from brim.cost.projection import project
from brim.cost.setting import Setting
from brim.cost.tape import ZERO, Tape, Tensor, fixed, per_token
from brim.spec.model import Attention, NormKind

_WIDEST_GROUPED_HEAD = 256  # integrations/sdpa_attention.py use_gqa_in_sdpa


def attend(
    tape: Tape, attention: Attention, setting: Setting, x: Tensor, kind: NormKind, *, crosses: bool = False
) -> Tensor:
    """Record the attention block and return the output projection's result.

    Args:
        x: what queries, keys and values are projected from.
        kind: the layer's kind of normalisation, which query and key norms share.
        crosses: whether keys and values come from another stack.
    """
    if attention.latent:
        q, k, v = _latent_inputs(tape, attention, setting, x)
    else:
        q, k, v = _plain_inputs(tape, attention, setting, x, kind)
    context = _attention_kernel(tape, attention, setting, q, k, v, crosses=crosses)
    out = project(tape, context, attention.linears[-1], setting)
    tape.hold(x, q, k, v)  # variables of the module's forward, and its argument
    return out


def _plain_inputs(
    tape: Tape, attention: Attention, setting: Setting, x: Tensor, kind: NormKind
) -> tuple[Tensor, Tensor, Tensor]:
    c, heads, kv_heads = setting.compute_bytes, attention.num_attention_heads, attention.num_key_value_heads
    made = [project(tape, x, one, setting) for one in attention.linears[:-1]]
    if len(made) == 1:  # one fused matrix: heads are views of it, rotation copies them out
        made = [_narrow(tape, made[0], attention.linears[0].out_features, setting)] * 3
    if setting.code.copies_heads and len(attention.linears) == 2 and kv_heads < heads:
        return _copied_heads(tape, attention, setting, made[0])
    q, k = (
        _position(tape, _head_norm(tape, tensor, size, parts, attention, setting, kind), size, attention, setting)
        for tensor, size, parts in ((made[0], attention.q_size, heads), (made[1], attention.k_size, kv_heads))
    )
    q, k = _narrow(tape, q, attention.q_size, setting), _narrow(tape, k, attention.k_size, setting)
    v = _narrow(tape, made[-1], attention.v_size, setting) if len(attention.linears) > 2 else made[-1]
    if v.size.per_token > c * attention.v_size and setting.attention != "eager" and not attention.rotary:
        return q, q, q  # nothing was copied out of the fused projection: one storage serves all three
    return q, k, v


def _narrow(tape: Tape, x: Tensor, width: int, setting: Setting) -> Tensor:
    """Attention kernels take fp32 results, where there are any, in the compute dtype."""
    wide = x.size.per_token == 4 * width and setting.compute_bytes < 4
    return tape.op("attention cast", [x], per_token(setting.compute_bytes * width)) if wide else x


def _copied_heads(tape: Tape, attention: Attention, setting: Setting, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source: models/falcon FalconAttention._split_heads: one head is indexed out, several are spread to all."""
    c, several = setting.compute_bytes, attention.num_key_value_heads > 1
    sizes = (attention.q_size, attention.out_size) if several else (attention.k_size, attention.v_size)
    k, v = (tape.op("repeated heads", [fused], per_token(c * size)) for size in sizes)
    q, k = (_rotate(tape, x, size, attention, setting) for x, size in ((fused, attention.q_size), (k, sizes[0])))
    return q, k, v


def _rotate(tape: Tape, x: Tensor, size: int, attention: Attention, setting: Setting) -> Tensor:
    """Queries or keys as the kernel reads them: rotated with fp32 cosines they are fp32, and cast."""
    rotated = _position(tape, x, size, attention, setting)
    return _narrow(tape, rotated, size, setting) if attention.rotary else rotated


def _latent_inputs(tape: Tape, attention: Attention, setting: Setting, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (optionally through a latent) and keys/values expanded from a shared latent.

    Source: modeling_deepseek_v3.py DeepseekV3Attention: rotated and plain parts are concatenated into new
    query and key tensors; values are a view of the expansion.
    """
    c = setting.compute_bytes
    *queries, kv_down, kv_up = attention.linears[:-1]
    q = x
    for index, linear in enumerate(queries):
        q = project(tape, q, linear, setting)
        if index + 1 < len(queries):
            q = normalise(tape, q, linear.out_features, "rmsnorm", setting)
    squeezed = tape.op("latent", [project(tape, x, kv_down, setting)], per_token(c * kv_up.in_features))
    latent = normalise(tape, squeezed, kv_up.in_features, "rmsnorm", setting)
    expanded = _narrow(tape, project(tape, latent, kv_up, setting), kv_up.out_features, setting)
    q = tape.op("query concat", [q], per_token(c * attention.q_size))
    k = tape.op("key concat", [expanded], per_token(c * attention.k_size))
    return q, k, expanded


def _head_norm(
    tape: Tape, x: Tensor, size: int, heads: int, attention: Attention, setting: Setting, kind: NormKind
) -> Tensor:
    if attention.qk_norm == "none":
        return x
    return normalise(tape, x, size, kind, setting, parts=heads if attention.qk_norm == "head" else 1)


def _position(tape: Tape, x: Tensor, size: int, attention: Attention, setting: Setting) -> Tensor:
    """Rotary embedding: two products, a rotated copy and a sum; only cosines are kept.

    Source: models/llama LlamaRotaryEmbedding.forward: cosines have the dtype of the residual stream, and so has what
    they are multiplied with.
    """
    if not attention.rotary:
        return x
    fused = len(attention.linears) == 2  # of a view of the fused matrix the size says nothing; it has been narrowed
    wide = (not fused and x.size.per_token == 4 * size) or setting.residual_bytes == 4
    out = per_token((4 if wide else setting.compute_bytes) * size)
    if setting.fused_rotary and x.size == out:
        return x  # rotated in place
    return tape.op("rotary", [x], out, scratch=out.times(2), grad_scratch=out.times(2))


def _attention_kernel(
    tape: Tape, attention: Attention, setting: Setting, q: Tensor, k: Tensor, v: Tensor, *, crosses: bool
) -> Tensor:
    c, heads = setting.compute_bytes, attention.num_attention_heads
    grouped = attention.num_key_value_heads < heads and k.size.per_token < c * attention.q_size
    wide_head = setting.attention == "sdpa" and attention.head_dim > _WIDEST_GROUPED_HEAD
    repeats = grouped and (
        setting.repeats_kv or setting.attention == "eager" or wide_head
        or (setting.masks(attention) and not setting.code.copies_heads)
    )  # fmt: skip
    if repeats:
        k = tape.op("repeat keys", [k], per_token(c * attention.q_size))
        v = tape.op("repeat values", [v], per_token(c * attention.out_size))
    if setting.attention == "eager":
        return _eager(tape, attention, setting, q, k, v)
    given_heads = attention.num_key_value_heads if grouped and not repeats else heads
    biased = setting.code.position_bias and (setting.masked or not crosses)
    call = _read_call(attention, setting, q, key_heads=given_heads, masked=biased or setting.masks(attention))
    if setting.attention == "sdpa" and choose_kernel(call) == "math":
        mask_heads = heads if biased else _mask_heads(attention, setting)
        return attend_plainly(
            tape, attention, setting, (q, k, v), grouped=call.grouped, key_heads=given_heads, mask_heads=mask_heads
        )
    # Source: torch aten/native/transformers/cuda/flash_attn: out, log-sum-exp per head kept; backward holds an fp32
    # query gradient, a row sum, and under grouped queries key/value gradients of every head before they are reduced.
    expanded = 2 * c * attention.q_size if grouped and not repeats else 0
    lse = tape.op("attention lse", (), per_token(4 * heads), saves_output=True, needs_grad=True)
    bias = _position_bias(tape, attention, setting) if biased else _additive_mask(tape, attention, setting)
    bias_grad = c * heads * setting.attended_len if biased else 0
    return tape.op(
        "attention", [q, k, v], per_token(c * attention.out_size), saves=[q, k, v, lse, *bias], saves_output=True,
        grad_scratch=per_token(4 * attention.q_size + 4 * heads + expanded + bias_grad),
    )  # fmt: skip


def _read_call(attention: Attention, setting: Setting, q: Tensor, *, key_heads: int, masked: bool) -> AttentionCall:
    """Return what decides the kernel: code that copies heads out itself does not tell SDPA that they are grouped."""
    heads = attention.num_attention_heads
    return AttentionCall(
        dtype=setting.compute_dtype, query_heads=heads, key_heads=key_heads, key_width=attention.q_size // heads,
        value_width=attention.out_size // heads, grouped=key_heads < heads and not setting.code.copies_heads,
        masked=masked, drops=setting.dropout.attention_dropout > 0, needs_grad=q.needs_grad,
        capability=setting.capability,
    )  # fmt: skip


def _additive_mask(tape: Tape, attention: Attention, setting: Setting) -> list[Tensor]:
    """SDPA turns a boolean mask into an additive one in the compute dtype, for each layer anew, and keeps it.

    Source: aten/native/transformers/attention.cpp convert_boolean_attn_mask; the efficient kernel saves its bias.
    """
    heads = _mask_heads(attention, setting)
    if not heads:
        return []
    size = per_token(setting.compute_bytes * setting.attended_len * heads)
    return [tape.op("attention mask", (), size, saves_output=True, needs_grad=True)]


def _mask_heads(attention: Attention, setting: Setting) -> int:
    """Heads of the mask that SDPA makes for a call, 0 if it makes none."""
    if not setting.masks(attention):
        return 0
    if setting.code.always_masks and not attention.rotary:  # ALiBi: additive for every head, cast under autocast only
        return 0 if setting.residual_bytes == setting.compute_bytes else attention.num_attention_heads
    return 1


def _position_bias(tape: Tape, attention: Attention, setting: Setting) -> list[Tensor]:
    """A bias per head and pair of positions, laid out anew in each layer: for all sequences together, or for each where
    a padding mask is folded in, into the cross-attention's bias of zeros too.

    Source: integrations/sdpa_attention.py create_position_bias_mask; a causal pattern is folded in with `where`.
    """
    if setting.masked:
        each = per_token(setting.compute_bytes * attention.num_attention_heads * setting.attended_len)
        return [tape.op("position bias", (), each, saves_output=True, needs_grad=True)]
    pairs = setting.attended_len**2
    size = setting.compute_bytes * attention.num_attention_heads * pairs
    kept = [tape.op("position bias", (), fixed(size), saves_output=True, needs_grad=True)]
    if attention.causal:
        kept.append(tape.op("position pattern", (), fixed(pairs), saves_output=True, needs_grad=True))
    return kept


def _eager(tape: Tape, attention: Attention, setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores materialised: product, scale, mask, softmax (kept), 16-bit copy (kept), product.

    Source: models/llama, gpt2, gemma2, gpt_oss modeling files, eager_attention_forward.
    """
    c, heads = setting.compute_bytes, attention.num_attention_heads
    seen, code = heads * setting.attended_len, setting.code
    q, k, v = (
        _own_storage(tape, tensor, c * size)
        for tensor, size in ((q, attention.q_size), (k, attention.q_size), (v, attention.out_size))
    )
    scores = tape.op("scores", [q, k], per_token(c * seen), saves=[q, k])
    scaled = tape.op("scores scale", [scores], per_token(c * seen))
    if code.softcap:
        capped = tape.op("scores softcap", [scaled], per_token(c * seen))
        capped = tape.op("scores tanh", [capped], per_token(c * seen), saves_output=True)
        scaled = tape.op("scores uncap", [capped], per_token(c * seen))
    scaled = tape.op("scores mask", [scaled], per_token(c * seen), passes_grad=True)
    if attention.sinks:
        seen += heads
        joined = tape.op("scores and sinks", [scaled], per_token(c * seen))
        highest = tape.op("scores maximum", (), per_token(8 * heads), saves_output=True, needs_grad=True)
        scaled = tape.op("scores shifted", [joined], per_token(c * seen), saves=[highest])
    size = per_token(_softmax_bytes(setting) * seen)
    widened = size if size.per_token > c * seen else ZERO  # bf16 scores are cast first: aten/native/SoftMax.cpp
    soft = tape.op("softmax", [scaled], size, saves_output=True, scratch=widened, grad_scratch=size)
    narrow = soft
    if size.per_token > c * seen:
        narrow = tape.op("softmax cast", [soft], per_token(c * heads * setting.attended_len))
    narrow = drop_out(tape, narrow, heads * setting.attended_len, setting.dropout.attention_dropout)
    out = tape.op("attention", [narrow, v], per_token(c * attention.out_size), saves=[narrow, v])
    return tape.op("attention transpose", [out], out.size)


def _own_storage(tape: Tape, tensor: Tensor, size_bytes: int) -> Tensor:
    """A matrix product of four dimensions copies what is a view of something wider."""
    wider = tensor.size.per_token > size_bytes
    return tape.op("attention copy", [tensor], per_token(size_bytes)) if wider else tensor


def _softmax_bytes(setting: Setting) -> int:
    """Bytes of an element of eager attention's softmax."""
    kind = setting.code.softmax
    if kind == "stream":
        return setting.residual_bytes
    return 4 if kind == "fp32" or setting.autocast else setting.compute_bytes
