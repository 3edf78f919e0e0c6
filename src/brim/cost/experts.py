"""Tapes of mixtures of experts: router, dispatch, experts, shared experts. Tokens are spread evenly."""

from __future__ import annotations

from fractions import Fraction

from brim.cost.feed_forward import combine, feed_dense
from brim.cost.projection import project
from brim.cost.setting import Setting
from brim.cost.tape import ZERO, Tape, Tensor, fixed, per_token
from brim.spec.model import Linear, Moe


def feed_experts(tape: Tape, moe: Moe, setting: Setting, x: Tensor) -> Tensor:
    """Record routed experts, assumed balanced, and the experts every token visits."""
    c, hidden = setting.compute_bytes, moe.expert_linears[0].in_features
    weights = _route(tape, moe, setting, x)
    run = _grouped_experts if setting.fused_experts else _looped_experts
    total = run(tape, moe, setting, x, weights)
    if moe.shared is None:
        return total
    shared = feed_dense(tape, moe.shared, setting, x)
    if moe.shared_gate is not None:
        gate = project(tape, x, moe.shared_gate, setting)
        gate = tape.op("shared gate", [gate], gate.size, saves_output=True)
        shared = tape.op("shared weighting", [gate, shared], shared.size, saves=[shared, gate])
    return tape.op("shared sum", [total, shared], per_token(c * hidden), passes_grad=True)


def _route(tape: Tape, moe: Moe, setting: Setting, x: Tensor) -> Tensor:
    """Scores of every expert and the chosen ones' weights; indices are int64.

    Source: models/mixtral MixtralTopKRouter, qwen3_moe Qwen3MoeTopKRouter, deepseek_v3 DeepseekV3TopkRouter.
    """
    c, visits = setting.compute_bytes, moe.num_experts_per_tok
    width, scores_size = moe.router.in_features, per_token(4 * moe.num_experts)
    wide = setting.code.wide_router and not setting.autocast and c < 4
    saves: list[Tensor] = []
    if wide:
        x = tape.op("router fp32", [x], per_token(4 * width))
        copied = fixed(4 * moe.router.num_weights)
        saves.append(tape.op("router weight copy", (), copied, saves_output=True, needs_grad=True))
    elif setting.autocast and x.size.per_token > c * width:
        x = tape.op("router cast", [x], per_token(c * width))
    learns = setting.trains_base or _adapts_experts(moe, setting, moe.router.name)
    scores = tape.op("router", [x], scores_size, saves=[x, *saves] if learns else saves)
    soft = tape.op("router softmax", [scores], scores_size, saves_output=True)
    return tape.op("routes", [soft], per_token((8 + 4) * visits), saves_output=True)


def _adapts_experts(moe: Moe, setting: Setting, *names: str) -> bool:
    """Whether adapters named after former modules reach the fused parameters."""
    named = bool({"all-linear", *names} & setting.adapter_targets)
    return setting.adapter_rank > 0 and setting.fused_experts and moe.adapters_reach_experts and named


def _grouped_experts(tape: Tape, moe: Moe, setting: Setting, x: Tensor, weights: Tensor) -> Tensor:
    """All experts in one grouped product per matrix, which autocast leaves alone: it runs in the weights' dtype.

    Source: transformers 5 integrations/moe.py grouped_mm_experts_forward: sorted copies of the tokens, weighting by
    the router, a second copy back in order, a sum over experts.
    """
    visits, hidden = moe.num_experts_per_tok, moe.expert_linears[0].in_features
    element = setting.weight_bytes if setting.autocast else setting.compute_bytes
    wide = 4 if setting.code.wide_routes else element
    order = tape.op("expert order", (), per_token((3 * 8 + wide) * visits), saves_output=True, needs_grad=True)
    rows = tape.op("dispatch", [x], per_token(element * hidden * visits), saves=[order])
    made = [_multiply(tape, rows, linear, moe, setting, element) for linear in moe.expert_linears[:-1]]
    inner = (_clamped_gate if setting.code.clamps_gate else _gate)(tape, made, moe, setting, element)
    down = _multiply(tape, inner, moe.expert_linears[-1], moe, setting, element)
    weighted = tape.op("expert weighting", [down, weights], per_token(wide * hidden * visits), saves=[down, order])
    ordered = tape.op("combine", [weighted], per_token(wide * hidden * visits))
    return tape.op("expert sum", [ordered], per_token(element * hidden))


