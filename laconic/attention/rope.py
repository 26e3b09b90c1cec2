"""Moving keys to other positions: rotary embeddings applied by difference, each layer by its own table."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.layers import decoder_layers

LAYOUTS = ("half", "interleaved")
CACHES = ("cache", "layer_past")  # what an attention module calls its cache
PLACE = 7  # position of the token by which a layout is told
# layouts per model and layer, told once: a draft model's handle comes and goes with every draft
_told: weakref.WeakKeyDictionary[torch.nn.Module, list[str | None]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Rope:
    """A rotary embedding (RoFormer, 2021): frequencies ``(rotated_dims / 2,)`` in radians per token and their layout.

    ``half`` pairs dimension i with i + rotated_dims / 2, ``interleaved`` pairs 2i with 2i + 1. Dimensions past
    ``rotated_dims`` (partial rotary) are left as they are: all of them where there are no frequencies, as in a layer whose
    keys know no positions.
    """

    frequencies: torch.Tensor
    layout: str = "half"

    def rotate(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Turns ``x`` (..., n, head_dim) by ``offset`` positions (..., n), broadcast; negative offsets undo."""
        angle = offset[..., None].to(torch.float32) * self.frequencies.to(x.device, torch.float32)
        return self._turn(x, angle.cos(), angle.sin())

    def rotate_mean(self, x: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
        """The mean of ``x`` (batch, ..., head_dim) turned by each of the ``count`` positions from ``first`` (batch,) on."""
        ahead = first[:, None] + torch.arange(count, device=x.device)
        angle = ahead[..., None].to(torch.float32) * self.frequencies.to(x.device, torch.float32)
        shape = (len(first), *[1] * (x.dim() - 2), -1)
        return self._turn(x, angle.cos().mean(1).view(shape), angle.sin().mean(1).view(shape))

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        width = 2 * self.frequencies.shape[0]
        if not width:
            return x
        turned, rest = x[..., :width].float(), x[..., width:]
        if self.layout == "half":
            a, b = turned.chunk(2, dim=-1)
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([out.to(x.dtype), rest], dim=-1) if rest.shape[-1] else out.to(x.dtype)


def find_ropes(model: torch.nn.Module) -> list[Rope | None]:
    """The rotary embedding of every text layer, None where a layer has none or one that we cannot tell by test.

    Some models have a table of frequencies for each kind of layer (Gemma 3: local and global layers), and some have layers
    whose keys are not turned, here a table without frequencies. Nothing is guessed from a model's name: every layer makes the
    key of a random token at two positions, and a layout is taken only if it turns one into the other. M-RoPE, which has several
    positions per token, is answered with None.
    """
    text = model.config.get_text_config() if hasattr(model, "config") else None
    count, rotary = getattr(text, "num_hidden_layers", 0), _find_rotary(model)
    if rotary is None or _many_axes(rotary, getattr(text, "rope_parameters", None)):
        return [None] * count
    kinds = getattr(text, "layer_types", None) or [None] * count
    tables = [_frequencies(rotary, kind) for kind in kinds]
    if model not in _told:
        _told[model] = [
            None if table is None else _layout(layer, rotary, kind, table, text.hidden_size)
            for layer, kind, table in zip(decoder_layers(model), kinds, tables, strict=True)
        ]
    layouts = _told[model]
    usual = next((layout for layout in layouts if layout), LAYOUTS[0])
    return [
        None if layout is None else Rope(table, layout) if layout else Rope(table[:0], usual)
        for layout, table in zip(layouts, tables, strict=True)
    ]


def describe(ropes: Sequence[Rope | None]) -> str | list[dict[str, Any]] | None:
    """What tells the rotary embeddings of a model from others, for JSON: the layout where all layers share one table, else for
    each table its layout, how many pairs it turns, the slowest in radians per token, and the layers that it serves."""
    found: list[tuple[Rope | None, list[int]]] = []
    for index, rope in enumerate(ropes):
        same = next((layers for other, layers in found if _same(rope, other)), None)
        if same is None:
            found.append((rope, [index]))
        else:
            same.append(index)
    if len(found) < 2:
        return found[0][0].layout if found and found[0][0] is not None else None
    return [{**_summary(rope), "layers": layers} for rope, layers in found]


def _same(one: Rope | None, other: Rope | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.layout == other.layout and torch.equal(one.frequencies, other.frequencies)


def _summary(rope: Rope | None) -> dict[str, Any]:
    if rope is None:
        return {"layout": None, "pairs": 0, "slowest": None}
    pairs = len(rope.frequencies)
    slowest = float(f"{float(rope.frequencies.min()):.2g}") if pairs else None  # few digits: tables may be cast with a model
    return {"layout": rope.layout, "pairs": pairs, "slowest": slowest}


def _find_rotary(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module with the tables of the text layers, which stands beside their list."""
    try:
        first = decoder_layers(model)[0]
    except (AttributeError, LaconicError):
        return None
    lists = (list(module.children()) for module in model.modules())
    beside = next(
        parts for parts in lists if any(isinstance(p, torch.nn.ModuleList) and len(p) and p[0] is first for p in parts)
    )
    found = [part for part in beside if any(name.endswith("inv_freq") for name, _ in part.named_buffers(recurse=False))]
    return found[0] if len(found) == 1 else None


def _many_axes(rotary: torch.nn.Module, parameters: Any) -> bool:
    """Whether a token has several positions, such as row and column of a picture."""
    return hasattr(rotary, "mrope_section") or "mrope_section" in (parameters or {})


def _per_kind(rotary: torch.nn.Module, kind: str | None) -> bool:
    return isinstance(getattr(rotary, f"{kind}_inv_freq", None), torch.Tensor)


def _frequencies(rotary: torch.nn.Module, kind: str | None) -> torch.Tensor | None:
    """The table for layers of a kind, ``(pairs,)``, as it is now."""
    table = getattr(rotary, f"{kind}_inv_freq" if _per_kind(rotary, kind) else "inv_freq", None)
    return table.detach() if isinstance(table, torch.Tensor) and table.dim() == 1 else None


@torch.no_grad()
def _layout(
    layer: torch.nn.Module, rotary: torch.nn.Module, kind: str | None, table: torch.Tensor, width: int
) -> str | None:
    """How a layer turns its keys: one of the layouts, "" where it leaves them alone, None for another way.

    Args:
        table: the frequencies that the layer is taken to turn by; width: of the hidden states.
    """
    weight = next((p for p in layer.parameters() if p.is_floating_point()), table)
    token = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        (before, value), (after, other) = (_cached(layer, rotary, kind, token, place) for place in (0, PLACE))
        close = 8 * max(torch.finfo(weight.dtype).eps, 1e-5) * float(before.abs().max())
        if not torch.allclose(value, other, atol=close):  # latents, whose turned part is held apart
            return None
        if torch.allclose(before, after, atol=close):
            return ""
        for layout in LAYOUTS:
            turned = Rope(table, layout).rotate(before, torch.tensor([PLACE], device=before.device))
            if torch.allclose(turned, after, atol=close):
                return layout
    except (AttributeError, IndexError, LookupError, RuntimeError, TypeError, ValueError):  # made in another way than most are
        return None
    return None


def _cached(
    layer: torch.nn.Module, rotary: torch.nn.Module, kind: str | None, token: torch.Tensor, place: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The key and the value ``(1, kv_heads, 1, head_dim)``, float32, that a layer gives its cache of a ``token`` (1, 1, width)
    at a place."""
    at = torch.tensor([[place]], device=token.device)
    turns = rotary(token, at, kind) if _per_kind(rotary, kind) else rotary(token, at)
    for module in layer.modules():
        taken = inspect.signature(module.forward).parameters
        name = next((name for name in CACHES if name in taken), None)
        if module is not layer and name and "position_embeddings" in taken:
            seen = _Seen()
            try:
                module.forward(hidden_states=token, position_embeddings=turns, attention_mask=None, **{name: seen})
            except _Enough:
                return seen.keys.float(), seen.values.float()
    raise ValueError("no attention with a cache")


class _Enough(Exception):
    """Key and value are there: the rest of the layer need not run."""


class _Seen:
    """A cache that remembers what one call gives it."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.keys, self.values = keys, values
        raise _Enough
