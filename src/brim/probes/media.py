"""Images and sound of a micro-batch: their shapes from the config, their tokens counted by the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from brim.errors import ProbeFailed

Make = Callable[[], torch.Tensor]
Media = dict[int, int]
"""Id of a placeholder token -> how many of them stand in one sequence."""

_GRID, _POOLED = 32, 16
_SECONDS, _SAMPLES_PER_SECOND, _FRAMES = 10, 16_000, 1000
_IMAGE_TOKENS = (
    "image_token_id", "image_token_index", "im_patch_id", "media_placeholder_token_id", "image_soft_token_id",
    "video_token_index",
)  # fmt: skip
_AUDIO_TOKENS = ("audio_token_id", "audio_token_index")
_FEATURES = {
    "image": ("get_image_features", "get_video_features"), "audio": ("get_audio_features", "get_audio_embeddings"),
}  # fmt: skip
_FILLER = 5


def add_media(request: Any, makers: MutableMapping[str, Make]) -> Media:
    """Add what a forward reads besides text, one image or sound per sequence, and return the tokens it stands for.

    Raises:
        ProbeFailed: the model reads media in a form brim cannot make up.
    """
    takes, media = request.takes, {}
    if "pixel_values" in takes or "image_patches" in takes:
        media |= _add(request, makers, "image")
    if ("input_features" in takes and "input_ids" not in takes) or _hears(request):
        media |= _add(request, makers, "audio")
    elif "flattened_patches" in takes:
        makers["flattened_patches"] = _flattened_patches(request)
    elif "input_values" in takes and "input_ids" not in takes:
        makers["input_values"] = _waves(request)
    return media


def _hears(request: Any) -> bool:
    """Whether a language model reads sound and nothing else besides text."""
    return "input_features" in request.takes and "pixel_values" not in request.takes


def _add(request: Any, makers: MutableMapping[str, Make], medium: str) -> Media:
    """Add the first form of a medium that the model's encoder takes."""
    name, names, list_forms = _MEDIA[medium]
    failed: Exception | None = None
    token = _find_id(request.config, names)
    for form in list_forms(request, _list_taken(request, medium)):
        if "input_ids" not in request.takes or token is None:
            makers |= form
            return {}
        try:
            count = count_tokens(request.model, medium, form)
        except Exception as error:  # whatever the model's own code raises: the next form is tried
            failed = failed or error
            continue
        if not count and "Classification" in request.kind:  # of text alone
            return {}
        makers |= form if _takes_any(request.model) else _given(request.takes, **form)
        return {token: count // request.batch} if count else {}
    text = f"{name} of {request.kind}: no form brim knows fits ({_short(failed)}); pass make_inputs"
    raise ProbeFailed(text) from failed


def _list_taken(request: Any, medium: str) -> frozenset[str]:
    """Names the forward takes, or hands on to what encodes the medium."""
    names = set(request.takes)
    for method in _list_encoders(request.model, medium):
        names |= set(inspect.signature(method).parameters) - {"input_ids", "args", "kwargs"}
    return frozenset(names)


def _takes_any(model: Any) -> bool:
    kinds = inspect.signature(model.forward).parameters.values()
    return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in kinds)


def _list_encoders(model: Any, medium: str) -> Iterator[Any]:
    """Yield the methods that encode a medium: the outer model's first, then the inner one's."""
    for name in _FEATURES[medium]:
        for owner in (model, getattr(model, "model", None)):
            method = getattr(owner, name, None)
            if method is not None:
                yield method


