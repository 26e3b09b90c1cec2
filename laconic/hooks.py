"""The only place that touches a model: puts a recipe into it and takes it out again."""

from __future__ import annotations

import inspect
from types import TracebackType
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from laconic.attention import engine
from laconic.attention.base import AttentionMethod
from laconic.attention.rope import find_ropes
from laconic.cache import KVCache
from laconic.errors import LaconicError
from laconic.layers import LayerShrinker
from laconic.method import Method
from laconic.recipe import Recipe
from laconic.vision.base import VisionMethod
from laconic.vision.entry import Entry
from laconic.vision.neurons import StepNeurons
from laconic.vision.watch import LayerWatch

LAYER_TYPES = {"full_attention", "sliding_attention"}
CACHE_NAMES = ("cache", "past_key_values")


def apply(
    model: torch.nn.Module, recipe: str | Method | Recipe, *, measure: bool = False, reserve: int = 0
) -> Handle:
    """Puts ``recipe`` into ``model`` at once and returns the handle that takes it out.

    Args:
        model: a causal language model of transformers. Its parameters are not touched.
        recipe: ``"tokenselect:256"``, a method, or a :class:`Recipe`.
        measure: also compute the attention mass that is not read, at the price of a dense pass per step.
        reserve: tokens to preallocate in every cache, when the final length is known.

    As a context manager it is taken out at the end, also on an exception; otherwise call ``handle.remove()``. Inside,
    ``model(...)`` and ``model.generate(...)`` (greedy, sampling, beams) use a cache of ours. Blocks can be nested: the
    innermost recipe is in force.

    Raises:
        LaconicError: when the model or the recipe cannot work, in one sentence.
    """
    return Handle(model, Recipe.parse(recipe), measure=measure, reserve=reserve)


