from __future__ import annotations

import gc
import random
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build, prompt

import laconic
from laconic import LaconicError
from laconic.attention.rope import Rope
from laconic.buffers import Buffer, RaggedBuffer, kept, take
from laconic.cache import EMPTY, KVCache, KVLayer, Request

BATCH, HEADS, DIM = 2, 2, 4


def numbered(start: int, count: int, batch: int = BATCH) -> torch.Tensor:
    """(batch, HEADS, count, DIM): every number occurs once, so that a mix-up cannot go unseen."""
    row = torch.arange(batch)[:, None, None, None] * 1_000_000
    head = torch.arange(HEADS)[:, None, None] * 100_000
    return (row + head + (start + torch.arange(count))[:, None] * 10 + torch.arange(DIM)).double()


def some_slots(n: int, k: int, seed: int, heads: int = HEADS, batch: int = BATCH) -> torch.Tensor:
    """(batch, heads, k) ascending, different per row and head."""
    random = torch.rand(batch, heads, n, generator=torch.Generator().manual_seed(seed))
    return random.argsort(-1)[..., :k].sort(-1).values


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "keep", "crop", "front", "rows", "copy"]), st.integers(0, 40)
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(0, 30), st.integers(0, 100))
def test_a_buffer_equals_torch_cat(operations: list[tuple[str, int]], first: int, reserve: int) -> None:
    model = numbered(0, first)
    buffer, written, others = Buffer(model, reserve), first, []
    for step, (name, size) in enumerate(operations):
        n = model.shape[2]
        if name == "append":
            new = numbered(written, size, batch=model.shape[0])
            written += size
            buffer.append(new)
            model = torch.cat([model, new], dim=2)
        elif name == "keep":
            slots = some_slots(n, min(size, n), step)
            buffer.keep(slots)
            model = torch.stack(
                [torch.stack([h[s] for h, s in zip(r, q, strict=True)]) for r, q in zip(model, slots, strict=True)]
            )
        elif name == "crop":
            buffer.crop(max(0, n - size))
            model = model[:, :, : max(0, n - size)]
        elif name == "front":
            buffer.drop_front(min(size, n))
            model = model[:, :, min(size, n) :]
        elif name == "rows":
            index = torch.tensor([(size >> 1) % 2, size % 2])
            buffer.rows(index)
            model = model[index]
        else:
            others.append((buffer, model.clone()))
            buffer = buffer.copy()
        assert torch.equal(buffer.view(), model), (step, name, size)
        assert buffer.n <= buffer.capacity
    for old, then in others:  # what happened to the copy did not reach the original
        assert torch.equal(old.view(), then)


def uneven(n: int, seed: int, batch: int, starts: torch.Tensor) -> torch.Tensor:
    """Slots (batch, HEADS, k) from ``starts`` on, ascending, of a different number per row and head; -1 in front."""
    marks = torch.rand(batch, HEADS, n, generator=torch.Generator().manual_seed(seed)) < torch.tensor([[0.2], [0.9]])
    marks = marks & (torch.arange(n) >= starts[..., None])
    slots = torch.where(marks, torch.arange(n), -1).sort(-1).values
    return slots[..., int((slots < 0).sum(-1).min()) :]


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(1, 30), st.integers(0, 1000))
def test_heads_of_their_own_lengths_equal_a_padded_buffer(operations: list[tuple[str, int]], first: int, seed: int) -> None:
    padded, written, others = Buffer(numbered(0, first)), first, []
    slots = uneven(first, seed, BATCH, torch.zeros(BATCH, HEADS, dtype=torch.int64))
    ragged = kept(Buffer(padded.view().clone()), slots, ragged=True)
    padded = kept(padded, slots, ragged=False)
    starts = (slots < 0).sum(-1)
    for step, (name, size) in enumerate(operations):
        n, batch = padded.n, len(starts)
        if name == "append":
            new = numbered(written, size, batch=batch)
            written += size
            padded.append(new)
            ragged.append(new)
        elif name == "keep" and n:
            slots = uneven(n, seed + step, batch, starts)
            padded, ragged, starts = kept(padded, slots, ragged=False), kept(ragged, slots, ragged=True), (slots < 0).sum(-1)
        elif name in ("crop", "front"):
            size = min(size, n)
            padded.crop(n - size) if name == "crop" else padded.drop_front(size)
            ragged.crop(n - size) if name == "crop" else ragged.drop_front(size)
            starts = starts.clamp(max=n - size) if name == "crop" else (starts - size).clamp(min=0)
        elif name == "rows":
            index = torch.tensor([size % batch, 0, batch - 1])
            padded.rows(index)
            ragged.rows(index)
            starts = starts[index]
        elif name == "copy":
            others.append((ragged, ragged.view().padded()))
            ragged = ragged.copy()
        assert isinstance(ragged, RaggedBuffer) and torch.equal(ragged.view().starts, starts)
        real = torch.arange(padded.n) >= starts[..., None]
        expected = padded.view().masked_fill(~real[..., None], 0)
        assert torch.equal(ragged.view().padded(), expected) and ragged.view().numel() == int(real.sum()) * DIM
        everything = torch.where(real, torch.arange(padded.n), -1)
        assert torch.equal(take(kept(ragged.copy(), everything, ragged=False).view(), everything)[real], expected[real])
        for old, before in others:  # a copy lives on its own
            assert torch.equal(old.view().padded(), before)


