"""The KV cache: preallocated buffers, views out, and the true position of every entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from laconic.errors import LaconicError
from laconic.kernels.blocks import KeyBlocks
from laconic.kernels.index import KeyIndex
from laconic.kernels.memory import empty

if TYPE_CHECKING:
    from laconic.attention.engine import Policy
    from laconic.attention.rope import Rope

EMPTY = -1  # the position of a slot that holds no token (left padding)


class Buffer:
    """A tensor ``(batch, heads, n, ...)`` that grows along n: memory doubles, appending is amortised O(new), reads are views."""

    def __init__(self, first: torch.Tensor, reserve: int = 0) -> None:
        self.n = 0
        count = first.shape[2]
        capacity = max(reserve, count + max(64, count // 8))  # room for an answer, before the first doubling
        self._data = empty((*first.shape[:2], capacity, *first.shape[3:]), first.dtype, first.device)
        self.append(first)

    def append(self, new: torch.Tensor) -> None:
        end = self.n + new.shape[2]
        if end > self._data.shape[2]:
            self._reallocate(max(end, 2 * self._data.shape[2]))
        self._data[:, :, self.n : end] = new
        self.n = end

    def view(self) -> torch.Tensor:
        return self._data[:, :, : self.n]

    def keep(self, slots: torch.Tensor) -> None:
        """Keeps ``slots`` (batch, heads or 1, k) in that order and gives the memory of the others back."""
        kept = take(self.view(), slots)
        self.n = kept.shape[2]
        if 2 * self.n < self._data.shape[2] or kept.shape[1] != self._data.shape[1]:
            self._data = kept
        else:  # nearly the same size, as in every decode step at a fixed budget: stay in place
            self._data[:, :, : self.n] = kept

    def drop_front(self, count: int) -> None:
        """Forgets the first ``count`` entries of every row and head."""
        rest = self.view()[:, :, count:].clone()
        self._data, self.n = rest, rest.shape[2]

    def crop(self, n: int) -> None:
        self.n = n

    def rows(self, index: torch.Tensor) -> None:
        """Picks rows of the batch (beams); keeps the capacity."""
        picked = self.view().index_select(0, index.to(self._data.device))
        data = empty((picked.shape[0], *self._data.shape[1:]), picked.dtype, picked.device)
        data[:, :, : self.n] = picked
        self._data = data

    def copy(self) -> Buffer:
        twin = object.__new__(Buffer)
        twin.n, twin._data = self.n, self.view().clone()
        return twin

    @property
    def capacity(self) -> int:
        return self._data.shape[2]

    def _reallocate(self, capacity: int) -> None:
        data = empty((*self._data.shape[:2], capacity, *self._data.shape[3:]), self._data.dtype, self._data.device)
        data[:, :, : self.n] = self.view()
        self._data = data


def take(tensor: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Gathers ``slots`` (batch, heads or 1, k) along dimension 2 of ``tensor`` (batch, heads or 1, n, ...)."""
    heads = max(tensor.shape[1], slots.shape[1])
    index = slots.clamp(min=0).expand(-1, heads, -1)
    tensor = tensor.expand(-1, heads, *tensor.shape[2:])
    if tensor.dim() > 3:
        index = index[..., None].expand(*index.shape, tensor.shape[-1])
    return tensor.gather(2, index)


