from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import pytest
import torch
from attend import SCALE, Run, random_qkv
from hypothesis import given
from hypothesis import strategies as st
from tiny import build, generate, prompt, shared

import laconic
from laconic import LaconicError, get
from laconic.attention.base import Call
from laconic.attention.engine import Policy
from laconic.attention.spatten import schedule
from laconic.cache import KVLayer
from laconic.kernels.index import KeyIndex
from laconic.layers import decoder_layers

PADS, LENGTH = (0, 12), 50


def deep(name: str = "llama", layers: int = 4, **changes: Any) -> torch.nn.Module:
    return build(name, num_hidden_layers=layers, **changes)


# --- the budget over depth -------------------------------------------------------------------------------------------
@given(
    mean=st.floats(0.01, 1), layers=st.integers(1, 80), warm=st.floats(0, 1), slope=st.floats(0, 0.99),
)  # fmt: skip
def test_shares_never_rise_and_have_the_mean_of_the_budget(mean: float, layers: int, warm: float, slope: float) -> None:
    shares = schedule(mean, layers, warm, slope)
    assert len(shares) == layers and sum(shares) == pytest.approx(mean * layers)
    assert all(0 < share <= 1 + 1e-9 for share in shares)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(shares))
    rest = [s for s in shares if s < 1 - 1e-9]
    if len(rest) > 2:
        drops = [a - b for a, b in itertools.pairwise(rest)]
        assert max(drops) - min(drops) < 1e-9  # a line


def test_the_first_layers_keep_all_where_the_budget_allows() -> None:
    full = [sum(s == 1 for s in schedule(mean, 32, 0.15, 0.5)) for mean in (0.05, 0.1, 0.2, 0.5)]
    assert full == [0, 1, 3, 5]
    assert schedule(0.5, 4, 0.25, 0.5) == pytest.approx([1, 0.5, 1 / 3, 1 / 6])
    assert schedule(0.9, 3, 0, 0.5) == pytest.approx([1, 0.9, 0.8])  # the line cannot start above 1