def test_heads_of_their_own_lengths_hold_no_more_than_that() -> None:
    """One long head and seven short ones: memory of the entries and some room, and in place at a fixed budget."""
    n = 10_000
    buffer = Buffer(torch.zeros(1, 8, n, 16))
    slots = torch.arange(n).expand(1, 8, -1).clone()
    slots[:, 1:, : n - 100] = -1
    ragged = kept(buffer, slots, ragged=True)
    entries = n + 7 * 100
    assert ragged.view().numel() == entries * 16
    assert len(ragged._data) <= entries + 8 * 64 + 8
    before = ragged._data.data_ptr()
    for _ in range(200):  # a decode step that drops an entry of each short head
        ragged.append(torch.ones(1, 8, 1, 16))
        slots = torch.arange(ragged.n).expand(1, 8, -1).clone()
        slots[:, 1:, : ragged.n - 100] = -1
        ragged = kept(ragged, slots, ragged=True)
        assert len(ragged._data) <= 1.15 * ragged.view().numel() / 16 + 8 * 64 + 8
    assert ragged.view()[0, 1].sum() == 100 * 16 and ragged.view()[0, 0].sum() == 200 * 16
    assert before != ragged._data.data_ptr()  # the long head has grown


def test_appending_is_amortised() -> None:
    buffer, moves = Buffer(numbered(0, 1)), 0
    for step in range(1, 5000):
        before = buffer._data.data_ptr()
        buffer.append(numbered(step, 1))
        moves += buffer._data.data_ptr() != before
    assert moves <= 8  # 65 * 2**7 > 5000
    assert buffer.capacity < 2 * 5000


def test_a_reserved_buffer_never_moves_and_views_are_no_copies() -> None:
    buffer = Buffer(numbered(0, 10), reserve=500)
    address = buffer.view().data_ptr()
    for step in range(10, 500):
        buffer.append(numbered(step, 1))
    assert buffer.view().data_ptr() == address and buffer.capacity == 500
    buffer.view()[0, 0, 0, 0] = -7
    assert buffer.view()[0, 0, 0, 0] == -7


def test_eviction_gives_memory_back_and_a_fixed_budget_stays_in_place() -> None:
    buffer = Buffer(numbered(0, 4000))
    buffer.keep(some_slots(4000, 64, 0))
    assert buffer.capacity <= 128
    addresses = set()
    for step in range(300):
        buffer.append(numbered(step, 1))
        buffer.keep(some_slots(65, 64, step))
        addresses.add(buffer._data.data_ptr())
        assert buffer.capacity <= 160
    assert len(addresses) <= 3


def test_take_gathers_per_head_or_for_all_heads() -> None:
    tensor = numbered(0, 9)
    own, shared = some_slots(9, 4, 1), some_slots(9, 4, 2, heads=1)
    for row in range(BATCH):
        for head in range(HEADS):
            assert torch.equal(take(tensor, own)[row, head], tensor[row, head, own[row, head]])
            assert torch.equal(take(tensor, shared)[row, head], tensor[row, head, shared[row, 0]])
    assert take(tensor[:, :1], own).shape == (BATCH, HEADS, 4, DIM)  # what all heads shared is told apart


def layer_with(count: int, pads: tuple[int, ...] = (0, 0), rope: Rope | None = None) -> KVLayer:
    layer = KVLayer(0, 1, Request())
    layer.rope = rope
    add(layer, count, pads)
    return layer


