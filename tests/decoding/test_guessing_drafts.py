"""Drafts from prompt rows and from heads: whatever they guess, the text is the model's own."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import laconic
from laconic import LaconicError, get
from laconic.cli import app
from laconic.decoding.engine import decode
from laconic.decoding.prompt_trees import first_tree, lay_out, plan
from laconic.decoding.runner import Runner
from laconic.decoding.sampling import Sampling, repetition_penalty
from laconic.decoding.tree import PromptRows
from laconic.hooks import apply
from laconic.profiles import make_profile
from tests import tiny
from tests.decoding.drafts import TEXT, random_profile, taught

METHODS = ("parallel_prompt_decoding", "medusa")


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    return {(method, name): random_profile(method, tiny.shared(name), folder)
            for method in METHODS for name in ("llama", "qwen3", "gemma3", "gpt_neox")}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("method", METHODS)
def test_the_greedy_text_stays_for_any_weights(method, name, profiles):
    model, inputs = tiny.shared(name), tiny.prompt(3, 40, pads=(0, 7, 3))
    expected = tiny.generate(model, inputs, 40)[:, 40:].tolist()
    for budget in (3, 20):
        out = decode(model, inputs, f"{method}(profile={profiles[method, name]}):{budget}", max_new_tokens=40)
        assert out.rows == expected


@pytest.mark.parametrize("method", METHODS)
def test_sampling_and_penalties_go_on_as_ever(method, profiles):
    model, inputs, recipe = tiny.shared("llama"), tiny.prompt(2, 30), f"{method}(profile={profiles[method, 'llama']}):12"
    sampling = Sampling(processors=(repetition_penalty(1.5),))
    expected = tiny.generate(model, inputs, 40, repetition_penalty=1.5)[:, 30:].tolist()
    assert decode(model, inputs, recipe, max_new_tokens=40, sampling=sampling).rows == expected
    warm = decode(model, inputs, f"{method}(profile={profiles[method, 'llama']},verifier=typical):12", max_new_tokens=20,
                  sampling=Sampling(temperature=1.0))  # fmt: skip
    assert [len(row) for row in warm.rows] == [20, 20]


def test_a_sparse_recipe_lets_prompt_rows_choose_for_themselves(profiles):
    model, inputs = tiny.shared("llama"), tiny.prompt(1, 60)
    alone = decode(model, inputs, "tokenselect(recent=4):28", max_new_tokens=12)
    recipe = f"tokenselect(recent=4):28 + parallel_prompt_decoding(profile={profiles[METHODS[0], 'llama']}):9"
    assert decode(model, inputs, recipe, max_new_tokens=12).rows == alone.rows


def test_sampled_text_follows_the_same_law(tmp_path):
    model, inputs = tiny.build("llama", sharpen=1.5, vocab_size=7), tiny.prompt(1, 8)
    inputs["input_ids"] = inputs["input_ids"] % 7
    many = {name: value.expand(3000, -1) for name, value in inputs.items()}
    path = random_profile("parallel_prompt_decoding", model, tmp_path)
    counts = []
    for recipe in ("dense", f"parallel_prompt_decoding(profile={path}):8"):
        out = decode(model, many, recipe, max_new_tokens=3, sampling=Sampling(temperature=0.9), seed=1)
        counts.append(torch.bincount(torch.tensor(out.rows) @ torch.tensor([49, 7, 1]), minlength=343).double())
    both = counts[0] + counts[1]
    cells = both >= 20
    freedom = int(cells.sum()) - 1
    assert freedom > 20
    assert ((counts[0] - counts[1]) ** 2 / both)[cells].sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_without_prompt_tokens_it_is_plain_decoding(profiles):
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 30)
    plain = decode(model, inputs, max_new_tokens=20)
    out = decode(model, inputs, f"parallel_prompt_decoding(profile={profiles[METHODS[0], 'llama']},ahead=0)", max_new_tokens=20)
    assert (out.rows, out.forwards, out.nodes) == (plain.rows, plain.forwards, plain.nodes)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_prompt_rows_change_no_node_and_leave_no_trace(name):
    """Logits of nodes are those of the tree alone, rows see what a text would show them, and the cache forgets them."""
    model, inputs = tiny.shared(name), tiny.prompt(2, 20)
    trees = plan(((0.5, 0.2), (0.4, 0.1)), 9)
    layout = lay_out((trees[1], first_tree(2)), 9)
    tokens = torch.randint(2, tiny.VOCABULARY, layout.nodes.parents.shape, generator=torch.Generator().manual_seed(5))
    prompts = torch.randn(2, model.config.hidden_size)
    rows = PromptRows(layout.whole, prompts[layout.numbers])
    with torch.inference_mode(), apply(model, "dense") as handle:
        runner = Runner(handle)
        runner.prefill(inputs)
        kept = runner.cache.fork()
        alone = runner.run(tokens, layout.nodes).logits
        runner.settle(torch.tensor([[0, 1], [0, -1]]))
        bare = [(layer.keys.clone(), layer.positions.clone()) for layer in runner.cache.layers]
        runner.cache.restore(kept)
        runner.lengths = torch.tensor([20, 20])
        logits = runner.run(tokens, layout.nodes, rows).logits
        runner.settle(torch.tensor([[0, 1], [0, -1]]))
        for layer, (keys, positions) in zip(runner.cache.layers, bare, strict=True):
            torch.testing.assert_close(layer.keys, keys)
            assert torch.equal(layer.positions, positions)
    n = layout.nodes.nodes
    real = layout.nodes.real
    torch.testing.assert_close(logits[:, :n][real], alone[real], atol=1e-4, rtol=1e-4)
    way = layout.nodes.paths(torch.tensor([1, 0]))[0]
    text = torch.cat([inputs["input_ids"][0], tokens[0, way[way >= 0]]])
    embedded = torch.cat([model.get_input_embeddings()(text), prompts])[None]
    with torch.no_grad():
        expected = model(inputs_embeds=embedded).logits[0, -2:]
    first, count = int(layout.first[0, 1]), int(layout.count[0, 1])
    torch.testing.assert_close(logits[0, first : first + count], expected[:count], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_right_guesses_are_accepted(method, profiles, monkeypatch):
    """With guesses that are what the model says, every depth is accepted: places, ranks and states fit together."""
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 30)
    plain = decode(model, inputs, max_new_tokens=60).rows
    made = []

    original = type(get(method)).drafter

    def oracle(self, setting):
        drafter = original(self, setting)
        propose = drafter.propose

        def told(text, room):
            for row in range(len(text.rows)):
                done = text.written(row)
                future = [*plain[row][done : done + 3], 0, 0, 0][:3]
                drafter.guesses[row, :, 0] = torch.tensor(future)[: drafter.guesses.shape[1]]
            return propose(text, room)

        drafter.propose = told
        made.append(drafter)
        return drafter

    monkeypatch.setattr(type(get(method)), "drafter", oracle)
    out = decode(model, inputs, f"{method}(profile={profiles[method, 'llama']}):60", max_new_tokens=60)
    assert out.rows == plain and len(made) == 1
    assert out.tokens_per_forward > 2.5
    assert len(out.accepted) == 4  # three guesses at most


@pytest.mark.parametrize("method", METHODS)
def test_a_hot_start_on_another_text_is_right(method, profiles):
    model, recipe = tiny.shared("llama"), f"{method}(profile={profiles[method, 'llama']}):12"
    first = decode(model, tiny.prompt(3, 30), recipe, max_new_tokens=20)
    inputs = tiny.prompt(1, 25, seed=4)
    again = decode(model, inputs, recipe, max_new_tokens=20, drafter=first.drafter)
    assert again.rows == decode(model, inputs, max_new_tokens=20).rows and first.draft_bytes > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_last_positions_are_not_passed(method, tmp_path):
    model, inputs = tiny.build("llama", max_position_embeddings=40), tiny.prompt(1, 30)
    path = random_profile(method, model, tmp_path)
    plain = decode(model, inputs, max_new_tokens=10)
    seen = []
    hook = model.register_forward_pre_hook(lambda m, a, k: seen.append(int(k["position_ids"].max())), with_kwargs=True)
    assert decode(model, inputs, f"{method}(profile={path}):12", max_new_tokens=10).rows == plain.rows
    hook.remove()
    assert max(seen) < 40


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("method", METHODS)
def test_training_leaves_the_model_and_beats_no_training(method, name, monkeypatch):
    """Three embeddings can say that they do not know; heads can guess what a model says that knows a text by heart."""
    monkeypatch.setattr("laconic.decoding.distill.MEASURED", 4)
    monkeypatch.setattr("laconic.decoding.latency.ROWS", (1, 2))
    monkeypatch.setattr("laconic.decoding.medusa.RATE", 0.1)
    monkeypatch.setattr("laconic.decoding.parallel_prompt_decoding.RATE", 0.1)
    model = taught(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    texts = list(TEXT[:400].view(8, 50))
    tables = make_profile(method, model, texts, 0, steps=30).tables
    assert all(row == sorted(row, reverse=True) and sum(row) <= 1 for row in tables["accuracy"])
    assert tables["loss"][1] < 0.8 * tables["loss"][0] and tables["steps"] == 30
    if method == "medusa":
        assert all(row[0] > 0.9 for row in tables["accuracy"])
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_command_makes_a_profile_that_drafts(method, tmp_path, monkeypatch):
    monkeypatch.setattr("laconic.decoding.distill.MEASURED", 1)
    monkeypatch.setattr("laconic.decoding.latency.ROWS", (1, 2))
    path = str(tmp_path / "made.json")
    arguments = ["profile", method, "--tokens", "64", "--samples", "2", "--steps", "2", "--output", path]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    model, tokenizer = laconic.load("needle")
    inputs = dict(tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False))
    out = decode(model, inputs, f"{method}(profile={path}):8", max_new_tokens=12)
    assert out.rows == decode(model, inputs, max_new_tokens=12).rows


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_work_is_one_sentence(method, tmp_path):
    model, inputs = tiny.shared("llama"), tiny.prompt(1, 10)
    with pytest.raises(LaconicError, match=f"laconic profile {method}"):
        decode(model, inputs, method, max_new_tokens=4)
    with pytest.raises(LaconicError, match="is no file"):
        get(method, profile="nowhere.json")
    with pytest.raises(LaconicError, match="too short"):
        make_profile(method, model, [torch.arange(4)], 0)


def test_a_budget_that_holds_no_guess_is_refused():
    with pytest.raises(LaconicError, match="give 3 or more"):
        get("parallel_prompt_decoding", budget="2")
    with pytest.raises(LaconicError, match="length must be one of"):
        get("parallel_prompt_decoding", length="long")
    with pytest.raises(LaconicError, match="no number of training steps"):
        make_profile("fasa", tiny.shared("llama"), [torch.arange(40)], 0, steps=3)


def test_the_length_by_latency_computes_fewer_rows(profiles):
    model, inputs, path = tiny.shared("llama"), tiny.prompt(1, 30), profiles[METHODS[0], "llama"]
    nodes = {}
    for length in ("budget", "latency"):
        out = decode(model, inputs, f"parallel_prompt_decoding(profile={path},length={length}):31", max_new_tokens=30)
        nodes[length] = out.nodes / (out.forwards - 1)
    assert nodes["latency"] < nodes["budget"] / 2  # the profile's times rise steeply behind 8 rows
