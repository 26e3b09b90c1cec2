from __future__ import annotations

import pytest
import torch
from attend import random_qkv

from laconic.primitives.scores import attention_received, hashed_uniform, key_norm


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("window", [None, 6])
def test_attention_received_equals_the_full_map(rows: int, reduce: str, window: int | None) -> None:
    query, keys, _ = random_qkv(20)
    starts = torch.tensor([[0, 0], [7, 7]])
    at = torch.arange(20)
    visible = (at <= at[:, None])[None, None] & (at >= starts[:, :1, None, None])
    if window:
        visible = visible & (at > at[:, None] - window)
    logits = query @ keys.repeat_interleave(2, dim=1).mT * 0.5
    full = logits.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    columns = full[:, :, 20 - rows :].sum(2).view(2, 2, 2, 20)
    expected = {"mean": columns.mean(2), "max": columns.amax(2), "sum": columns.sum(2)}[reduce]
    got = attention_received(query[:, :, 20 - rows :], keys, scale=0.5, starts=starts, window=window, reduce=reduce)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_small_keys_are_worth_more() -> None:
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 1.0]]]])
    assert key_norm(keys).tolist() == [[[-5.0, -1.0]]]
    assert key_norm(keys.bfloat16()).dtype == torch.float32


def test_a_position_keeps_its_number() -> None:
    long = hashed_uniform(torch.arange(100).expand(2, 3, -1), seed=4)
    part = hashed_uniform(torch.arange(60, 80).expand(2, 3, -1), seed=4)
    assert torch.equal(long[:, :, 60:80], part) and torch.equal(long[0], long[1])
    assert not torch.equal(long[:, 0], long[:, 1])