class Handle:
    """A recipe inside a model. See :func:`apply`."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, *, measure: bool, reserve: int) -> None:
        for method in recipe.methods:
            if not isinstance(method, (AttentionMethod, VisionMethod)):
                raise LaconicError(
                    f"{method.id} decides how text is written, not what a forward computes: give it to laconic.generate, or "
                    "compare it with laconic compare --suite decoding."
                )
        self.model, self.recipe, self.reserve = model, recipe, reserve
        self.policy = engine.Policy(tuple(m for m in recipe.methods if isinstance(m, AttentionMethod)), measure=measure)
        self.policy.model = model
        self._layers = check_model(model)
        for method in recipe.methods if caches_latents(model) else ():
            name = type(model).__name__
            method.require(method.id == "dense", f"{name} caches latents in place of keys (MLA), so only dense runs on it yet.")
        self._ropes = find_ropes(model)
        self._configs = _attention_configs(model)  # found once: a draft model's handle comes and goes with every draft
        self._depth = 0
        self._cache: KVCache | None = None
        self._shrinker: LayerShrinker | None = None
        self.entry: Entry | None = None
        self._watch: LayerWatch | None = None
        self._neurons: StepNeurons | None = None
        self._install()

    def __enter__(self) -> Handle:
        if self._depth or self not in _stack(self.model):
            self._install()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        self.remove()

    def remove(self) -> None:
        """Takes the recipe out; the model is then as it was before."""
        stack = _stack(self.model)
        if self in stack:
            stack.reverse()
            stack.remove(self)  # the innermost of several entries of the same handle
            stack.reverse()
        if self not in stack:
            self._remove_parts()
        if not stack:
            _restore(self.model)

    def cache(self) -> KVCache:
        """A new, empty cache for a request that is run by hand: ``model(ids, past_key_values=handle.cache())``."""
        cache = KVCache(self._layers, reserve=self.reserve)
        self.serve(cache)
        return cache

    @property
    def latest(self) -> KVCache:
        """The cache of the latest forward."""
        if self._cache is None:
            raise LaconicError("There is no cache yet: run the model inside the block first.")
        return self._cache

    def stats(self) -> dict[str, Any]:
        """Figures of the latest forward, over all layers.

        ``kept``: entries attended per KV head (mean over layers); ``bytes_kept``: bytes held; ``bytes_read``: bytes of
        the cache read by the forward, scoring included; ``dropped_mass``: see ``measure`` (None when not measured);
        ``pairs``: share of a prompt's pairs of query and key that was computed (None in a step).
        """
        figures = list(self._cache.request.figures.values()) if self._cache is not None else []
        if not figures:
            raise LaconicError("There are no figures yet: run the model inside the block first.")

        def mean(name: str) -> float | None:
            known = [row[name] for row in figures if row[name] is not None]
            return sum(known) / len(known) if known else None

        return {
            "kept": mean("kept"),
            "bytes_kept": sum(row["bytes_kept"] for row in figures),
            "bytes_read": sum(row["bytes_read"] for row in figures),
            "dropped_mass": mean("dropped_mass"),
            "pairs": mean("pairs"),
        }

    def _install(self) -> None:
        if self not in _stack(self.model):
            try:
                self._install_parts()
            except LaconicError:
                self._remove_parts()
                raise
        if not _stack(self.model):
            _prepare(self.model, self._configs)
        _stack(self.model).append(self)

    def _install_parts(self) -> None:
        """Hooks besides the attention's, for the methods that ask for them."""
        methods = self.recipe.methods
        looking = tuple(m for m in methods if m.stage == "vision")
        watching = tuple(m for m in methods if getattr(m, "watches_parts", ()))
        if any(isinstance(m, AttentionMethod) and m.shortens for m in methods):
            self._shrinker = LayerShrinker(self.model)
        if looking:
            self.entry = Entry(self.model, looking, lambda: _stack(self.model)[-1:] == [self])
        if watching:
            self._watch = LayerWatch(self.model, watching)
        if any(getattr(m, "narrows_steps", False) for m in methods):
            self._neurons = StepNeurons(self.model)

    def _remove_parts(self) -> None:
        for part in (self._shrinker, self.entry, self._watch, self._neurons):
            if part is not None:
                part.remove()
        self._shrinker = self._watch = self._neurons = None

    def refuse_drafts(self, batch: int) -> None:
        """Raises LaconicError where the recipe cannot check drafts for so many rows, or cannot take rejected ones back."""
        if caches_latents(self.model):
            raise LaconicError(f"{type(self.model).__name__} caches latents in place of keys (MLA): it cannot check drafts.")
        self.policy.refuse_drafts(batch)
        if self.entry is not None and self.entry.parks:
            raise LaconicError(
                "What is parked is chosen anew with every turn, and a draft is none: leave rest=park or the drafter out."
            )

    def serve(self, cache: KVCache) -> None:
        """Makes this handle's policy serve ``cache``, which is the latest from now on."""
        cache.request.policy = self.policy
        renumbered = self.entry is not None and self.entry.compact  # then positions do not say how far a key was turned
        for layer, rope in zip(cache.layers, self._ropes, strict=True):
            layer.rope = None if renumbered else rope
        self._cache = cache

    def before_forward(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Gives the forward a cache of ours and tells it the positions of the incoming tokens."""
        name = next((n for n in CACHE_NAMES if arguments.get(n) is not None), None)
        cache = arguments.get(name) if name else None
        use_cache = arguments.get("use_cache")
        uncached = use_cache is False or (use_cache is None and not self.model.config.get_text_config().use_cache)
        if cache is None and uncached and self.entry is None:
            return {}
        changes: dict[str, Any] = {}
        if cache is None:
            cache = KVCache(self._layers, reserve=self.reserve)
            changes[cache_name(self.model)] = cache
        elif not isinstance(cache, KVCache):
            _take_over(cache, self._layers, self.reserve, arguments.get("attention_mask"))
        self.serve(cache)
        branches = cache.request.branches
        cache.request.positions = _positions(arguments, cache.get_seq_length()) if branches is None else branches.positions
        if self.entry is not None:
            self.entry.start(cache.request, arguments)
        for part in (self._shrinker, self._watch, self._neurons):
            if part is not None:
                part.start(cache.request)
        return changes


def check_model(model: torch.nn.Module) -> int:
    """Number of cached layers of a model that apply can serve; a LaconicError says why it cannot."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None or not hasattr(model, "generate"):
        raise LaconicError(f"{name} is not a causal language model of transformers: load one with laconic.load.")
    if getattr(config, "is_encoder_decoder", False):
        raise LaconicError(f"{name} is an encoder-decoder model: laconic.apply serves decoder-only models.")
    text = config.get_text_config()
    if getattr(text, "diffusion", None) == "masked":
        raise LaconicError(f"{name} fills in masks with full attention, which laconic.apply cannot serve: use laconic.generate.")
    foreign = set(getattr(text, "layer_types", None) or []) - LAYER_TYPES
    if foreign:
        raise LaconicError(f"{name} has layers of type {', '.join(sorted(foreign))}: these keep no keys to choose from.")
    if not getattr(model, "_supports_attention_backend", False):
        raise LaconicError(f"{name} does not take its attention from the registry of transformers, so no method fits in.")
    sees = hasattr(getattr(model, "model", None), "get_image_features")  # then its mask says who sees what
    if not sees and any(getattr(m, "is_causal", True) is False for m in model.modules() if hasattr(m, "layer_idx")):
        raise LaconicError(f"{name} attends in both directions: load it as a decoder (is_decoder=True).")
    if getattr(text, "num_kv_shared_layers", 0):
        raise LaconicError(f"{name} shares keys between layers, which laconic.apply does not support yet.")
    return text.num_hidden_layers


def caches_latents(model: torch.nn.Module) -> bool:
    """Whether keys and values are made anew from smaller latents in every step, so that a cache holds none to choose from."""
    return bool(getattr(model.config.get_text_config(), "kv_lora_rank", None))


def _stack(model: torch.nn.Module) -> list[Handle]:
    """The handles that are in the model now, innermost last."""
    return model.__dict__.get("_laconic_handles", [])


def _attention_configs(model: torch.nn.Module) -> list[Any]:
    """The configurations that the attention and mask functions of the text layers are looked up in."""
    found = {id(model.config.get_text_config()): model.config.get_text_config()}
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(getattr(module, "config", None), "_attn_implementation"):
            found[id(module.config)] = module.config
    return list(found.values())


def _prepare(model: torch.nn.Module, configs: list[Any]) -> None:
    """Registers our functions, points the configurations at them, and hooks the entry of the model."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(engine.NAME, engine.attention_forward)
    AttentionMaskInterface.register(engine.NAME, engine.attention_mask)
    names = list(inspect.signature(model.forward).parameters)
    saved = [(config, config._attn_implementation) for config in configs]

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        arguments = dict(zip(names, args)) | kwargs  # noqa: B905 (fewer arguments than parameters)
        changes = _stack(module)[-1].before_forward(arguments)
        args = tuple(changes.pop(name, value) for name, value in zip(names, args))  # noqa: B905
        return args, kwargs | changes

    for config, _ in saved:
        config._attn_implementation = engine.NAME
    model.__dict__["_laconic_handles"] = []
    model.__dict__["_laconic_undo"] = (model.register_forward_pre_hook(hook, with_kwargs=True), saved)


def _restore(model: torch.nn.Module) -> None:
    hook, saved = model.__dict__.pop("_laconic_undo", (None, []))
    model.__dict__.pop("_laconic_handles", None)
    if hook is not None:
        hook.remove()
    for config, implementation in saved:
        config._attn_implementation = implementation


def cache_name(model: torch.nn.Module) -> str:
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])


def _take_over(cache: Any, layers: int, reserve: int, mask: torch.Tensor | None) -> None:
    """Makes a stock cache one of ours in place, so that whoever holds it keeps holding the cache of this request.

    What it already holds is taken along; a sliding layer brings the window it still has. ``mask`` (batch, seen + new) says
    which of it is padding.
    """
    ours, seen = KVCache(layers, reserve=reserve), cache.get_seq_length()
    for old, new in zip(cache.layers, ours.layers, strict=False):
        new.recording = getattr(old, "record_past", False)
        if seen == 0:
            continue
        if type(old) not in (DynamicLayer, DynamicSlidingWindowLayer) or old.keys is None:
            raise LaconicError(
                f"A filled {type(cache).__name__} cannot be taken over: start inside the block without a cache, or with an "
                "empty one."
            )
        batch, count = old.keys.shape[0], old.keys.shape[2]
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            ours.request.positions = _count(mask)[:, seen - count : seen]
        else:
            ours.request.positions = torch.arange(seen - count, seen).expand(batch, count)
        new.update(old.keys, old.values)
        new.seen, new.passed = seen, count + 1 if count < seen else 0
    cache.__dict__.clear()
    cache.__dict__.update(ours.__dict__)
    cache.__class__ = KVCache


def _positions(arguments: dict[str, Any], seen: int) -> torch.Tensor | None:
    """True positions ``(batch, new)`` of the incoming tokens, -1 for padding; None when nothing tells."""
    ids = arguments.get("input_ids")
    ids = ids if ids is not None else arguments.get("inputs_embeds")
    if ids is None:
        return None
    batch, new = ids.shape[:2]
    mask = arguments.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        if new == 1:  # every decode step: the last token is real, and the mask was looked at with the prompt
            return mask.sum(-1, keepdim=True) - 1
        if mask.shape[-1] != seen + new:
            raise LaconicError(
                f"The attention mask covers {mask.shape[-1]} tokens, but {seen + new} are cached or new: give it for all of them."
            )
        return _count(mask)[:, -new:]
    given = arguments.get("position_ids")
    if isinstance(given, torch.Tensor) and given.dim() == 2 and given.shape[-1] == new:
        if new > 1 and bool((given.diff(dim=-1) <= 0).any()):
            raise LaconicError("The positions do not ascend: put one text in each row and pad on the left, with a mask.")
        if seen or bool((given.diff(dim=-1) != 1).any()):  # a fresh text without gaps is counted from 0, as some models do not
            return given.expand(batch, -1).clone()  # layers look later, when the caller may have counted on in place
    return torch.arange(seen, seen + new, device=ids.device).expand(batch, -1)


def _count(mask: torch.Tensor) -> torch.Tensor:
    """Positions from a padding mask (batch, n): 0, 1, 2 ... from the first real token of each row, -1 before it."""
    mask = mask.long()
    if bool((mask.diff(dim=-1) < 0).any()):
        raise LaconicError("The attention mask has padding after text: pad on the left (padding_side='left').")
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, -1)
