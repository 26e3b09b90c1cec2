"""Attention of prompts over chosen entries, against the definition."""

from __future__ import annotations

import pytest
import torch
from attend import SCALE, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError
from laconic.attention.base import PrefillMethod
from laconic.attention.engine import Policy
from laconic.attention.prefill import prefill_attention, sparse_prefill_attention
from laconic.recipe import Recipe


def by_hand(qkv: list[torch.Tensor], pads: list[int], chosen: torch.Tensor, window: int | None, softcap: float | None):
    """Row by row: chosen (batch, kv_heads, rows, n) says what is read. Output, and the mean share of visible pairs."""
    query, keys, values = qkv
    batch, heads, rows, _ = query.shape
    kv_heads, n = keys.shape[1:3]
    output, shares = torch.zeros_like(query), torch.zeros(batch, kv_heads, 2)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // kv_heads)
            for row in range(rows):
                own = n - rows + row
                low = max(pads[b], own - window + 1 if window is not None else 0)
                seen = torch.arange(low, own + 1) if own >= pads[b] else torch.arange(0)
                read = seen[chosen[b, kv, row][seen]]
                shares[b, kv] += torch.tensor([len(read), len(seen)])
                if len(read):
                    logits = keys[b, kv, read] @ query[b, h, row] * SCALE
                    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                    output[b, h, row] = logits.softmax(0) @ values[b, kv, read]
    return output, float((shares[..., 0] / shares[..., 1]).mean())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(2, 24), new=st.integers(1, 24), block=st.integers(1, 9),
    share=st.floats(0.1, 1.0), window=st.sampled_from([None, 5]), softcap=st.sampled_from([None, 2.0]), shared=st.booleans(),
    going=st.booleans(),
)  # fmt: skip
def test_chosen_entries(
    seed: int, n: int, new: int, block: int, share: float, window: int | None, softcap: float | None, shared: bool, going: bool
) -> None:
    new, pads = min(n, new), [0, min(n // 3, n - 1)]
    query, keys, values = random_qkv(n, seed=seed)
    query = query[:, :, n - new :]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(2, 2, new, n, dtype=torch.bool)
    blocks = []
    for begin in range(0, new, block):
        end = min(begin + block, new)
        marks = torch.rand(2, 1 if shared else 2, n, generator=generator) < share
        chosen[:, :, begin:end] = marks[:, :, None]
        order = torch.where(marks, torch.arange(n), -1).sort(-1).values
        blocks.append((begin, end, order[..., int((~marks).sum(-1).min()) :]))
    positions = (torch.arange(n) - torch.tensor(pads)[:, None]).clamp(min=-1)[:, None]
    gone = torch.randint(0, 2 * n, (2, 2, n), generator=generator) if going else None
    if going:  # a query sees what is not gone at its position
        own = positions[:, :, n - new :, None]
        chosen &= gone[:, :, None] > own
    got, pairs = sparse_prefill_attention(
        query, keys, values, positions, blocks, scale=SCALE, window=window, softcap=softcap, gone=gone
    )
    expected, expected_pairs = by_hand([query, keys, values], pads, chosen, window, softcap)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert pairs == pytest.approx(expected_pairs)


@pytest.mark.parametrize("window", [None, 7])
def test_all_entries_are_the_dense_attention(window: int | None) -> None:
    query, keys, values = random_qkv(33)
    positions = (torch.arange(33) - torch.tensor([[0], [9]])).clamp(min=-1)[:, None]
    everything = torch.arange(33).expand(2, 1, -1)
    blocks = [(0, 16, everything), (16, 33, everything)]
    got, pairs = sparse_prefill_attention(query, keys, values, positions, blocks, scale=SCALE, window=window)
    dense = prefill_attention(query, keys, values, positions, scale=SCALE, window=window)
    torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)
    assert pairs == 1.0


def test_one_method_shortens_prompts_and_none_with_a_reweighter() -> None:
    class Half(PrefillMethod):
        id = "half"

        def attend_prompt(self, layer, call):
            return call.query, 0.5

    assert Policy((Half(), *Recipe.parse("h2o:8 + tokenselect:4").methods)).shortener == Half()
    with pytest.raises(LaconicError, match="half and half both compute a part"):
        Policy((Half(), Half()))
    with pytest.raises(LaconicError, match="act changes weights that half does not compute"):
        Policy((Half(), *Recipe.parse("act").methods))
