"""What we need to know of each family of vision-language models: where pictures stand in a prompt and how they lie there."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.vision.encoder import Trace
from laconic.vision.picture import SEPARATOR, Layout, grid
from laconic.vision.sheets import Packed

UNMATCHED = "The prompt's picture tokens do not match the pictures: let the model's processor make the inputs."
PROJECTORS = ("multi_modal_projector", "connector", "merger")


@dataclass(frozen=True)
class Eyes:
    """The parts of a vision-language model that we look at.

    Attributes:
        inner: the module whose ``get_image_features`` and ``get_video_features`` are called by the forward.
        tower: the vision encoder; projector: what turns its features into tokens.
        image, video: ids of the tokens that pictures and videos take the place of; video is None where the model has none.
    """

    inner: torch.nn.Module
    tower: torch.nn.Module
    projector: torch.nn.Module
    language: torch.nn.Module
    image: int
    video: int | None

    def pictured(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of ``ids`` stand for pictures or videos, boolean."""
        return ids == self.image if self.video is None else (ids == self.image) | (ids == self.video)


@dataclass
class Seen:
    """What one call of the encoder gave: features of each picture as the model packs them, and how they lie.

    A video is one picture whose crops are its frames; where the encoder joins frames, those that it made of them.

    Attributes:
        token: id of the tokens that these pictures take the place of.
        features: per picture ``(n, dim)``.
        layouts: per picture.
        firsts: per picture the number of its first crop among those of the encoder.
        windows: where the encoder has one row of all patches, per picture its part: first, and last + 1.
        orders: then, per picture, the place of each cell's patches in that part.
        trace, encoded, pixels: of all of them, as in ``laconic.vision.picture.Picture``.
    """

    token: int
    features: list[torch.Tensor]
    layouts: list[Layout]
    firsts: list[int]
    windows: list[tuple[int, int]] | None = None
    orders: list[torch.Tensor] | None = None
    trace: Trace | None = None
    encoded: torch.Tensor | None = None
    pixels: torch.Tensor | None = None

    def pixels_of(self, number: int) -> torch.Tensor | None:
        """Pixels of one picture's crops; None where the encoder was given patches, or crops that are no pictures lie between."""
        count = sum(len(layout.shapes) for layout in self.layouts)
        if self.pixels is None or self.windows is not None or len(self.pixels) != count:
            return None
        return self.pixels[self.firsts[number] : self.firsts[number] + len(self.layouts[number].shapes)]


def find_eyes(model: torch.nn.Module) -> Eyes:
    """The parts of ``model``; a LaconicError where it is no vision-language model that we understand."""
    name = type(model).__name__
    inner = next((m for m in (getattr(model, "model", None), model) if hasattr(m, "get_image_features")), None)
    if inner is None:
        raise LaconicError(f"{name} reads text only: methods for pictures need a model that sees, such as LLaVA or Qwen-VL.")
    config = model.config
    image, video = (_token(config, kind) for kind in ("image", "video"))
    if image is None:
        raise LaconicError(f"{name} does not say which token stands for pictures (image_token_id), so none can be found.")
    tower = model.get_encoder(modality="image")
    projector = next((m for part in (inner, tower) for n in PROJECTORS if (m := getattr(part, n, None)) is not None), None)
    if tower is model or projector is None:
        raise LaconicError(f"The vision encoder of {name} is not understood: no projector between it and the language model.")
    return Eyes(inner, tower, projector, model.get_decoder(), image, video)


def _token(config: Any, kind: str) -> int | None:
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next((token for name in names if (token := getattr(config, name, None)) is not None), None)


