from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from test_apply import assert_untouched, fingerprint
from tiny import ARCHITECTURES, build, generate, prompt

import laconic
from laconic import LaconicError
from laconic.attention.base import Call, EvictMethod
from laconic.cache import KVLayer
from laconic.layers import decoder_layers

PADS, LENGTH = (0, 9, 25), 44


@dataclass(frozen=True, kw_only=True)
class Leave(EvictMethod):
    """After layer ``after`` only every third token goes on, and the last one."""

    id: ClassVar[str] = "leave"
    paper: ClassVar[str] = "test"
    shortens: ClassVar[bool] = True
    after: int = 0
    last: bool = True

    def keep(self, layer: KVLayer, call: Call) -> None:
        positions = layer.request.positions
        if layer.index == self.after and not call.decoding:
            stays = positions % 3 == 0
            stays[:, -1] |= self.last
            layer.request.onward = positions.masked_fill(~stays, -1).sort(dim=-1).values


def deep(name: str = "llama", layers: int = 4) -> torch.nn.Module:
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    if name == "gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    return build(name, **changes)


def by_hand(model: torch.nn.Module, ids: torch.Tensor, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states of one text (1, n): layers above ``after`` get the living rows as a text of their own, whose
    positions have gaps. Second: which tokens those are."""
    n = ids.shape[1]
    living = torch.arange(n)[(torch.arange(n) % 3 == 0) | (torch.arange(n) == n - 1)]
    captured: dict[int, torch.Tensor] = {}
    layers = decoder_layers(model)
    hooks = [
        layer.register_forward_pre_hook(lambda m, a, k, i=i: captured.__setitem__(i, (a[0] if a else k["hidden_states"])),
                                        with_kwargs=True)
        for i, layer in enumerate(layers)
    ]  # fmt: skip
    with torch.no_grad():
        model(ids)
    whole = captured[after + 1]

    def start(module: Any, args: tuple, kwargs: dict) -> tuple:
        if args:
            return (whole[:, living], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": whole[:, living]}

    hooks.append(layers[after + 1].register_forward_pre_hook(start, with_kwargs=True))
    with torch.no_grad():
        out = model(ids[:, living], position_ids=living[None], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out.logits, living


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_deeper_layers_run_on_the_living_tokens_alone(name: str) -> None:
    """The logits of living tokens are those of a model whose upper layers were given only them."""
    model = deep(name)
    window = name in ("mistral", "gemma2", "gemma3")
    inputs = prompt(3, 11 if window else LENGTH, seed=1, pads=(0, 3, 6) if window else PADS)
    for after in (0, 2):
        with laconic.apply(model, Leave(after=after)), torch.no_grad():
            ours = model(**inputs).logits
        for row, mask in enumerate(inputs["attention_mask"]):
            pad = int((mask == 0).sum())
            expected, living = by_hand(model, inputs["input_ids"][row : row + 1, pad:], after)
            torch.testing.assert_close(ours[row, pad + living], expected[0], atol=2e-3, rtol=2e-3)


def test_a_window_counts_positions_and_not_rows() -> None:
    """Eleven tokens live, fewer than the window of 12; the last, at 29, still sees only those from 18 on."""
    model, ids = build("mistral", num_hidden_layers=2), prompt(1, 30)["input_ids"]
    reach = 18 - 11  # in the first layer, where all live, the token at 18 sees those from 7 on
    with laconic.apply(model, Leave()), torch.no_grad():
        said = model(ids).logits[0, -1]
        for changed, same in ((reach - 1, True), (reach, False)):
            other = ids.clone()
            other[0, changed] = 7 + int(ids[0, changed] == 7)
            assert torch.equal(model(other).logits[0, -1], said) is same


def rows_seen(model: torch.nn.Module) -> tuple[list[int], list[Any]]:
    """How many rows the feed-forward part of every layer computes, and the hooks that count."""
    seen: list[int] = []
    return seen, [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
        for layer in decoder_layers(model)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral", "gemma3"])
def test_deeper_layers_compute_fewer_rows_and_hold_fewer_tokens(name: str) -> None:
    model, inputs = deep(name), prompt(3, LENGTH, pads=PADS)
    seen, hooks = rows_seen(model)
    living = len({*range(0, LENGTH, 3), LENGTH - 1})
    with laconic.apply(model, Leave(after=1)) as handle, torch.no_grad():
        cache = handle.cache()
        out = model(**inputs, past_key_values=cache, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert seen == [LENGTH, LENGTH, living, living]
    held = [layer.n for layer in cache.layers]
    assert held[2:] == [living] * 2 and (held[0] == LENGTH or name == "gemma3")
    assert cache.layers[2].bytes_kept < cache.layers[1].bytes_kept or name == "gemma3"
    assert [layer.seen for layer in cache.layers] == [LENGTH] * 4
    for row, pad in enumerate(PADS):
        expected = sorted({*range(0, LENGTH - pad, 3), LENGTH - pad - 1})
        for head in cache.layers[3].positions[row].tolist():
            assert head == [-1] * (living - len(expected)) + expected
    before, after = out.hidden_states[2], out.hidden_states[3]
    assert before.shape == after.shape == (3, LENGTH, 32)
    dead = [p for p in range(LENGTH - 1) if p % 3]
    assert torch.equal(after[0, dead], before[0, dead])  # a dead row stays what it was
    assert not torch.equal(after[0, 0], before[0, 0])


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt_neox"])
def test_a_padded_row_is_the_row_alone_while_it_answers(name: str) -> None:
    model, inputs = deep(name), prompt(3, LENGTH, seed=2, pads=PADS)
    with laconic.apply(model, Leave(after=0)):
        together = generate(model, inputs, 8)
        for row, pad in enumerate(PADS):
            alone = generate(model, {"input_ids": inputs["input_ids"][row : row + 1, pad:]}, 8)
            assert torch.equal(together[row, -8:], alone[0, -8:])


@pytest.mark.parametrize("chunk", [7, 20])
def test_a_prompt_in_pieces_leaves_no_gaps(chunk: int) -> None:
    """Rows of a batch add different numbers of tokens with every piece; empty slots stand in front all the same."""
    model, inputs = deep(), prompt(3, LENGTH, pads=PADS)

    @dataclass(frozen=True, kw_only=True)
    class Even(Leave):
        def keep(self, layer: KVLayer, call: Call) -> None:
            positions = layer.request.positions
            if layer.index == 0 and not call.decoding:
                stays = positions % torch.tensor([[2], [3], [4]])[: len(positions)] == 0
                stays[:, -1] = True
                layer.request.onward = positions.masked_fill(~stays, -1).sort(dim=-1).values

    with laconic.apply(model, Even()), torch.no_grad():
        out = generate(model, inputs, 5, prefill_chunk_size=chunk, return_dict_in_generate=True, output_logits=True)
    ends = {min(end, LENGTH) - 1 for end in range(chunk, LENGTH + chunk, chunk)}
    for row, pad in enumerate(PADS):
        expected = {p for p in range(LENGTH - pad) if p % (row + 2) == 0 or p + pad in ends}
        expected |= set(range(LENGTH - pad, LENGTH - pad + 4))
        for layer in out.past_key_values.layers[1:]:
            held = layer.positions[row, 0].tolist()
            assert held == [-1] * (len(held) - len(expected)) + sorted(expected), row
    torch.testing.assert_close(
        out.logits[0][2], _alone(model, inputs, 2, chunk, Even), atol=1e-3, rtol=1e-3
    )


def _alone(model: Any, inputs: dict[str, torch.Tensor], row: int, chunk: int, kind: type) -> torch.Tensor:
    """Logits after the same pieces for one row, whose tokens leave as in the batch."""

    @dataclass(frozen=True, kw_only=True)
    class One(kind):  # type: ignore[misc,valid-type]
        def keep(self, layer: KVLayer, call: Call) -> None:
            positions = layer.request.positions
            if layer.index == 0 and not call.decoding:
                stays = positions % (row + 2) == 0
                stays[:, -1] = True
                layer.request.onward = positions.masked_fill(~stays, -1).sort(dim=-1).values

    ids, mask = inputs["input_ids"][row : row + 1], inputs["attention_mask"][row : row + 1]
    with laconic.apply(model, One()), torch.no_grad():
        out = generate(
            model, {"input_ids": ids, "attention_mask": mask}, 1, prefill_chunk_size=chunk, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    return out.logits[0][0]


# --- in and out ------------------------------------------------------------------------------------------------------
def test_hooks_go_with_the_recipe_also_nested_and_after_an_exception() -> None:
    model, inputs = deep(), prompt(1, 20)
    before, dense = fingerprint(model), generate(model, inputs, 4)
    count = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with laconic.apply(model, Leave()) as outer:
        short = generate(model, inputs, 4, return_dict_in_generate=True).past_key_values.layers[1].n
        with laconic.apply(model, "dense"):
            assert torch.equal(generate(model, inputs, 4), dense)
        with laconic.apply(model, Leave(after=2)), outer:
            out = generate(model, inputs, 4, return_dict_in_generate=True)
            assert out.past_key_values.layers[1].n == short < out.past_key_values.layers[0].n
        out = generate(model, inputs, 4, return_dict_in_generate=True)
        assert out.past_key_values.layers[1].n == short
    assert_untouched(model, before)
    assert count == {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError):  # noqa: SIM117
        with laconic.apply(model, Leave()):
            raise ZeroDivisionError
    assert_untouched(model, before)


def test_a_forward_that_fails_half_way_does_not_reach_the_next() -> None:
    model, inputs = deep(), prompt(1, 20)
    dense = generate(model, inputs, 4)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with laconic.apply(model, Leave()) as handle:
        cache = handle.cache()
        hook = decoder_layers(model)[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(**inputs, past_key_values=cache)
        hook.remove()
        assert cache.request.living is None and cache.request.onward is None
        with laconic.apply(model, "dense"):
            assert torch.equal(generate(model, inputs, 4), dense)


def test_without_a_cache_nothing_is_dropped() -> None:
    model, inputs = deep(), prompt(2, 20, pads=(0, 4))
    with laconic.apply(model, "dense"), torch.no_grad():
        dense = model(**inputs, use_cache=False).logits
    with laconic.apply(model, Leave()), torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=False).logits, dense)


def test_a_last_token_that_leaves_is_refused() -> None:
    model = deep()
    with laconic.apply(model, Leave(last=False)), pytest.raises(LaconicError, match="last token"):
        generate(model, prompt(1, 21), 2)


def test_a_model_without_a_list_of_layers_is_refused_and_left_alone() -> None:
    model = deep()
    model.model.layers = torch.nn.ModuleList([*model.model.layers, torch.nn.Identity()])
    before = fingerprint(model)
    with pytest.raises(LaconicError, match="no list of decoder layers"):
        laconic.apply(model, Leave())
    assert_untouched(model, before)
