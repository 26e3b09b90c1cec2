"""What we need to know of each family of vision-language models: where pictures stand in a prompt and how they lie there."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.vision.picture import Layout, grid

UNMATCHED = "The prompt's picture tokens do not match the pictures: let the model's processor make the inputs."
PROJECTORS = ("multi_modal_projector", "connector", "merger")


@dataclass(frozen=True)
class Eyes:
    """The parts of a vision-language model that we look at.

    Attributes:
        inner: the module whose ``get_image_features`` is called by the forward.
        tower: the vision encoder; projector: what turns its features into tokens.
        image, video: ids of the tokens that pictures and frames take the place of; video may be None.
    """

    inner: torch.nn.Module
    tower: torch.nn.Module
    projector: torch.nn.Module
    language: torch.nn.Module
    image: int
    video: int | None


@dataclass
class Seen:
    """What one call of the encoder gave: features of each picture as the model packs them, and how they lie.

    Attributes:
        features: per picture ``(n, dim)``.
        layouts: per picture.
        firsts: per picture the number of its first crop among those of the encoder.
        windows: where the encoder has one row of all patches, per picture its part: first, and last + 1.
        orders: then, per picture, the place of each cell's patches in that part.
    """

    features: list[torch.Tensor]
    layouts: list[Layout]
    firsts: list[int]
    windows: list[tuple[int, int]] | None = None
    orders: list[torch.Tensor] | None = None


def find_eyes(model: torch.nn.Module) -> Eyes:
    """The parts of ``model``; a LaconicError where it is no vision-language model that we understand."""
    name = type(model).__name__
    inner = next((m for m in (getattr(model, "model", None), model) if hasattr(m, "get_image_features")), None)
    if inner is None:
        raise LaconicError(f"{name} reads text only: methods for pictures need a model that sees, such as LLaVA or Qwen-VL.")
    config = model.config
    image = getattr(config, "image_token_id", None)
    image = getattr(config, "image_token_index", None) if image is None else image
    if image is None:
        raise LaconicError(f"{name} does not say which token stands for pictures (image_token_id), so none can be found.")
    video = getattr(config, "video_token_id", None)
    tower = model.get_encoder(modality="image")
    projector = next((m for part in (inner, tower) for n in PROJECTORS if (m := getattr(part, n, None)) is not None), None)
    if tower is model or projector is None:
        raise LaconicError(f"The vision encoder of {name} is not understood: no projector between it and the language model.")
    return Eyes(inner, tower, projector, model.get_decoder(), image, video)


def cell_side(eyes: Eyes) -> int:
    """Patches along one side of what becomes one token, in encoders that see each picture as a row of a batch."""
    config = eyes.inner.config
    if scale := getattr(eyes.projector, "scale_factor", None):
        return scale
    if share := getattr(config, "downsample_ratio", None):
        return round(1 / share)
    if tokens := getattr(config, "mm_tokens_per_image", None):
        return config.vision_config.image_size // config.vision_config.patch_size // round(tokens**0.5)
    return 1


def feature_block(eyes: Eyes, depth: int) -> int:
    """The block of an encoder of ``depth`` blocks whose output the projector is given, the earliest where there are several."""
    layer = getattr(eyes.inner.config, "vision_feature_layer", -1)
    return min(number % (depth + 1) for number in (layer if isinstance(layer, list) else [layer])) - 1


def look(eyes: Eyes, output: Any, arguments: dict[str, Any]) -> Seen:
    """How the pictures of one ``get_image_features`` call lie, from its ``output`` and the ``arguments`` that it was given."""
    pooled = output.pooler_output
    features = list(pooled)
    if (thw := arguments.get("image_grid_thw")) is not None:
        return _look_native(eyes, features, thw)
    if arguments.get("image_sizes") is not None and hasattr(eyes.inner, "pack_image_features"):
        return _look_packed(eyes, features, arguments)
    if scale := getattr(eyes.projector, "scale_factor", None):  # Idefics3: all crops of a prompt in one piece
        vision = eyes.inner.config.vision_config
        size = (vision.image_size // vision.patch_size // scale) ** 2
        features = [part for whole in features for part in whole.split(size) if len(part)]
    layouts = [grid(*_square(len(part))) for part in features]
    return Seen(features, layouts, list(range(len(features))))


def _square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    if side * side != count:
        raise LaconicError(f"A picture of {count} tokens is no square, and the model does not say how they lie.")
    return side, side


def _look_native(eyes: Eyes, features: list[torch.Tensor], thw: torch.Tensor) -> Seen:
    """Qwen-VL: every picture in its own size, the patches of a token side by side, with windows in another order."""
    merge = eyes.tower.spatial_merge_size
    layouts, windows, at = [], [], 0
    for frames, height, width in thw.tolist():
        layouts.append(grid(height // merge, width // merge, frames))
        windows.append((at, at + frames * height * width))
        at += frames * height * width
    orders = [torch.arange(len(layout)) for layout in layouts]
    if getattr(eyes.tower, "window_size", None):
        from transformers.vision_utils import get_vision_window_index

        index, _ = get_vision_window_index(thw, merge, eyes.tower.window_size, eyes.tower.patch_size)
        place = torch.argsort(index.cpu())
        begin = 0
        for i, layout in enumerate(layouts):  # windows of one picture stay together
            orders[i] = place[begin : begin + len(layout)] - begin
            begin += len(layout)
    return Seen(features, layouts, [0] * len(layouts), windows, orders)


def _look_packed(eyes: Eyes, features: list[torch.Tensor], arguments: dict[str, Any]) -> Seen:
    """LLaVA-NeXT and OneVision: the model's own packing of cell numbers says where each token comes from."""
    config = eyes.inner.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    pixels, layouts, firsts, first = arguments["pixel_values"], [], [], 0
    counts = crop_counts(eyes, arguments)
    for picture, (count, size) in enumerate(zip(counts, arguments["image_sizes"], strict=True)):
        layouts.append(_packed_layout(eyes, count, size, side, len(features[picture]), pixels.device))
        firsts.append(first)
        first += count
    return Seen(features, layouts, firsts)


