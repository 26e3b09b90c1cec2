from __future__ import annotations

import torch

from laconic.primitives.rest import compensate, others


def test_others_are_the_slots_not_chosen() -> None:
    slots = torch.tensor([[[1, 3]], [[-1, 0]]])
    assert others(slots, 4).tolist() == [[[True, False, True, False]], [[False, True, True, True]]]


def test_compensate_is_the_mean_per_head() -> None:
    keys = torch.arange(2 * 2 * 5 * 3, dtype=torch.float32).view(2, 2, 5, 3)
    dropped = torch.zeros(2, 2, 5, dtype=torch.bool)
    dropped[0, 0, [1, 3]] = dropped[1, 1, 2:] = True
    key, value, log_n = compensate(keys, -keys, dropped)
    torch.testing.assert_close(key[0, 0, 0], keys[0, 0, [1, 3]].mean(0))
    torch.testing.assert_close(value[1, 1, 0], -keys[1, 1, 2:].mean(0))
    assert log_n.shape == (2, 2, 1)
    torch.testing.assert_close(log_n[..., 0].exp(), torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