def add(layer: KVLayer, count: int, pads: tuple[int, ...] = (0, 0)) -> None:
    at = layer.seen + torch.arange(count)
    positions = at[None] - torch.tensor(pads)[:, None]
    layer.request.positions = positions.masked_fill(positions < 0, EMPTY)
    layer.update(numbered(layer.seen, count), -numbered(layer.seen, count))


def text_of(layer: KVLayer, pads: tuple[int, ...] = (0, 0)) -> None:
    """Keys and values still belong to the positions that the layer says they have."""
    for row in range(BATCH):
        for head in range(HEADS):
            real = layer.positions[row, head] >= 0
            at = layer.positions[row, head][real] + pads[row]
            expected = numbered(0, layer.seen + 1)[row, head][at]
            assert torch.equal(layer.keys[row, head][real], expected)
            assert torch.equal(layer.values[row, head][real], -expected)
            assert bool((layer.positions[row, head].diff() > 0)[layer.positions[row, head][1:] >= 0].all())


def test_positions_keys_and_values_travel_together() -> None:
    pads = (0, 5)
    layer = layer_with(20, pads)
    text_of(layer, pads)
    layer.keep(some_slots(15, 8, 3) + 5)
    add(layer, 3, pads)
    text_of(layer, pads)
    assert layer.n == 11 and layer.seen == layer.get_seq_length() == 23
    assert layer.lengths.tolist() == [23, 18]
    assert layer.get_mask_sizes(4) == (27, 0)


def test_starts_is_the_first_visible_slot() -> None:
    assert layer_with(9).starts() is None
    padded = layer_with(9, (0, 4))
    assert padded.starts().tolist() == [[0, 0], [4, 4]]
    assert padded.starts(window=3).tolist() == [[6, 6], [6, 6]]
    assert padded.starts(window=6).tolist() == [[3, 3], [4, 4]]
    assert layer_with(9).starts(window=9) is None
    uneven = layer_with(12)
    uneven.keep(torch.tensor([[[0, 1, 2, 11], [0, 9, 10, 11]]]).expand(2, -1, -1))
    assert uneven.starts(window=3).tolist() == [[3, 1], [3, 1]]


def test_empty_slots_of_a_selection_become_empty_positions() -> None:
    layer = layer_with(6)
    layer.keep(torch.tensor([[[0, 3, 5]], [[-1, 2, 5]]]))
    assert layer.positions.tolist() == [[[0, 3, 5]] * 2, [[-1, 2, 5]] * 2]
    assert layer.starts().tolist() == [[0, 0], [1, 1]]


def test_crop_forgets_the_last_tokens() -> None:
    layer = layer_with(20, (0, 5))
    layer.crop(-4)
    assert layer.seen == layer.n == 16
    text_of(layer, (0, 5))
    add(layer, 2, (0, 5))
    text_of(layer, (0, 5))


def test_crop_after_heads_have_evicted_different_tokens() -> None:
    layer = layer_with(10)
    layer.track("score", torch.arange(10).expand(2, 2, 10).double())
    layer.keep(torch.tensor([[[0, 1, 2, 9], [0, 7, 8, 9]], [[0, 1, 2, 3], [6, 7, 8, 9]]]))
    layer.crop(-3)
    assert layer.seen == 7
    held = [[[p for p in head if p >= 0] for head in row] for row in layer.positions.tolist()]
    assert held == [[[0, 1, 2], [0]], [[0, 1, 2, 3], [6]]]
    for row in range(2):
        for head in range(2):
            assert layer.tracks["score"].view()[row, head, -1] == layer.positions[row, head, -1]
    assert torch.equal(layer.starts(), (layer.positions < 0).sum(-1))
    text_of(layer)
    add(layer, 2)
    assert layer.positions[:, :, -2:].tolist() == [[[7, 8]] * 2] * 2
    text_of(layer)


def test_a_second_crop_counts_tokens_that_were_evicted() -> None:
    layer = layer_with(10)
    layer.keep(torch.tensor([[[0, 1, 2, 9]] * 2] * 2))
    layer.crop(-3)  # ends inside what was evicted: the newest entry is 2, the newest token 6
    layer.crop(-4)
    assert layer.seen == 3 and layer.positions[0, 0].tolist() == [0, 1, 2]
    layer.crop(-1)
    assert layer.seen == 2 and layer.positions[0, 0].tolist() == [0, 1]
    add(layer, 1)
    text_of(layer)


