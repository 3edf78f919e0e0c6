"""Counting parameters: pure sums over a `ModelShape`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from brim.spec.model import Attention, LayerGroup, Linear, ModelShape, Moe
from brim.spec.recipe import Lora

ALL_LINEAR = "all-linear"


def count_parameters(shape: ModelShape) -> int:
    """Return all parameters of the model, elements; a tied head counts once.

    Source: equals `model.num_parameters()` of transformers 5.23 (tests/readers/test_hf_config.py).
    """
    head = sum(linear.num_parameters for linear in shape.head)
    if shape.tie_word_embeddings and shape.head:
        head -= shape.head[-1].num_weights
    return (
        count_embedding_parameters(shape)
        + sum(linear.num_parameters for linear in shape.stem)
        + sum(group.count * count_layer_parameters(group) for group in shape.groups)
        + head
        + shape.other_parameters
    )


def count_embedding_parameters(shape: ModelShape) -> int:
    """Return the parameters of all lookup tables, elements; a tied head is the first of them."""
    return sum(embedding.num_parameters for embedding in shape.embeddings)


def count_layer_parameters(group: LayerGroup) -> int:
    """Return the parameters of one layer of the group, elements, all experts included."""
    matrices = sum(copies * linear.num_parameters for linear, copies in layer_linears(group))
    norms = group.num_norms * group.hidden_size * (2 if group.norm_bias else 1)
    attention = sum(block.other_parameters for block in _attentions(group))
    experts = group.mlp.other_parameters if isinstance(group.mlp, Moe) else 0
    return matrices + norms + attention + experts + group.other_parameters


def layer_linears(group: LayerGroup) -> tuple[tuple[Linear, int], ...]:
    """Return every matrix of one layer and how many copies the layer has (an expert's: `num_experts`)."""
    attention = [(linear, 1) for block in _attentions(group) for linear in block.linears]
    return (*attention, *_mlp_linears(group), *((linear, 1) for linear in group.other_linears))


def _attentions(group: LayerGroup) -> Sequence[Attention]:
    """Return self-attention and, where there is one, cross-attention."""
    return (group.attention,) if group.cross_attention is None else (group.attention, group.cross_attention)


def _mlp_linears(group: LayerGroup) -> Iterable[tuple[Linear, int]]:
    """Yield the feed-forward matrices of one layer and their copies."""
    if not isinstance(group.mlp, Moe):
        yield from ((linear, 1) for linear in group.mlp.linears)
        return
    yield group.mlp.router, 1
    yield from ((linear, group.mlp.num_experts) for linear in group.mlp.expert_linears)
    if group.mlp.shared is not None:
        yield from ((linear, 1) for linear in group.mlp.shared.linears)
    if group.mlp.shared_gate is not None:
        yield group.mlp.shared_gate, 1


def count_matmul_parameters(shape: ModelShape) -> int:
    """Return the weights one token is multiplied with, elements: of routed experts only those it visits; the
    output head, tied or not; no lookup table, bias or norm.

    Twice this number is the FLOPs of a forward pass per token, attention scores aside.

    Leaves out: layers only image patches or audio frames meet, in a model that reads text as well (their `stem` is
    counted: 0.1 % of Gemma 3 4B). In encoder-decoder models both stacks are counted, though a token passes through
    one of them and the keys and values of cross-attention: at most twice too many.
    """
    stem = sum(linear.num_weights for linear in shape.stem)
    head = sum(linear.num_weights for linear in shape.head)
    return stem + head + sum(group.count * _count_active_weights(group) for group in _main_groups(shape))


def _main_groups(shape: ModelShape) -> Sequence[LayerGroup]:
    """Return the layers every token meets: without the towers of a model that also reads text."""
    text = [group for group in shape.groups if group.stack not in ("vision", "audio")]
    return text or shape.groups


def _count_active_weights(group: LayerGroup) -> int:
    """Return the weights of one layer that one token meets, elements."""
    total = sum(copies * linear.num_weights for linear, copies in layer_linears(group))
    if isinstance(group.mlp, Moe):
        idle = group.mlp.num_experts - group.mlp.num_experts_per_tok
        total -= idle * sum(linear.num_weights for linear in group.mlp.expert_linears)
    return total


def target_linears(
    shape: ModelShape | LayerGroup, target_modules: Iterable[str], fused_experts: bool
) -> tuple[tuple[Linear, int], ...]:
    """Return the matrices an adapter hits and how many copies of each the model (or one layer of a group) has.

    Args:
        shape: a model, or one group of its layers.
        target_modules: names as PEFT takes them, compared by their last part; or `all-linear`: every `nn.Linear`
            but the output head.
        fused_experts: whether experts are one 3-D parameter and the router a bare one (transformers 5), which
            adapters and bitsandbytes pass over; otherwise each expert has modules of its own.

    Leaves out: regular expressions, `layers_to_transform`, `exclude_modules`, and parents in a target's path
    (`self_attn.q_proj` hits every `q_proj`).

    Source: PEFT 0.21 `tuners/tuners_utils.py`, `check_target_module_exists`, `_maybe_include_all_linear_layers`.
    """
    names = {target.rsplit(".", 1)[-1] for target in target_modules}
    if isinstance(shape, LayerGroup):
        modules = _group_modules(shape, fused_experts)
    else:
        modules = _model_modules(shape, names, fused_experts)
    return tuple((linear, copies) for linear, copies in modules if ALL_LINEAR in names or linear.name in names)


def _model_modules(shape: ModelShape, names: set[str], fused_experts: bool) -> Iterable[tuple[Linear, int]]:
    """Yield every `nn.Linear` of the model and its copies; the output head only if it is named."""
    num_outputs = 1 if _has_output_head(shape) else 0
    inner, outputs = shape.head[: len(shape.head) - num_outputs], shape.head[len(shape.head) - num_outputs :]
    yield from ((linear, 1) for linear in shape.stem if not linear.bare)
    for group in shape.groups:
        yield from ((linear, group.count * copies) for linear, copies in _group_modules(group, fused_experts))
    yield from ((linear, 1) for linear in inner)
    yield from ((linear, 1) for linear in outputs if linear.name in names)


def _has_output_head(shape: ModelShape) -> bool:
    """Return whether the last matrix is what PEFT spares: logits over tokens, or the labels of a sequence.

    Labels of tokens or images are not spared, nor the pooler of a model without a head.
    """
    labels = shape.architecture.endswith("ForSequenceClassification") and shape.head[-1].name in ("score", "classifier")
    return shape.vocab_size > 0 or labels


def _group_modules(group: LayerGroup, fused_experts: bool) -> Iterable[tuple[Linear, int]]:
    """Yield every `nn.Linear` of one layer and its copies."""
    moe = group.mlp if isinstance(group.mlp, Moe) else None
    for linear, copies in layer_linears(group):
        if linear.bare:
            continue
        if moe is not None and any(linear is expert for expert in moe.expert_linears):
            if not fused_experts:
                yield from ((part, copies) for part in _separate(linear, moe))
        elif moe is None or linear is not moe.router or moe.router_is_module or not fused_experts:
            yield linear, copies


def _separate(linear: Linear, moe: Moe) -> tuple[Linear, ...]:
    """Return a matrix of an expert as the modules it was before transformers 5."""
    gate, up, down = moe.separate_names
    if linear is moe.expert_linears[-1]:
        return (replace(linear, name=down),)
    half = linear.out_features // 2
    return tuple(replace(linear, name=name, out_features=half) for name in (gate, up))


def adapter_linears(shape: ModelShape, lora: Lora, fused_experts: bool) -> tuple[tuple[Linear, int], ...]:
    """Return the matrices PEFT adapts and how many adapters of rank r each gets in the whole model.

    As `target_linears`, but for one thing PEFT does to mixtures of experts under transformers 5 (Mixtral, Qwen3-MoE,
    DeepSeek, GLM-4-MoE): it takes the names of separate experts and of the router out of the targets, also those
    `all-linear` stands for, and adapts the fused parameters instead, every expert with a rank of its own. Gate and
    up, fused, get twice the rank (two copies here). Dense and shared blocks of those names are then passed over.

    Source: PEFT 0.21 `utils/transformers_weight_conversion.py`, `_convert_peft_config_moe`; experts in 0.19 already,
    `all-linear` since 0.20.
    """
    if not fused_experts or not any(_is_rerouted(group) for group in shape.groups):
        return target_linears(shape, lora.target_modules, fused_experts)
    names = {target.rsplit(".", 1)[-1] for target in lora.target_modules}
    former = {name for group in shape.groups if _is_rerouted(group) for name in _former_names(group.mlp)}
    if ALL_LINEAR in names:
        modules = target_linears(shape, (ALL_LINEAR,), fused_experts)
        names = names - {ALL_LINEAR} | former | {linear.name for linear, _ in modules}
    plain = target_linears(shape, names - former, fused_experts)
    return (*plain, *(hit for group in shape.groups if _is_rerouted(group) for hit in _rerouted(group, names)))


def _is_rerouted(group: LayerGroup) -> bool:
    """Return whether adapters reach the fused experts of this group."""
    return isinstance(group.mlp, Moe) and group.mlp.adapters_reach_experts


def _former_names(moe: Moe) -> tuple[str, ...]:
    """Return the names by which router and separate experts are targeted."""
    return (moe.router.name, *moe.separate_names)


def _rerouted(group: LayerGroup, names: set[str]) -> Iterable[tuple[Linear, int]]:
    """Yield the bare parameters of a group that adapters reach, with the adapters of rank r in all its layers."""
    moe = group.mlp
    assert isinstance(moe, Moe)
    gate, up, down = moe.separate_names
    gate_up, down_linear = moe.expert_linears
    if moe.router.name in names:
        yield moe.router, group.count
    for linear, parts in ((gate_up, (gate, up)), (down_linear, (down,))):
        if hits := sum(part in names for part in parts):
            yield linear, group.count * moe.num_experts * hits


def count_lora_parameters(shape: ModelShape, lora: Lora, fused_experts: bool) -> int:
    """Return the trained parameters of an adapter, elements: r x (in + out) per matrix, and out more with DoRA.

    Leaves out: `modules_to_save` (PEFT trains a classification head whole), `rank_pattern`, adapters on convolutions.

    Source: LoRA (arXiv 2106.09685) section 4.1; DoRA (arXiv 2402.09353) section 4.1.
    """
    return sum(
        copies * _count_adapter(linear.in_features, linear.out_features, lora)
        for linear, copies in adapter_linears(shape, lora, fused_experts)
    ) + sum(
        _count_adapter(table.num_embeddings, table.embedding_dim, lora)
        for table in shape.embeddings
        if table.name in lora.target_modules
    )


def _count_adapter(in_features: int, out_features: int, lora: Lora) -> int:
    """Return the parameters of the adapter of one matrix, elements."""
    return lora.r * (in_features + out_features) + (out_features if lora.use_dora else 0)


def default_targets(shape: ModelShape) -> tuple[str, ...]:
    """Return the names of all attention and feed-forward matrices, in call order: what practitioners adapt.

    Leaves out: in a mixture of experts, every name that separate experts have or had (`gate_proj`), for it would put
    an adapter on each expert; the names of vision and audio towers in models that also read text.

    Source: QLoRA (arXiv 2305.14314) section 4: adapters on all linear layers are what matches full training.
    """
    if not shape.groups:
        return ("all-linear",)
    groups = _main_groups(shape)
    names = (linear.name for group in groups for linear in _block_linears(group) if not linear.bare)
    experts = {name for group in groups for name in _expert_names(group)}
    return tuple(name for name in dict.fromkeys(names) if name not in experts)


def _block_linears(group: LayerGroup) -> Iterable[Linear]:
    """Yield the matrices of attention and of the feed-forward block every token visits."""
    for block in _attentions(group):
        yield from block.linears
    dense = group.mlp.shared if isinstance(group.mlp, Moe) else group.mlp
    if dense is not None:
        yield from dense.linears


def _expert_names(group: LayerGroup) -> tuple[str, ...]:
    """Return the names of separate experts, where there ever were any."""
    if not isinstance(group.mlp, Moe) or group.mlp.expert_linears[0].bare:
        return ()
    return group.mlp.separate_names
