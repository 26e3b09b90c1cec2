"""The KV cache: preallocated buffers, views out, and the true position of every entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from laconic.buffers import Buffer, RaggedBuffer, kept, locate, take
from laconic.errors import LaconicError
from laconic.kernels.blocks import KeyBlocks
from laconic.kernels.index import KeyIndex
from laconic.kernels.ragged import Ragged, dense
from laconic.primitives.select import marked

if TYPE_CHECKING:
    from laconic.attention.branches import Branches
    from laconic.attention.engine import Policy
    from laconic.attention.rope import Rope

WORD, OTHER = -1, -2  # in ``Request.pictures``: a word, and a token that is neither a word nor part of what a picture shows
EMPTY = -1  # the position of a slot that holds no token (left padding, or a head that keeps fewer entries than others)
SAVES = 1 / 8  # share of a layer that has to be empty slots for its heads to be stored in their own lengths


@dataclass(frozen=True)
class Rest:
    """One entry per row and KV head that stands for ``count`` evicted ones: as their mean, with log ``count`` added to its logit
    (RazorAttention, 2024). Equal keys so keep exactly the attention that they had.

    Attributes:
        key_sum, value_sum: float32 ``(batch, kv_heads, dim)``; count: float32 ``(batch, kv_heads, 1)``.
    """

    key_sum: torch.Tensor
    value_sum: torch.Tensor
    count: torch.Tensor

    def __add__(self, other: Rest) -> Rest:
        return Rest(self.key_sum + other.key_sum, self.value_sum + other.value_sum, self.count + other.count)

    def entry(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Its key and value ``(batch, kv_heads, 1, dim)``, and the bias of its logit ``(batch, kv_heads, 1)``; -inf for none."""
        key, value = (total / self.count.clamp(min=1) for total in (self.key_sum, self.value_sum))
        return key[:, :, None].to(dtype), value[:, :, None].to(dtype), self.count.log()

    def rows(self, index: torch.Tensor) -> Rest:
        return Rest(*(_rows(t, index) for t in (self.key_sum, self.value_sum, self.count)))

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.key_sum, self.value_sum, self.count))


@dataclass(frozen=True)
class Lasting:
    """A tensor in a memory that a crop leaves as it is: whoever reads it knows by positions what of it still counts."""

    tensor: torch.Tensor

    def rows(self, index: torch.Tensor) -> Lasting:
        return Lasting(_rows(self.tensor, index))

    def copy(self) -> Lasting:
        return Lasting(self.tensor.clone())

    def cropped(self, left: int) -> Lasting:
        return self


