"""The attention function that transformers calls, and the policy that answers it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from laconic import kernels
from laconic.attention.base import AttentionMethod, Call, EvictMethod, ReweightMethod
from laconic.attention.branches import branch_attention, each_branch
from laconic.attention.prefill import prefill_attention
from laconic.attention.reweight import reweighted_chunk, reweighted_step
from laconic.buffers import locate, take
from laconic.cache import EMPTY, KVLayer, Rest
from laconic.errors import LaconicError
from laconic.kernels.ragged import dense
from laconic.primitives.scores import capped
from laconic.primitives.select import hide
from laconic.selection import Selection

NAME = "laconic"
UNSUPPORTED = {
    "s_aux": "learned attention sinks",
    "position_bias": "a learned position bias",
    "alibi": "ALiBi",
    "indices": "its own sparse index",
}


class Policy:
    """What the methods of a recipe do in every attention call: read, attend, evict.

    At most one method reads, one reweights and one shortens prompts; any number evict, in order. With ``measure`` the dense
    attention mass that was not attended (for a reader) or was evicted (for an evictor, at the newest query) is computed too,
    at the price of a dense pass.
    """

    def __init__(self, methods: tuple[AttentionMethod, ...], *, measure: bool = False) -> None:
        self.evictors = [m for m in methods if isinstance(m, EvictMethod) and not m.reads]
        readers = [m for m in methods if m.reads]
        if len(readers) > 1:
            names = " and ".join(m.id for m in readers)
            raise LaconicError(f"{names} both choose what a step reads: keep one of them, and evict with the other kind.")
        self.reader = readers[0] if readers else None
        reweighters = [m for m in methods if isinstance(m, ReweightMethod)]
        if len(reweighters) > 1:
            raise LaconicError(f"{' and '.join(m.id for m in reweighters)} both change weights: keep one of them.")
        self.reweighter = reweighters[0] if reweighters else None
        shorteners = [m for m in methods if m.shortens_prompts]
        if len(shorteners) > 1:
            raise LaconicError(f"{' and '.join(m.id for m in shorteners)} both compute a part of the prompt: keep one of them.")
        self.shortener = shorteners[0] if shorteners else None
        folders = [m for m in self.evictors if m.compensates]
        if folders and self.reweighter:
            raise LaconicError(
                f"{self.reweighter.id} changes weights of entries, and {folders[0].id} has one for many: keep one of them."
            )
        if self.shortener and self.reweighter:
            raise LaconicError(
                f"{self.reweighter.id} changes weights that {self.shortener.id} does not compute: keep one of them."
            )
        attending = [m for m in methods if m.attends]
        others = [m.id for m in (*attending[1:], *readers, *reweighters, *folders, *shorteners)]
        if attending and others:
            raise LaconicError(f"{attending[0].id} attends in its own way, which {others[0]} would change: use one of them.")
        self.attending = attending[0] if attending else None
        compacting = [m for m in self.evictors if m.compacts]
        others = [m.id for m in (*self.evictors, *readers) if m not in compacting]
        if compacting and others:
            raise LaconicError(f"{compacting[0].id} renumbers what stays, which {others[0]} cannot follow: leave positions=keep.")
        self.leavers = [m for m in methods if type(m).leave is not AttentionMethod.leave]
        self.compacting = compacting[0] if compacting else None
        self.measure = measure
        self.model: torch.nn.Module | None = None  # which model it serves, where a method has to know

    def attend(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Output ``(batch, heads, new, head_dim)``; afterwards the layer holds what the methods keep."""
        branches = layer.request.branches
        if branches is None:
            return self._attend(layer, call)
        if self.reader is not None or self.reweighter is not None:
            return each_branch(layer, call, branches, self._attend)
        layer.request.figures[layer.index] = {
            "kept": layer.entries, "bytes_kept": layer.bytes_kept, "bytes_read": self._bytes_read(layer, None),
            "dropped_mass": None, "pairs": None,
        }  # fmt: skip
        return branch_attention(layer, call, branches)

    def refuse_drafts(self, batch: int) -> None:
        """Raises LaconicError where a draft cannot be undone in what the methods remember."""
        step = Call(torch.empty(1, 1, 1, 1), 1.0)
        for method in self.evictors:
            method.require(not method.evicts(step), "it evicts in every step, which a rejected draft cannot undo: add once=true.")
        for method in (self.attending, self.compacting):
            if method is not None:
                raise LaconicError(f"{method.id} attends to a text in its own way, so nothing can be drafted: leave it out.")
        for method in (self.reader, self.reweighter):
            if method is not None:
                method.require(method.branches, "its steps hang together over layers, so drafts cannot be checked: leave it out.")
                method.require(batch == 1, "every draft chooses what it reads, for one prompt at a time: give a single prompt.")

    def _attend(self, layer: KVLayer, call: Call) -> torch.Tensor:
        if not call.decoding or "prompt" not in layer.memory:
            layer.memory["prompt"] = layer.lengths.clone()  # what shares are taken of
        written, call = call, self._placed(layer, call)
        selection = self._select(layer, call)
        columns = self.reweighter.columns(layer, call) if self.reweighter is not None else None
        pairs: float | None = None  # of query and key; the share of a prompt's that was computed
        own = self.attending.attend(layer, call) if self.attending is not None else None
        if own is not None:
            output, mass = own[0], None
        elif columns is not None:
            output, mass = self._reweight(layer, call, selection, columns)
        elif call.decoding:
            output, mass = self._decode(layer, call, selection)
        else:
            (output, pairs), mass = self._chunk(layer, call, selection), None
        read = own[1] if own is not None else self._bytes_read(layer, selection)
        if self.reader is not None:
            read += self.reader.observe(layer, call) or 0
        for method in self.leavers if not call.decoding else ():
            method.leave(layer, call)
        for method in self.evictors:  # all see the cache that this step attended to, then the first one evicts
            method.observe(layer, call)
        for method in self.evictors:
            call = call if layer.turned is not None else self._placed(layer, written)
            slots = method.keep(layer, call) if method.evicts(call) else None
            counted = own is not None and method is self.attending
            if method.reads_keys and not counted and (slots is not None or method.watches):
                read += layer.keys.numel() * layer.keys.element_size()
            if slots is not None:
                if self.measure:
                    mass = _mass(layer, call, slots)
                layer.keep(slots)
        if call.window is not None and not layer.recording and layer.n > 2 * call.window:
            layer.pass_window(call.window)
        layer.turned = None
        kept = layer.entries if selection is None else min(_read(selection), layer.entries)
        layer.request.figures[layer.index] = {
            "kept": kept, "bytes_kept": layer.bytes_kept, "bytes_read": read, "dropped_mass": mass,
            "pairs": pairs,
        }  # fmt: skip
        return output

    def _placed(self, layer: KVLayer, call: Call) -> Call:
        """The call with its queries, and the layer's keys, where a method that renumbers wants them."""
        if self.compacting is None:
            return call
        self.compacting.need_rope(layer)
        return dataclasses.replace(call, query=layer.renumber(call.query))

    def _select(self, layer: KVLayer, call: Call) -> Selection | None:
        if self.reader is None or (not call.decoding and not self.reader.reads_chunks):
            return None
        return self.reader.select(layer, call)

    def _decode(
        self, layer: KVLayer, call: Call, selection: Selection | None
    ) -> tuple[torch.Tensor, float | None]:
        options = {"scale": call.scale, "softcap": call.softcap}
        if selection is None:
            starts = layer.starts(call.window)
            output, lse = kernels.decode_attention(call.last, layer.keys, layer.values, starts=starts, **options)
            return self._add_rest(layer, call, output, lse).unsqueeze(2), 0.0 if self.measure else None
        query, keys, values, slots, _ = _entries(layer, call, selection)
        output, lse = kernels.selected_attention(query[:, :, -1], keys, values, slots, **options)
        mass = None
        if self.measure and selection.key_positions is None:
            mass = _mass(layer, call, selection.indices, lse)
        return self._add_rest(layer, call, output, lse)[:, :, None], mass

    def _add_rest(self, layer: KVLayer, call: Call, output: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """The output (batch, heads, head_dim) of a step, with what stands for evicted entries."""
        if layer.rest is None:
            return output
        key, value, bias = layer.rest.entry(torch.float32)
        grouped = (part.unflatten(1, (layer.heads, -1)) for part in (call.last.float(), output.float(), lse))
        query, kept, total = grouped
        logit = capped((query * key).sum(-1) * call.scale, call.softcap) + bias
        # a softmax over two: what is kept as one, and the rest
        share = torch.sigmoid(logit - total).masked_fill(logit == float("-inf"), 0.0)[..., None]
        return (kept + share * (value - kept)).flatten(1, 2).to(output.dtype)

    def _chunk(self, layer: KVLayer, call: Call, selection: Selection | None) -> tuple[torch.Tensor, float]:
        """Attention of several new tokens, and the share of their pairs with keys that was computed."""
        if self.shortener is not None and selection is None and layer.rest is None and call.reach is None:
            shortened = self.shortener.attend_prompt(layer, call)
            if shortened is not None:
                return shortened
        query, keys, values, _, positions = _entries(layer, call, selection)
        bias = None
        if layer.rest is not None:
            keys, values, positions, bias = _with_rest(layer.rest, keys, values, positions)
        output = prefill_attention(
            query, keys, values, positions, scale=call.scale, window=call.window, softcap=call.softcap, bias=bias,
            reach=call.reach,
        )  # fmt: skip
        return output, 1.0

    def _reweight(
        self, layer: KVLayer, call: Call, selection: Selection | None, columns: torch.Tensor
    ) -> tuple[torch.Tensor, float | None]:
        """As ``_decode`` or ``_chunk``, with other weights at the slots ``columns``."""
        factor = functools.partial(self.reweighter.factor, layer)
        options = {"scale": call.scale, "softcap": call.softcap}
        query, keys, values, slots, positions = _entries(layer, call, selection)
        columns = columns.expand(-1, layer.heads, -1)
        if selection is not None:
            columns = locate(selection.indices, columns)
        if not call.decoding:
            return reweighted_chunk(query, keys, values, positions, columns, factor, window=call.window, **options), None
        if slots is None:
            slots = torch.arange(layer.n, device=keys.device).expand(keys.shape[0], layer.heads, -1)
            slots = hide(slots, layer.starts(call.window))
        output = reweighted_step(query[:, :, -1], keys, values, slots, columns, factor, **options)
        mass = 0.0 if self.measure else None
        if self.measure and selection is not None:
            mass = _mass(layer, call, selection.indices) if selection.key_positions is None else None
        return output[:, :, None], mass

    def _bytes_read(self, layer: KVLayer, selection: Selection | None) -> int:
        """Bytes of keys and values that this call had to read from the cache, scoring included."""
        if selection is None:
            return layer.bytes_held
        size = layer.keys.element_size()
        row = size * (layer.keys.shape[-1] + layer.values.shape[-1])
        read = row * layer.keys.shape[0] * layer.heads * _read(selection)
        return round(read) + selection.bytes_scored


def _read(selection: Selection) -> float:
    """Entries read per row and KV head, mean: empty slots stand only for what other heads or rows read more."""
    return int((selection.indices >= 0).sum()) / (selection.indices.numel() // selection.kept)


def _entries(
    layer: KVLayer, call: Call, selection: Selection | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Queries, keys and values of a call, which slots of these are read (None: all), and the positions of the keys.

    A step that moves no key reads in place; a piece of prompt reads a gathered copy, or a whole one of heads that keep
    different numbers of entries.
    """
    if selection is None:
        keys, values = (layer.keys, layer.values) if call.decoding else (dense(layer.keys), dense(layer.values))
        return call.query, keys, values, None, layer.shared_positions
    if call.decoding and selection.key_positions is None:
        return call.query, layer.keys, layer.values, selection.indices, layer.shared_positions
    query, keys, values, slots = _moved(layer, call, selection)
    positions = torch.where(selection.indices < 0, -1, take(layer.shared_positions, selection.indices))
    return query, keys, values, slots, positions


def _with_rest(
    rest: Rest, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and positions with the entry of ``rest`` in front, which every token sees, and what is added to logits."""
    key, value, more = rest.entry(keys.dtype)
    positions = positions.expand(-1, keys.shape[1], -1)
    bias = torch.cat([more, more.new_zeros(positions.shape)], dim=-1)
    first = torch.zeros_like(positions[..., :1]).masked_fill(rest.count == 0, EMPTY)
    return torch.cat([key, keys], dim=2), torch.cat([value, values], dim=2), torch.cat([first, positions], dim=-1), bias


def _moved(
    layer: KVLayer, call: Call, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gathered keys and values at the selection's positions, the queries moved along, and the slots of the gathered copy."""
    keys, values = take(layer.keys, selection.indices), take(layer.values, selection.indices)
    query = call.query
    if selection.key_positions is not None:
        at = take(layer.shared_positions, selection.indices)
        keys = layer.rope.rotate(keys, selection.key_positions - at)
        query = layer.rope.rotate(query, selection.query_shift[:, None, None])
    slots = torch.arange(keys.shape[2], device=keys.device).expand(*selection.indices.shape)
    return query, keys, values, slots.masked_fill(selection.indices < 0, -1)


def _mass(layer: KVLayer, call: Call, slots: torch.Tensor, lse: torch.Tensor | None = None) -> float:
    """Share of the newest query's dense attention that lies outside ``slots``, mean over rows and heads."""
    options = {"scale": call.scale, "softcap": call.softcap}
    _, dense = kernels.decode_attention(
        call.last, layer.keys, layer.values, starts=layer.starts(call.window), **options
    )
    if lse is None:
        _, lse = kernels.selected_attention(call.last, layer.keys, layer.values, slots, **options)
    return float((1 - (lse - dense).exp()).clamp(min=0).mean())


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Stands in the model as its attention function. Without a cache of ours it is plain causal attention."""
    for name, meaning in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise LaconicError(f"{type(module).__name__} uses {meaning}, which laconic.apply does not support yet.")
    if dropout and module.training:
        raise LaconicError("The model is in training mode with attention dropout: call model.eval() first.")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise LaconicError("A 4-D attention mask cannot be used inside laconic.apply: pass the 2-D padding mask.")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: KVLayer | None = getattr(key, "laconic_layer", None)
    reach = getattr(attention_mask, "laconic_reach", None)
    if layer is not None:
        if reach is not None:
            at = layer.request.take(query.shape[0], query.shape[2], layer.seen - query.shape[2], query.device)
            reach = reach.to(at.device).gather(1, at.clamp(min=0)).masked_fill(at < 0, EMPTY)
        output = layer.request.policy.attend(layer, Call(query, scale, sliding_window, softcap, reach))
    else:
        n = key.shape[2]
        valid = torch.ones(query.shape[0], n, device=query.device) if attention_mask is None else attention_mask
        positions = (valid.long().cumsum(-1) - 1).masked_fill(valid == 0, -1)[:, None]
        output = prefill_attention(
            query, key, value, positions, scale=scale, window=sliding_window, softcap=softcap, reach=reach
        )
    return output.transpose(1, 2).contiguous(), None


def attention_mask(
    *,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    mask_function: Callable[..., torch.Tensor] | None = None,
    batch_size: int = 1,
    q_length: int = 1,
    q_offset: int | torch.Tensor = 0,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """Stands in the model as its mask function: hands the 2-D padding mask through, so that no n x n mask is built.

    What a token may see of its two neighbours tells a causal mask, with or without a window, from others. Tokens in a row that
    each see the next one are a block, such as a picture, whose tokens see each other; how far each sees goes with the mask as
    ``laconic_reach`` (batch, positions). Packed texts, which do not see what is before their start, are refused.
    """
    plain, reach = mask_function is None or q_length == 1, None
    if not plain:
        row = torch.arange(batch_size, device=device)[:, None]
        here = torch.arange(q_length - 1, device=device)[None] + q_offset
        before = mask_function(row, 0, here + 1, here)
        ahead = mask_function(row, 0, here, here + 1)
        plain = not use_vmap and bool(before.all()) and not bool(ahead.any())
        if not plain:
            reach = _reach(mask_function, ahead.expand(batch_size, -1), before.expand(batch_size, -1), attention_mask, q_offset)
            plain = reach is not None
    if not plain:
        raise LaconicError(
            "This call needs more than a causal mask (packed texts, blocks that see their future), which laconic.apply does "
            "not support: put one text in each row and pad on the left."
        )
    if reach is not None:
        rows = torch.ones(batch_size, q_length, dtype=torch.int64, device=device) if attention_mask is None else attention_mask
        attention_mask = rows.clone()
        attention_mask.laconic_reach = reach
    return attention_mask


def _reach(
    mask_function: Callable[..., torch.Tensor],
    ahead: torch.Tensor,
    before: torch.Tensor,
    padding: torch.Tensor | None,
    offset: int | torch.Tensor,
) -> torch.Tensor | None:
    """Last position that the token at each position sees, ``(batch, positions)``; None where that is not all there is to know.

    ``ahead`` and ``before`` (batch, count - 1): whether a token sees the next one, and whether that sees it. Only of a fresh
    prompt.
    """
    batch, count = ahead.shape[0], ahead.shape[1] + 1
    pads = torch.zeros(batch, 1, dtype=torch.int64, device=ahead.device)
    if padding is not None:
        pads = (padding == 0).sum(-1, keepdim=True).to(ahead.device)
    slot = torch.arange(count, device=ahead.device)
    real = slot[1:] > pads
    if int(offset) or not bool((before | ~real).all()):
        return None
    ends = torch.nn.functional.pad(~(ahead & real), (0, 1), value=True)
    last = slot.masked_fill(~ends, count).flip(-1).cummin(-1).values.flip(-1)  # where the block of each token ends
    row = torch.arange(batch, device=ahead.device)[:, None]
    whole = mask_function(row, 0, slot[None].expand(batch, -1), last) | (slot < pads)
    if not bool(whole.all()):
        return None
    return (last - pads).gather(1, (slot + pads).clamp(max=count - 1))
