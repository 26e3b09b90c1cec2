"""Methods with a draft model, in real models: the text is the model's own, and the draft model's cache is that of the text."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import laconic
from laconic import LaconicError, Recipe
from laconic.decoding.draft_model import ModelDrafter
from laconic.decoding.engine import decode
from laconic.decoding.sampling import Sampling, repetition_penalty
from tests import tiny
from tests.conftest import build_tokenizer

DRAFTS = (
    "speculative:3", "speculative(branches=2x2x1):10", "spectr(drafts=3):9", "dyspec:8",
    "dyspec(slot_value=expected,threshold=0.05):8",
)  # fmt: skip


def with_model(recipe: str, model):
    """The method of a recipe with a model that is open already."""
    return dataclasses.replace(Recipe.parse(recipe).methods[0], model=model)


def near(name: str, noise: float = 0.1, **changes):
    """The target model, a little out of tune: it is often right."""
    model = tiny.build(name, **changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * noise if weight.numel() > 1 else 0)
    return model


def smaller(name: str):
    """A random model of half the width and one layer."""
    changes = {"layer_types": ["sliding_attention"]} if name == "gemma3" else {}
    return tiny.build(name, seed=5, hidden_size=16, num_hidden_layers=1, **changes)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("pads", [(0,), (0, 7, 3)], ids=len)
def test_the_greedy_text_is_that_of_plain_decoding(name, pads):
    model, inputs = tiny.shared(name), tiny.prompt(len(pads), 30, pads=pads)
    plain = decode(model, inputs, max_new_tokens=24)
    for recipe in DRAFTS[1:4]:
        assert decode(model, inputs, with_model(recipe, smaller(name)), max_new_tokens=24).rows == plain.rows
    for recipe in DRAFTS:
        out = decode(model, inputs, with_model(recipe, near(name)), max_new_tokens=24)
        assert out.rows == plain.rows and out.forwards < plain.forwards and out.draft_s > 0


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(("recipe", "sampling"), [
    ("speculative(confidence=0):3", Sampling()),
    ("speculative(confidence=0):3", Sampling(processors=(repetition_penalty(1.5),))),
    ("speculative(confidence=0):3", Sampling(temperature=1.0, top_k=9, top_p=0.95)),
    ("speculative(branches=2x1x1,confidence=0):6", Sampling(temperature=0.8, processors=(repetition_penalty(1.5),))),
    ("spectr(drafts=3):9", Sampling(temperature=0.8, processors=(repetition_penalty(1.5),))),
], ids=["greedy", "greedy with a penalty", "sampled", "sampled with a penalty", "drafts with a penalty"])  # fmt: skip
def test_a_draft_model_with_the_same_weights_is_always_right(name, recipe, sampling):
    """So its cache, its positions and its law are those of the target model, in rows of different lengths."""
    inputs = tiny.prompt(3, 30, pads=(0, 7, 3))
    out = decode(tiny.shared(name), inputs, with_model(recipe, tiny.build(name)), max_new_tokens=17, sampling=sampling)
    assert sum(out.accepted[:3]) == 0 and out.forwards == 1 + 16 // 4


class Spy:
    """Compares what a draft model says with its forward over each whole text."""

    def __init__(self, drafter: ModelDrafter) -> None:
        self.drafter, self.seen, self._begin, self._grow = drafter, 0, drafter._begin, drafter.grow
        drafter._begin, drafter.grow = self.begin, self.grow

    def fresh(self, ids: list[int]) -> torch.Tensor:
        return self.drafter.network(input_ids=torch.tensor([ids])).logits[0, -1]

    def begin(self, text):
        scores = self._begin(text)
        for row, (ids, done) in enumerate(zip(text.rows, text.done, strict=True)):
            if not done:
                torch.testing.assert_close(scores[row, 0], self.fresh(ids), atol=2e-3, rtol=1e-3)
        self.ways = [[ids] for ids in text.rows]
        return scores

    def grow(self, tokens, parents):
        scores = self._grow(tokens, parents)
        for row, done in enumerate(self.drafter.text.done):
            for i, (token, parent) in enumerate(zip(tokens[row].tolist(), parents[row].tolist(), strict=True)):
                self.ways[row].append([*self.ways[row][parent], token])
                if parent >= 0 and not done:
                    self.seen += 1
                    torch.testing.assert_close(scores[row, i], self.fresh(self.ways[row][-1]), atol=2e-3, rtol=1e-3)
        return scores


@pytest.mark.parametrize(("name", "recipe", "sampling"), [
    ("llama", "dyspec:8", Sampling(temperature=0.15, top_p=0.95)), ("gemma3", "dyspec(temperature=0.2):8", Sampling()),
    ("gpt_neox", "spectr(drafts=4):12", Sampling(temperature=1.0)),
    ("gemma3", "speculative(branches=2x2x1,confidence=0):10", Sampling()),
])  # fmt: skip
def test_what_a_draft_model_says_is_its_forward_over_the_text(name, recipe, sampling, monkeypatch):
    method = with_model(recipe, near(name, 0.2))
    spies = []
    make = type(method).drafter
    monkeypatch.setattr(type(method), "drafter", lambda self, setting: spies.append(Spy(make(self, setting))) or spies[0].drafter)
    out = decode(tiny.shared(name), tiny.prompt(3, 20, pads=(0, 7, 3)), method, max_new_tokens=14, sampling=sampling)
    assert spies[0].seen > 15 and sum(out.accepted[1:]) > 0


def test_drafts_end_where_the_draft_model_is_unsure():
    """A chain goes on while some row's newest token is as likely as asked; what is written stays the model's own."""
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 30)
    plain = decode(model, inputs, max_new_tokens=20)
    texts = torch.cat([inputs["input_ids"], torch.tensor(plain.rows)], 1)
    middle = round(float(near("llama")(input_ids=texts).logits[:, 30:].softmax(-1).amax(-1).median().detach()), 4)
    drafted = {}
    for confidence in (0, middle, 1):
        sizes: list[int] = []
        out = decode(model, inputs, with_model(f"speculative(confidence={confidence}):4", near("llama")), max_new_tokens=20,
                     watch=lambda step, sizes=sizes: sizes.append(len(step.tokens[0]) - 1))  # fmt: skip
        assert out.rows == plain.rows
        drafted[confidence] = sizes[1:3]  # the first entry is the prompt's
    assert drafted[0] == [4, 4] and drafted[1] == [1, 1] and drafted[middle] not in ([4, 4], [1, 1])


def test_in_a_tree_the_children_of_a_node_count_together():
    model, inputs, draft = tiny.shared("llama"), tiny.prompt(1, 30), near("llama")
    first = torch.tensor(decode(model, inputs, max_new_tokens=1).rows)
    law = draft(input_ids=torch.cat([inputs["input_ids"], first], 1)).logits[0, -1].softmax(-1).detach()
    together = float(law.topk(2).values.sum())
    for confidence, size in ((together - 1e-3, 4), (together + 1e-3, 2)):
        sizes: list[int] = []
        decode(model, inputs, with_model(f"speculative(branches=2x1,confidence={confidence:.6f}):4", draft), max_new_tokens=8,
               watch=lambda step, sizes=sizes: sizes.append(len(step.tokens[0]) - 1))  # fmt: skip
        assert sizes[1] == size, confidence


def test_only_new_tokens_are_read():
    out = decode(tiny.shared("llama"), tiny.prompt(1, 30), with_model("speculative:3", near("llama")), max_new_tokens=40)
    runner, steps = out.drafter.runner, sum(out.accepted)
    assert runner.forwards <= 1 + 3 * steps
    assert runner.rows <= 30 + 40 + 3 * steps  # the prompt, the text, and what was drafted in vain


def test_sampling_with_a_draft_model_follows_the_same_law():
    model, inputs = tiny.build("llama", sharpen=1.5, vocab_size=7), tiny.prompt(1, 8)
    inputs["input_ids"] = inputs["input_ids"] % 7
    many = {name: value.expand(2000, -1) for name, value in inputs.items()}
    sampling = Sampling(temperature=0.9, top_k=6, processors=(repetition_penalty(1.3),))

    def counts(recipe, seed: int) -> torch.Tensor:
        out = decode(model, many, recipe, max_new_tokens=3, sampling=sampling, seed=seed)
        return torch.bincount(torch.tensor(out.rows) @ torch.tensor([49, 7, 1]), minlength=343).double()

    plain = counts("dense", 0)
    for recipe in DRAFTS[1:]:
        drafted = counts(with_model(recipe, near("llama", 0.5, sharpen=1.5, vocab_size=7)), 1)
        cells = plain + drafted >= 20
        chi = ((plain - drafted) ** 2 / (plain + drafted))[cells].sum()
        freedom = int(cells.sum()) - 1
        assert freedom > 20 and chi < freedom + 4 * (2 * freedom) ** 0.5, recipe


def test_a_draft_model_with_fewer_positions_stops_drafting():
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 30, pads=(0, 4))
    plain = decode(model, inputs, max_new_tokens=30)
    out = decode(model, inputs, with_model("dyspec:8", near("llama", max_position_embeddings=45)), max_new_tokens=30)
    assert out.rows == plain.rows and out.forwards < plain.forwards
    assert int(out.drafter.runner.lengths.max()) <= 45
    short = with_model("speculative:4", near("llama", max_position_embeddings=20))
    assert decode(model, inputs, short, max_new_tokens=8).rows == [row[:8] for row in plain.rows]


def test_a_drafter_goes_on_with_another_text():
    model, method = tiny.shared("llama"), with_model("dyspec:8", near("llama"))
    first = decode(model, tiny.prompt(2, 30), method, max_new_tokens=20)
    other = tiny.prompt(1, 20, seed=3)
    again = decode(model, other, method, max_new_tokens=20, drafter=first.drafter)
    assert again.rows == decode(model, other, max_new_tokens=20).rows and again.forwards < 20
    assert again.drafter is first.drafter


def test_the_draft_model_is_left_as_it_was():
    draft = near("llama")
    before = draft.config._attn_implementation
    out = decode(tiny.shared("llama"), tiny.prompt(1, 30), with_model("speculative:4", draft), max_new_tokens=10)
    assert draft.config._attn_implementation == before and not draft._forward_pre_hooks
    weights = sum(p.numel() * 4 for p in draft.parameters())
    cached = 2 * 2 * 2 * 8 * 4 * int(out.drafter.runner.lengths[0] + out.drafter.runner.pending)
    assert out.draft_bytes == weights + cached  # two layers, keys and values, two heads of eight numbers of four bytes


def test_a_model_can_draft_for_itself():
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 30, pads=(0, 5))
    out = decode(model, inputs, with_model("speculative(confidence=0):4", model), max_new_tokens=21)
    assert out.rows == decode(model, inputs, max_new_tokens=21).rows and out.forwards == 5


# --- which model --------------------------------------------------------------------------------------------------------
@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """Built-in models "tale", "tale-draft", "fable", of whose tokenizers the last is another one, and "saga" with padding."""
    from laconic import models

    monkeypatch.setattr(models, "ZOO", tmp_path)
    models.vocabulary.cache_clear()
    for name, size in (("tale", 258), ("tale-draft", 258), ("fable", 258), ("saga", 260)):
        network = tiny.build("llama", vocab_size=size, seed=int(name == "tale-draft"))
        network.save_pretrained(tmp_path / name)
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(tmp_path / name)
        if name == "fable":
            file = tmp_path / name / "tokenizer.json"
            text = json.loads(file.read_text())
            pieces = text["model"]["vocab"]
            text["model"]["vocab"] = pieces | {"a": pieces["c"], "b": pieces["a"], "c": pieces["b"]}
            file.write_text(json.dumps(text))
    return tmp_path


def test_a_built_in_model_finds_its_draft_model(zoo):
    model, tokenizer = laconic.load("tale")
    inputs = tokenizer("It was a dark night.", return_tensors="pt")
    plain = decode(model, inputs, max_new_tokens=12)
    found = decode(model, inputs, "speculative:3", max_new_tokens=12)
    assert found.rows == plain.rows
    assert found.drafter.network.config._name_or_path == str(zoo / "tale-draft")
    again = decode(model, inputs, "dyspec:3", max_new_tokens=12)
    assert again.drafter.network is found.drafter.network  # opened once
    with pytest.raises(LaconicError, match="add model="):
        decode(laconic.load("fable")[0], inputs, "speculative:3")
    with pytest.raises(LaconicError, match="add model="):
        decode(tiny.shared("llama"), tiny.prompt(1, 9), "speculative:3")


def test_models_of_different_tokenizers_are_refused(zoo):
    model, tokenizer = laconic.load("tale")
    inputs = tokenizer("It was a dark night.", return_tensors="pt")
    pieces = laconic.load("fable")[1].get_vocab()
    assert 0 < sum(pieces[piece] != i for piece, i in tokenizer.get_vocab().items()) < 0.05 * len(pieces)
    with pytest.raises(LaconicError, match="different tokenizers: give one that was trained with the same"):
        decode(model, inputs, "speculative(model=fable):3")
    with pytest.raises(LaconicError, match="different tokenizers"):
        decode(model, inputs, with_model("dyspec:3", laconic.load("fable")))
    with pytest.raises(LaconicError, match="has 97 tokens and the model 258"):
        decode(model, inputs, with_model("dyspec:3", tiny.shared("llama")))


@pytest.mark.parametrize("pair", [("tale", "saga"), ("saga", "tale")], ids="-".join)
def test_a_vocabulary_may_be_padded(zoo, pair):
    model, tokenizer = laconic.load(pair[0])
    inputs = tokenizer("It was a dark night.", return_tensors="pt")
    plain = decode(model, inputs, max_new_tokens=12)
    assert decode(model, inputs, f"spectr(model={pair[1]},drafts=2):6", max_new_tokens=12).rows == plain.rows
    sampling = Sampling(temperature=1.0)
    assert len(decode(model, inputs, f"dyspec(model={pair[1]}):6", max_new_tokens=12, sampling=sampling).rows[0]) == 12


def test_a_recipe_names_its_model(tmp_path):
    recipe = Recipe.parse("dyspec(model=some/where, slot_value=expected):16")
    assert str(recipe) == "dyspec(model=some/where, slot_value=expected):16" and Recipe.parse(str(recipe)) == recipe
    named = with_model("dyspec:16", tiny.shared("llama"))
    for ending in ("json", "yaml"):
        Recipe((named,)).save(tmp_path / f"r.{ending}")
        assert Recipe.load(tmp_path / f"r.{ending}").methods[0].model == "LlamaForCausalLM"
    assert dataclasses.replace(named, budget=8).model.network is tiny.shared("llama")


@pytest.mark.parametrize(("text", "reason"), [
    ("speculative(branches=4x2):8", "are 12 tokens: give a budget of 12"), ("speculative(branches=4xa):8", "counts such as"),
    ("spectr:4", "8 drafts need a budget of 8"), ("dyspec(slot_value=best):8", "product or expected"),
    ("dyspec(temperature=0):8", "at least 0.01"), ("spectr(verifier=rejection)", "k_seq, match, typical"),
    ("speculative(model=no/such/folder/here):4", "There is no model folder"),
])  # fmt: skip
def test_parameters_that_cannot_work_are_one_sentence(text, reason):
    with pytest.raises(LaconicError, match=reason):
        decode(tiny.shared("llama"), tiny.prompt(1, 10), text)