def pictured_tokens(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Which of ``ids`` stand for pictures or videos, boolean; none in models that read text only."""
    known = [token for kind in ("image", "video") if (token := _token(model.config, kind)) is not None]
    return torch.isin(ids, torch.tensor(known, dtype=ids.dtype, device=ids.device))


def patch_side(eyes: Eyes) -> int:
    """Patches along one side of what the encoder sees, where it sees squares."""
    vision = eyes.inner.config.vision_config
    return vision.image_size // vision.patch_size


def frame_side(eyes: Eyes) -> int:
    """Tokens along one side of a frame, in encoders that see each frame of a video as a picture of its own."""
    if hasattr(eyes.inner, "apply_pooling"):  # LLaVA-OneVision
        return -(-patch_side(eyes) // 2)
    if stride := getattr(eyes.inner.config, "spatial_pool_stride", None):  # LLaVA-NeXT-Video
        return patch_side(eyes) // stride
    raise not_understood(eyes, "videos")


def not_understood(eyes: Eyes, what: str) -> LaconicError:
    return LaconicError(f"{type(eyes.inner).__name__} makes tokens of {what} in a way that is not understood: leave them out.")


def cell_side(eyes: Eyes, video: bool) -> int:
    """Patches along one side of what becomes one token, in encoders that see each picture as a row of a batch."""
    config = eyes.inner.config
    if video:
        side, rest = divmod(patch_side(eyes), frame_side(eyes))
        if rest:
            raise LaconicError("Tokens of this model's videos share patches, none of which can leave: use hiprune or divprune.")
        return side
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
    features = list(output.pooler_output)
    if (thw := arguments.get("image_grid_thw")) is not None:
        return _look_native(eyes, eyes.image, features, thw)
    if arguments.get("image_sizes") is not None and hasattr(eyes.inner, "pack_image_features"):
        return _look_packed(eyes, features, arguments)
    if scale := getattr(eyes.projector, "scale_factor", None):  # Idefics3: all crops of a prompt in one piece
        size = (patch_side(eyes) // scale) ** 2
        features = [part for whole in features for part in whole.split(size) if len(part)]
    layouts = [grid(*_square(len(part))) for part in features]
    return Seen(eyes.image, features, layouts, list(range(len(features))))


def look_at_videos(eyes: Eyes, output: Any, arguments: dict[str, Any]) -> Seen:
    """As ``look``, of one ``get_video_features`` call."""
    features = list(output.pooler_output)
    if (thw := arguments.get("video_grid_thw")) is not None:
        seen = _look_native(eyes, eyes.video, features, thw)
    else:
        side, frames = frame_side(eyes), arguments["pixel_values_videos"].shape[1]
        layout = grid(side, side, frames)
        if hasattr(eyes.inner, "apply_pooling"):
            layout = _marked(layout)
        count = len(features)
        seen = Seen(eyes.video, features, [layout] * count, [number * frames for number in range(count)])
    if [len(part) for part in features] != [len(layout) for layout in seen.layouts]:
        raise not_understood(eyes, "videos")
    return seen


def _marked(layout: Layout) -> Layout:
    """With a mark behind the last token, as LLaVA-OneVision ends a video."""
    places = (torch.nn.functional.pad(t, (0, 1), value=SEPARATOR) for t in (layout.crop, layout.row, layout.column))
    return Layout(*places, layout.shapes)


def _square(count: int) -> tuple[int, int]:
    side = round(count**0.5)
    if side * side != count:
        raise LaconicError(f"A picture of {count} tokens is no square, and the model does not say how they lie.")
    return side, side


def _look_native(eyes: Eyes, token: int, features: list[torch.Tensor], thw: torch.Tensor) -> Seen:
    """Qwen-VL: every picture in its own size, the patches of a token side by side, with windows in another order."""
    merge = eyes.tower.spatial_merge_size
    layouts, windows, at = [], [], 0
    for frames, height, width in thw.tolist():
        layouts.append(grid(height // merge, width // merge, frames))
        windows.append((at, at + frames * height * width))
        at += frames * height * width
    orders = cell_orders(eyes.tower, thw, [len(layout) for layout in layouts])
    return Seen(token, features, layouts, [0] * len(layouts), windows, orders)


def cell_orders(tower: torch.nn.Module, thw: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Where in its part of a Qwen-VL encoder's row each cell lies, for parts of ``sizes`` cells: int64 ``(cells,)`` each, row by
    row. A part is a picture, a video or one frame of it."""
    if not getattr(tower, "window_size", None):
        return [torch.arange(size) for size in sizes]
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(thw, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    parts = torch.argsort(index.cpu()).split(list(sizes))  # windows of one frame stay together
    return [part - begin for part, begin in zip(parts, [0, *itertools.accumulate(sizes)], strict=False)]


def packed(tower: torch.nn.Module, thw: torch.Tensor) -> Packed:
    """How a Qwen-VL encoder holds pictures of these sizes (pictures, 3), in patches: frames, rows, columns."""
    merge = tower.spatial_merge_size
    grids = [(height // merge, width // merge) for frames, height, width in thw.tolist() for _ in range(frames)]
    return Packed(grids, cell_orders(tower, thw, [height * width for height, width in grids]), merge**2)


def _look_packed(eyes: Eyes, features: list[torch.Tensor], arguments: dict[str, Any]) -> Seen:
    """LLaVA-NeXT and OneVision: the model's own packing of cell numbers says where each token comes from."""
    side, pixels, layouts, firsts, first = patch_side(eyes), arguments["pixel_values"], [], [], 0
    counts = crop_counts(eyes, arguments)
    for picture, (count, size) in enumerate(zip(counts, arguments["image_sizes"], strict=True)):
        layouts.append(_packed_layout(eyes, count, size, side, len(features[picture]), pixels.device))
        firsts.append(first)
        first += count
    return Seen(eyes.image, features, layouts, firsts)


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


def spans(ids: torch.Tensor, sights: Sequence[Seen]) -> list[tuple[Seen, int, int, torch.Tensor]]:
    """For each picture and video of each row of ``ids`` (batch, count), in the order of the prompt: the one of ``sights`` that it
    is in and its number there, the row, and its slots, int64 ``(n,)``."""
    found = [(seen, *place) for seen in sights for place in _places(ids, seen)]
    return sorted(found, key=lambda place: (place[2], int(place[3][0])))


def _places(ids: torch.Tensor, seen: Seen) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Number, row and slots of what ``seen`` has. Rows of a beam search stand side by side and show the same pictures."""
    pictured = ids == seen.token
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