def test_crop_of_more_than_there_is_and_of_a_final_length_are_refused() -> None:
    layer = layer_with(5)
    layer.crop(0)
    assert layer.n == 5
    for wrong in (-6, 3):  # a positive number once meant the final length: stock refuses it too
        with pytest.raises((LaconicError, ValueError)):
            layer.crop(wrong)
    assert layer.n == 5
    KVLayer(0, 1, Request()).crop(-1)  # nothing there yet: nothing to do, as in the stock cache


def test_rows_reorder_everything_that_belongs_to_them() -> None:
    layer = layer_with(6, (0, 2))
    layer.keep(some_slots(4, 3, 5) + 2)
    layer.track("score", layer.positions.double())
    layer.memory["query"] = torch.tensor([10.0, 20.0])
    layer.memory["step"] = 7
    layer.slots["choice"] = torch.tensor([[[0, 1]], [[1, 2]]])
    before = layer.keys.clone(), layer.positions.clone()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.keys, before[0][[1, 1]]) and torch.equal(layer.positions, before[1][[1, 1]])
    assert torch.equal(layer.tracks["score"].view(), before[1][[1, 1]].double())
    assert layer.memory["query"].tolist() == [20.0, 20.0] and layer.memory["step"] == 7
    assert layer.slots["choice"].tolist() == [[[1, 2]], [[1, 2]]]


def test_a_batch_can_be_repeated_and_thinned() -> None:
    layer = layer_with(4)
    keys = layer.keys.clone()
    layer.batch_repeat_interleave(3)
    assert torch.equal(layer.keys, keys.repeat_interleave(3, dim=0))
    layer.batch_select_indices(torch.tensor([0, 5]))
    assert torch.equal(layer.keys, keys)


def test_reset_forgets_everything() -> None:
    cache = KVCache(1)
    layer = cache.layers[0]
    layer.update(numbered(0, 5), numbered(0, 5))
    layer.track("score", torch.zeros(2, 2, 5))
    layer.memory["x"], layer.slots["y"] = 1, torch.zeros(2, 1, 1)
    cache.reset()
    assert cache.get_seq_length() == 0 and layer.keys is None and layer.n == 0
    assert not layer.tracks and not layer.memory and not layer.slots
    layer.update(numbered(0, 3), numbered(0, 3))
    assert layer.positions[0, 0].tolist() == [0, 1, 2]


def test_tracks_follow_eviction_also_when_they_are_behind() -> None:
    """Keys before RoPE are only written when somebody asks: an eviction in between must not mix them up."""
    rope = Rope(torch.tensor([0.3, 0.05], dtype=torch.float64))
    raw = numbered(0, 12) / 1e6
    layer = KVLayer(0, 1, Request())
    layer.rope = rope

    def feed(start: int, stop: int) -> None:
        at = torch.arange(start, stop)
        layer.update(rope.rotate(raw[:, :, start:stop].float(), at), raw[:, :, start:stop].float())

    feed(0, 8)
    assert torch.allclose(layer.raw_keys, raw[:, :, :8].float(), atol=1e-5)
    feed(8, 10)  # the track now lacks two
    layer.keep(some_slots(10, 6, 1))
    assert torch.allclose(layer.raw_keys, layer.values, atol=1e-5)
    feed(10, 12)
    layer.crop(-1)
    assert torch.allclose(layer.raw_keys, layer.values, atol=1e-5)
    layer.pass_window(layer.n - 2)
    feed(11, 12)
    assert torch.allclose(layer.raw_keys, layer.values, atol=1e-5)


def test_keys_before_rope_need_a_known_rope() -> None:
    with pytest.raises(LaconicError, match="RoPE"):
        _ = layer_with(3).raw_keys


# --- with a model ----------------------------------------------------------------------------------------------------
RECIPE = "h2o(recent=2):12 + tokenselect(sinks=1, recent=3):8"


