"""Methods that change weights, against attention maps."""

from __future__ import annotations

import pytest
import torch
from attend import SCALE, Run, random_qkv
from tiny import generate, prompt, shared

import laconic
from laconic.errors import LaconicError


def maps(qkv: list[torch.Tensor], row: int, head: int, pad: int, window: int | None, softcap: float | None) -> torch.Tensor:
    """The attention map (n, n) of one head over the real tokens."""
    logits = qkv[0][row, head, pad:] @ qkv[1][row, head // 2, pad:].T * SCALE
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    n = len(logits)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones(n, n, dtype=torch.bool).tril(-window)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("gamma", "heads"), [(0.2, "all"), (3.0, "1;2")])
def test_zerotuning_is_a_changed_map(window: int | None, softcap: float | None, gamma: float, heads: str) -> None:
    pads, qkv, n = (0, 6), random_qkv(30), 30
    run = Run(f"zerotuning(gamma={gamma}, heads={heads})", qkv, 24, pads=pads, window=window, softcap=softcap)
    outputs = torch.cat([output for _, output in run], dim=2)
    for row, pad in enumerate(pads):
        for head in range(4):
            p = maps(qkv, row, head, pad, window, softcap)
            if heads == "all" or str(head) in heads.split(";"):
                p = p * torch.cat([torch.tensor([gamma]), torch.ones(n - pad - 1)])
                p = p / p.sum(-1, keepdim=True)
            expected = p @ qkv[2][row, head // 2, pad:]
            torch.testing.assert_close(outputs[row, head, pad:], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 12])
def test_act_is_a_changed_map(window: int | None) -> None:
    beta, pads, n = 0.3, (0, 6), 40
    qkv = random_qkv(n)
    qkv[1][:, :, 20] = 3.0 * qkv[0][:, ::2].mean(2)  # a token that many queries like
    run = Run(f"act(beta={beta}, threshold=1.5, most=3, skip=0)", qkv, n, pads=pads, window=window, layers=2)
    output, changed = run.piece(0, n), 0
    for row, pad in enumerate(pads):
        for kv_head in range(2):
            both = [maps(qkv, row, head, pad, window, None) for head in (2 * kv_head, 2 * kv_head + 1)]
            seers = torch.arange(n - pad, 0, -1)
            mean = (both[0] + both[1]).sum(0) / 2 / seers
            best = sorted(range(1, n - pad), key=lambda k: -float(mean[k]))[:3]
            sinks = [k for k in best if float(mean[k]) > 1.5 / (n - pad)]
            changed += bool(sinks)
            for head, p in zip((2 * kv_head, 2 * kv_head + 1), both, strict=True):
                mass = p[:, sinks].sum(-1, keepdim=True)
                new = p * (1 - beta * mass) / (1 - mass)
                new[:, sinks] = beta * p[:, sinks]
                sound = mass[:, 0] < 0.99  # beyond, the little rest is mostly rounding
                assert sound.sum() > 0.8 * len(sound)
                torch.testing.assert_close(new.sum(-1)[sound], torch.ones(int(sound.sum())), atol=1e-4, rtol=1e-4)
                expected = new @ qkv[2][row, kv_head, pad:]
                torch.testing.assert_close(output[row, head, pad:][sound], expected[sound], atol=1e-4, rtol=1e-3)
    assert changed, "no sink was found: the test shows nothing"


@pytest.mark.parametrize("recipe", ["zerotuning", "zerotuning(gamma=1)", "act(beta=1)"])
def test_factor_one_changes_nothing(recipe: str) -> None:
    qkv = random_qkv(30)
    for (_, one), (_, other) in zip(Run(recipe, qkv, 20), Run("dense", qkv, 20), strict=True):
        assert torch.equal(one, other)


def test_a_reader_and_a_tuner_work_on_the_tokens_that_are_read() -> None:
    qkv = random_qkv(40, batch=1)
    run = Run("tokenselect(refresh=2, sinks=2, recent=3):10 + zerotuning(gamma=4)", qkv, 39)
    last = [output for _, output in run][-1]
    chosen = run.layer.slots["tokenselect"][0, 0].tolist()
    for head in range(4):
        p = torch.stack([qkv[0][0, head, 39] @ qkv[1][0, head // 2, s] * SCALE for s in chosen]).softmax(0)
        p[0] *= 4
        expected = (p / p.sum()) @ qkv[2][0, head // 2, chosen]
        torch.testing.assert_close(last[0, head, 0], expected, atol=1e-5, rtol=1e-4)


def test_when_the_first_token_is_gone_nothing_is_tuned() -> None:
    qkv = random_qkv(40)
    tuned = Run("streaming(sinks=0):8 + zerotuning(gamma=5)", qkv, 30)
    plain = Run("streaming(sinks=0):8", qkv, 30)
    steps = list(zip(tuned, plain, strict=True))
    assert not torch.allclose(steps[0][0][1], steps[0][1][1])  # the prompt still sees it
    for (_, one), (_, other) in steps[1:]:
        torch.testing.assert_close(one, other)


def test_generation_with_padding_equals_rows_alone_and_differs_from_dense() -> None:
    model, inputs = shared(), prompt(2, 40, pads=(0, 11))
    for recipe in ("zerotuning(gamma=0.05)", "act(beta=0.0, threshold=1.5, skip=0)"):
        with laconic.apply(model, recipe):
            together = generate(model, inputs, 6, return_dict_in_generate=True, output_logits=True)
            alone = generate(
                model, {"input_ids": inputs["input_ids"][1:, 11:]}, 6, return_dict_in_generate=True, output_logits=True
            )
        with laconic.apply(model, "dense"):
            dense = generate(model, inputs, 6, return_dict_in_generate=True, output_logits=True)
        torch.testing.assert_close(together.logits[-1][1], alone.logits[-1][0], atol=1e-3, rtol=1e-3)
        assert not torch.allclose(together.logits[0], dense.logits[0], atol=1e-3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("zerotuning:10%", "takes no budget"),
        ("zerotuning(gamma=0)", "above 0"),
        ("zerotuning(heads=one)", "numbers such as"),
        ("act(beta=2)", "up to 1"),
    ],
)
def test_bad_parameters_are_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(LaconicError, match=sentence):
        laconic.Recipe.parse(text)


def test_a_head_that_is_not_there_is_named() -> None:
    with pytest.raises(LaconicError, match="names head 9"):
        Run("zerotuning(gamma=2, heads=9)", random_qkv(10), 10).piece(0, 10)
