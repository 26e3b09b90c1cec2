from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import build, generate, prompt

import laconic
from laconic.attention.base import Call
from laconic.attention.engine import Policy


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any, Any]]:
    """Per call of attention in a decode step: layer, the true positions that were read (None: all), and bytes read."""
    calls: list[tuple[int, Any, Any]] = []
    original = Policy.attend

    def attend(self: Policy, layer: Any, call: Call) -> torch.Tensor:
        chosen = []
        select = type(self)._select
        monkeypatch.setattr(Policy, "_select", lambda s, one, two: chosen.append(select(s, one, two)) or chosen[-1])
        output = original(self, layer, call)
        monkeypatch.setattr(Policy, "_select", select)
        if call.decoding:
            read = None if chosen[0] is None else layer.positions.gather(
                2, chosen[0].indices.clamp(min=0).expand(-1, layer.heads, -1)
            )  # fmt: skip
            calls.append((layer.index, read, layer.request.figures[layer.index]["bytes_read"]))
        return output

    monkeypatch.setattr(Policy, "attend", attend)
    return calls


def run(recipe: str, layers: int = 8, steps: int = 3, **changes: Any) -> torch.Tensor:
    model = build(num_hidden_layers=layers, sharpen=2.0, **changes)
    with laconic.apply(model, recipe), torch.no_grad():
        return generate(model, prompt(1, 60), steps)


def test_deeper_layers_read_what_the_choosing_layers_chose(seen) -> None:
    run("tidaldecode(start=1, reselect=4, recent=2):12")
    assert len(seen) == 2 * 8  # two of the three steps feed a token
    for begin in (0, 8):
        step = seen[begin : begin + 8]
        assert [read is None for _, read, _ in step] == [True, True, False, False, True, False, False, False]
        for first, others in ((2, [3]), (5, [6, 7])):
            for other in others:
                assert torch.equal(step[first][1], step[other][1])
        assert not torch.equal(step[2][1], step[5][1]), "the layer in the middle chose anew"
        dense, sparse = step[0][2], step[3][2]
        assert sparse * 5 <= dense and step[1][2] == dense * 1.5, "a choosing layer reads the keys twice"


@pytest.mark.parametrize("per_head", [False, True])
def test_the_choice_is_the_vote_of_the_choosing_layer(per_head: bool, seen) -> None:
    captured: dict[str, Any] = {}
    original = Policy._decode

    def decode(self: Policy, layer: Any, call: Call, selection: Any) -> Any:
        if layer.index == 0:
            heads = layer.keys.repeat_interleave(2, 1)
            captured["weights"] = (torch.einsum("bhd,bhnd->bhn", call.last, heads) * call.scale).softmax(-1)
        return original(self, layer, call, selection)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "_decode", decode)
        run(f"tidaldecode(start=0, reselect=0, recent=1, per_head={per_head}):10", layers=3, steps=2)
    weights = captured["weights"][0]
    votes = weights.view(2, 2, -1).sum(1) if per_head else weights.sum(0, keepdim=True).expand(2, -1)
    for head in range(2):
        best = set(votes[head, :-1].topk(9).indices.tolist()) | {votes.shape[-1] - 1}
        assert set(seen[1][1][0, head].tolist()) == best == set(seen[2][1][0, head].tolist())


def test_where_choices_lie() -> None:
    method = laconic.get("tidaldecode")
    assert [i for i in range(32) if method.chooses(i, 32)] == [2, 13]
    assert [i for i in range(3) if method.chooses(i, 3)] == [0, 1]
    never = laconic.get("tidaldecode", start=40)
    assert not any(never.chooses(i, 32) for i in range(32))


def test_layers_before_every_choice_are_dense() -> None:
    assert torch.equal(run("dense", layers=3), run("tidaldecode(start=9):4", layers=3))


def test_positions_are_found_where_a_layer_holds_them() -> None:
    from laconic.cache import KVLayer, Request

    layer = KVLayer(0, 1, Request())
    layer.update(torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4))
    layer.keep(torch.tensor([[[0, 2, 5, 9], [-1, 3, 5, 8]]]))
    found = layer.slots_of(torch.tensor([[[-1, 2, 3, 5, 9]]]))
    assert found.tolist() == [[[-1, -1, 1, 2, 3], [-1, -1, -1, 1, 2]]]
