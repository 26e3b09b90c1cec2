"""What a recipe leaves of a picture, to look at: the answer beside the dense one, and the patches that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from laconic.errors import LaconicError
from laconic.generation import Clock
from laconic.models.pictures import spans
from laconic.models.reading import open_picture, read, sees, text_side
from laconic.recipe import Recipe
from laconic.vision.photos import photo_path
from laconic.vision.picture import Layout

if TYPE_CHECKING:
    from PIL.Image import Image


SHOWN_METHODS = ("random_prune:11.1%", "uniform:11.1%", "vtc_cls:11.1%", "divprune:11.1%", "visionzip:11.1%", "fastv:11.1%")


@dataclass
class Shown:
    """What became of one picture's tokens.

    Attributes:
        layout: where each token lies.
        depth: float ``(n,)``: share of the layers that hold the token; 1 all, 0 none.
        into: int64 ``(n,)``: the token that took it in, itself where it stays, -1 where it is gone; None where nothing merges.
        scores: float ``(n,)``: what the choice was made by, or None.
    """

    layout: Layout
    depth: torch.Tensor
    into: torch.Tensor | None = None
    scores: torch.Tensor | None = None

    @property
    def kept(self) -> int:
        """Tokens that reach the last layer, separators not counted."""
        return int(((self.depth == self.depth.max()) & ~self.layout.separators).sum())


@dataclass
class View:
    """One recipe on one prompt. Times in seconds: ``prefill_s`` with the vision encoder, ``decode_s`` per further token."""

    recipe: str
    answer: str
    tokens: int
    prefill_s: float
    decode_s: float | None
    kept: float
    bytes_kept: int
    pictures: list[Shown] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """In JSON types, without the pictures' tensors."""
        shown = [{"tokens": int((~p.layout.separators).sum()), "kept": p.kept} for p in self.pictures]
        names = ("recipe", "answer", "tokens", "prefill_s", "decode_s", "kept", "bytes_kept")
        return {name: getattr(self, name) for name in names} | {"pictures": shown}


def scene_of(name: str) -> tuple[Any, str]:
    """The rendered scene ``scene:N`` and a question about it; ``scene`` is the first."""
    from itertools import islice

    from laconic.evaluation.picture_tasks import held_out
    from laconic.models.scenes import examples

    number = name.partition(":")[2] or "0"
    if not number.isdecimal() or int(number) > 100_000:
        raise LaconicError(f"There is no scene '{number}': give a whole number, as in scene:4.")
    scene, question = next(islice(examples(held_out(0)), int(number), None))
    return scene, question.text


def picture_named(name: str) -> tuple[Any, str | None]:
    """The picture at a path, of ``scene:N`` or of ``photo:NAME``, and the question that belongs to it, if one does."""
    kind, colon, rest = name.partition(":")
    if kind == "scene":
        return scene_of(name)
    return (photo_path(rest) if kind == "photo" and colon else name), None


def asked_about(image: str, question: str | None) -> tuple[Any, str]:
    """The picture that ``image`` names, and what is asked about it: where nothing is, the question that belongs to it."""
    picture, own = picture_named(image)
    if not (question or own):
        raise LaconicError(f'There is no question about {image}: write one behind it, such as "What is this?".')
    return picture, question or own


def see(
    model: torch.nn.Module,
    reader: Any,
    pictures: Sequence[Any],
    question: str,
    recipes: Sequence[str | Recipe],
    *,
    max_new_tokens: int = 32,
) -> tuple[list[View], list[Image]]:
    """Answers ``question`` about ``pictures`` dense and under each recipe, greedily.

    Args:
        model, reader: a vision-language model and its processor, as ``laconic.load`` gives them.
        pictures: paths or Pillow images.

    Returns:
        one view per recipe, dense first, and the pictures as the model saw them.

    Raises:
        LaconicError: for a model without eyes, a picture that cannot be read, or a recipe that cannot work.
    """
    if not sees(reader):
        raise LaconicError("This model reads text only: use a vision-language model.")
    opened = [open_picture(picture) for picture in pictures]
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in read(reader, question, opened).items()}
    chosen = [Recipe.parse("dense"), *(Recipe.parse(recipe) for recipe in recipes)]
    views = [_view(model, reader, inputs, recipe, max_new_tokens) for recipe in chosen]
    return views, [as_seen(picture, inputs, reader, number) for number, picture in enumerate(opened)]


def _view(model: torch.nn.Module, reader: Any, inputs: dict[str, Any], recipe: Recipe, limit: int) -> View:
    from laconic import apply

    clock = Clock(None)
    with apply(model, recipe) as handle, torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)  # what is compiled at the first call is not timed
        ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False, streamer=clock)
        stats = handle.stats()
        model(**inputs)
        pictures = shown(handle, inputs["input_ids"])
    times = clock.times
    new = ids[0, inputs["input_ids"].shape[1] :]
    return View(
        str(recipe),
        text_side(reader).decode(new, skip_special_tokens=True).strip(),
        inputs["input_ids"].shape[1],
        times[1] - times[0],
        (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else None,
        stats["kept"],
        stats["bytes_kept"],
        pictures,
    )


def shown(handle: Any, ids: torch.Tensor) -> list[Shown]:
    """What became of the pictures of the latest forward, read off its cache; empty where no method looks at pictures."""
    entry = handle.entry
    if entry is None or not entry.seen:
        return []
    layers, merged = handle.latest.layers, handle.latest.request.merged
    found, places = [], spans(ids, entry.seen)
    for (_, _, _, slots), picture, reduction in zip(places, entry.pictures, entry.reductions, strict=True):
        held = torch.stack([torch.isin(slots, layer.positions[0, 0]) for layer in layers])
        into = reduction.into if merged is None else taken_in(slots, held[-1], reduction.into, merged[0])
        found.append(Shown(picture.layout, held.float().mean(0).cpu(), into, reduction.scores))
    return found


def taken_in(slots: torch.Tensor, stays: torch.Tensor, before: torch.Tensor | None, merged: torch.Tensor) -> torch.Tensor:
    """``Shown.into`` of the picture whose tokens stand at ``slots`` (n,), of which the last layer has those that ``stays`` says.

    Args:
        before: int64 ``(n,)``, what took each in before the first layer, as in ``Reduction``, or None.
        merged: int64 ``(positions,)``, what took each in between layers, as in ``Request``.
    """
    own = torch.arange(len(slots), device=slots.device)
    into = own.masked_fill(~stays, -1)
    if before is not None:
        into = torch.where((before >= 0) & (before != own), before, into)
    taker = merged.to(slots.device)[slots]
    return torch.where(taker >= 0, torch.searchsorted(slots, taker.clamp(min=int(slots[0]), max=int(slots[-1]))), into)


def as_seen(picture: Image, inputs: dict[str, torch.Tensor], reader: Any, number: int) -> Image:
    """The picture as the encoder saw it: cut and resized. Where that cannot be told, the picture itself."""
    from PIL import Image

    pixels = inputs.get("pixel_values")
    mean = getattr(reader.image_processor, "image_mean", None)
    std = getattr(reader.image_processor, "image_std", None)
    if pixels is None or mean is None or std is None or pixels.dim() not in (4, 5):
        return picture
    crops = pixels[number] if pixels.dim() == 5 and pixels.shape[0] > 1 else pixels.flatten(0, -4)[number:]
    first = crops[0].float().cpu()
    colours = first * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return Image.fromarray((colours.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