def run(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


@pytest.mark.parametrize("recipe", ["dense", "snapkv(window=4):14", RECIPE, "recycled_attention(every=2):9"])
def test_a_fork_goes_its_own_way(recipe: str) -> None:
    model, ids = build("llama"), prompt(2, 30)["input_ids"]
    with laconic.apply(model, recipe) as handle:
        cache = handle.cache()
        run(model, cache, ids[:, :20])
        snapshot = cache.fork()
        expected = [run(model, cache, ids[:, i : i + 1]) for i in range(20, 26)]
        positions = [layer.positions.clone() for layer in cache.layers]
        twin = snapshot.fork()
        for i in range(26, 30):  # the twin reads another text
            run(model, twin, ids[:, i : i + 1])
        assert all(torch.equal(layer.positions, p) for layer, p in zip(cache.layers, positions, strict=True))
        for _ in range(2):  # a snapshot can be restored more than once
            cache.restore(snapshot)
            again = [run(model, cache, ids[:, i : i + 1]) for i in range(20, 26)]
            assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
            assert all(torch.equal(layer.positions, p) for layer, p in zip(cache.layers, positions, strict=True))


@pytest.mark.parametrize("recipe", ["dense", "tokenselect:4096", "h2o:4096", "recycled_attention:4096"])
def test_crop_then_other_text_equals_never_having_read_it(recipe: str) -> None:
    model, inputs = build("llama"), prompt(2, 26, pads=(0, 6))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        straight, detour = handle.cache(), handle.cache()
        for cache in (straight, detour):
            model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        model(ids[:, 20:25].flip(1), attention_mask=mask[:, :25], past_key_values=detour)
        detour.crop(-5)
        for i in range(20, 24):
            a, b = (
                model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache).logits
                for cache in (straight, detour)
            )
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_share_is_still_a_share_of_the_prompt_after_crop() -> None:
    model, ids = build("llama"), prompt(1, 80)["input_ids"]
    with laconic.apply(model, "streaming:25%") as handle:
        cache = handle.cache()
        run(model, cache, ids[:, :40])
        for i in range(40, 60):
            run(model, cache, ids[:, i : i + 1])
        cache.crop(-1)
        run(model, cache, ids[:, 60:61])
        assert cache.layers[0].n == 10


def test_offloading_is_refused() -> None:
    with pytest.raises(LaconicError, match="ffload"):
        layer_with(2).offload()


@pytest.mark.parametrize("recipe", ["h2o:32", "streaming:32", "knorm:32 + tokenselect(sinks=1, recent=4):16"])
def test_memory_does_not_grow_over_two_thousand_steps(recipe: str) -> None:
    model = build("llama", num_hidden_layers=1, max_position_embeddings=4096)
    process = psutil.Process()
    with laconic.apply(model, recipe) as handle, torch.inference_mode():
        cache = handle.cache()
        token = model(prompt(1, 64)["input_ids"], past_key_values=cache).logits[:, -1:].argmax(-1)
        layer, capacity, resident = cache.layers[0], 0, 0
        for step in range(2000):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            if step == 400:
                gc.collect()
                capacity, resident = sum(b.capacity for b in layer._buffers()), process.memory_info().rss
    gc.collect()
    assert layer.seen == 2064 and layer.n == 32
    assert sum(b.capacity for b in layer._buffers()) <= capacity <= 4 * 64 + 64
    assert process.memory_info().rss - resident < 3 * 2**20


def test_what_layers_hand_to_each_other_follows_the_cache() -> None:
    cache = KVCache(2)
    for layer in range(2):
        cache.update(torch.randn(2, 1, 4, 8), torch.randn(2, 1, 4, 8), layer)
    cache.request.memory["scores"] = torch.tensor([[1.0], [2.0]])
    twin = cache.fork()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.request.memory["scores"].tolist() == [[2.0], [2.0]]
    assert twin.request.memory["scores"].tolist() == [[1.0], [2.0]], "a fork has its own"
    cache.batch_repeat_interleave(2)
    assert cache.request.memory["scores"].shape == (4, 1)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.request.memory["scores"].shape == (1, 1)
    cache.restore(twin)
    assert cache.request.memory["scores"].tolist() == [[1.0], [2.0]]
    cache.crop(-1)
    assert not cache.request.memory
    twin.reset()
    assert not twin.request.memory


@pytest.mark.parametrize("seed", range(20))
def test_what_is_appended_late_is_there_for_whoever_looks(seed):
    dice = random.Random(seed)
    first = torch.arange(3).expand(2, 1, 3)
    late, plain, count = Buffer(first), Buffer(first), 3
    for _ in range(200):
        new = torch.arange(count, count + dice.randint(1, 9)).expand(2, -1)
        count += new.shape[1]
        late.append_late(new)
        plain.append(new[:, None])
        change = dice.random()
        if change < 0.4:
            left = dice.randint(1, late.n)
            late.crop(left)
            plain.crop(left)
        elif change < 0.5:
            late.drop_front(late.n // 2)
            plain.drop_front(plain.n // 2)
        elif change < 0.6:
            late, plain = late.copy(), plain.copy()
        assert late.n == plain.n
        if dice.random() < 0.2:
            assert torch.equal(late.view(), plain.view())
    assert torch.equal(late.view(), plain.view())