class Request:
    """What the layers of one cache share: the policy that serves them, the incoming positions, and the figures.

    Attributes:
        policy: the :class:`laconic.attention.engine.Policy` that attends for this cache; set by every forward.
        positions: int64 ``(batch, new)``: true positions of the tokens of the running forward, -1 for padding.
        onward: int64 ``(batch, k)``: positions of the tokens that layers deeper than the running one compute, -1 for none;
            None for all. A method sets it, and :class:`laconic.layers.LayerShrinker` sees to it.
        living: int64 ``(batch, k)``: positions of the rows that reach the running layer, -1 in front; None for all.
        into: int64 ``(batch, positions)``: position of the token that takes in the one at each position when that does not go
            onward, -1 for none; None for nobody. What takes others in enters the next layer as the mean of them all.
        adds: boolean ``(batch, positions)``: tokens whose mean is added to what takes them in instead; None for nobody.
        merged: as ``into``, of all layers of the latest forward of more than one token together, for pictures of it.
        pictures: int64 ``(batch, positions)``: number of the picture that the token at each position belongs to, ``WORD`` for
            words, ``OTHER`` for separators; None where the running forward brings no picture, or nobody asked.
        looked: the :class:`laconic.vision.picture.Picture` of that forward, by number.
        layers: the layers of the cache.
        branches: says that the running forward is of a draft tree, and who sees whom in it; None for a text.
        count: how many tokens came in, where fewer reach the first layer: what is left of ``positions`` is then theirs.
        figures: per layer, what the last forward kept and read (see ``Policy``).
        memory: what methods hand from layer to layer (a selection that deeper layers use again, scores that add up over
            depth). Tensors in it have the batch as first dimension and follow reordering. A crop leaves only what says how
            it looks then: ``value.cropped(left)``, when the first ``left`` tokens are left; None to be forgotten.
    """

    def __init__(self) -> None:
        self.policy: Policy | None = None
        self.positions: torch.Tensor | None = None
        self.onward: torch.Tensor | None = None
        self.living: torch.Tensor | None = None
        self.into: torch.Tensor | None = None
        self.adds: torch.Tensor | None = None
        self.merged: torch.Tensor | None = None
        self.branches: Branches | None = None
        self.count: int | None = None
        self.pictures: torch.Tensor | None = None
        self.looked: list[Any] = []
        self._asked: tuple[torch.Tensor | None, bool] = None, False
        self.layers: list[KVLayer] = []
        self.figures: dict[int, dict[str, Any]] = {}
        self.memory: dict[str, Any] = {}

    @property
    def reads(self) -> bool:
        """Whether the running forward reads a text of several tokens, a prompt or a turn: no step, and no draft."""
        return self.positions is not None and self.positions.shape[1] > 1 and self.branches is None

    def take(self, batch: int, count: int, seen: int, device: torch.device) -> torch.Tensor:
        """Positions ``(batch, count)``; without word from the model's caller, the tokens follow what was seen."""
        if self.branches is not None:
            return self.branches.positions.to(device)
        if self.living is not None:
            return self.living.to(device)
        if self.positions is not None and self.positions.shape == (batch, count):
            return self.positions.to(device)
        return torch.arange(seen, seen + count, device=device).expand(batch, count)

    def padded(self, positions: torch.Tensor) -> bool:
        """Whether any row of ``positions`` begins with padding. Layers share their positions: the device is asked once."""
        if self._asked[0] is not positions:
            self._asked = positions, bool((positions[:, 0] < 0).any())
        return self._asked[1]