def locate(held: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where in ``held`` (batch, heads or 1, n), ascending, each of ``wanted`` (batch, heads or 1, k) stands: int64
    ``(batch, heads, k)``, ascending; -1 in front for what is not held, and for a wanted -1."""
    heads = max(held.shape[1], wanted.shape[1])
    held, wanted = held.expand(-1, heads, -1).contiguous(), wanted.expand(-1, heads, -1).contiguous()
    found = torch.searchsorted(held, wanted).clamp(max=held.shape[-1] - 1)
    absent = (wanted < 0) | (held.gather(2, found) != wanted)
    return found.masked_fill(absent, -1).sort(dim=-1).values


class Request:
    """What the layers of one cache share: the policy that serves them, the incoming positions, and the figures.

    Attributes:
        policy: the :class:`laconic.attention.engine.Policy` that attends for this cache; set by every forward.
        positions: int64 ``(batch, new)``: true positions of the tokens of the running forward, -1 for padding.
        onward: int64 ``(batch, k)``: positions of the tokens that layers deeper than the running one compute, -1 for none;
            None for all. A method sets it, and :class:`laconic.layers.LayerShrinker` sees to it.
        living: int64 ``(batch, k)``: positions of the rows that reach the running layer, -1 in front; None for all.
        figures: per layer, what the last forward kept and read (see ``Policy``).
        memory: what methods hand from layer to layer (a selection that deeper layers use again, scores that add up over
            depth). Tensors in it have the batch as first dimension and follow reordering; a crop empties it.
    """

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.positions: torch.Tensor | None = None
        self.onward: torch.Tensor | None = None
        self.living: torch.Tensor | None = None
        self.figures: dict[int, dict[str, Any]] = {}
        self.memory: dict[str, Any] = {}

    def take(self, batch: int, count: int, seen: int, device: torch.device) -> torch.Tensor:
        """Positions ``(batch, count)``; without word from the model's caller, the tokens follow what was seen."""
        if self.living is not None:
            return self.living.to(device)
        if self.positions is not None and self.positions.shape == (batch, count):
            return self.positions.to(device)
        return torch.arange(seen, seen + count, device=device).expand(batch, count)


class KVLayer(CacheLayerMixin):
    """One layer's keys and values, ``(batch, kv_heads, n, head_dim)``, with what methods remember about them.

    Attributes:
        positions: int64 ``(batch, kv_heads, n)``, ascending: where each kept entry stands in its text; -1 for padding.
        seen: tokens this layer was given so far, padding included; what transformers calls the sequence length.
        tracks: per-entry tensors ``(batch, kv_heads, n)`` of methods (accumulated scores, ...), which follow every
            eviction, reordering and crop.
        memory: anything else a method keeps for this request and layer (the last query, the last selection, ...).
            Tensors in it have the batch as first dimension and follow reordering.
        slots: selections that a method wants to use again, int64 ``(batch, heads, k)``. They follow reordering and the
            passing of a sliding window, and are forgotten when entries are evicted or cropped.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, index: int, layers: int, request: Request, *, reserve: int = 0) -> None:
        self.index, self.layers, self.request, self.reserve = index, layers, request, reserve
        self.rope: Rope | None = None
        self.recording = False
        self._clear()

    def _clear(self) -> None:
        self._keys: Buffer | None = None
        self._values: Buffer | None = None
        self._positions: Buffer | None = None
        self.tracks: dict[str, Buffer] = {}
        self.memory: dict[str, Any] = {}
        self.seen = 0
        self.padded = False
        self.passed = 0  # the sliding window behind which entries were dropped; 0 when all are still there
        self.slots: dict[str, torch.Tensor] = {}
        self._index: KeyIndex | None = None
        self._blocks: dict[tuple[int, str], KeyBlocks] = {}
        self.is_initialized = False

    # --- what transformers calls -------------------------------------------------------------------------------------
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Appends ``(batch, kv_heads, new, head_dim)`` and returns views of all entries, the keys tagged with this layer."""
        batch, _, count, _ = key_states.shape
        positions = self.request.take(batch, count, self.seen, key_states.device)[:, None]
        self.padded = self.padded or bool((positions[:, :, 0] < 0).any())
        self.seen += count if self.request.living is None else self.request.positions.shape[1]
        if self._keys is None:
            self._keys, self._values = Buffer(key_states, self.reserve), Buffer(value_states, self.reserve)
            self._positions = Buffer(positions, self.reserve)
            self.is_initialized = True
        else:
            self._keys.append(key_states)
            self._values.append(value_states)
            self._positions.append(positions.expand(-1, self._positions.view().shape[1], -1))
            if self.request.living is not None:
                self._close_gaps(count)
        keys, values = self.keys, self.values
        keys.laconic_layer = self  # how the attention function finds the request that it serves
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()

    def activate_past_recording(self) -> None:
        self.recording = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self._keys is None or torch.equal(beam_idx.cpu(), torch.arange(self._keys.view().shape[0])):
            return
        for buffer in self._buffers():
            buffer.rows(beam_idx)
        self.memory = {name: _rows(value, beam_idx) for name, value in self.memory.items()}
        self.slots = {name: _rows(value, beam_idx) for name, value in self.slots.items()}
        self._index = None
        self._blocks = {}

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._keys is not None:
            self.reorder_cache(torch.arange(self._keys.view().shape[0]).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens; like transformers, refuses a positive number (once a final length)."""
        count = -tokens_to_remove
        if count == 0 or self._keys is None:
            return
        if not 0 < count <= self.seen:
            raise LaconicError(f"The cache holds {self.seen} tokens: give how many to remove as a negative number, not {-count}.")
        if self.n - count < self.passed:
            raise LaconicError("A sliding window has moved on and cannot go back: call cache.activate_past_recording() first.")
        self._catch_up()
        positions = self._positions.view()
        last = positions.amax(dim=(1, 2), keepdim=True)
        gone = positions > last - count
        if bool((gone.sum(-1) == count).all()):
            remaining = self.n - count
            for buffer in self._buffers():
                buffer.crop(remaining)
        else:  # heads evicted different numbers of the last tokens: what remains moves to the end, empty slots in front
            order = gone.logical_not().to(torch.int8).argsort(dim=-1, stable=True)
            order = order[..., int(gone.sum(-1).min()) :]
            empty = take(gone, order)
            for buffer in self._buffers():
                buffer.keep(order)
            self._positions.view()[empty] = EMPTY
            self.padded = True
        self.seen -= count
        self.memory = {name: value for name, value in self.memory.items() if name == "prompt"}  # shares stay what they were
        self.slots.clear()
        self._index = None
        self._blocks = {}

    def offload(self) -> None:
        raise LaconicError("Offloading is not supported inside laconic.apply: leave cache_implementation unset.")

    prefetch = offload

    # --- what methods use --------------------------------------------------------------------------------------------
    @property
    def n(self) -> int:
        """Entries per row and head."""
        return 0 if self._keys is None else self._keys.n

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self._keys is None else self._keys.view()

    @property
    def values(self) -> torch.Tensor | None:
        return None if self._values is None else self._values.view()

    @property
    def heads(self) -> int:
        """KV heads."""
        return self._keys.view().shape[1]

    @property
    def positions(self) -> torch.Tensor | None:
        return None if self._positions is None else self._positions.view().expand(-1, self.heads, -1)

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens seen per row, ``(batch,)``: padding does not count, evicted tokens do."""
        return self.shared_positions[:, 0, -1] + 1

    @property
    def shared_positions(self) -> torch.Tensor:
        """``(batch, 1, n)`` while all heads hold the same entries, else ``(batch, kv_heads, n)``."""
        return self._positions.view()

    def starts(self, window: int | None = None) -> torch.Tensor | None:
        """First visible slot ``(batch, kv_heads)`` for the newest token; None when all slots are visible.

        Padding and what has left a sliding ``window`` (tokens, the newest included) stand in front, for positions ascend.
        """
        first = 0
        if window is not None and self.seen > window:
            first = (self.shared_positions[:, :, -1:] - window + 1).clamp(min=0)
        elif not self.padded:
            return None
        hidden = (self.shared_positions < first).sum(-1)
        return hidden.expand(-1, self.heads)

    def slots_of(self, positions: torch.Tensor) -> torch.Tensor:
        """Slots of the entries at true ``positions`` (batch, heads or 1, k), ascending; -1 in front for what is not held."""
        return locate(self.shared_positions, positions)

    def keep(self, slots: torch.Tensor) -> None:
        """Evicts all but ``slots``, int64 ``(batch, kv_heads or 1, kept)`` ascending; -1 is an empty slot."""
        self._catch_up()
        for buffer in self._buffers():
            buffer.keep(slots)
        self.slots.clear()
        self._index = None
        self._blocks = {}
        empty = slots < 0
        if bool(empty.any()):
            self._positions.view().masked_fill_(empty, EMPTY)
            self.padded = True

    def pass_window(self, window: int) -> None:
        """Evicts all but the newest ``window`` entries of every row and head, which no later token can see."""
        self._catch_up()
        count, self.passed = self.n - window, window
        for buffer in self._buffers():
            buffer.drop_front(count)
        self.slots = {name: (slots - count).clamp(min=-1) for name, slots in self.slots.items()}
        self._index = None
        self._blocks = {}

    def track(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """Appends ``new`` (batch, kv_heads, count) to the track so that it covers all entries; returns a view."""
        if name not in self.tracks:
            self.tracks[name] = Buffer(new)
        else:
            self.tracks[name].append(new)
        return self.tracks[name].view()

    @property
    def raw_keys(self) -> torch.Tensor:
        """Keys before the rotary embedding, ``(batch, kv_heads, n, head_dim)``, kept beside the cache from the first call on."""
        track = self.tracks.get("raw_keys")
        have = 0 if track is None else track.n
        if have < self.n:
            if self.rope is None:
                raise LaconicError("Keys before RoPE are not known for this model: leave positions=keep.")
            fresh = self.rope.rotate(self.keys[:, :, have:], -self.shared_positions[:, :, have:].clamp(min=0))
            self.track("raw_keys", fresh)
        return self.tracks["raw_keys"].view()

    def key_index(self) -> KeyIndex:
        """8-bit keys of all entries, for scoring; kept beside the cache from the first call on, made anew after evictions."""
        if self._index is None:
            self._index = KeyIndex(self.keys)
        elif self._index.n < self.n:
            self._index.append(self.keys[:, :, self._index.n :])
        return self._index

    def key_blocks(self, size: int, kind: str = "bounds") -> KeyBlocks:
        """Bounds or means of blocks of ``size`` keys; kept beside the cache from the first call on, made anew after evictions.

        Borders of blocks lie at multiples of ``size`` of the positions, counted on from the first entry that is held.
        """
        blocks = self._blocks.get((size, kind))
        if blocks is None or blocks.unsettled:
            starts = self.starts()
            first = torch.zeros(*self.keys.shape[:2], 1, dtype=torch.int64, device=self.keys.device)
            first = first if starts is None else starts[..., None].clamp(max=self.n - 1)
            lead = take(self.shared_positions, first)[..., 0].clamp(min=0) % size
            blocks = self._blocks[size, kind] = KeyBlocks(self.keys, size, kind=kind, starts=starts, lead=lead)
        elif blocks.n < self.n:
            blocks.append(self.keys[:, :, blocks.n :])
        return blocks

    @property
    def bytes_kept(self) -> int:
        """Bytes of the entries held: keys, values, tracks, 8-bit keys and blocks of keys."""
        held = [b for b in self._buffers() if b is not self._positions]
        index = 0 if self._index is None else self._index.bytes
        index += sum(blocks.bytes for blocks in self._blocks.values())
        return index + sum(b.view().numel() * b.view().element_size() for b in held)

    def copy(self, request: Request) -> KVLayer:
        twin = KVLayer(self.index, self.layers, request, reserve=self.reserve)
        twin.rope, twin.recording = self.rope, self.recording
        twin.seen, twin.padded, twin.passed = self.seen, self.padded, self.passed
        twin.is_initialized = self.is_initialized
        if self._keys is not None:
            twin._keys, twin._values, twin._positions = self._keys.copy(), self._values.copy(), self._positions.copy()
            twin.tracks = {name: buffer.copy() for name, buffer in self.tracks.items()}
            twin.memory = {name: _copy(value) for name, value in self.memory.items()}
            twin.slots = {name: value.clone() for name, value in self.slots.items()}
        return twin

    def _catch_up(self) -> None:
        """Brings the keys before RoPE, which are written when somebody asks, to the length of all others."""
        if "raw_keys" in self.tracks:
            _ = self.raw_keys

    def _close_gaps(self, count: int) -> None:
        """Moves empty slots among the newest ``count``, where rows of a batch differ, to the front, where all are expected."""
        gaps = self._positions.view() < 0
        if not bool(gaps[:, :, -count:].any()):
            return
        self._catch_up()
        for buffer in self.tracks.values():
            if buffer.n < self.n:
                buffer.append(torch.zeros_like(buffer.view()[:, :, :1]).expand(-1, -1, self.n - buffer.n))
        order = gaps.logical_not().to(torch.int8).argsort(dim=-1, stable=True)
        for buffer in self._buffers():
            buffer.keep(order)
        self.slots.clear()
        self._index = None
        self._blocks = {}

    def _buffers(self) -> list[Buffer]:
        return [b for b in (self._keys, self._values, self._positions, *self.tracks.values()) if b is not None]


def _rows(value: Any, index: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor) and value.dim():
        return value.index_select(0, index.to(value.device))
    return value.rows(index) if hasattr(value, "rows") else value


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value.copy() if hasattr(value, "copy") else value


class KVCache(Cache):
    """A transformers ``Cache`` of :class:`KVLayer`."""

    def __init__(self, layers: int, *, reserve: int = 0) -> None:
        self.request = Request()
        super().__init__(layers=[KVLayer(i, layers, self.request, reserve=reserve) for i in range(layers)])

    def fork(self) -> KVCache:
        """An independent copy of everything held: what happens to one does not reach the other."""
        twin = KVCache(0)
        twin.request.policy = self.request.policy
        twin.request.memory = {name: _copy(value) for name, value in self.request.memory.items()}
        twin.layers = [layer.copy(twin.request) for layer in self.layers]
        return twin

    def restore(self, snapshot: KVCache) -> None:
        """Back to the state of ``snapshot = cache.fork()``; the snapshot stays usable."""
        fresh = snapshot.fork()
        self.layers, self.request = fresh.layers, fresh.request

    def reset(self) -> None:
        self.request.memory.clear()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.request.memory.clear()
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._reorder_memory(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._reorder_memory(indices)
        super().batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.layers and self.layers[0].n:
            self._reorder_memory(torch.arange(self.layers[0].keys.shape[0]).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def _reorder_memory(self, rows: torch.Tensor) -> None:
        self.request.memory = {name: _rows(value, rows) for name, value in self.request.memory.items()}