def _multiply(tape: Tape, x: Tensor, linear: Linear, moe: Moe, setting: Setting, element: int) -> Tensor:
    """One grouped product. Adapters on a fused parameter are added into a copy of it, which is kept.

    Source: peft tuners/lora/layer.py ParamWrapper: the adapted parameter is made anew in each forward pass, and its
    whole gradient on the way back.
    """
    size = per_token(element * linear.out_features * moe.num_experts_per_tok)
    count = moe.num_experts * linear.num_weights
    parts = _parts(linear, moe)
    if _adapts_experts(moe, setting, *parts):
        whole, rank = fixed(setting.weight_bytes * count), setting.adapter_rank * len(parts)
        cast = setting.weight_bytes if setting.weight_bytes != setting.adapter_bytes else 0
        factors = fixed(cast * moe.num_experts * rank * (linear.in_features + linear.out_features))
        kept = [
            tape.op(name, (), kept_size, saves_output=True, needs_grad=True)
            for name, kept_size in (("adapted experts", whole), ("adapter weight copy", factors))
        ]
        return tape.op(linear.name, [x], size, saves=[x, *kept], grad_scratch=whole)
    trained = fixed(moe.num_experts * linear.num_parameters * setting.weight_bytes) if setting.trains_base else ZERO
    return tape.op(linear.name, [x], size, saves=[x] if setting.trains_base else (), weight_grad=trained)


def _parts(linear: Linear, moe: Moe) -> tuple[str, ...]:
    """Names the matrices in a fused parameter had as modules; PEFT gives it the sum of their ranks."""
    gate, up, down = moe.separate_names
    return (down,) if linear is moe.expert_linears[-1] else (gate, up)


def _gate(tape: Tape, made: list[Tensor], moe: Moe, setting: Setting, element: int) -> Tensor:
    return combine(
        tape, made, moe.intermediate_size, True, moe.hidden_act, setting, tokens=moe.num_experts_per_tok,
        element=element,
    )  # fmt: skip


def _clamped_gate(tape: Tape, made: list[Tensor], moe: Moe, setting: Setting, element: int) -> Tensor:
    """Source: models/gpt_oss GptOssExperts._apply_gate: (clamp(up) + 1) * clamp(gate) * sigmoid(clamp(gate))."""
    size = per_token(element * moe.intermediate_size * moe.num_experts_per_tok)
    gate = tape.op("gate clamp", [made[0]], size, saves=[made[0]])
    soft = tape.op("gate sigmoid", [gate], size, saves_output=True, scratch=size)
    swish = tape.op("swish", [gate, soft], size, saves=[gate, soft])
    up = tape.op("up clamp", [made[-1]], size, saves=[made[-1]])
    more = tape.op("up offset", [up], size)
    return tape.op("gate", [more, swish], size, saves=[more, swish])


def _looped_experts(tape: Tape, moe: Moe, setting: Setting, x: Tensor, weights: Tensor) -> Tensor:
    """One expert after the other, each on its share of the tokens, added into one output.

    Source: transformers 4 models/mixtral/modeling_mixtral.py MixtralSparseMoeBlock.forward.
    """
    c, hidden = setting.compute_bytes, moe.expert_linears[0].in_features
    share = Fraction(moe.num_experts_per_tok, moe.num_experts)
    total = tape.op("expert sum", (), per_token(c * hidden), needs_grad=True, held=True)
    for _ in range(moe.num_experts):
        rows = tape.op("dispatch", [x], per_token(round(c * hidden * share)))
        made = [project(tape, rows, linear, setting, tokens=share) for linear in moe.expert_linears[:-1]]
        inner = combine(tape, made, moe.intermediate_size, True, moe.hidden_act, setting, tokens=share, element=c)
        down = project(tape, inner, moe.expert_linears[-1], setting, tokens=share)
        weighted = tape.op("expert weighting", [down, weights], down.size, saves=[down, weights])
        total = tape.op("expert add", [total, weighted], ZERO, passes_grad=True)
    return tape.op("expert output", [total], per_token(c * hidden), passes_grad=True)
