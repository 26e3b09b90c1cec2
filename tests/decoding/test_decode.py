"""The engine: drafts change how many forwards there are, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from laconic import LaconicError, get, load
from laconic.decoding.base import Drafter, DraftMethod
from laconic.decoding.engine import decode
from laconic.decoding.runner import Runner
from laconic.decoding.sampling import Sampling, repetition_penalty
from laconic.decoding.tree import DraftTree, TreeShape
from laconic.hooks import apply
from tests import tiny

DRAFTS = ("prompt_lookup:6", "token_recycling:12", "token_recycling(prompt=true, successors=3):5")


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_greedy_text_is_that_of_transformers(name):
    inputs = tiny.prompt(1, 40)
    expected = tiny.generate(tiny.shared(name), inputs, 40)[:, 40:].tolist()
    for draft in ("dense", *DRAFTS):
        assert decode(tiny.shared(name), inputs, draft, max_new_tokens=40).rows == expected


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox"])
def test_rows_of_a_batch_accept_different_numbers(name):
    inputs = tiny.prompt(3, 40, pads=(0, 7, 3))
    expected = tiny.generate(tiny.shared(name), inputs, 90)[:, 40:].tolist()
    for draft in ("dense", *DRAFTS):
        assert decode(tiny.shared(name), inputs, draft, max_new_tokens=90).rows == expected


@pytest.mark.parametrize("recipe", [
    "tokenselect(recent=4):28", "quest(recent=4):28", "hisa(recent=4,block=4):28", "recycled_attention(recent=4):28",
    "longheads(recent=4):28", "coarse_to_fine(recent=4,block=4):28", "zerotuning", "snapkv(recent=4,window=4):28",
    "h2o(recent=4,once=true):28", "tokenselect(recent=4):28 + snapkv(recent=4,window=4):40",
])  # fmt: skip
def test_a_sparse_recipe_is_verified_against_its_own_choice(recipe):
    inputs, model = tiny.prompt(1, 60), tiny.shared("llama")
    alone = decode(model, inputs, recipe, max_new_tokens=40)
    drafted = decode(model, inputs, f"{recipe} + token_recycling:8", max_new_tokens=40)
    assert drafted.rows == alone.rows
    assert drafted.forwards < alone.forwards


@pytest.mark.parametrize("recipe", [
    "razor_attention(once=true):30%", "adakv(snapkv(once=true)):20%", "duo_attention(once=true):40%", "tova(once=true):10%",
])  # fmt: skip
def test_drafting_over_heads_that_keep_different_tokens(recipe):
    """Ragged caches, and the entry that stands for dropped tokens, count for every node of a tree."""
    model, _ = load("needle")
    ids = torch.randint(5, model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    alone = decode(model, inputs, recipe, max_new_tokens=40)
    drafted = decode(model, inputs, f"{recipe} + token_recycling:8", max_new_tokens=40)
    assert drafted.rows == alone.rows
    assert drafted.forwards < alone.forwards


@pytest.mark.parametrize(("recipe", "reason"), [
    ("h2o:28", "add once=true"), ("tidaldecode(recent=4,start=1):28", "over layers"),
    ("streaming(positions=compact,once=true):28", "leave it out"), ("prompt_lookup:4", "both draft"),
])  # fmt: skip
def test_what_a_draft_cannot_undo_is_refused(recipe, reason):
    with pytest.raises(LaconicError, match=reason):
        decode(tiny.shared("llama"), tiny.prompt(1, 60), f"{recipe} + token_recycling:8", max_new_tokens=4)


def test_a_sparse_recipe_drafts_for_one_prompt():
    with pytest.raises(LaconicError, match="give a single prompt"):
        decode(tiny.shared("llama"), tiny.prompt(2, 60), "tokenselect(recent=4):28 + prompt_lookup:4")


class Wrong(Drafter):
    """Drafts what the model will certainly not say."""

    def propose(self, text, room):
        roots = text.roots()
        return DraftTree.chain(torch.stack([roots, *[(roots + 1) % self.setting.vocabulary] * 3], dim=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongMethod(DraftMethod):
    """Test only."""

    id = "wrong"
    paper = "none"

    def drafter(self, setting):
        return Wrong(self, setting)


def test_a_drafter_that_errs_costs_no_forward():
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 20)
    plain = decode(model, inputs, max_new_tokens=30)
    wrong = decode(model, inputs, WrongMethod(), max_new_tokens=30)
    assert wrong.rows == plain.rows
    assert wrong.forwards <= 1.1 * plain.forwards


def test_sampling_with_any_draft_follows_the_same_law():
    model, inputs = tiny.build("llama", sharpen=1.5, vocab_size=7), tiny.prompt(1, 8)
    inputs["input_ids"] = inputs["input_ids"] % 7
    rows = 4000
    many = {name: value.expand(rows, -1) for name, value in inputs.items()}
    sampling = Sampling(temperature=0.9, processors=(repetition_penalty(1.3),))
    counts = []
    for draft in ("dense", "token_recycling:6"):
        out = decode(model, many, draft, max_new_tokens=3, sampling=sampling, seed=1)
        codes = torch.tensor(out.rows) @ torch.tensor([49, 7, 1])
        counts.append(torch.bincount(codes, minlength=343).double())
    both = counts[0] + counts[1]
    cells = both >= 20
    chi = ((counts[0] - counts[1]) ** 2 / both)[cells].sum()
    freedom = int(cells.sum()) - 1
    assert freedom > 20
    assert chi < freedom + 4 * (2 * freedom) ** 0.5


def test_penalties_look_at_the_way_to_a_node():
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 30)
    sampling = Sampling(processors=(repetition_penalty(1.5),))
    expected = tiny.generate(model, inputs, 40, repetition_penalty=1.5)[:, 30:].tolist()
    for draft in ("dense", *DRAFTS):
        assert decode(model, inputs, draft, max_new_tokens=40, sampling=sampling).rows == expected


def test_a_text_ends_at_its_end_and_not_behind_it():
    model, inputs = tiny.shared("llama"), tiny.prompt(3, 30)
    whole = decode(model, inputs, max_new_tokens=30).rows
    end = whole[0][12]
    for draft in ("dense", *DRAFTS):
        rows = decode(model, inputs, draft, max_new_tokens=30, ends=[end]).rows
        assert rows == [row[: row.index(end) + 1] if end in row else row for row in whole]
        stopped = decode(model, inputs, draft, max_new_tokens=30, stop=lambda row, new: len(new) == 5 + row).rows
        assert stopped == [row[: 5 + i] for i, row in enumerate(whole)]


def test_the_steps_that_are_watched_tell_the_whole_text():
    seen = [[], []]
    told = []
    out = decode(tiny.shared("llama"), tiny.prompt(2, 30), "token_recycling:8", max_new_tokens=20, watch=told.append)
    for step in told:
        for row, new in enumerate(step.new):
            seen[row] += new
            assert [step.tokens[row][i] for i in step.accepted[row]][: len(new)] == new[: len(step.accepted[row])]
    assert seen == out.rows
    assert sum(out.accepted) == sum(bool(new) for step in told[1:] for new in step.new)


def test_a_hot_start_goes_on_with_what_was_learned():
    model, inputs = tiny.shared("llama"), tiny.prompt(1, 30)
    first = decode(model, inputs, "token_recycling:8", max_new_tokens=30)
    table = first.drafter.table.clone()
    again = decode(model, inputs, "token_recycling:8", max_new_tokens=30, drafter=first.drafter)
    assert again.rows == first.rows and again.drafter is first.drafter
    assert table.any() and first.draft_bytes == table.numel() * 4


@pytest.mark.parametrize("draft", ["prompt_lookup:6", "suffix_automaton:6", "token_recycling:8", "trigram_mcts:8"])
def test_a_drafter_goes_on_with_another_text(draft):
    """It drafts no worse than a new one where it knows nothing but the text."""
    model, first, other = tiny.shared("llama"), tiny.prompt(1, 30), tiny.prompt(2, 45, seed=5)
    fresh = decode(model, other, draft, max_new_tokens=30)
    used = decode(model, first, draft, max_new_tokens=30).drafter
    again = decode(model, other, draft, max_new_tokens=30, drafter=used)
    assert again.rows == fresh.rows
    if draft.startswith(("prompt", "suffix")):
        assert again.accepted == fresh.accepted


def test_settling_a_tree_leaves_the_cache_of_a_plain_run():
    """Keys and values of accepted nodes are those of the text alone, in the same order and place."""
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 20)
    parents = torch.tensor([[-1, 0, 0, 1, 2, 4], [-1, 0, 1, 2, 3, 4]])
    tokens = torch.randint(2, tiny.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    paths = torch.tensor([[0, 2, 4, 5], [0, 1, -1, -1]])
    with torch.inference_mode(), apply(model, "dense") as handle:
        runner = Runner(handle)
        runner.prefill(inputs)
        runner.run(tokens, TreeShape(parents))
        runner.settle(paths)
        runner.cache.close_gaps()
        for row, path in enumerate(paths.tolist()):
            ids = torch.cat([inputs["input_ids"][row], tokens[row, [i for i in path if i >= 0]]])[None]
            plain = handle.cache()
            model(input_ids=ids, cache=plain, use_cache=True)
            for ours, theirs in zip(runner.cache.layers, plain.layers, strict=True):
                n = theirs.n
                torch.testing.assert_close(ours.keys[row, :, -n:], theirs.keys[0])
                torch.testing.assert_close(ours.values[row, :, -n:], theirs.values[0])
                assert ours.positions[row, 0, -n:].tolist() == list(range(n))
                assert bool((ours.positions[row, :, :-n] < 0).all())


def test_a_fork_is_restored_to_the_byte():
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 20)
    with torch.inference_mode(), apply(model, "dense") as handle:
        runner = Runner(handle)
        runner.prefill(inputs)
        kept = runner.cache.fork()
        before = [(layer.keys.clone(), layer.values.clone(), layer.positions.clone()) for layer in runner.cache.layers]
        runner.run(torch.ones(2, 4, dtype=torch.int64), TreeShape.chain(3, 2))
        runner.settle(torch.tensor([[0, 1, 2], [0, -1, -1]]))
        runner.cache.restore(kept)
        for layer, saved in zip(runner.cache.layers, before, strict=True):
            assert all(torch.equal(a, b) for a, b in zip((layer.keys, layer.values, layer.positions), saved, strict=True))


def test_nodes_that_come_later_see_what_they_hang_on():
    """A tree grown in two forwards gives the logits of the same tree in one."""
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 20)
    parents = torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 1, 2, 0]])
    tokens = torch.randint(2, tiny.VOCABULARY, (2, 5))
    with torch.inference_mode(), apply(model, "dense") as handle:
        runner = Runner(handle)
        runner.prefill(inputs)
        kept = runner.cache.fork()
        whole = runner.run(tokens, TreeShape(parents)).logits
        runner.cache.restore(kept)
        runner.pending = 0
        first = runner.run(tokens[:, :3], TreeShape(parents[:, :3])).logits
        more = runner.grow(tokens[:, 3:], parents[:, 3:]).logits
    torch.testing.assert_close(torch.cat([first, more], dim=1), whole)


def test_the_last_positions_of_a_model_are_not_passed():
    model = tiny.build("llama", max_position_embeddings=40)
    inputs = tiny.prompt(1, 30)
    plain = decode(model, inputs, max_new_tokens=10)
    assert decode(model, inputs, "token_recycling:12", max_new_tokens=10).rows == plain.rows


@pytest.mark.parametrize(("text", "reason"), [
    ("token_recycling:10%", "number of tokens drafted"), ("prompt_lookup(ngram=0):4", "at least 1"),
    ("token_recycling(verifier=guess):4", "verifier must be one of match, typical"),
    ("token_recycling:512", "512 drafted tokens are more than the model's 512 positions"),
])  # fmt: skip
def test_parameters_that_cannot_work_are_one_sentence(text, reason):
    with pytest.raises(LaconicError, match=reason):
        decode(tiny.shared("llama"), tiny.prompt(1, 10), text)


def test_a_typical_verifier_says_that_it_is_lossy():
    assert get("token_recycling", verifier="typical").promise == "lossy"
    assert get("token_recycling").promise == "exact in distribution" and str(get("token_recycling")) == "token_recycling:24"
    out = decode(tiny.shared("llama"), tiny.prompt(1, 30), "token_recycling(verifier=typical):8", max_new_tokens=20,
                 sampling=Sampling(temperature=1.0))  # fmt: skip
    assert len(out.rows[0]) == 20
