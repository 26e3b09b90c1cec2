"""Sink metrics against attention maps, and interventions against their meaning."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import build, prompt, shared
from typer.testing import CliRunner

from laconic.cli import app
from laconic.errors import LaconicError
from laconic.explain.sinks import SinkReport, active_dormant_map, head_uses, intervene, sink_report, summary


def texts(count: int = 2, length: int = 24) -> list[torch.Tensor]:
    return list(prompt(count, length)["input_ids"])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_weights_are_the_mean_over_later_queries(name: str) -> None:
    model, ids = build(name), texts(1)[0]
    report = sink_report(model, [ids])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(ids[None], output_attentions=True, output_hidden_states=True)
    maps = torch.stack(output.attentions)[:, 0]  # (layers, heads, n, n)
    n = len(ids)
    received = maps.sum(2) - maps.diagonal(dim1=-2, dim2=-1)
    mean = received / torch.arange(n - 1, -1, -1).clamp(min=1)
    assert report.sink == int(mean[..., : n // 2].mean((0, 1)).argmax())
    torch.testing.assert_close(report.weight, mean[..., report.sink], atol=1e-5, rtol=1e-4)
    norms = torch.stack([hidden[0].norm(dim=-1) for hidden in output.hidden_states])
    torch.testing.assert_close(report.residual_ratio, norms[:, report.sink] / norms.median(-1).values, atol=1e-4, rtol=1e-4)


def test_values_are_those_of_the_cache_and_shared_in_a_group() -> None:
    model, ids = shared(), texts(1)[0]
    report = sink_report(model, [ids])
    with torch.no_grad():
        cache = model(ids[None], use_cache=True).past_key_values
    for layer in range(2):
        lengths = cache.layers[layer].values[0].norm(dim=-1)  # (kv_heads, n)
        expected = lengths[:, report.sink] / lengths.median(-1).values
        torch.testing.assert_close(report.value_ratio[layer], expected.repeat_interleave(2), atol=1e-5, rtol=1e-5)


def test_the_order_of_texts_does_not_matter() -> None:
    one, other = sink_report(shared(), texts()), sink_report(shared(), texts()[::-1])
    assert one.sink == other.sink
    torch.testing.assert_close(one.weight, other.weight)


def test_zeroed_heads_give_nothing_and_sunk_heads_give_the_sinks_value() -> None:
    model, ids = shared(), texts(1)[0][None]
    outputs: dict[str, torch.Tensor] = {}

    def catch(module: torch.nn.Module, arguments: tuple) -> None:
        outputs["now"] = arguments[0].detach().clone()

    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            plain = outputs["now"].view(1, -1, 4, 8)
            for what in ("zero", "sink"):
                with intervene(model, [(0, 2)], what, sink=3):
                    model(ids, use_cache=True)
                changed = outputs["now"].view(1, -1, 4, 8)
                expected = torch.zeros(8) if what == "zero" else cache.layers[0].values[0, 1, 3]
                torch.testing.assert_close(changed[0, :, 2], expected.expand(24, 8))
                torch.testing.assert_close(changed[:, :, [0, 1, 3]], plain[:, :, [0, 1, 3]], atol=1e-5, rtol=1e-5)
    finally:
        hook.remove()


def test_uses_of_heads_are_losses_without_them() -> None:
    model, two = shared(), texts()
    uses = head_uses(model, two)
    assert uses.shape == (2, 4) and (uses != 0).any()
    with torch.no_grad():
        before = sum(float(model(ids[None], labels=ids[None]).loss) for ids in two) / 2
        with intervene(model, [(1, 3)]):
            after = sum(float(model(ids[None], labels=ids[None], use_cache=True).loss) for ids in two) / 2
    assert float(uses[1, 3]) == pytest.approx(after - before, abs=1e-4)


def test_heads_that_wake_up_on_one_domain_come_first() -> None:
    rows = active_dormant_map(shared(), {"a": texts(1), "b": list(prompt(1, 24, seed=9)["input_ids"])})
    assert len(rows) == 8 and {tuple(row["weights"]) for row in rows} == {("a", "b")}
    differs = [len(set(row["states"].values())) > 1 for row in rows]
    assert differs == sorted(differs, reverse=True)


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(LaconicError, match="at least 8 tokens"):
        sink_report(shared(), [torch.tensor([1, 2])])
    with pytest.raises(LaconicError, match="use zero or sink"), intervene(shared(), [], "invert"):
        pass


def test_the_command_prints_a_row_per_head(tmp_path) -> None:
    result = CliRunner().invoke(app, ["explain", "sinks", "--tokens", "128", "--samples", "2", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found["heads"]) == 12 and {row["state"] for row in found["heads"]} <= {"dormant", "active", "mixed"}
    assert len(found["residual_ratio"]) == 4
    table = CliRunner().invoke(app, ["explain", "sinks", "--tokens", "128", "--samples", "2"])
    assert table.exit_code == 0 and "layer" in table.stdout
    assert "no sink" in table.stdout and "no sink" in found["summary"], "the built-in model has none"
    (tmp_path / "empty.txt").write_text(" ")
    bad = CliRunner().invoke(app, ["explain", "sinks", "--text", str(tmp_path / "empty.txt")])
    assert bad.exit_code == 2 and "is empty" in bad.stderr


def test_the_command_compares_two_texts(tmp_path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("All the world is a stage, and all the men and women are merely players. " * 40)
    options = ["explain", "sinks", "--tokens", "128", "--samples", "1", "--against", str(other)]
    rows = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert len(rows) == 12 and set(rows[0]["weights"]) == {"built-in", "other.txt"}
    table = CliRunner().invoke(app, options)
    assert table.exit_code == 0 and "other.txt" in table.stdout and "spread" in table.stdout


def test_the_summary_tells_how_many_tokens_to_protect() -> None:
    weight = torch.tensor([[0.9, 0.1], [0.6, 0.3]])
    report = SinkReport(sink=1, weight=weight, value_ratio=weight, residual_ratio=torch.ones(3))
    assert "2 of 4 heads are dormant on the token at position 1" in summary(report) and "sinks=2" in summary(report)
    assert "no sink" in summary(replace(report, weight=weight / 2))
