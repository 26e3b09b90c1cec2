"""Where pictures enter the language model: the one place that shortens prompts for every vision-language model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from laconic.cache import OTHER, WORD, KVCache, Request
from laconic.errors import LaconicError
from laconic.layers import change_tensors, take_rows
from laconic.method import Method
from laconic.models.pictures import (
    Seen,
    cell_side,
    feature_block,
    find_eyes,
    look,
    look_at_videos,
    not_understood,
    packed,
    spans,
)  # fmt: skip
from laconic.vision.base import Reduction, VisionMethod
from laconic.vision.encoder import NAME, Trace, find_blocks, vision_attention
from laconic.vision.first_layer import FirstLayer
from laconic.vision.gaps import GAPS, Gaps
from laconic.vision.parking import PARKED, Parked, by_axis, by_row
from laconic.vision.picture import Picture
from laconic.vision.sheets import Stack
from laconic.vision.thinning import Shortening, whole_blocks
from laconic.wrap import join, leave

LOOKS = {"get_image_features": look, "get_video_features": look_at_videos}  # what runs the encoder, and how to read it


class Entry:
    """Hooks on a vision-language model that let ``methods`` shorten its pictures, one after another.

    While a forward with pictures runs, the encoder's attention is asked for what the methods want; at the language model's
    entry the rows of what they drop are taken out of all that it gets. The cache receives the tokens that stay with their true
    positions, and counts those that came in, so that whatever follows stands where it would have stood.

    Where a method parks what it does not keep, each later turn chooses again, and the language model computes the conversation
    anew where that makes a difference: the same as if it had been asked all in one.
    """

    def __init__(self, model: torch.nn.Module, methods: tuple[Method, ...], in_force: Callable[[], bool]) -> None:
        self.methods = tuple(method for method in methods if isinstance(method, VisionMethod))
        self.model, self.eyes, self.in_force = model, find_eyes(model), in_force
        self.compact = any(m.positions == "compact" for m in self.methods)
        self.parks = any(m.rest == "park" and not m.budget.is_full for m in self.methods)
        self._words = model.get_input_embeddings()
        self._late: int | None = None  # of a forward that was made longer, how many tokens the caller gave
        self.reductions: list[Reduction] = []
        self.pictures: list[Picture] = []
        self._request: Request | None = None
        self._arguments: dict[str, Any] = {}
        self.seen: list[Seen] = []  # of the latest forward with pictures, as are ``pictures`` and ``reductions``
        self._fresh = False  # whether the encoder has looked at pictures that no forward has taken in yet
        self._trace: Trace | None = None  # of the encoder's running call
        self._encoded: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self._depth = len(find_blocks(self.eyes.tower))
        self._wants = frozenset(want for method in methods for want in method.wants(self._depth))
        self._thinner = next((m for m in self.methods if m.thins and not m.budget.is_full), None)
        if self._thinner is not None:
            self._check_thinning(methods)
        _register()
        Trace(self.eyes.tower, self._wants).stop()  # says now what the encoder cannot give
        self._install(model)

    def _install(self, model: torch.nn.Module) -> None:
        self._functions = [name for name in LOOKS if hasattr(self.eyes.inner, name)]
        for name in self._functions:
            join(self.eyes.inner, name, self, functools.partial(_watched, looks=LOOKS[name]))
        self._hooks = [
            self.eyes.projector.register_forward_pre_hook(self._remember, with_kwargs=True),
            self.eyes.language.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.eyes.language.register_forward_hook(self._leave),
            model.register_forward_hook(lambda *_: self.stop(), always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks out of the model."""
        for name in self._functions:
            leave(self.eyes.inner, name, self)
        self._functions = []
        for hook in self._hooks:
            hook.remove()

    @property
    def looking(self) -> bool:
        """Whether the encoder runs under observation now."""
        return self._trace is not None

    def start(self, request: Request, arguments: dict[str, Any]) -> None:
        """Serves the forward that begins now, with the ``arguments`` of the model."""
        self.stop()
        if arguments.get("pixel_values_videos") is not None and "get_video_features" not in self._functions:
            raise not_understood(self.eyes, "videos")
        self._request, self._arguments = request, arguments

    def stop(self) -> None:
        """The forward is over, or has failed."""
        if self._request is not None:
            self._request.count = self._request.pictures = None
            self._request.looked = []
            self._fresh = False
        self._request = self._rows = self._late = None
        self._arguments = {}

    def watch(self, run: Callable[[], Any], looks: Callable[..., Seen], given: dict[str, Any]) -> Any:
        """Runs the encoder under observation: within a forward, or ahead of it as ``generate`` does."""
        self._encoded = thinning = None
        self._trace = trace = Trace(self.eyes.tower, self._wants, thinned=self._thinner is not None)
        try:
            if self._thinner is not None:
                thinning = self._thin({**self._arguments, **given}, video=looks is look_at_videos)
            output = run()
            if thinning is not None:
                thinning.tell()
        finally:
            self._trace = None
            trace.stop()
            if thinning is not None:
                thinning.stop()
        pixels = given.get("pixel_values", given.get("pixel_values_videos"))
        pixels = pixels.flatten(0, -4) if isinstance(pixels, torch.Tensor) and pixels.dim() > 3 else None
        seen = replace(looks(self.eyes, output, {**self._arguments, **given}), trace=trace, encoded=self._encoded, pixels=pixels)
        others = [other for other in self.seen if other.token != seen.token] if self._fresh else []
        self.seen, self._fresh = [*others, seen], True
        return output

    def _check_thinning(self, methods: tuple[Method, ...]) -> None:
        name, other = self._thinner.id, next((m.id for m in methods if m.wants(self._depth)), None)
        kinds, even = {want.kind for want in self._wants}, self._thinner.thins.even
        if not even and min(whole_blocks(self.eyes.tower), default=self._depth) >= feature_block(self.eyes, self._depth):
            raise LaconicError(
                f"No block of the vision encoder but its last sees whole pictures, as {name} asks for: use hiprune or divprune."
            )
        if other is not None and not (even and kinds <= {"cls", "received", "salience"}):
            raise LaconicError(
                f"{other} asks for attention to all patches, of which {name} takes some away: keep one of the two."
            )

    def _thin(self, given: dict[str, Any], video: bool) -> Shortening:
        """Lets the method that thins the encoder do so."""
        last, tower, method = feature_block(self.eyes, self._depth), self.eyes.tower, self._thinner
        thw = given.get("video_grid_thw" if video else "image_grid_thw")
        sheet = Stack(cell_side(self.eyes, video), int(self._trace.has_class)) if thw is None else packed(tower, thw)
        return method.thins(tower, method, self._trace, sheet, last, method.budget.tokens)

    def _remember(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._trace is not None and self._encoded is None:
            self._encoded = args[0] if args else next(iter(kwargs.values()))

    def _enter(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        request = self._request
        if request is None:
            return None
        parked = request.memory.get(PARKED)
        kwargs = self._close_gaps(kwargs)
        if self._fresh and request.reads:
            if self.parks:
                self._park(kwargs)
            self._choose(kwargs)
            kwargs = self._shorten(kwargs)
        elif parked is not None:
            parked = parked.and_then(self._ids(), request.positions, by_row(self._positions(kwargs)))
            request.memory[PARKED] = parked
            if request.reads:
                kwargs = self._choose_again(kwargs, parked)
        return args, kwargs

    def _ids(self) -> torch.Tensor:
        ids = self._arguments.get("input_ids")
        if ids is None:
            raise LaconicError("Pictures are found by the ids of their tokens: give input_ids, not inputs_embeds.")
        return ids

    def _choose(self, kwargs: dict[str, Any]) -> None:
        """What the methods leave of every picture of the prompt: ``pictures`` and ``reductions``."""
        self.pictures = self._open(self._ids(), kwargs)
        self.reductions = [self._reduce(picture) for picture in self.pictures]
        for picture, reduction in zip(self.pictures, self.reductions, strict=True):
            picture.given = len(reduction.kept)
        if PARKED in self._request.memory:
            kept = [reduction.kept for reduction in self.reductions]
            self._request.memory[PARKED] = replace(self._request.memory[PARKED], kept=kept)

    def _shorten(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The language model's arguments without the rows that are dropped."""
        request, embeddings, ids = self._request, kwargs["inputs_embeds"], self._ids()
        positions = request.positions.to(embeddings.device)
        stays = positions >= 0
        request.pictures = torch.full((len(ids), int(positions.max()) + 1), WORD, device=positions.device)
        request.looked = self.pictures
        other = (self.eyes.pictured(ids) & stays).nonzero(as_tuple=True)
        request.pictures[other[0], positions[other]] = OTHER
        for picture, reduction, (_, _, row, slots) in zip(self.pictures, self.reductions, spans(ids, self.seen), strict=True):
            gone = torch.ones(len(slots), dtype=torch.bool, device=slots.device)
            gone[reduction.kept] = False
            gone &= ~picture.layout.separators.to(gone.device)
            stays[row, slots[gone]] = False
            request.pictures[row, positions[row, slots[picture.cells]]] = picture.number
            if reduction.features is not None:
                embeddings = embeddings.clone() if embeddings is kwargs["inputs_embeds"] else embeddings
                embeddings[row, slots[reduction.kept]] = reduction.features.to(embeddings.dtype)
        if bool(stays.eq(positions >= 0).all()):
            return {**kwargs, "inputs_embeds": embeddings}
        return self._take({**kwargs, "inputs_embeds": embeddings}, stays)

    def _park(self, kwargs: dict[str, Any]) -> None:
        """Remembers what a later turn needs to choose again."""
        request, mask = self._request, kwargs.get("attention_mask")
        if int(request.positions.max()) >= request.positions.shape[1]:
            raise LaconicError("With rest=park all pictures come in a conversation's first turn: start a new cache for more.")
        if isinstance(mask, dict) or hasattr(mask, "laconic_reach"):
            raise LaconicError("Picture tokens of this model see each other, which no later turn can redo: leave out rest=park.")
        ids, embeddings = self._ids(), kwargs["inputs_embeds"]
        features = [embeddings[row, slots] for _, _, row, slots in spans(ids, self.seen)]
        places, deep = by_row(self._positions(kwargs)), kwargs.get("deepstack_visual_embeds")
        request.memory[PARKED] = Parked(ids, request.positions, places.expand(len(ids), -1, -1), features, [], self.seen, deep)

    def _choose_again(self, kwargs: dict[str, Any], parked: Parked) -> dict[str, Any]:
        """The language model's arguments for the whole conversation where its latest turn chooses other tokens; else as given."""
        request, new, late = self._request, kwargs["inputs_embeds"], self._request.positions
        self.seen, pictured = parked.seen, self.eyes.pictured(parked.ids)
        self._arguments = {**self._arguments, "input_ids": parked.ids}
        embeddings = self._words(parked.ids.masked_fill(pictured, 0)).to(new.dtype)
        for features, (_, _, row, slots) in zip(parked.features, spans(parked.ids, self.seen), strict=True):
            embeddings[row, slots] = features
        embeddings[:, -new.shape[1] :] = new
        whole = {**kwargs, "inputs_embeds": embeddings, "position_ids": by_axis(parked.places)}
        if parked.deep is not None:
            whole |= {"deepstack_visual_embeds": parked.deep, "visual_pos_masks": pictured}
        request.positions = parked.positions
        self._choose(whole)
        if all(torch.equal(old, reduction.kept) for old, reduction in zip(parked.kept, self.reductions, strict=True)):
            request.positions = late
            return kwargs
        parked = request.memory[PARKED]
        cache = next(value for value in kwargs.values() if isinstance(value, KVCache))
        cache.reset()  # all that stands behind a picture has changed
        request.memory[PARKED], request.positions = parked, parked.positions
        self._late = new.shape[1]
        return self._shorten(whole)

    def _reduce(self, picture: Picture) -> Reduction:
        """What all methods in turn leave of a picture."""
        cells = picture.cells
        reduction = Reduction(cells)
        for method in self.methods:
            k = method.budget.tokens(len(cells))
            if k >= len(reduction.kept):
                continue
            if len(reduction.kept) < len(cells):
                raise LaconicError(f"{method.id} would shorten a picture that is shortened already: keep one of the two.")
            reduction = method.reduce(picture, k)
        return reduction

    def _open(self, ids: torch.Tensor, kwargs: dict[str, Any]) -> list[Picture]:
        """The pictures of this forward in the order of the prompt."""
        pictures, embeddings, first_layer = [], kwargs["inputs_embeds"], None
        real = self._request.positions.to(embeddings.device) >= 0
        if any(method.reads_first_layer for method in self.methods):
            first_layer = FirstLayer(self.eyes.language, {**kwargs, "position_ids": self._positions(kwargs)}, self._request)
        special = self.eyes.pictured(ids)
        for seen, i, row, slots in spans(ids, self.seen):
            words = (real[row] & ~special[row]).nonzero()[:, 0]
            pictures.append(
                Picture(
                    features=embeddings[row, slots], layout=seen.layouts[i], text=embeddings[row, words],
                    after=words > slots[-1], trace=seen.trace, encoded=seen.encoded,
                    first=seen.firsts[i], window=seen.windows and seen.windows[i], order=seen.orders and seen.orders[i],
                    number=len(pictures),
                    projector=self.eyes.projector, pixels=seen.pixels_of(i), model=self.model,
                    from_words=first_layer and first_layer.attention(row, words[words > slots[-1]], slots),
                )
            )  # fmt: skip
        return pictures

    def _take(self, kwargs: dict[str, Any], stays: torch.Tensor) -> dict[str, Any]:
        """Only the rows that stay, padded on the left; tells the cache which they are."""
        request, (batch, count) = self._request, stays.shape
        width = int(stays.sum(-1).max())
        order = stays.to(torch.int8).argsort(dim=-1, stable=True)[:, count - width :]
        kept = stays.gather(1, order)
        self._rows = order.masked_fill(~kept, -1)
        positions = self._positions(kwargs)
        deep, mask = kwargs.pop("deepstack_visual_embeds", None), kwargs.pop("attention_mask", None)
        marks = kwargs.get("visual_pos_masks")
        kwargs = change_tensors({**kwargs, "position_ids": positions}, lambda tensor: take_rows(tensor, order, batch, count))
        if deep is not None:
            alive = stays[marks.to(stays.device)]
            kwargs["deepstack_visual_embeds"] = [part[alive.to(part.device)] for part in deep]
            kwargs["visual_pos_masks"] = kwargs["visual_pos_masks"] & kept.to(marks.device)
        kwargs["attention_mask"] = mask if isinstance(mask, dict) else kept.clone()  # transformers copies what is not boolean
        if hasattr(mask, "laconic_reach"):
            kwargs["attention_mask"].laconic_reach = mask.laconic_reach
        if self.compact:
            kwargs["position_ids"] = self._renumber(kwargs["position_ids"], order, stays)
        request.positions = request.positions.to(order.device).gather(1, order).masked_fill(~kept, -1)
        request.count = count
        return kwargs

    def _positions(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """What the rotary embedding is given: the caller's positions, or the places in the text."""
        given = kwargs.get("position_ids")
        return self._request.positions.clamp(min=0) if given is None else given

    def _close_gaps(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The language model's arguments with this forward's tokens moved up to those of earlier ones."""
        request = self._request
        if GAPS not in request.memory:
            return kwargs
        gaps = request.memory[GAPS] = request.memory[GAPS].before(request.positions)
        return {**kwargs, "position_ids": self._positions(kwargs) - gaps.sizes[:, None]}

    def _renumber(self, kept_positions: torch.Tensor, order: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
        """What the rotary embedding is given for the rows in ``order``, without gaps, which later forwards will close too."""
        if kept_positions.dim() != 2:
            raise LaconicError("This model places pictures by row and column, which cannot be renumbered: leave positions=keep.")
        memory, positions = self._request.memory, self._request.positions.to(stays.device)
        gone = (positions >= 0) & ~stays
        fresh = positions.masked_fill(~gone, -1)[:, gone.any(0)]
        memory[GAPS] = memory[GAPS].and_then(fresh) if GAPS in memory else Gaps(fresh)
        return (kept_positions - gone.long().cumsum(-1).gather(1, order)).clamp(min=0)

    def _leave(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        """Puts the rows back where they stood, zero where tokens were dropped, so that the output has its usual length."""
        if self._rows is None:
            return None
        rows = self._rows
        short = output.last_hidden_state
        whole = short.new_zeros(short.shape[0], self._request.count, short.shape[-1])
        row, slot = (rows >= 0).nonzero(as_tuple=True)
        whole[row, rows[row, slot]] = short[row, slot]
        output.last_hidden_state = whole if self._late is None else whole[:, -self._late :]
        return output


def _watched(original: Callable[..., Any], entries: list[Entry], looks: Callable[..., Seen]) -> Callable[..., Any]:
    """Stands for one of the model's functions that run the encoder: the entry in force watches it."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        entry = next((entry for entry in entries if entry.in_force()), None)
        if entry is None or entry.looking:  # Qwen3-VL looks at videos by the function for pictures
            return original(*args, **kwargs)
        return entry.watch(lambda: original(*args, **kwargs), looks, signature.bind_partial(*args, **kwargs).arguments)

    return watched


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, vision_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