# --- the cascade -----------------------------------------------------------------------------------------------------
class ByHand:
    """Scores and sets of living tokens as the paper says them: dictionaries of positions, one text at a time."""

    def __init__(self, rows: int, sinks: int, recent: int) -> None:
        self.total = [defaultdict(float) for _ in range(rows)]
        self.alive: list[set[int]] = [set() for _ in range(rows)]
        self.sinks, self.recent = sinks, recent

    def read(self, row: int, call: Call, keys: torch.Tensor, held: list[list[int]], coming: list[int], quota: int) -> list[int]:
        """One row of a layer; ``held`` are positions per entry and KV head. Gives the tokens that stay, ascending."""
        entries = [(slot, p) for slot, p in enumerate(held[0]) if p >= 0]
        group = call.query.shape[1] // keys.shape[0]
        for at, position in enumerate(coming):
            seen = [(s, p) for s, p in entries if p <= position and (call.window is None or p > position - call.window)]
            if position < 0:
                continue
            for head in range(call.query.shape[1]):
                logits = torch.stack([call.query[row, head, at] @ keys[head // group, s] for s, _ in seen]) * call.scale
                if call.softcap is not None:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                for (_, p), value in zip(seen, logits.softmax(0).tolist(), strict=True):
                    self.total[row][p] += value
        first = min((p for p in coming if p >= 0), default=0)
        here = [p for _, p in entries if call.window is None or p > first - call.window]
        free = [p for p in here[self.sinks : len(here) - self.recent] if p in self.alive[row]]
        best = sorted(free, key=lambda p: (-self.total[row][p], p))[: max(quota - self.sinks - self.recent, 0)]
        stay = sorted({*here[: self.sinks], *here[len(here) - self.recent :], *best}) if len(here) > quota else here
        self.alive[row] -= set(here) - set(stay)
        return [p for p in stay if p in self.alive[row]]


@pytest.mark.parametrize("pieces", [(50,), (40, 50)], ids=["at once", "in pieces"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_sums_and_living_tokens_are_those_of_the_paper(name: str, pieces: tuple[int, ...]) -> None:
    model, inputs = deep(name, 3), prompt(2, LENGTH + 4, seed=3, pads=PADS)
    ids, mask, hand = inputs["input_ids"], inputs["attention_mask"], ByHand(2, 2, 3)
    tokens = {50: (36, 24, 12), 38: (27, 18, 9)}  # 48%, and half of it more or less
    checked = 0
    with laconic.apply(model, "spatten(sinks=2, recent=3, warm=0):48%") as handle, torch.no_grad():
        attend, cache = handle.policy.attend, handle.cache()
        method = handle.recipe.methods[0]

        def spy(layer: KVLayer, call: Call) -> torch.Tensor:
            nonlocal checked
            keys, held = layer.keys.clone(), layer.positions.tolist()
            new = call.query.shape[2]
            coming = layer.request.take(2, new, layer.seen - new, keys.device).tolist()
            output = attend(layer, call)
            for row in (0, 1):
                now = int(layer.lengths[row])
                if layer.index == 0:
                    hand.alive[row] = set(range(now))
                quota = method.tokens(int(layer.memory["prompt"][row]), layer.index, 3)
                stay = hand.read(row, call, keys[row], held[row], coming[row], quota)
                real = [p for p in layer.positions[row, 0].tolist() if p >= 0]
                if call.window is not None:  # what is out of sight may still be held, and after a prompt it is not
                    real = [p for p in real if p > min(q for q in coming[row] if q >= 0) - call.window]
                    stay = stay[-len(real) :]
                assert real == stay, (layer.index, row)
                assert len(stay) <= quota and max(real) == now - 1
                got = handle._cache.request.memory["spatten.scores"][row, :now]
                expected = torch.tensor([hand.total[row][p] for p in range(now)])
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
                checked += 1
            return output

        handle.policy.attend = spy
        for begin, end in itertools.pairwise([0, *pieces, *range(LENGTH + 1, LENGTH + 5)]):
            model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
        for pad in PADS:
            assert [method.tokens(LENGTH - pad, layer, 3) for layer in range(3)] == list(tokens[LENGTH - pad])
    assert checked == 2 * 3 * (len(pieces) + 4)


@pytest.mark.parametrize("chunk", [None, 50])
def test_sets_lie_inside_each_other_and_deeper_layers_do_less(chunk: int | None) -> None:
    model, inputs, rows = deep(), prompt(3, 60, pads=(0, 7, 20)), []
    options = {"prefill_chunk_size": chunk} if chunk else {}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[-2]))
        for layer in decoder_layers(model)
    ]
    with laconic.apply(model, "spatten(sinks=2, recent=3, warm=0.25):50%") as handle:
        out = generate(model, inputs, 9, return_dict_in_generate=True, **options)
        stats = handle.stats()
    for hook in hooks:
        hook.remove()
    layers = out.past_key_values.layers
    if chunk is None:
        assert rows[:4] == [60, 60, 30, 20] and rows[4:8] == [1] * 4
    else:
        assert rows[0] == 50 > rows[2] > rows[3]
    assert [layer.n for layer in layers] == [60, 30, 20, 10]  # in the first layer too, a new token takes an old one's place
    assert stats["bytes_kept"] == sum(layer.n for layer in layers) * 3 * 2 * 2 * 8 * 4
    for row, pad in enumerate((0, 7, 20)):
        sets = [set(layer.positions[row, 0].tolist()) - {-1} for layer in layers]
        assert all(deeper < above for above, deeper in itertools.pairwise(sets))
        assert all({0, 1, *range(65 - pad, 68 - pad)} <= s for s in sets)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox", "olmo2", "phi3"])
@pytest.mark.parametrize("recipe", ["spatten", "spatten:4096", "spatten(warm=0):100%"])
def test_with_everything_kept_it_is_dense(name: str, recipe: str) -> None:
    model, inputs = shared(name), prompt(2, 30, pads=(0, 9))
    logits = []
    for which in ("dense", recipe):
        with laconic.apply(model, which):
            out = generate(model, inputs, 8, return_dict_in_generate=True, output_logits=True)
        logits.append(torch.stack(out.logits))
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_neox", "olmo2", "mixtral"])
@pytest.mark.parametrize("chunk", [None, 44])
def test_a_padded_row_is_the_row_alone(name: str, chunk: int | None) -> None:
    model, inputs = shared(name), prompt(3, 70, seed=4, pads=(0, 15, 25))
    options = {"prefill_chunk_size": chunk} if chunk else {}
    with laconic.apply(model, "spatten(sinks=1, recent=2):40%"):
        together = generate(model, inputs, 8, return_dict_in_generate=True, **options)
        for row, pad in enumerate((0, 15, 25)):
            rest = {"prefill_chunk_size": chunk - pad} if chunk else {}
            ids = inputs["input_ids"][row : row + 1, pad:]
            if chunk:  # the same pieces: they end where the batch's do
                alone = in_pieces(model, ids, (chunk - pad, 70 - pad), 8)
            else:
                alone = generate(model, {"input_ids": ids}, 8, **rest)[0, -8:]
            assert torch.equal(together.sequences[row, -8:], alone), row


def in_pieces(model: Any, ids: torch.Tensor, ends: tuple[int, ...], count: int) -> torch.Tensor:
    """Greedy tokens after a prompt (1, n) that is read in pieces."""
    cache = model._laconic_handles[-1].cache()
    with torch.no_grad():
        for begin, end in itertools.pairwise([0, *ends]):
            out = model(ids[:, begin:end], past_key_values=cache).logits[:, -1:].argmax(-1)
        answer = [out]
        while len(answer) < count:
            answer.append(model(answer[-1], past_key_values=cache).logits[:, -1:].argmax(-1))
    return torch.cat(answer, 1)[0]


def test_beams_and_drafts_go_on() -> None:
    model, inputs = shared(), prompt(2, 40, pads=(0, 11))
    with laconic.apply(model, "spatten(sinks=1, recent=2):50%"):
        together = generate(model, inputs, 8, num_beams=3)
        for row, pad in ((0, 0), (1, 11)):
            alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, pad:]}, 8, num_beams=3)
            assert torch.equal(together[row, -8:], alone[0, -8:])
        repeated = {"input_ids": prompt(1, 12)["input_ids"].repeat(1, 4)}
        out = generate(model, repeated, 20, prompt_lookup_num_tokens=4, return_dict_in_generate=True)
    first, second = ({*layer.positions[0, 0].tolist()} for layer in out.past_key_values.layers)
    assert out.sequences.shape[1] == 68 and second < first


