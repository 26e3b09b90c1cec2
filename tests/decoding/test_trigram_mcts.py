"""ADED: the table is what the text says, the search is the one of the paper, and drafts stand in the table."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError, get
from laconic.decoding.engine import decode
from laconic.decoding.trigram_mcts import CAP, TrigramTable
from laconic.kernels import cpu_trigrams
from laconic.profiles import make_profile
from tests import tiny

texts = st.lists(st.integers(0, 5), min_size=3, max_size=60)


def table_of(ids, bump=0.04, limit=10_000):
    table = TrigramTable(limit)
    table.observe(ids, bump)
    return table


def setting(rows, seed=0):
    text = SimpleNamespace(rows=rows)
    return SimpleNamespace(text=text, model=tiny.shared("llama"), generator=torch.Generator().manual_seed(seed))


def search(table, a, b, *, iterations=150, most=24, summed=True, seed=7):
    return cpu_trigrams.search(a, b, iterations, most, summed, 32.0, 8.0, np.array([seed], np.uint64), *table.arrays).tolist()


@settings(max_examples=50, deadline=None)
@given(texts)
def test_scores_count_occurrences_in_all_windows(ids):
    drafter = get("trigram_mcts", window=16).drafter(setting([ids]))
    expected = defaultdict(int)
    for end in range(1, len(ids) + 1):
        drafter.propose_row(0, ids[:end], 10)
        window = ids[:end][-16:]
        for triple in zip(window, window[1:], window[2:], strict=False):
            expected[triple] += 1
    scores = drafter.table.scores_of()
    assert scores.keys() == expected.keys()
    assert all(math.isclose(scores[t], min(CAP, 0.04 * n)) for t, n in expected.items())


@settings(max_examples=50, deadline=None)
@given(texts, st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**31))
def test_what_is_drafted_stands_in_the_table(ids, nodes, room, seed):
    drafter = get("trigram_mcts", budget=str(nodes)).drafter(setting([ids], seed))
    tokens, parents = drafter.propose_row(0, ids, room)
    assert len(tokens) <= nodes + 1 and tokens[0] == ids[-1]
    known, before, depths = drafter.table.scores_of(), [ids[-2]], [0]
    for node in range(1, len(tokens)):
        parent = parents[node]
        assert (before[parent], tokens[parent], tokens[node]) in known
        before.append(tokens[parent])
        depths.append(depths[parent] + 1)
    assert max(depths) <= min(room, 4)
    assert len(set(zip(parents, tokens, strict=True))) == len(tokens)
    again = get("trigram_mcts", budget=str(nodes)).drafter(setting([ids], seed))
    assert again.propose_row(0, ids, room) == (tokens, parents)


def plain_search(scores, a, b, iterations, most, summed):
    """The search in plain Python, where every pair has at most one successor at the last level, so that nothing is drawn."""
    after = defaultdict(list)
    for (x, y, z), score in scores.items():
        after[x, y].append((z, score))
    root = {"key": (a, b), "path": (), "n": 0, "q": 0.0, "p": 0.0, "children": [], "up": None}
    nodes = [root]
    for _ in range(iterations):
        node, reward = root, 1.0
        while node["children"]:
            factor = (32.0 + math.log((node["n"] + 9.0) / 8.0)) * math.sqrt(node["n"])
            node = max(node["children"], key=lambda c: c["q"] / c["n"] + factor * c["p"] / (1 + c["n"]) if c["n"] else math.inf)
            reward += node["p"]
        if len(node["path"]) < 3 and after[node["key"]]:
            for z, score in after[node["key"]]:
                child = {"key": (node["key"][1], z), "path": (*node["path"], z), "n": 0, "q": 0.0, "p": score, "children": [],
                         "up": node}  # fmt: skip
                node["children"].append(child)
                nodes.append(child)
            node = node["children"][-1]
            reward += node["p"]
        key, depth = node["key"], len(node["path"])
        while depth < 3 and after[key]:
            (z, score), = after[key]  # a chain: nothing to draw
            reward, key, depth = reward + score, (key[1], z), depth + 1
        while node is not None:
            node["n"], node["q"], node = node["n"] + 1, node["q"] + (reward if summed else 1.0), node["up"]
    best = sorted(nodes, key=lambda node: -node["n"])[:most]
    best = [node for node in best if node["n"] and node["path"]]
    found = []
    for node in best:
        more = after[node["key"]]
        last = (max(more, key=lambda item: item[1])[0],) if more else ()
        path = node["path"] + last
        found.append([*path, *[-1] * (4 - len(path))])
    return found


@pytest.mark.parametrize("summed", [True, False])
def test_the_search_is_that_of_the_paper(summed):
    rng = np.random.default_rng(5)
    triples, fresh = [], iter(range(100, 10_000))
    for first in range(2, 8):  # six first tokens; a chain after each, of its own tokens
        chain = [0, 1, first, *(next(fresh) for _ in range(5))]
        triples += list(zip(chain, chain[1:], chain[2:], strict=False))
    triples = list(dict.fromkeys(triples))
    scores = rng.uniform(0.05, 2.0, len(triples))
    table = TrigramTable(10_000)
    table.add(np.array(triples), scores)
    known = table.scores_of()
    for iterations in (1, 2, 7, 40, 150):
        expected = plain_search(known, 0, 1, iterations, 24, summed)
        assert search(table, 0, 1, iterations=iterations, summed=summed) == expected


def test_roll_outs_follow_the_scores():
    table = TrigramTable(10_000)
    table.add(np.array([[0, 1, 2], [1, 2, 3], [1, 2, 4]]), np.array([1.0, 0.9, 0.1]))
    state, slot = np.array([3], np.uint64), table.slots[cpu_trigrams._place(1, 2, table.slots, table.keys)]
    drawn = [int(table.tokens[cpu_trigrams._drawn(slot, table.first, table.tokens, table.next, table.scores, state)])
             for _ in range(4000)]  # fmt: skip
    assert abs(drawn.count(3) / 4000 - 0.9) < 0.02 and set(drawn) == {3, 4}


def test_a_full_table_forgets_what_was_not_met_for_longest():
    table = TrigramTable(10_000)
    rng = np.random.default_rng(0)
    for _ in range(30):
        table.observe(rng.integers(0, 1000, 1000), 0.04)
        table.observe([7, 8, 9], 0.04)
    assert table.used[1] <= 10_000
    newest = rng.integers(0, 1000, 1000).tolist()
    table.observe(newest, 0.04)
    known = table.scores_of()
    assert all(triple in known for triple in zip(newest, newest[1:], newest[2:], strict=False))
    assert math.isclose(known[7, 8, 9], 30 * 0.04)


def test_a_table_grows_without_losing_anything():
    ids = np.random.default_rng(1).integers(0, 60, 9000).tolist()
    table = table_of(ids, limit=100_000)
    expected = defaultdict(int)
    for triple in zip(ids, ids[1:], ids[2:], strict=False):
        expected[triple] += 1
    assert table.scores_of() == pytest.approx({t: min(CAP, 0.04 * n) for t, n in expected.items()})


@pytest.mark.parametrize("recipe", [
    "trigram_mcts:12", "trigram_mcts(reward=constant, observe_prompt=true):24", "trigram_mcts(iterations=10, paths=4):3",
])  # fmt: skip
def test_the_greedy_text_is_that_without_drafts(recipe):
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 40, pads=(0, 5))
    plain = decode(model, inputs, max_new_tokens=60)
    drafted = decode(model, inputs, recipe, max_new_tokens=60)
    assert drafted.rows == plain.rows and drafted.draft_bytes > 0
    again = decode(model, inputs, recipe, max_new_tokens=60)
    assert (again.nodes, again.accepted) == (drafted.nodes, drafted.accepted)


def test_a_corpus_gives_a_better_start(tmp_path):
    """A profile of the very text that follows: drafts are accepted from the first step on."""
    model, inputs = tiny.shared("llama"), tiny.prompt(1, 40)
    plain = decode(model, inputs, max_new_tokens=40)
    whole = torch.tensor([*inputs["input_ids"][0].tolist(), *plain.rows[0]])
    path = tmp_path / "table.json"
    made = make_profile("trigram_mcts", model, [whole], seed=0)
    made.save(path)
    assert max(made.tables["shares"]) <= 1.0
    cold = decode(model, inputs, "trigram_mcts:12", max_new_tokens=40)
    warm = decode(model, inputs, f"trigram_mcts(profile={path}):12", max_new_tokens=40)
    assert warm.rows == cold.rows == plain.rows
    assert warm.forwards < 0.6 * cold.forwards
    with pytest.raises(LaconicError, match="of another model"):
        decode(tiny.build("llama", seed=1), inputs, f"trigram_mcts(profile={path})", max_new_tokens=4)


def test_a_profile_keeps_the_most_frequent_successors():
    ids = torch.tensor([token for third in range(20) for token in [1, 2, 10 + third] * (1 + third)])
    tables = get("trigram_mcts").calibrate(None, [ids])
    kept = dict(zip(map(tuple, tables["trigrams"]), tables["shares"], strict=True))
    after = {third for first, second, third in kept if (first, second) == (1, 2)}
    assert after == set(range(18, 30))
    assert kept[1, 2, 29] == pytest.approx(20 / 210, abs=1e-6)


@pytest.mark.parametrize(("text", "reason"), [
    ("trigram_mcts(reward=half)", "sum or constant"), ("trigram_mcts(profile=none.json)", "is no file"),
    ("trigram_mcts(window=2)", "at least 3"),
])  # fmt: skip
def test_parameters_that_cannot_work_are_one_sentence(text, reason):
    with pytest.raises(LaconicError, match=reason):
        decode(tiny.shared("llama"), tiny.prompt(1, 10), text)
