"""Tapes of the layers: which tensors attention, feed-forward and experts make, keep and drop.

Read from transformers 5.23 (models/*/modeling_*.py, integrations/sdpa_attention.py, integrations/moe.py),
peft 0.21 (tuners/lora/layer.py), bitsandbytes (autograd/_functions.py), torch 2.13 autograd formulas.
Leaves out: dropout masks of pre-2020 architectures (their configs train at 0.1: one byte per element).
"""

from __future__ import annotations

from fractions import Fraction

from brim.cost.setting import Setting, norm_is_fused
from brim.cost.tape import ZERO, Size, Tape, Tensor, fixed, per_token
from brim.spec.model import Attention, LayerGroup, Linear, Mlp, Moe, NormKind

# F.gelu and F.silu are one kernel that keeps its input; these are written out in Python and keep more copies.
_PYTHON_ACTIVATION_COPIES = {"gelu_new": 4, "gelu_fast": 4, "gelu_python": 3, "quick_gelu": 2}


def record_layer(group: LayerGroup, setting: Setting) -> tuple[Tape, Tensor]:
    """Return the tape of one layer and its input (the residual stream)."""
    tape = Tape()
    stream = Tensor("layer input", per_token(group.hidden_size * setting.residual_bytes))
    if group.parallel:
        return _record_parallel(tape, group, setting, stream), stream
    before = _norm(tape, group, setting, stream)
    state = _add(tape, group, setting, stream, attend(tape, group, group.attention, setting, before))
    if group.cross_attention is not None:
        crossed = _norm(tape, group, setting, state)
        state = _add(tape, group, setting, state, attend(tape, group, group.cross_attention, setting, crossed))
    inner = feed_forward(tape, group, setting, _norm(tape, group, setting, state))
    _add(tape, group, setting, state, inner)
    return tape, stream


def _record_parallel(tape: Tape, group: LayerGroup, setting: Setting, stream: Tensor) -> Tape:
    normed = _norm(tape, group, setting, stream)
    attended = attend(tape, group, group.attention, setting, normed)
    second = _norm(tape, group, setting, stream) if group.num_norms > 1 else normed
    inner = feed_forward(tape, group, setting, second)
    both = _add(tape, group, setting, inner, attended)
    _add(tape, group, setting, both, stream)
    return tape


def _norm(tape: Tape, group: LayerGroup, setting: Setting, x: Tensor) -> Tensor:
    return normalise(tape, x, group.hidden_size, group.norm, setting)


def normalise(tape: Tape, x: Tensor, width: int, kind: NormKind, setting: Setting) -> Tensor:
    """Record a normalisation over `width` elements a token and return its output.

    Source: LlamaRMSNorm: an fp32 copy is kept for the mean of squares and the product; a trained
    weight keeps the normalised value too. torch layer_norm keeps its input and two scalars; autocast
    runs it in fp32.
    """
    r = setting.residual_bytes
    if norm_is_fused(kind, setting):
        source = x
        if kind == "layernorm" and setting.autocast and r != 4:
            source, r = tape.op("norm cast", [x], per_token(4 * width)), 4
        return tape.op("norm", [source], per_token(r * width), saves=[source], grad_scratch=per_token(8))
    wide = x if r == 4 else tape.op("norm fp32", [x], per_token(4 * width))
    scaled = tape.op(
        "norm scale", [wide], per_token(4 * width), saves=[wide],
        scratch=per_token(4 * width), grad_scratch=per_token(12 * width),
    )  # fmt: skip
    narrow = scaled if r == 4 else tape.op("norm cast", [scaled], per_token(r * width))
    return tape.op("norm", [narrow], per_token(r * width), saves=[narrow] if setting.trains_base else ())


def _add(tape: Tape, group: LayerGroup, setting: Setting, stream: Tensor, branch: Tensor) -> Tensor:
    if group.num_norms > 2 + (group.cross_attention is not None) and not group.parallel:
        branch = _norm(tape, group, setting, branch)  # Gemma and GLM normalise each branch's output as well
    return tape.op("residual", [stream, branch], per_token(group.hidden_size * setting.residual_bytes), passes_grad=True)


