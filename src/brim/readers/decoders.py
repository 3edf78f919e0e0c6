"""Decoder-only language models: `DecoderFacts` and a config's numbers -> `ModelShape` parts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from brim.readers.blocks import even_head_dim, named_mlp
from brim.readers.config_fields import ConfigFields
from brim.readers.decoder_facts import DecoderFacts
from brim.readers.decoder_layers import LayerKind, layer_kinds
from brim.readers.decoder_table import DECODERS
from brim.readers.experts import read_experts
from brim.readers.heads import Head, class_suffix, label_head, language_head, read_architecture, span_head
from brim.readers.stack import Stack
from brim.spec.model import Attention, Embedding, LayerGroup, Linear, Mlp, ModelShape


def read_decoder(fields: ConfigFields) -> ModelShape:
    """Return the shape of a decoder-only model under the head its class has.

    Raises:
        InvalidConfig: a key is broken.
        UnsupportedModel: a class or feature is not known.
    """
    facts = DECODERS[fields.model_type]
    fields = replace(fields, defaults=facts.defaults, aliases=facts.aliases)
    architecture = read_architecture(fields, facts.prefixes[0] + facts.language_head)
    stack = read_stack(fields, facts)
    head = _decoder_head(fields, facts, architecture, stack)
    return ModelShape(
        name=fields.source,
        model_type=fields.model_type,
        architecture=architecture,
        hidden_size=stack.hidden_size,
        vocab_size=head.vocab_size,
        max_position_embeddings=fields.optional_number("max_position_embeddings"),
        tie_word_embeddings=head.tied,
        embeddings=stack.embeddings,
        groups=stack.groups,
        head=head.linears,
        stem=stack.stem,
        final_norm=facts.norm,
        other_parameters=stack.other_parameters + head.other_parameters,
        logit_softcap=fields.get("final_logit_softcapping") is not None and head.vocab_size > 0,
        native_dtype=fields.native_dtype(),
    )


def _decoder_head(fields: ConfigFields, facts: DecoderFacts, architecture: str, stack: Stack) -> Head:
    """Return the head of a decoder-only class."""
    suffix = class_suffix(fields, architecture, facts.prefixes)
    width = stack.embeddings[0].embedding_dim
    before = ()
    if width != stack.hidden_size:
        before = (Linear(name="project_out", in_features=stack.hidden_size, out_features=width),)
    if suffix == facts.language_head:
        return language_head(fields, width, bias=facts.language_head_bias, before=before)
    match suffix:
        case "Model":
            return Head(linears=before)
        case "ForSequenceClassification":
            return label_head(fields, width, "score", bias=False, before=before)
        case "ForTokenClassification":
            return label_head(fields, stack.hidden_size, facts.token_head, bias=True, before=before)
        case "ForQuestionAnswering":
            return span_head(width)
    fields.unsupported(f"class {architecture[:60]}")


def read_stack(fields: ConfigFields, facts: DecoderFacts) -> Stack:
    """Return the layers, embeddings and norms of a decoder-only model.

    Identical layers become one group whatever lies between them (a sliding/full mix has two groups): the
    order of layers does not change how much memory they take. Groups keep the order of first appearance.

    Raises:
        InvalidConfig: a key is broken.
        UnsupportedModel: a feature is not known.
    """
    if fields.model_type == "falcon":
        facts = _falcon(fields, facts)
    for key in ("per_layer_config", "add_cross_attention"):
        if fields.get(key):
            fields.unsupported(key)
    hidden_size = fields.number("hidden_size")
    kinds = Counter(layer_kinds(fields, facts))
    embeddings, stem, other = _surroundings(fields, facts, hidden_size)
    return Stack(
        hidden_size=hidden_size,
        embeddings=embeddings,
        groups=tuple(_group(fields, facts, kind, count) for kind, count in kinds.items()),
        other_parameters=other,
        stem=stem,
    )


def _falcon(fields: ConfigFields, facts: DecoderFacts) -> DecoderFacts:
    """Return the facts of the Falcon generation at hand: 1B (`rw`), 7B or 40B style.

    Source: transformers `models/falcon/modeling_falcon.py`, `FalconDecoderLayer.__init__`.
    """
    parallel = fields.flag("parallel_attn")
    num_norms = fields.optional_number("num_ln_in_parallel_attn", at_least=0)
    if num_norms is None and fields.flag("new_decoder_architecture"):
        num_norms = 2
    return replace(
        facts,
        parallel=parallel,
        num_norms=1 if parallel and num_norms != 2 else 2,
        rotary=not fields.flag("alibi"),
    )


def _group(fields: ConfigFields, facts: DecoderFacts, kind: LayerKind, count: int) -> LayerGroup:
    """Return the group of layers of one kind."""
    sparse = kind.sparse and facts.experts is not None
    return LayerGroup(
        count=count,
        attention=read_attention(fields, facts, kind),
        mlp=read_experts(fields, facts) if sparse else read_mlp(fields, facts),
        norm=facts.norm,
        num_norms=facts.num_norms,
        norm_bias=facts.norm == "layernorm",
        parallel=fields.flag(facts.parallel),
        hidden_size=fields.number("hidden_size"),
    )


def read_attention(fields: ConfigFields, facts: DecoderFacts, kind: LayerKind) -> Attention:
    """Return the attention block of a layer of this kind."""
    build = _latent_attention if facts.attention == "latent" else _grouped_attention
    return build(fields, facts, kind)


def num_key_value_heads(fields: ConfigFields, facts: DecoderFacts, num_heads: int) -> int:
    """Return key/value heads; null or absent means as many as query heads.

    Raises:
        InvalidConfig: query heads are no multiple of them.
    """
    key = "num_key_value_heads"
    if fields.model_type == "falcon":
        key = "num_kv_heads"
        if not fields.flag("new_decoder_architecture"):
            return 1 if fields.flag("multi_query") else num_heads
    elif facts.square:
        return num_heads
    num_kv_heads = fields.optional_number(key) or num_heads
    if num_heads % num_kv_heads:
        fields.refuse(key, f"{num_kv_heads} does not divide num_attention_heads {num_heads}")
    return num_kv_heads


def head_dim(fields: ConfigFields, *, is_key: bool = True) -> int:
    """Return the width of one head: `head_dim` if given, else hidden width over heads.

    Raises:
        InvalidConfig: the hidden width does not divide, or null where transformers has a fixed default.
    """
    if is_key and fields.get("head_dim") is not None:
        return fields.number("head_dim")
    if is_key and fields.defaults.get("head_dim") is not None:
        fields.refuse("head_dim", "must be a whole number, not null")
    return even_head_dim(fields, fields.number("hidden_size"), fields.number("num_attention_heads"))


def _grouped_attention(fields: ConfigFields, facts: DecoderFacts, kind: LayerKind) -> Attention:
    hidden_size, num_heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    dim, num_kv_heads = head_dim(fields, is_key=not facts.square), num_key_value_heads(fields, facts, num_heads)
    qk_norm = facts.qk_norm if fields.flag(facts.qk_norm_if) else "none"
    norm_size = {"none": 0, "head": 2 * dim, "full": (num_heads + num_kv_heads) * dim}[qk_norm]
    sizes = {"query": num_heads * dim, "key_value": num_kv_heads * dim}
    return Attention(
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=dim,
        v_head_dim=dim,
        linears=_projections(fields, facts, hidden_size, sizes["query"], sizes["key_value"]),
        sliding_window=kind.sliding_window,
        causal=not fields.flag("use_bidirectional_attention"),
        rotary=facts.rotary and kind.rotary,
        qk_norm=qk_norm,
        sinks=facts.sinks,
        other_parameters=norm_size * (2 if facts.norm == "layernorm" else 1) + (num_heads if facts.sinks else 0),
    )


def _projections(
    fields: ConfigFields, facts: DecoderFacts, hidden_size: int, query_size: int, key_value_size: int
) -> tuple[Linear, ...]:
    """Return query, key, value and output matrices, the first three fused if there are two names."""
    *inner, out = facts.projections
    sizes = (query_size, key_value_size, key_value_size)
    widths = sizes if len(inner) == 3 else (sum(sizes),)
    bias = fields.flag(facts.query_bias)
    return (
        *(
            Linear(name=name, in_features=hidden_size, out_features=width, bias=bias)
            for name, width in zip(inner, widths, strict=True)
        ),
        Linear(name=out, in_features=query_size, out_features=hidden_size, bias=fields.flag(facts.output_bias)),
    )


def _latent_attention(fields: ConfigFields, facts: DecoderFacts, kind: LayerKind) -> Attention:
    """Return DeepSeek's multi-head latent attention.

    Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1; transformers `models/deepseek_v3/modeling_deepseek_v3.py`.
    """
    hidden_size, num_heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    num_key_value_heads(fields, facts, num_heads)
    rank, query_rank = fields.number("kv_lora_rank"), fields.optional_number("q_lora_rank")
    nope, rope, v_dim = (fields.number(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    bias = fields.flag(facts.query_bias)
    query_size = num_heads * (nope + rope)
    if query_rank is None:
        queries = (Linear(name="q_proj", in_features=hidden_size, out_features=query_size),)
    else:
        queries = (
            Linear(name="q_a_proj", in_features=hidden_size, out_features=query_rank, bias=bias),
            Linear(name="q_b_proj", in_features=query_rank, out_features=query_size),
        )
    return Attention(
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=nope + rope,
        v_head_dim=v_dim,
        linears=(
            *queries,
            Linear(name="kv_a_proj_with_mqa", in_features=hidden_size, out_features=rank + rope, bias=bias),
            Linear(name="kv_b_proj", in_features=rank, out_features=num_heads * (nope + v_dim)),
            Linear(name="o_proj", in_features=num_heads * v_dim, out_features=hidden_size, bias=bias),
        ),
        sliding_window=kind.sliding_window,
        latent=True,
        other_parameters=rank + (query_rank or 0),
    )


def read_mlp(fields: ConfigFields, facts: DecoderFacts) -> Mlp:
    """Return the dense feed-forward block."""
    hidden_size = fields.number("hidden_size")
    width = fields.optional_number(facts.width) if facts.width else None
    return named_mlp(
        names=facts.mlp,
        hidden_size=hidden_size,
        intermediate_size=width or 4 * hidden_size,
        hidden_act=fields.text(facts.activation),
        bias=fields.flag(facts.mlp_bias),
        gated="gate" in facts.mlp[0],
    )


def _surroundings(
    fields: ConfigFields, facts: DecoderFacts, hidden_size: int
) -> tuple[tuple[Embedding, ...], tuple[Linear, ...], int]:
    """Return embeddings, matrices before the first layer, and elements of embedding and final norms."""
    width, stem, num_norms = hidden_size, (), 2 if facts.embedding_norm else 1
    if fields.model_type == "opt":
        width, stem, num_norms = _opt_surroundings(fields, hidden_size)
    tables = [(facts.embedding, fields.number("vocab_size"), width)]
    if facts.positions:
        name, extra = facts.positions
        tables.append((name, fields.number("max_position_embeddings") + extra, hidden_size))
    embeddings = tuple(Embedding(name=name, num_embeddings=rows, embedding_dim=dim) for name, rows, dim in tables)
    return embeddings, stem, num_norms * hidden_size * (2 if facts.norm == "layernorm" else 1)


def _opt_surroundings(fields: ConfigFields, hidden_size: int) -> tuple[int, tuple[Linear, ...], int]:
    """Return OPT's embedding width, its projection into the residual stream, and its number of final norms.

    OPT-350m embeds in 512 columns, projects to 1024 and has no final norm (post-norm layers).
    """
    if not fields.flag("layer_norm_elementwise_affine"):
        fields.unsupported("layer_norm_elementwise_affine=false")
    width = fields.optional_number("word_embed_proj_dim") or hidden_size
    stem = () if width == hidden_size else (Linear(name="project_in", in_features=width, out_features=hidden_size),)
    has_final_norm = fields.flag("do_layer_norm_before") and not fields.flag("_remove_final_layer_norm")
    return width, stem, int(has_final_norm)
