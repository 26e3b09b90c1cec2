"""Methods that change weights, against attention maps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attend import SCALE, Run, random_qkv
from tiny import VOCABULARY, build, generate, prompt, shared
from typer.testing import CliRunner

import laconic
from laconic.attention.act import ACT
from laconic.attention.head_search import measure_answers
from laconic.attention.rope import Rope
from laconic.attention.zerotuning import ZeroTuning
from laconic.cli import app
from laconic.errors import LaconicError
from laconic.profiles import Profile, fingerprint
from laconic.selection import Selection


def maps(qkv: list[torch.Tensor], row: int, head: int, pad: int, window: int | None, softcap: float | None) -> torch.Tensor:
    """The attention map (n, n) of one head over the real tokens, in double precision."""
    logits = qkv[0][row, head, pad:].double() @ qkv[1][row, head // 2, pad:].double().T * SCALE
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    n = len(logits)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones(n, n, dtype=torch.bool).tril(-window)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1)


def scaled(p: torch.Tensor, columns: list[int], factor: float | torch.Tensor) -> torch.Tensor:
    """The map with some columns multiplied, rows summing to 1 again."""
    p = p.clone()
    p[:, columns] *= factor
    return p / p.sum(-1, keepdim=True)


def values_of(qkv: list[torch.Tensor], row: int, head: int, pad: int) -> torch.Tensor:
    return qkv[2][row, head // 2, pad:].double()


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
            p = scaled(p, [0], gamma) if heads == "all" or str(head) in heads.split(";") else p
            expected = p @ values_of(qkv, row, head, pad)
            torch.testing.assert_close(outputs[row, head, pad:].double(), expected, atol=1e-6, rtol=1e-5)
            assert p.shape[0] == n - pad


def liked(n: int, at: int) -> list[torch.Tensor]:
    """Random queries, keys and values, with one token that many queries like."""
    qkv = random_qkv(n)
    qkv[1][:, :, at] = 3.0 * qkv[0][:, ::2].mean(2)
    return qkv


def sinks_of(both: list[torch.Tensor], threshold: float, most: int, prompt: int, window: int | None) -> list[int]:
    """The sinks of a group of two heads, by their maps over the prompt."""
    reach = min(prompt, window or prompt)
    seers = torch.arange(prompt, 0, -1).clamp(max=reach)
    mean = (both[0] + both[1])[:prompt, :prompt].sum(0) / 2 / seers
    best = sorted(range(1, prompt), key=lambda k: -float(mean[k]))[:most]
    return [k for k in best if float(mean[k]) > threshold / reach]


@pytest.mark.parametrize("beta", [0.3, 0.0])
@pytest.mark.parametrize("window", [None, 12])
def test_act_is_a_changed_map(window: int | None, beta: float) -> None:
    pads, n, prompt_length = (0, 6), 40, 34
    qkv = liked(n, 20)
    recipe = f"act(beta={beta}, threshold=1.5, most=3, skip=0)"
    run = Run(recipe, qkv, prompt_length, pads=pads, window=window, layers=2)
    outputs, changed = torch.cat([output for _, output in run], dim=2), 0
    for row, pad in enumerate(pads):
        for kv_head in range(2):
            both = [maps(qkv, row, head, pad, window, None) for head in (2 * kv_head, 2 * kv_head + 1)]
            sinks = sinks_of(both, 1.5, 3, prompt_length - pad, window)
            changed += bool(sinks)
            others = [k for k in range(n - pad) if k not in sinks]
            for head, p in zip((2 * kv_head, 2 * kv_head + 1), both, strict=True):
                mass, rest = p[:, sinks].sum(-1, keepdim=True), p[:, others].sum(-1, keepdim=True)
                new = p * (1 - beta * mass) / rest
                new[:, sinks] = beta * p[:, sinks]
                torch.testing.assert_close(new.sum(-1), torch.ones(n - pad).double())
                expected = new @ values_of(qkv, row, head, pad)
                torch.testing.assert_close(outputs[row, head, pad:].double(), expected, atol=1e-5, rtol=1e-4)
    assert changed, "no sink was found: the test shows nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [1e-6, 0.1, 10.0])
def test_what_little_a_strong_sink_leaves_to_others_is_not_lost_in_rounding(dtype: torch.dtype, gamma: float) -> None:
    qkv = random_qkv(30, batch=1)
    qkv[0][..., 0], qkv[1][..., 0] = 1.0, 0.0
    qkv[1][:, :, 0] = 0.0
    qkv[1][:, :, 0, 0] = 20.0  # weighs more than 0.999 in every row
    qkv = [t.to(dtype) for t in qkv]
    outputs = torch.cat([output for _, output in Run(f"zerotuning(gamma={gamma})", qkv, 26)], dim=2)
    for head in range(4):
        p = maps(qkv, 0, head, 0, None, None)
        assert float(p[1:, 0].median()) > 0.999
        expected = scaled(p, [0], gamma) @ values_of(qkv, 0, head, 0)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(outputs[0, head].double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("recipe", ["zerotuning", "zerotuning(gamma=1)", "act(beta=1)"])
def test_factor_one_changes_nothing(recipe: str) -> None:
    qkv = random_qkv(30)
    for (_, one), (_, other) in zip(Run(recipe, qkv, 20), Run("dense", qkv, 20), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("recipe", ["zerotuning(gamma=1.0000001)", "act(beta=0.9999999, threshold=1, skip=0, most=5)"])
def test_a_factor_near_one_computes_dense_attention_in_parts(recipe: str) -> None:
    qkv = random_qkv(30)
    for (_, one), (_, other) in zip(Run(recipe, qkv, 20, layers=2), Run("dense", qkv, 20), strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reader", ["tokenselect(refresh=2, sinks=2, recent=3):10", "longheads(sinks=2, recent=3):10"])
def test_a_reader_and_a_tuner_work_on_the_tokens_that_are_read(reader: str) -> None:
    assert_changed_reads(reader, None)


@pytest.mark.parametrize("reader", ["tokenselect(positions=compact, sinks=2, recent=4):16", "actqkv(recent=4, block=4):16"])
def test_pieces_of_a_prompt_and_moved_keys_are_tuned_too(reader: str) -> None:
    assert_changed_reads(reader, Rope(torch.tensor([1.0, 0.3, 0.1, 0.03])))


def assert_changed_reads(reader: str, rope: Rope | None) -> None:
    """Every output is that of the selection, as it says where the keys stand, with the first token's weight times 4."""
    qkv = random_qkv(40, batch=1)
    run = Run(f"{reader} + zerotuning(gamma=4)", qkv, 30, rope=rope)
    chosen: list[Selection | None] = []
    original = run.policy._select
    run.policy._select = lambda layer, call: chosen.append(original(layer, call)) or chosen[-1]  # type: ignore[method-assign]
    checked = 0
    for begin, end in [(0, 24), (24, 30), *((i, i + 1) for i in range(30, 40))]:
        output, selection = run.piece(begin, end), None
        selection = chosen[-1]
        if selection is None:
            continue
        for head in range(4):
            slots = selection.indices[0, min(head // 2, selection.indices.shape[1] - 1)]
            assert 0 in slots and slots.min() >= 0
            keys, queries = qkv[1][0, head // 2, slots], qkv[0][0, head, begin:end]
            if selection.key_positions is not None:
                at = selection.key_positions[0, min(head // 2, selection.indices.shape[1] - 1)]
                keys, queries = rope.rotate(keys, at - slots), rope.rotate(queries, selection.query_shift.expand(end - begin))
            logits = queries.double() @ keys.double().T * SCALE
            hidden = slots[None] > torch.arange(begin, end)[:, None]
            p = scaled(logits.masked_fill(hidden, float("-inf")).softmax(-1), [0], 4.0)
            expected = p @ qkv[2][0, head // 2, slots].double()
            torch.testing.assert_close(output[0, head].double(), expected, atol=1e-5, rtol=1e-4)
            checked += 1
    assert checked >= 20


def test_when_the_first_token_is_gone_nothing_is_tuned() -> None:
    qkv = random_qkv(40)
    tuned = Run("streaming(sinks=0):8 + zerotuning(gamma=5)", qkv, 30)
    plain = Run("streaming(sinks=0):8", qkv, 30)
    steps = list(zip(tuned, plain, strict=True))
    assert not torch.allclose(steps[0][0][1], steps[0][1][1])  # the prompt still sees it
    for (_, one), (_, other) in steps[1:]:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_neox"])  # groups; windows and capped logits; no groups
@pytest.mark.parametrize("recipe", ["zerotuning(gamma=0.05)", "act(beta=0.0, threshold=1.2, skip=0, most=4) + tova:30"])
def test_generation_with_padding_equals_rows_alone_and_differs_from_dense(architecture: str, recipe: str) -> None:
    model, inputs = shared(architecture), prompt(2, 40, pads=(0, 11))
    options = {"return_dict_in_generate": True, "output_logits": True}
    with laconic.apply(model, recipe):
        together = generate(model, inputs, 6, **options)
        alone = generate(model, {"input_ids": inputs["input_ids"][1:, 11:]}, 6, **options)
        pieces = generate(model, inputs, 6, prefill_chunk_size=16, **options)
    with laconic.apply(model, "dense"):
        dense = generate(model, inputs, 6, **options)
    torch.testing.assert_close(together.logits[-1][1], alone.logits[-1][0], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(together.logits[0], dense.logits[0], atol=1e-3)
    if recipe.startswith("zerotuning"):  # act finds its sinks in the newest piece
        torch.testing.assert_close(together.logits[-1], pieces.logits[-1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (f"zerotuning(gamma=2, profile={__file__})", "leave gamma and heads out"),
        ("act(profile=none.json)", "is no file: make one with laconic profile act"),
        ("zerotuning:10%", "takes no budget"),
        ("zerotuning(gamma=0)", "above 0"),
        ("zerotuning(heads=one)", "numbers such as"),
        ("act(beta=2)", "up to 1"),
    ],
)
def test_bad_parameters_are_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(LaconicError, match=sentence):
        laconic.Recipe.parse(text)


def test_two_methods_that_change_weights_are_refused() -> None:
    with pytest.raises(LaconicError, match="zerotuning and act both change weights"):
        Run("zerotuning(gamma=2) + act", random_qkv(10), 10)


def test_a_head_that_is_not_there_is_named() -> None:
    with pytest.raises(LaconicError, match="names head 9"):
        Run("zerotuning(gamma=2, heads=9)", random_qkv(10), 10).piece(0, 10)


# --- heads that are searched, and kept in a profile ---------------------------------------------------------------------
def test_answers_are_measured_as_the_model_gives_them() -> None:
    model, texts = shared(), list(prompt(3, 26)["input_ids"])
    greedy = [generate(model, {"input_ids": text[None]}, 3)[0, 26:] for text in texts]
    wrong = [(answer + 1) % VOCABULARY for answer in greedy]
    for answers, expected in ((greedy, 1.0), (wrong, 0.0), ([greedy[0], *wrong[1:]], 1 / 3)):
        right, sure = measure_answers(model, laconic.get("zerotuning"), texts, answers)
        assert right == pytest.approx(expected, abs=1e-5)
        with torch.no_grad():
            both = [torch.cat(pair)[None] for pair in zip(texts, answers, strict=True)]
            logits = [model(ids).logits[0, 25:-1].log_softmax(-1) for ids in both]
        means = [float(table[range(3), answer].mean()) for table, answer in zip(logits, answers, strict=True)]
        assert sure == pytest.approx(sum(means) / 3, abs=1e-4)
    (certainty,) = measure_answers(model, laconic.get("zerotuning"), texts)
    with torch.no_grad():
        p = torch.stack([model(text[None]).logits[0, -1].softmax(-1) for text in texts])
    assert certainty == pytest.approx(float((p * p.log()).sum(-1).mean()), abs=1e-4)


def test_the_search_of_gamma_finds_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads (0, 1) and (1, 2) gain from a gamma near 2, head (1, 0) from a small one, and the others lose by any change."""
    wanted = {(0, 1): math.log(2), (1, 2): math.log(2), (1, 0): math.log(0.5)}

    def score(model: Any, method: Any, texts: Any, answers: Any) -> tuple[float, ...]:
        loss = 0.0
        for layer, row in enumerate(method.table):
            loss += sum(abs(math.log(g) - wanted.get((layer, head), 0.0)) for head, g in enumerate(row))
        return (-loss,)

    monkeypatch.setattr("laconic.attention.zerotuning.measure_answers", score)
    found = ZeroTuning.calibrate(shared(), [])
    assert found["gamma"] == [[1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0, 1.0]]
    assert found["after"] > found["before"]
    wanted.clear()
    assert ZeroTuning.calibrate(shared(), [])["gamma"] == [[1.0] * 4] * 2


def test_the_filter_of_heads_keeps_those_that_help(monkeypatch: pytest.MonkeyPatch) -> None:
    helps = {(0, 3), (1, 1)}

    def score(model: Any, method: Any, texts: Any, answers: Any) -> tuple[float, ...]:
        return (sum(1.0 if at in helps else -1.0 for at in method.chosen) + bonus * (len(method.chosen) > 1),)

    monkeypatch.setattr("laconic.attention.act.measure_answers", score)
    bonus = 0
    assert ACT.calibrate(shared(), [])["heads"] == [(0, 3), (1, 1)]
    bonus = -5  # each helps alone, but not together
    assert ACT.calibrate(shared(), [])["heads"] == []


def test_a_profile_says_which_heads_are_changed(tmp_path: Path) -> None:
    model, ids = shared(), prompt(1, 40)["input_ids"]
    table = [[1.0, 1.0, 3.0, 1.0], [1.0] * 4]
    recipes = []
    for name, tables in (("zerotuning", {"gamma": table}), ("act", {"heads": [[0, 2]]})):
        path = tmp_path / f"{name}.json"
        Profile(name, fingerprint(model), 0, "", tables).save(path)
        recipes.append(f"{name}(profile={path}" + (", threshold=1, most=4, beta=0)" if name == "act" else ")"))
    entering = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, given: entering.append(given[0].clone()))
    with torch.no_grad():
        for recipe in ("dense", *recipes):
            with laconic.apply(model, recipe):
                model(ids)
    hook.remove()
    dense, *others = (t.view(40, 4, 8) for t in entering)
    for changed in others:
        torch.testing.assert_close(changed[:, [0, 1, 3]], dense[:, [0, 1, 3]], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(changed[:, 2], dense[:, 2], atol=1e-3)
    with pytest.raises(LaconicError, match="of another model"), laconic.apply(build(seed=1), recipes[0]) as handle:
        handle.model(ids)


@pytest.mark.parametrize("method", ["zerotuning", "act"])
def test_the_command_writes_a_profile_that_fits(method: str, tmp_path: Path) -> None:
    task, path = tmp_path / "mine.jsonl", tmp_path / "p.json"
    lines = [{"prompt": "One day the sailor came home. Where did he come?", "answer": "home"}] * 2
    task.write_text("\n".join(json.dumps(line) for line in lines))
    result = CliRunner().invoke(app, ["profile", method, "--task", str(task), "--output", str(path)])
    assert result.exit_code == 0, result.stderr
    tables = json.loads(path.read_text())["tables"]
    assert len(tables["before"]) == 2 and tables["after"] >= tables["before"], "scored by the answers"
    model, tokenizer = laconic.load("needle")
    with laconic.apply(model, f"{method}(profile={path})"):
        generate(model, tokenizer("One day the sailor came", return_tensors="pt"), 2)
    task.write_text("\n".join(json.dumps({"prompt": line["prompt"]}) for line in lines))
    result = CliRunner().invoke(app, ["profile", method, "--task", str(task), "--output", str(path), "--json"])
    assert result.exit_code == 0 and len(json.loads(result.stdout)["tables"]["before"]) == 1, "scored by entropy"