def project(
    tape: Tape, x: Tensor, linear: Linear, setting: Setting, *, copies: int = 1, tokens: Fraction | int = 1, is_output: bool = False
) -> Tensor:
    """Record one matrix product, with its adapter if it has one.

    Args:
        x: the input, `tokens x in_features` elements a token.
        copies: matrices of this shape that run together (experts).
        tokens: rows per token of the micro-batch (experts a token visits).
        is_output: the output matrix, which loaders leave unquantised and `all-linear` leaves without adapter.
    """
    c = setting.compute_bytes
    narrow = _cast_input(tape, x, linear, setting, tokens)
    is_expert = copies > 1 and setting.fused_experts
    quantised = setting.quantization is not None and not is_expert and not is_output
    trains = setting.trains_base
    working = _working_weight(linear, setting, quantised)
    weight_copy = _cast_weight(tape, linear, setting, quantised, copies)
    output = tape.op(
        linear.name, [narrow], per_token(round(c * linear.out_features * tokens)),
        saves=[*weight_copy, narrow] if trains or (quantised and _keeps_inputs(setting)) else weight_copy,
        scratch=working, grad_scratch=working,
        weight_grad=fixed(linear.num_parameters * copies * setting.weight_bytes) if trains else ZERO,
    )  # fmt: skip
    named = linear.name in setting.adapter_targets
    if setting.adapts(linear) and not is_expert and (named or not is_output):
        output = _adapt(tape, x, output, linear, setting, tokens)
    return output


def _keeps_inputs(setting: Setting) -> bool:
    return setting.quantization is not None and setting.quantization.keeps_inputs


def _cast_input(tape: Tape, x: Tensor, linear: Linear, setting: Setting, tokens: Fraction | int) -> Tensor:
    """Under autocast each product makes its own 16-bit copy of an fp32 input (only weights are cached)."""
    c = setting.compute_bytes
    wide = x.size.per_token > round(c * linear.in_features * tokens)
    needs = (setting.autocast or setting.quantization is not None) and wide
    return tape.op(f"{linear.name} cast", [x], per_token(round(c * linear.in_features * tokens))) if needs else x


def _working_weight(linear: Linear, setting: Setting, quantised: bool) -> Size:
    """A quantised matrix is expanded for each product, forward and backward, and dropped at once."""
    return fixed(linear.num_weights * setting.compute_bytes) if quantised else ZERO


def _cast_weight(tape: Tape, linear: Linear, setting: Setting, quantised: bool, copies: int) -> list[Tensor]:
    """Autocast keeps the 16-bit copy of an fp32 weight until backward: the product saves it.

    Source: torch/csrc/autograd formulas: linear saves its weight operand, which is the cast copy.
    """
    if not setting.autocast or quantised or setting.weight_bytes <= setting.compute_bytes:
        return []
    size = fixed(linear.num_weights * copies * setting.compute_bytes)
    return [tape.op(f"{linear.name} weight copy", (), size, saves_output=True, needs_grad=True)]


def _adapt(tape: Tape, x: Tensor, base: Tensor, linear: Linear, setting: Setting, tokens: Fraction | int) -> Tensor:
    """LoRA beside a matrix: down to the rank, up again, scaled, added.

    Source: peft tuners/lora/layer.py Linear.forward: the input is cast to the adapter's dtype, the sum is made
    in the wider dtype and cast back. Unsloth's fused form keeps only the input.
    """
    c, width = setting.compute_bytes, round(linear.out_features * tokens)
    a = c if setting.autocast else setting.adapter_bytes
    out = per_token(c * width)
    if setting.fused_adapters:
        dropped = [tape.op("adapter dropout", [x], x.size)] if setting.adapter_dropout else []
        return tape.op("adapter", [*dropped, base], ZERO, saves=[x, *dropped], passes_grad=True)
    source = _adapter_input(tape, x, linear, setting, tokens)
    down = tape.op("adapter down", [source], per_token(round(a * setting.adapter_rank * tokens)), saves=[source])
    up = tape.op("adapter up", [down], per_token(a * width), saves=[down])
    scaled = tape.op("adapter scale", [up], per_token(a * width))
    if a == c:
        return tape.op("adapter sum", [base, scaled], out, passes_grad=True)
    wide = tape.op("adapter sum", [base, scaled], per_token(a * width), grad_scratch=out)
    return tape.op("adapter narrow", [wide], out)