def test_bad_input_is_refused() -> None:
    for wrong in ({"budget": "pyramid:10%"}, {"slope": 1.0}, {"warm": 1.5}, {"recent": 0}):
        with pytest.raises(LaconicError) as error:
            get("spatten", **wrong)
        assert "\n" not in str(error.value)
    with laconic.apply(shared(), "spatten(sinks=4, recent=16):20%"), pytest.raises(LaconicError, match="always kept"):
        generate(shared(), prompt(1, 60), 2)


# --- coarse keys, values and heads -----------------------------------------------------------------------------------
def step(recipe: str, qkv: list[torch.Tensor], pads: tuple[int, ...] = ()) -> tuple[torch.Tensor, int]:
    """Output (batch, heads, dim) of the last token's step, and the bytes that it read."""
    n = qkv[0].shape[2]
    run = Run(recipe, qkv, n - 1, pads=pads)
    run.piece(0, n - 1)
    output = run.piece(n - 1, n)[:, :, 0]
    return output, run.layer.request.figures[0]["bytes_read"]


@pytest.mark.parametrize("pads", [(0, 0), (0, 9)])
def test_a_high_threshold_reads_all_keys_and_a_low_one_their_bytes(pads: tuple[int, int]) -> None:
    qkv = random_qkv(60, seed=2)
    dense, whole = step("dense", qkv, pads)
    exact, read = step("spatten(theta=1.1)", qkv, pads)
    torch.testing.assert_close(exact, dense, atol=1e-5, rtol=1e-5)
    assert read == whole + 2 * 2 * 60 * (8 + 4)  # the bytes first, and then everything
    rough, few = step("spatten(theta=0.000001)", qkv, pads)
    torch.testing.assert_close(rough, dense, atol=0.05, rtol=0.05)
    assert not torch.equal(rough, dense) and few == whole // 2 + 2 * 2 * 60 * (8 + 4)  # values, and the bytes of keys
    reads = [step(f"spatten(theta={theta})", qkv, pads)[1] for theta in (0.05, 0.1, 0.2, 0.4, 0.8, 1.1)]
    assert reads == sorted(reads) and reads[0] < reads[-1] and len(set(reads)) > 2