class KVLayer(CacheLayerMixin):
    """One layer's keys and values, ``(batch, kv_heads, n, head_dim)``, with what methods remember about them.

    Attributes:
        positions: int64 ``(batch, kv_heads, n)``, ascending: where each kept entry stands in its text; -1 for padding.
        seen: tokens this layer was given so far, padding included; what transformers calls the sequence length.
        tracks: per-entry tensors ``(batch, kv_heads, n)`` of methods (accumulated scores, ...), which follow every
            eviction, reordering and crop.
        memory: anything else a method keeps for this request and layer (the last query, the last selection, ...).
            Tensors in it have the batch as first dimension and follow reordering. Crops are as in ``Request.memory``.
        rest: one entry per row and head that stands for evicted ones, or None; see ``fold``.
        turned: the keys as the running forward sees them, ``(batch, kv_heads, n, head_dim)``, where that is not as they were
            written; see ``renumber``. Gone as soon as entries are evicted.
        slots: selections that a method wants to use again, int64 ``(batch, heads, k)``. They follow reordering and the
            passing of a sliding window, and are forgotten when entries are evicted or cropped.
        branches: what was remembered after each node of a draft that is not settled yet, where nodes choose for themselves.
        gaps: empty slots among the entries, the same number or more in every row, that a batch left when its rows accepted
            different numbers of tokens; see ``settle``.
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
        self._keys: Buffer | RaggedBuffer | None = None
        self._values: Buffer | RaggedBuffer | None = None
        self._positions: Buffer | None = None
        self.tracks: dict[str, Buffer | RaggedBuffer] = {}
        self.memory: dict[str, Any] = {}
        self.seen = 0
        self.padded = False
        self.rest: Rest | None = None
        self.passed = 0  # the sliding window behind which entries were dropped; 0 when all are still there
        self.slots: dict[str, torch.Tensor] = {}
        self._index: KeyIndex | None = None
        self._blocks: dict[tuple[int, str], KeyBlocks] = {}
        self.turned: torch.Tensor | None = None
        self.branches: dict[int, Any] = {}
        self.gaps: torch.Tensor | None = None
        self._last: torch.Tensor | None = None  # position of the newest token after a crop, which may be of one that was evicted
        self.is_initialized = False

    # --- what transformers calls -------------------------------------------------------------------------------------
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Appends ``(batch, kv_heads, new, head_dim)`` and returns views of all entries, the keys tagged with this layer."""
        request, (batch, _, count, _) = self.request, key_states.shape
        positions = request.take(batch, count, self.seen, key_states.device)
        self.padded = self.padded or request.padded(positions)
        self._last = None
        self.seen += request.count or (count if request.living is None else request.positions.shape[1])
        if self._keys is None:
            self._keys, self._values = Buffer(key_states, self.reserve), Buffer(value_states, self.reserve)
            self._positions = Buffer(positions[:, None], self.reserve)
            self.is_initialized = True
        else:
            self._keys.append(key_states)
            self._values.append(value_states)
            self._positions.append_late(positions)
            if request.living is not None or request.count is not None:
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
        self.rest, self.gaps, self._last = (_rows(part, beam_idx) for part in (self.rest, self.gaps, self._last))
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
        positions = self._positions.view()
        last = positions.amax(dim=(1, 2), keepdim=True) if self._last is None else self._last
        gone = positions > last - count  # fewer where some were evicted, or never came in
        if self.n - int(gone.sum(-1).max()) < self.passed:
            raise LaconicError("A sliding window has moved on and cannot go back: call cache.activate_past_recording() first.")
        self._catch_up()
        if bool((gone.sum(-1) == count).all()):
            remaining = self.n - count
            for buffer in self._buffers():
                buffer.crop(remaining)
        else:  # heads evicted different numbers of the last tokens: what remains moves to the end, empty slots in front
            order = gone.logical_not().to(torch.int8).argsort(dim=-1, stable=True)
            order = order[..., int(gone.sum(-1).min()) :]
            self._keep(order.masked_fill(take(gone, order) | (take(positions, order) < 0), -1))
        self.seen -= count
        self._last = last - count
        prompt = {name: value for name, value in self.memory.items() if name == "prompt"}  # shares stay what they were
        self.memory = prompt | cropped(self.memory, self.seen)
        self._outdate()

    def settle(self, path: torch.Tensor, count: int, *, moved: bool = True) -> None:
        """Of the newest ``count`` entries, a draft, only those at ``path`` stay, in the order of their text.

        Args:
            path: int64 ``(batch, k)``, which of them, ascending, -1 behind the last. Rows with fewer get empty slots behind them,
                which all attention but that of drafts expects in front: see ``close_gaps``.
            moved: whether any of them has to move.
        """
        base, kept = self.n - count, path.shape[1]
        self._catch_up_to(base)
        if self.branches:
            self.set_state(self.branches[int(path[0].amax())])
        if moved:
            self._move(path, base)
        for buffer in self._buffers():
            buffer.crop(min(buffer.n, base + kept))
        self.seen += kept - count
        self.branches = {}

    def _move(self, path: torch.Tensor, base: int) -> None:
        """Puts the entries at slots ``base + path`` (batch, k) into those from ``base`` on; empty slots where there are none."""
        target = torch.arange(base, base + path.shape[1], device=path.device).expand(len(path), self.heads, -1)
        source = (base + path.clamp(min=0))[:, None].expand(-1, self.heads, -1)
        for buffer in self._buffers():
            if buffer.n > base:
                heads = buffer.view().shape[1]
                buffer.shift(source[:, :heads], target[:, :heads])
        empty = path < 0
        if bool(empty.any()):
            self._positions.view()[:, :, base : base + path.shape[1]].masked_fill_(empty[:, None], EMPTY)
            self.padded = True
            self.gaps = empty.sum(-1) + (0 if self.gaps is None else self.gaps)

    def close_gaps(self) -> None:
        """Moves the empty slots that ``settle`` left to the front, where all are expected."""
        if self.gaps is not None:
            self._close_gaps(self.n)
            self.gaps = None

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What is remembered besides the entries. Tensors are not copied: nobody changes them in place."""
        return dict(self.memory), dict(self.slots)

    def set_state(self, state: tuple[dict[str, Any], dict[str, torch.Tensor]]) -> None:
        self.memory, self.slots = dict(state[0]), dict(state[1])

    def set_aside(self, base: int) -> tuple[torch.Tensor, ...]:
        """Takes the entries from slot ``base`` on out and gives back their keys, values and positions; see ``put_back``."""
        tail = tuple(t[:, :, base:].clone() for t in (dense(self.keys), dense(self.values), self.shared_positions))
        self.cut(base)
        return tail

    def put_back(self, tail: tuple[torch.Tensor, ...], index: torch.Tensor) -> None:
        """Appends those at ``index`` (k,) of the entries that were set aside."""
        for buffer, entries in zip((self._keys, self._values, self._positions), tail, strict=True):
            buffer.append(entries[:, :, index])

    def cut(self, base: int) -> None:
        """Forgets the entries from slot ``base`` on, but not what methods remember."""
        self._catch_up_to(base)
        for buffer in self._buffers():
            buffer.crop(min(buffer.n, base))

    def offload(self) -> None:
        raise LaconicError("Offloading is not supported inside laconic.apply: leave cache_implementation unset.")

    prefetch = offload

    # --- what methods use --------------------------------------------------------------------------------------------
    @property
    def n(self) -> int:
        """Slots per row and head: the entries of the longest."""
        return 0 if self._keys is None else self._keys.n

    @property
    def entries(self) -> float:
        """Tokens held per row and KV head, mean; empty slots do not count."""
        starts = self.starts()
        return float(self.n) if starts is None else self.n - int(starts.sum()) / starts.numel()

    @property
    def keys(self) -> torch.Tensor | Ragged | None:
        """``(batch, kv_heads, n, head_dim)``: a view, or a ``Ragged`` where heads keep different numbers of entries."""
        if self.turned is not None:
            return self.turned
        return None if self._keys is None else self._keys.view()

    @property
    def values(self) -> torch.Tensor | Ragged | None:
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
        if isinstance(self._keys, RaggedBuffer) and isinstance(first, int):
            return self._keys.starts
        hidden = (self.shared_positions < first).sum(-1)
        return hidden.expand(-1, self.heads)

    def slots_of(self, positions: torch.Tensor) -> torch.Tensor:
        """Slots of the entries at true ``positions`` (batch, heads or 1, k), ascending; -1 in front for what is not held."""
        return locate(self.shared_positions, positions)

    def renumber(self, query: torch.Tensor) -> torch.Tensor:
        """Shows the keys of the running forward as of a text without gaps, and gives back its queries moved along.

        Args:
            query: ``(batch, heads, new, head_dim)`` of the newest tokens, at the positions where they stand.
        """
        held = self.shared_positions >= 0
        place = self.n - held.flip(-1).cumsum(-1).flip(-1)  # counted back from the newest, which all rows and heads share
        self.turned = self.rope.rotate(dense(self._keys.view()), (place - self.shared_positions).masked_fill(~held, 0))
        return self.rope.rotate(query, (self.n - self.lengths)[:, None, None])

    def keep(self, slots: torch.Tensor) -> None:
        """Evicts all but ``slots``, int64 ``(batch, kv_heads or 1, kept)`` ascending; -1 is an empty slot."""
        self._catch_up()
        slots = self._keep(slots)
        if self._index is not None:
            self._index.keep(slots)
        self.slots.clear()
        self._blocks = {}

    def _keep(self, slots: torch.Tensor) -> torch.Tensor:
        """Gives back ``slots`` without those in front that are empty in all rows and heads."""
        nothing = slots < 0
        if bool(nothing.any()):
            lead = int(nothing.sum(-1).min())  # empty in all rows and heads
            slots, nothing = slots[..., lead:], nothing[..., lead:]
        self.turned = None
        saves = slots.shape[1] == self.heads and float(nothing.float().mean()) >= SAVES
        ragged = saves and bool((self.lengths > 0).all())  # no more padding can come
        self._keys, self._values = kept(self._keys, slots, ragged), kept(self._values, slots, ragged)
        self.tracks = {name: kept(track, slots, ragged) for name, track in self.tracks.items()}
        self._positions.keep(slots)
        if bool(nothing.any()):
            self._positions.view().masked_fill_(nothing, EMPTY)
            self.padded = True
        return slots

    def fold(self, slots: torch.Tensor) -> None:
        """Adds the entries at ``slots`` (batch, kv_heads, k), -1 for none, to what stands for the evicted ones."""
        keys, values = (take(t, slots).float() for t in (self.keys, self.values))
        real = (slots >= 0).float()[..., None]
        fresh = Rest((keys * real).sum(2), (values * real).sum(2), real.sum(2))
        self.rest = fresh if self.rest is None else self.rest + fresh

    def forget_after(self, sinks: int, counts: torch.Tensor) -> None:
        """Evicts the ``counts`` (batch, kv_heads) entries that follow the first ``sinks`` of each row and head.

        The first ones move up to close the gap and nothing else moves, so that a step costs next to nothing at any length.
        Where that would leave much memory unused, the rest is stored anew.
        """
        self._catch_up()
        starts = self.starts()
        starts = torch.zeros_like(counts) if starts is None else starts
        slot, first = torch.arange(self.n, device=counts.device), starts + counts
        lead = int(first.min())  # empty in all rows and heads
        unused = 0.0 if isinstance(self._keys, RaggedBuffer) else float(first.float().mean()) - lead
        if max(int(counts.max()), unused) > max(64, SAVES * self.n):
            gone = (slot >= starts[..., None] + sinks) & (slot < (first + sinks)[..., None])
            self._keep(marked(~gone & (slot >= starts[..., None])))
        else:
            if self._positions.view().shape[1] == 1 < self.heads:
                self._positions = Buffer(self.positions)
            source = starts[..., None] + torch.arange(sinks, device=counts.device)
            for buffer in self._buffers():
                buffer.shift(source, source + counts[..., None])
                if isinstance(buffer, RaggedBuffer):
                    buffer.front(first)
            self._positions.view().masked_fill_(slot < first[..., None], EMPTY)
            self.padded = True
            for buffer in self._buffers() if lead else ():
                buffer.drop_front(lead)
        self._outdate()

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
    def raw_keys(self) -> torch.Tensor | Ragged:
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
            self._index = KeyIndex(dense(self.keys))
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
            blocks = self._blocks[size, kind] = KeyBlocks(dense(self.keys), size, kind=kind, starts=starts, lead=lead)
        elif blocks.n < self.n:
            blocks.append(self.keys[:, :, blocks.n :])
        return blocks

    @property
    def bytes_held(self) -> int:
        """Bytes of the keys and values held, which a step over all of them reads."""
        return 0 if self._keys is None else self._keys.bytes + self._values.bytes

    @property
    def bytes_kept(self) -> int:
        """Bytes of the entries held: keys, values, tracks, 8-bit keys, blocks of keys, and what stands for evicted entries."""
        parts = (*self.tracks.values(), *self._blocks.values(), self._index, self.rest)
        return self.bytes_held + sum(part.bytes for part in parts if part is not None)

    def copy(self, request: Request) -> KVLayer:
        twin = KVLayer(self.index, self.layers, request, reserve=self.reserve)
        twin.rope, twin.recording = self.rope, self.recording
        twin.seen, twin.padded, twin.passed = self.seen, self.padded, self.passed
        twin.is_initialized = self.is_initialized
        twin.gaps, twin._last, twin.branches = self.gaps, self._last, dict(self.branches)
        if self._keys is not None:
            twin._keys, twin._values, twin._positions = self._keys.copy(), self._values.copy(), self._positions.copy()
            twin.tracks = {name: buffer.copy() for name, buffer in self.tracks.items()}
            twin.memory = {name: _copy(value) for name, value in self.memory.items()}
            twin.rest = self.rest  # never changed in place
            twin.slots = {name: value.clone() for name, value in self.slots.items()}
        return twin

    def _catch_up(self) -> None:
        """Brings keys before RoPE and 8-bit keys, which are written when somebody asks, to the length of all others."""
        if "raw_keys" in self.tracks:
            _ = self.raw_keys
        if self._index is not None:
            self.key_index()

    def _catch_up_to(self, base: int) -> None:
        """Forgets 8-bit keys and blocks of the entries from slot ``base`` on, which are about to move or go."""
        if self._index is not None:
            self._index.crop(base)
        self._blocks = {key: blocks for key, blocks in self._blocks.items() if blocks.n <= base}

    def _outdate(self) -> None:
        """Forgets what was made of entries that have moved."""
        self.slots.clear()
        self._index = None
        self._blocks = {}
        self.turned = None

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
        self._keep(order.masked_fill(gaps.gather(-1, order), -1))
        self._outdate()

    def _buffers(self) -> list[Buffer]:
        return [b for b in (self._keys, self._values, self._positions, *self.tracks.values()) if b is not None]


def _rows(value: Any, index: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor) and value.dim():
        return value.index_select(0, index.to(value.device))
    return value.rows(index) if hasattr(value, "rows") else value


def cropped(memory: dict[str, Any], left: int) -> dict[str, Any]:
    """What of a memory outlives a crop to the first ``left`` tokens: values with a method ``cropped`` say what they are then."""
    found = {name: value.cropped(left) for name, value in memory.items() if hasattr(value, "cropped")}
    return {name: value for name, value in found.items() if value is not None}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value.copy() if hasattr(value, "copy") else value


class KVCache(Cache):
    """A transformers ``Cache`` of :class:`KVLayer`."""

    def __init__(self, layers: int, *, reserve: int = 0) -> None:
        self.request = Request()
        super().__init__(layers=[KVLayer(i, layers, self.request, reserve=reserve) for i in range(layers)])
        self.request.layers = self.layers

    def fork(self) -> KVCache:
        """An independent copy of everything held: what happens to one does not reach the other."""
        twin = KVCache(0)
        twin.request.policy = self.request.policy
        twin.request.memory = {name: _copy(value) for name, value in self.request.memory.items()}
        twin.layers = twin.request.layers = [layer.copy(twin.request) for layer in self.layers]
        return twin

    def restore(self, snapshot: KVCache) -> None:
        """Back to the state of ``snapshot = cache.fork()``; the snapshot stays usable."""
        fresh = snapshot.fork()
        self.layers, self.request = fresh.layers, fresh.request

    def reset(self) -> None:
        self.request.memory.clear()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.request.memory = cropped(self.request.memory, self.get_seq_length())

    def settle(self, path: torch.Tensor, count: int) -> None:
        """Keeps of a draft's ``count`` entries in every layer those at ``path`` (batch, k); see ``KVLayer.settle``.

        Where rows accept different numbers, empty slots stay behind until a quarter of the slots is empty in every row: moving
        all entries at every step would cost more than reading past them.
        """
        self.request.branches = None
        moved = bool((path != torch.arange(path.shape[1], device=path.device)).any())
        for layer in self.layers:
            layer.settle(path, count, moved=moved)
        gaps = self.layers[0].gaps
        if gaps is not None and int(gaps.min()) > max(64, self.layers[0].n // 4):
            self.close_gaps()

    def close_gaps(self) -> None:
        for layer in self.layers:
            layer.close_gaps()

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