def _adapter_input(tape: Tape, x: Tensor, linear: Linear, setting: Setting, tokens: Fraction | int) -> Tensor:
    """The input in the adapter's dtype, dropped out; under autocast cast once more to 16 bit, a copy of its own."""
    count = round(linear.in_features * tokens)
    wanted, present = setting.adapter_bytes * count, x.size.per_token
    source = tape.op("adapter cast", [x], per_token(wanted)) if wanted > present else x
    if setting.adapter_dropout:
        mask = tape.op("adapter mask", (), per_token(count), needs_grad=False)
        source = tape.op("adapter dropout", [source], source.size, saves=[mask])
    narrow = per_token(setting.compute_bytes * count)
    if setting.autocast and source.size.per_token > narrow.per_token:
        source = tape.op("adapter autocast", [source], narrow)
    return source


def attend(tape: Tape, group: LayerGroup, attention: Attention, setting: Setting, x: Tensor) -> Tensor:
    """Record the attention block and return the output projection's result."""
    if attention.latent:
        q, k, v = _latent_inputs(tape, attention, setting, x)
    else:
        q, k, v = _plain_inputs(tape, attention, setting, x)
    context = _attention_kernel(tape, attention, setting, q, k, v)
    return project(tape, context, attention.linears[-1], setting)