def crop_counts(eyes: Eyes, arguments: dict[str, Any]) -> list[int]:
    """Crops of each picture, the whole one included, as the model itself counts them."""
    module = sys.modules[type(eyes.inner).__module__]
    config, numbers = eyes.inner.config, arguments.get("batch_num_images")
    patching = [True] * len(arguments["image_sizes"])
    if numbers is not None:
        patching = [n == 1 for n in numbers.tolist() for _ in range(n)]
    return [
        module.image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if cut else 1
        for size, cut in zip(arguments["image_sizes"], patching, strict=True)
    ]


def _packed_layout(eyes: Eyes, count: int, size: torch.Tensor, side: int, length: int, device: Any) -> Layout:
    """Packs the coordinates of every cell as if they were features; a separator is packed as NaN."""
    pack = eyes.inner.pack_image_features
    module, config = sys.modules[type(eyes.inner).__module__], eyes.inner.config
    rows = columns = 0
    if count > 1:
        rows, columns = module.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    cell = torch.arange(side, dtype=torch.float32)
    place = torch.stack([cell.repeat_interleave(side), cell.repeat(side)], dim=-1)  # (side * side, 2): row, column
    crops = [place]
    for part in range(count - 1):  # coordinates in the grid of all parts together, so that resizing them means something
        crops.append(place + torch.tensor([part // columns * side, part % columns * side]))
    stacked = torch.stack(crops)
    marks = torch.zeros(count, side * side, 1)
    marks[1:] = 1.0
    values = torch.cat([stacked, marks], dim=-1).to(device)
    newline = torch.full((3,), float("nan"), device=device)
    named = "vision_feature_select_strategy" in inspect.signature(pack).parameters  # NeXT's, not OneVision's
    options = {"vision_feature_select_strategy": "default"} if named else {}
    packed, _ = pack([values], size[None] if torch.is_tensor(size) else [size], image_newline=newline, **options)
    packed = packed[0].cpu()
    if len(packed) != length:
        raise LaconicError(f"{type(eyes.inner).__name__} packs a picture in a way that is not understood.")
    gone = packed[:, 0].isnan()
    row, column, in_parts = packed.nan_to_num(0.0).round().long().unbind(-1)
    crop = torch.where(in_parts > 0, 1 + row // side * max(columns, 1) + column // side, torch.zeros_like(row))
    return Layout(
        crop.masked_fill(gone, -1), (row % side).masked_fill(gone, -1), (column % side).masked_fill(gone, -1),
        ((side, side),) * count, (rows, columns),
    )  # fmt: skip


def spans(ids: torch.Tensor, eyes: Eyes, seen: Seen) -> Iterator[tuple[int, int, torch.Tensor]]:
    """For each picture of each row of ``ids`` (batch, count): its number in ``seen``, the row, and its slots, int64 ``(n,)``.

    Rows of a beam search stand side by side and show the same pictures.
    """
    pictured = ids == eyes.image
    total, beams = sum(map(len, seen.features)), 1
    if total and int(pictured.sum()) % total == 0:
        beams = max(1, int(pictured.sum()) // total)
    number = done = 0
    for row in range(len(ids)):
        slots, begin, number = pictured[row].nonzero()[:, 0], 0, done
        while begin < len(slots):
            if number == len(seen.features) or begin + len(seen.features[number]) > len(slots):
                raise LaconicError(UNMATCHED)
            yield number, row, slots[begin : begin + len(seen.features[number])]
            begin, number = begin + len(seen.features[number]), number + 1
        if row % beams == beams - 1:
            done = number
    if done != len(seen.features):
        raise LaconicError(UNMATCHED)