def _list_image_forms(request: Any, takes: frozenset[str]) -> Iterator[dict[str, Make]]:
    """Yield forms images are read in, those the signature names first."""
    config, batch = request.config, request.batch
    vision = find_vision(config)
    channels = first_number(vision, ("num_channels", "in_channels", "in_chans", "input_channels"), 3)
    if "image_grid_thw" in takes:
        patch = first_number(vision, ("patch_size", "spatial_patch_size"), 14)
        frames = first_number(vision, ("temporal_patch_size", "patch_temporal"), 1)
        window = patch * first_number(vision, ("spatial_merge_size", "merge_size"), 2)
        rows = batch * _GRID * _GRID
        grid = [[1, _GRID, _GRID]] * batch
        flat_patches = (rows, channels * frames * patch * patch)
        for shape in (flat_patches, (rows, channels, patch, patch), (rows, window, window, channels)):
            yield _given(
                takes, pixel_values=_values(request, shape), image_grid_thw=lambda: torch.tensor(grid),
                image_merge_sizes=lambda: torch.tensor([first_number(vision, ("spatial_merge_size",), 2)] * batch),
            )  # fmt: skip
    height, width = find_size(config)
    sizes = torch.tensor([[height, width]] * batch).tolist()
    tiles = first_number(vision, ("max_num_tiles",), 1)
    if "aspect_ratio_ids" in takes:
        yield _given(
            takes, pixel_values=_values(request, (batch, 1, tiles, channels, height, width)),
            aspect_ratio_ids=lambda: torch.ones(batch, 1, dtype=torch.long),
            aspect_ratio_mask=lambda: torch.ones(batch, 1, tiles, dtype=torch.long),
            cross_attention_mask=lambda: torch.ones(batch, request.length, 1, tiles, dtype=torch.long),
        )  # fmt: skip
    if "image_position_ids" in takes:
        kernel = first_number(vision, ("pooling_kernel_size",), 3)
        patch = first_number(vision, ("model_patch_size", "patch_size"), 16)
        side = _POOLED * kernel
        places = [[[at % side, at // side] for at in range(side * side)]] * batch
        yield _given(
            takes, pixel_values=_values(request, (batch, side * side, channels * patch * patch)),
            image_position_ids=lambda: torch.tensor(places),
        )  # fmt: skip
    if "spatial_shapes" in takes:
        patch = first_number(vision, ("patch_size",), 16)
        side = height // patch if height >= patch else 16
        yield _given(
            takes, pixel_values=_values(request, (batch, side * side, channels * patch * patch)),
            spatial_shapes=lambda: torch.tensor([[side, side]] * batch),
            pixel_attention_mask=lambda: torch.ones(batch, side * side, dtype=torch.long),
        )  # fmt: skip
    flat, tiled = (batch, channels, height, width), (batch, 1, channels, height, width)
    frames = first_number(vision, ("num_frames", "frames"), 0)
    forms = [flat, tiled, *((batch, count, channels, height, width) for count in (2, 3))]
    patch = first_number(vision, ("patch_size",), 16)
    patches = (batch, (height // patch) * (width // patch), channels * patch * patch)
    forms = [patches, *forms] if "image_patches" in takes else forms
    if "pixel_attention_mask" in takes:
        forms = [tiled, flat]
    elif frames:
        forms = [(batch, frames, channels, height, width), flat]
    for shape in forms:
        yield _given(takes, pixel_values=_values(request, shape), high_res_pixel_values=_fine(request, channels))
        if "image_sizes" in takes:
            yield _given(takes, pixel_values=_values(request, shape), image_sizes=lambda: torch.tensor(sizes))


def _fine(request: Any, channels: int) -> Make:
    """The image once more, as large as a second encoder reads it."""
    part = getattr(request.config, "high_res_vision_config", None) or request.config
    return _values(request, (request.batch, channels, *find_size(part)))


def _flattened_patches(request: Any) -> Make:
    """Patches with their row and column before them. Source: transformers models/pix2struct/image_processing_*.py."""
    vision = find_vision(request.config)
    patches = first_of_all(request.config, ("seq_len",), 2048)
    width = first_of_all(request.config, ("patch_embed_hidden_size",), first_number(vision, ("hidden_size",), 768))
    return _values(request, (request.batch, min(patches, 2048), width + 2))


def _given(takes: frozenset[str], **makers: Make) -> dict[str, Make]:
    return {name: make for name, make in makers.items() if name in takes}


def _values(request: Any, shape: tuple[int, ...]) -> Make:
    """Values in the weights' dtype, none of them zero: some models take empty images for padding."""
    dtype = find_dtype(request.model)
    return lambda: torch.ones(shape, dtype=dtype)


def find_dtype(model: Any) -> torch.dtype:
    """Return the dtype of a model's weights."""
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)


def _list_sound_forms(request: Any, takes: frozenset[str]) -> Iterator[dict[str, Make]]:
    """Yield forms sound is read in: Whisper's (bands, frames), then (frames, bands)."""
    config, batch = request.config, request.batch
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels", "input_dim")
    bands = first_of_all(config, names, 80)
    positions = first_of_all(config, ("max_source_positions",), 0)
    frames = 2 * positions if positions and positions <= 3000 else _FRAMES
    by_band, by_frame = (batch, bands, frames), (batch, frames, bands)
    transposed = first_of_all(config, ("input_feat_per_channel", "feature_projection_input_dim"), 0)
    for shape in (by_frame, by_band) if transposed else (by_band, by_frame):
        yield _given(
            takes, input_features=_values(request, shape),
            feature_attention_mask=lambda: torch.ones(batch, frames, dtype=torch.long),
            input_features_mask=lambda: torch.ones(batch, frames, dtype=torch.long),
            padding_mask=lambda: torch.ones(batch, frames, dtype=torch.long),
        )  # fmt: skip


_MEDIA = {
    "image": ("images", _IMAGE_TOKENS, _list_image_forms),
    "audio": ("sound", _AUDIO_TOKENS, _list_sound_forms),
}
"""Medium -> its word in errors, the names of its placeholder's id in configs, the forms it is read in."""


def _waves(request: Any) -> Make:
    """Sound as samples, or as the spectrogram a transformer over patches reads."""
    config, batch = request.config, request.batch
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length") and hasattr(config, "frequency_stride"):
        return _values(request, (batch, config.max_length, config.num_mel_bins))
    samples = _SECONDS * _SAMPLES_PER_SECOND
    return _values(request, (batch, samples))


def count_tokens(model: Any, medium: str, given: Mapping[str, Make]) -> int:
    """Return how many tokens a micro-batch's media become, from the model's own encoder."""
    medium_takes = {one for method in _list_encoders(model, medium) for one in inspect.signature(method).parameters}
    for method in _list_encoders(model, medium):
        takes = inspect.signature(method).parameters
        whole = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values())
        hidden = whole and not any(name in takes for name in ("pixel_values", "input_features"))
        passed = hidden or (whole and medium_takes.issuperset(given))
        inputs = {key: make() for key, make in given.items() if key in takes or passed}
        if "qformer_input_ids" in takes:  # a question, which changes no shape
            inputs["qformer_input_ids"] = torch.zeros(len(inputs["pixel_values"]), 1, dtype=torch.long)
        with torch.no_grad():
            return _count_rows(method(**inputs))
    return 0


def _count_rows(features: Any) -> int:
    if hasattr(features, "pooler_output") and features.pooler_output is not None:
        features = features.pooler_output
    elif hasattr(features, "last_hidden_state"):
        features = features.last_hidden_state
    if isinstance(features, (list, tuple)):
        return sum(_count_rows(one) for one in features)
    return features.numel() // features.shape[-1]


def place_media(request: Any, media: Media, length: int) -> list[int]:
    """Return one sequence of token ids with the placeholders of its image or sound in it, then text.

    Raises:
        ProbeFailed: they need more tokens than the sequence has.
    """
    config = request.config
    ids: list[int] = []
    for token, count in media.items():
        start = _find_id(config, ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index"))
        ids += [start] if start is not None else []
        ids += [token] * count
    if len(ids) >= length:
        text = f"an image or sound takes {len(ids)} tokens, and a sequence has {length}; raise the sequence length"
        raise ProbeFailed(text, num_tokens=len(ids))
    return ids + [find_filler(config)] * (length - len(ids) - 1) + [_find_end(request)]


def _find_end(request: Any) -> int:
    """Classifiers with a decoder read the state of the last end-of-text token."""
    end = _find_id(request.config, ("eos_token_id",))
    return end if end is not None and "Classification" in request.kind else find_filler(request.config)


def find_filler(config: Any) -> int:
    """Return a token id that means nothing in particular."""
    taken = set()
    for one in (config, getattr(config, "text_config", None)):
        for name, value in vars(one).items() if one is not None else ():
            if "token" in name:
                taken |= {value} if isinstance(value, int) else set(value) if isinstance(value, list) else set()
    return next(one for one in range(_FILLER, 10_000) if one not in taken)


def _find_id(config: Any, names: tuple[str, ...]) -> int | None:
    for one in (config, getattr(config, "text_config", None), getattr(config, "thinker_config", None)):
        for name in names:
            value = getattr(one, name, None)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int):
                return value
    return None


def find_vision(config: Any) -> Any:
    """Return the part of a config that describes images."""
    for one in walk_configs(config):
        if one is not config and any(hasattr(one, name) for name in ("patch_size", "image_size")):
            return one
    return config


def find_size(config: Any) -> tuple[int, int]:
    """Return height and width of the images a config is made for, pixels; 224 where it names none."""
    for one in walk_configs(config):
        size = getattr(one, "image_size", None)
        if isinstance(size, dict):
            size = [size.get("height", 224), size.get("width", 224)]
        if isinstance(size, int):
            return size, size
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return 224, 224


def first_number(config: Any, names: tuple[str, ...], default: int) -> int:
    """Return the first of a config's numbers that is there."""
    for name in names:
        value = getattr(config, name, None)
        value = value[-1] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int):
            return value
    return default


def first_of_all(config: Any, names: tuple[str, ...], default: int) -> int:
    """Return the first such number in a config or in those inside it."""
    for one in walk_configs(config):
        value = first_number(one, names, -1)
        if value >= 0:
            return value
    return default


def walk_configs(config: Any) -> Iterator[Any]:
    """Yield a config and those inside it, those of images first."""
    inner = [(name, one) for name, one in vars(config).items() if hasattr(one, "to_dict")]
    yield config
    for _, one in sorted(inner, key=lambda pair: "vis" not in pair[0] and "image" not in pair[0]):
        yield from walk_configs(one)


def _short(error: Exception | None) -> str:
    return "" if error is None else (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