def _plain_inputs(tape: Tape, attention: Attention, setting: Setting, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    c = setting.compute_bytes
    made = [project(tape, x, linear, setting) for linear in attention.linears[:-1]]
    if len(made) == 1:  # one fused matrix: heads are views of it, rotation copies them out
        made = [made[0], made[0], made[0]]
    q, k = (
        _position(tape, _head_norm(tape, tensor, size, attention, setting), size, attention, setting)
        for tensor, size in ((made[0], attention.q_size), (made[1], attention.k_size))
    )
    v = made[-1]
    if v.size.per_token > c * attention.v_size and setting.attention != "eager" and not attention.rotary:
        return q, q, q  # nothing was copied out of the fused projection: one storage serves all three
    return q, k, v


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
    latent = normalise(tape, project(tape, x, kv_down, setting), kv_up.in_features, "rmsnorm", setting)
    expanded = project(tape, latent, kv_up, setting)
    q = tape.op("query concat", [q], per_token(c * attention.q_size))
    k = tape.op("key concat", [expanded], per_token(c * attention.k_size))
    return q, k, expanded


def _head_norm(tape: Tape, x: Tensor, size: int, attention: Attention, setting: Setting) -> Tensor:
    return x if attention.qk_norm == "none" else normalise(tape, x, size, "rmsnorm", setting)


def _position(tape: Tape, x: Tensor, size: int, attention: Attention, setting: Setting) -> Tensor:
    """Rotary embedding: two products, a rotated copy and a sum; only cosines are kept."""
    if not attention.rotary:
        return x
    out = per_token(setting.compute_bytes * size)
    if setting.fused_rotary and x.size == out:
        return x  # rotated in place
    return tape.op("rotary", [x], out, scratch=out.times(2), grad_scratch=out.times(2))


def _attention_kernel(
    tape: Tape, attention: Attention, setting: Setting, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    c, heads = setting.compute_bytes, attention.num_attention_heads
    grouped = attention.num_key_value_heads < heads
    needs_all_heads = setting.attention == "eager" or (setting.attention == "sdpa" and setting.masked)
    repeats = grouped and (setting.repeats_kv or needs_all_heads)
    if repeats:
        k = tape.op("repeat keys", [k], per_token(c * attention.q_size))
        v = tape.op("repeat values", [v], per_token(c * attention.out_size))
    if setting.attention == "eager":
        return _eager(tape, attention, setting, q, k, v)
    # Source: torch aten/native/transformers/cuda/flash_attn: out, log-sum-exp per head kept; backward holds an fp32
    # query gradient, a row sum, and under grouped queries key/value gradients of every head before they are reduced.
    expanded = 2 * c * attention.q_size if grouped and not repeats else 0
    lse = tape.op("attention lse", (), per_token(4 * heads), saves_output=True, needs_grad=True)
    bias = _additive_mask(tape, setting)
    return tape.op(
        "attention", [q, k, v], per_token(c * attention.out_size), saves=[q, k, v, lse, *bias], saves_output=True,
        grad_scratch=per_token(4 * attention.q_size + 4 * heads + expanded),
    )  # fmt: skip


def _additive_mask(tape: Tape, setting: Setting) -> list[Tensor]:
    """SDPA turns a boolean mask into an additive one in the compute dtype, for each layer anew, and keeps it.

    Source: aten/native/transformers/attention.cpp convert_boolean_attn_mask; the efficient kernel saves its bias.
    """
    if not setting.masked or setting.attention != "sdpa":
        return []
    size = per_token(setting.compute_bytes * setting.seq_len)
    return [tape.op("attention mask", (), size, saves_output=True, needs_grad=True)]


def _eager(tape: Tape, attention: Attention, setting: Setting, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores materialised: product, scale, mask, fp32 softmax (kept), 16-bit copy (kept), product.

    Source: models/llama/modeling_llama.py eager_attention_forward.
    """
    c, seen = setting.compute_bytes, attention.num_attention_heads * setting.seq_len
    scores = tape.op("scores", [q, k], per_token(c * seen), saves=[q, k])
    scaled = tape.op("scores scale", [scores], per_token(c * seen))
    masked = tape.op("scores mask", [scaled], per_token(c * seen), passes_grad=True)
    soft = tape.op("softmax", [masked], per_token(4 * seen), saves_output=True, grad_scratch=per_token(4 * seen))
    narrow = soft if c == 4 else tape.op("softmax cast", [soft], per_token(c * seen))
    out = tape.op("attention", [narrow, v], per_token(c * attention.out_size), saves=[narrow, v])
    return tape.op("attention transpose", [out], out.size)


def feed_forward(tape: Tape, group: LayerGroup, setting: Setting, x: Tensor) -> Tensor:
    """Record the feed-forward block, dense or routed."""
    if isinstance(group.mlp, Moe):
        return _experts(tape, group.mlp, setting, x)
    return _dense(tape, group.mlp, setting, x)


def _dense(tape: Tape, mlp: Mlp, setting: Setting, x: Tensor) -> Tensor:
    inner = _inner(tape, mlp.linears[:-1], mlp.intermediate_size, mlp.gated, mlp.hidden_act, setting, x)
    return project(tape, inner, mlp.linears[-1], setting)


def _inner(
    tape: Tape,
    linears: tuple[Linear, ...],
    width: int,
    gated: bool,
    act: str,
    setting: Setting,
    x: Tensor,
    *,
    copies: int = 1,
    tokens: Fraction | int = 1,
) -> Tensor:
    """Everything up to the last matrix: projections, activation function, gate."""
    out = per_token(round(setting.compute_bytes * width * tokens))
    made = [project(tape, x, linear, setting, copies=copies, tokens=tokens) for linear in linears]
    if gated and setting.fused_gate:
        return tape.op("gated activation", made, out, saves=made)
    gate = made[0]
    extra = _PYTHON_ACTIVATION_COPIES.get(act, 1) - 1
    copies_kept = [tape.op(f"{act} copy", (), out, saves_output=True, needs_grad=True) for _ in range(extra)]
    active = tape.op(act, [gate], out, saves=[gate, *copies_kept])
    if not gated:
        return active
    return tape.op("gate", [active, made[-1]], out, saves=[active, made[-1]])


def _experts(tape: Tape, moe: Moe, setting: Setting, x: Tensor) -> Tensor:
    """Routed experts, assumed balanced, and the experts every token visits."""
    c = setting.compute_bytes
    hidden = moe.expert_linears[0].in_features
    scores = tape.op("router", [x], per_token(4 * moe.num_experts), saves=[x] if setting.trains_base else ())
    weights = tape.op("router softmax", [scores], per_token(4 * moe.num_experts), saves_output=True)
    route = _grouped_experts if setting.fused_experts else _looped_experts
    total = route(tape, moe, setting, x, weights)
    if moe.shared is None:
        return total
    shared = _dense(tape, moe.shared, setting, x)
    return tape.op("shared sum", [total, shared], per_token(c * hidden), passes_grad=True)


def _grouped_experts(tape: Tape, moe: Moe, setting: Setting, x: Tensor, weights: Tensor) -> Tensor:
    """All experts in one grouped product per matrix.

    Source: transformers 5 integrations/moe.py grouped_mm_experts_forward: sorted copies of the tokens, weighting by
    the router, a second copy back in order, a sum over experts.
    """
    c, visits, hidden = setting.compute_bytes, moe.num_experts_per_tok, moe.expert_linears[0].in_features
    rows = tape.op("dispatch", [x], per_token(c * hidden * visits))
    inner = _inner(
        tape, moe.expert_linears[:-1], moe.intermediate_size, True, moe.hidden_act, setting, rows,
        copies=moe.num_experts, tokens=visits,
    )  # fmt: skip
    down = project(tape, inner, moe.expert_linears[-1], setting, copies=moe.num_experts, tokens=visits)
    weighted = tape.op("expert weighting", [down, weights], per_token(c * hidden * visits), saves=[down, weights])
    ordered = tape.op("combine", [weighted], per_token(c * hidden * visits))
    return tape.op("expert sum", [ordered], per_token(c * hidden))


def _looped_experts(tape: Tape, moe: Moe, setting: Setting, x: Tensor, weights: Tensor) -> Tensor:
    """One expert after the other, each on its share of the tokens, added into one output.

    Source: transformers 4 models/mixtral/modeling_mixtral.py MixtralSparseMoeBlock.forward.
    """
    c, hidden = setting.compute_bytes, moe.expert_linears[0].in_features
    share = Fraction(moe.num_experts_per_tok, moe.num_experts)
    total = tape.op("expert sum", (), per_token(c * hidden), needs_grad=True, held=True)
    for _ in range(moe.num_experts):
        rows = tape.op("dispatch", [x], per_token(round(c * hidden * share)))
        inner = _inner(
            tape, moe.expert_linears[:-1], moe.intermediate_size, True, moe.hidden_act, setting, rows, tokens=share
        )
        down = project(tape, inner, moe.expert_linears[-1], setting, tokens=share)
        weighted = tape.op("expert weighting", [down, weights], down.size, saves=[down, weights])
        total = tape.op("expert add", [total, weighted], ZERO, passes_grad=True)
    return tape.op("expert output", [total], per_token(c * hidden), passes_grad=True)


def mask_bytes(setting: Setting) -> Size:
    """Return the bytes of a materialised attention mask: one row of `seq_len` per token.

    Source: transformers masking_utils.py: boolean for SDPA, additive in the compute dtype for eager.
    """
    if setting.attention == "eager":
        return per_token(setting.compute_bytes * setting.seq_len)
    return per_token(setting.seq_len) if setting.masked and setting.attention == "sdpa" else ZERO


