"""Mixture-of-experts blocks: `ExpertFacts` and a config's numbers -> `Moe`."""

from __future__ import annotations

from brim.readers.config_fields import LARGEST_NUM_EXPERTS, ConfigFields
from brim.readers.decoder_facts import DecoderFacts, ExpertFacts
from brim.spec.model import Linear, Mlp, Moe


def read_experts(fields: ConfigFields, facts: DecoderFacts) -> Moe:
    """Return the mixture-of-experts block of a sparse layer.

    Routed experts are named as transformers 5 fuses them: `gate_up_proj`, `down_proj`.

    Raises:
        InvalidConfig: a key is broken, or a token would visit more experts than there are.
    """
    experts = facts.experts
    assert experts is not None
    hidden_size = fields.number("hidden_size")
    num_experts, num_visited = expert_counts(fields, "num_experts", "num_experts_per_tok")
    width = fields.number(experts.width)
    return Moe(
        num_experts=num_experts,
        num_experts_per_tok=num_visited,
        intermediate_size=width,
        hidden_act=fields.text(facts.activation),
        router=Linear(
            name=experts.router,
            in_features=hidden_size,
            out_features=num_experts,
            bias=experts.bias,
            bare=experts.bare_router,
        ),
        expert_linears=fused_expert(hidden_size, width, bias=experts.bias, bare=experts.bare_experts),
        separate_names=experts.separate_names,
        adapters_reach_experts=experts.rerouted,
        shared=_shared(fields, facts, experts, hidden_size),
        shared_gate=(
            Linear(name="shared_expert_gate", in_features=hidden_size, out_features=1)
            if experts.shared == "gated"
            else None
        ),
    )


def expert_counts(fields: ConfigFields, num_key: str, visited_key: str) -> tuple[int, int]:
    """Return how many experts there are and how many each token visits."""
    num_experts = fields.number(num_key, at_most=LARGEST_NUM_EXPERTS)
    num_visited = fields.number(visited_key)
    if num_visited > num_experts:
        fields.refuse(visited_key, f"{num_visited} is more than {num_key} {num_experts}")
    return num_experts, num_visited


def fused_expert(hidden_size: int, width: int, *, bias: bool = False, bare: bool = False) -> tuple[Linear, ...]:
    """Return the two matrices of one gated expert."""
    return (
        Linear(name="gate_up_proj", in_features=hidden_size, out_features=2 * width, bias=bias, bare=bare),
        Linear(name="down_proj", in_features=width, out_features=hidden_size, bias=bias, bare=bare),
    )


def _shared(fields: ConfigFields, facts: DecoderFacts, experts: ExpertFacts, hidden_size: int) -> Mlp | None:
    """Return the block every token visits, or None."""
    if experts.shared == "none":
        return None
    if experts.shared == "gated":
        width = fields.number("shared_expert_intermediate_size")
    else:
        width = fields.number("n_shared_experts", at_least=0, at_most=LARGEST_NUM_EXPERTS) * fields.number(
            experts.width
        )
    if width == 0:
        return None
    bias = fields.flag(facts.mlp_bias)
    return Mlp(
        intermediate_size=width,
        gated=True,
        hidden_act=fields.text(facts.activation),
        linears=(
            Linear(name="gate_proj", in_features=hidden_size, out_features=width, bias=bias),
            Linear(name="up_proj", in_features=hidden_size, out_features=width, bias=bias),
            Linear(name="down_proj", in_features=width, out_features=hidden_size, bias=bias),
        ),
    )