def test_heads_that_are_sure_on_bytes_are_left_at_that() -> None:
    """A head whose largest probability on 8-bit keys reaches the threshold keeps these probabilities, the others are exact."""
    qkv, theta = random_qkv(40, seed=7), 0.25
    output, _ = step(f"spatten(theta={theta})", qkv)
    query = qkv[0][:, :, -1]
    unit = query.abs().amax(-1, keepdim=True) / 127
    rough_keys = KeyIndex(qkv[1]).keys()
    kinds = set()
    for row, head in itertools.product(range(2), range(4)):
        coarse = (rough_keys[row, head // 2] @ ((query / unit).round() * unit)[row, head] * SCALE).softmax(0)
        fine = (qkv[1][row, head // 2] @ query[row, head] * SCALE).softmax(0)
        sure = float(coarse.max()) >= theta
        kinds.add(sure)
        expected = (coarse if sure else fine) @ qkv[2][row, head // 2]
        torch.testing.assert_close(output[row, head], expected, atol=1e-4, rtol=1e-4)
    assert kinds == {True, False}


@pytest.mark.parametrize("renormalise", [False, True])
def test_every_head_reads_the_values_of_its_largest_probabilities(renormalise: bool) -> None:
    qkv = random_qkv(41, seed=3)
    output, read = step(f"spatten(values=0.25, renormalise={str(renormalise).lower()})", qkv)
    for row, head in itertools.product(range(2), range(4)):
        weights = (qkv[1][row, head // 2] @ qkv[0][row, head, -1] * SCALE).softmax(0)
        best = weights.topk(10).indices
        share = weights[best] / (weights[best].sum() if renormalise else 1)
        torch.testing.assert_close(output[row, head], share @ qkv[2][row, head // 2, best], atol=1e-5, rtol=1e-5)
    assert read == 2 * (2 * 41 + 4 * 10) * 8 * 4  # keys of two KV heads, and ten values for each of four query heads


def test_dropped_heads_are_zero_stay_dropped_and_are_not_read() -> None:
    model, inputs = deep(layers=4, num_attention_heads=8, num_key_value_heads=4, hidden_size=64), prompt(2, 40, pads=(0, 9))
    seen: list[torch.Tensor] = []

    def look(_: Any, args: Any) -> None:
        seen.append(args[0].unflatten(-1, (8, -1)).abs().amax(-1))

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(look) for layer in decoder_layers(model)]
    with laconic.apply(model, "spatten(heads=0.5)") as handle:
        generate(model, inputs, 4)
        read = [figure["bytes_read"] for figure in handle._cache.request.figures.values()]
    for hook in hooks:
        hook.remove()
    alive = [(out[:, -1] > 0).tolist() for out in seen]  # of the last token, per row and head
    whole = 2 * 4 * 8 * 4 * 2 * 43  # bytes of a layer: rows, KV heads, dims, size, keys and values, tokens
    for row in range(2):
        layers = [alive[i][row] for i in range(4)]
        for before, after in itertools.pairwise(layers):
            assert all(a or not b for a, b in zip(before, after, strict=True))  # nested
        assert all(layers[0]) and sum(layers[3]) < 8
        for i in range(4):
            assert all(alive[4 * s + i][row] == layers[i] for s in range(4))  # steps go by what the prompt left
    assert sum(sum(alive[i][0]) for i in range(4)) / 32 == pytest.approx(0.5, abs=0.13)
    assert read[0] == whole and read[3] < whole
    idle = [kv for kv in range(4) if not any(alive[3][row][2 * kv + g] for row in range(2) for g in range(2))]
    assert read[3] <= whole * (4 - len(idle)) / 4


@pytest.mark.parametrize("way", ["heads=0.5", "theta=0.2", "values=0.5"])
def test_the_three_ways_go_with_the_cascade(way: str) -> None:
    model, inputs = deep(), prompt(2, LENGTH, pads=PADS)
    with laconic.apply(model, f"spatten(sinks=1, recent=4, {way}):50%"):
        together = generate(model, inputs, 6, return_dict_in_generate=True, output_logits=True)
        alone = generate(model, {"input_ids": inputs["input_ids"][1:, 12:]}, 6, return_dict_in_generate=True, output_logits=True)
    for a, b in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(a[1], b[0], atol=1e-3, rtol=1e-3)
    for a, b in zip(together.past_key_values.layers, alone.past_key_values.layers, strict=True):
        assert [p for p in a.positions[1, 0].tolist() if p >= 0] == [p for p in b.positions[0, 0].tolist() if p >= 0]


@pytest.mark.parametrize("other", ["tokenselect:8", "act", "spatten(theta=0.3):50%", "dhsa(borders=fixed)"])
def test_one_method_attends_in_its_own_way(other: str) -> None:
    with pytest.raises(LaconicError, match="spatten attends in its own way"):
        Policy(laconic.Recipe.parse(f"spatten(theta=0.2):50% + {other}").methods)
