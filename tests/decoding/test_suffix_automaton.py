"""The suffix automaton against a search through the text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError, get
from laconic.decoding.engine import decode
from laconic.decoding.suffix_automaton import CLIMB, Automaton
from tests import tiny

texts = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def longest_match(ids):
    """Length of the longest suffix that also ends earlier, and where such a one ended last."""
    for size in range(len(ids) - 1, 0, -1):
        ends = [end for end in range(size, len(ids)) if ids[end - size : end] == ids[-size:]]
        if ends:
            return size, ends[-1], len(ends)
    return 0, 0, 0


def draft(ids, **parameters):
    drafter = get("suffix_automaton", **parameters).drafter(SimpleNamespace(text=SimpleNamespace(rows=[ids])))
    return drafter.propose_row(0, ids, 100)


@settings(max_examples=300, deadline=None)
@given(texts)
def test_the_match_is_the_longest_one(ids):
    automaton = Automaton()
    for end, token in enumerate(ids):
        automaton.add(token)
        size, place, times = longest_match(ids[: end + 1])
        assert automaton.length[automaton.match] == size
        if size:
            found = automaton.ends[automaton.match]
            assert ids[found - size : found] == ids[end + 1 - size : end + 1] and found <= end
            if end <= CLIMB:  # no more suffixes than are told of every occurrence
                assert (found, automaton.counts[automaton.match]) == (place, times)
    assert len(automaton.onward) <= 2 * len(ids) + 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=CLIMB), st.integers(1, 9))
def test_what_followed_the_match_is_drafted(ids, nodes):
    tokens, parents = draft(ids, budget=str(nodes))
    size, place, _ = longest_match(ids)
    if size == 0:
        assert (tokens, parents) == ([ids[-1]], [-1])
    else:
        longer = [*ids]
        while len(longer) < place + nodes:
            longer.append(longer[place + len(longer) - len(ids)])
        assert tokens == [ids[-1], *longer[place : place + nodes]]
        assert parents == list(range(-1, nodes))
    assert draft(ids, least=size + 1) == ([ids[-1]], [-1])


@settings(max_examples=100, deadline=None)
@given(texts, st.integers(1, 9))
def test_the_tree_holds_only_what_followed_the_match(ids, nodes):
    tokens, parents = draft(ids, budget=str(nodes), follow="often")
    size = longest_match(ids)[0]
    assert len(tokens) <= nodes + 1 and len(set(zip(parents, tokens, strict=True))) == len(tokens)
    paths = [[]]
    for node in range(1, len(tokens)):
        paths.append([*paths[parents[node]], tokens[node]])
        part = [*ids[-size:], *paths[-1]]
        assert any(ids[i : i + len(part)] == part for i in range(len(ids)))
    if size and len(tokens) > 1:
        follows = [ids[end] for end in range(size, len(ids)) if ids[end - size : end] == ids[-size:]]
        assert tokens[1] in follows


def test_the_tree_begins_with_what_came_most_often():
    ids = [5, 1, 8, 5, 2, 8, 5, 1, 9, 5, 1, 7, 5]
    tokens, parents = draft(ids, budget="2", follow="often")
    assert tokens[:2] == [5, 1] and parents[:2] == [-1, 0]


def test_learning_takes_time_in_proportion():
    """No more states and links are touched than a small multiple of the tokens, for the texts that are worst for it."""
    for ids in ([1] * 3000, [1, 2] * 1500, [1] * 1500 + [2] * 1500, torch.randint(0, 3, (3000,)).tolist()):
        automaton = Automaton()
        for token in ids:
            automaton.add(token)
        assert len(automaton.onward) <= 2 * len(ids)
        assert sum(map(len, automaton.onward)) <= 3 * len(ids)


@pytest.mark.parametrize("follow", ["last", "often"])
def test_the_greedy_text_is_that_without_drafts(follow):
    model, inputs = tiny.shared("llama"), tiny.prompt(2, 40, pads=(0, 5))
    plain = decode(model, inputs, max_new_tokens=80)
    drafted = decode(model, inputs, f"suffix_automaton(follow={follow}):8", max_new_tokens=80)
    assert drafted.rows == plain.rows and drafted.draft_bytes > 0


def test_an_unknown_way_to_follow_is_refused():
    with pytest.raises(LaconicError, match="last or often"):
        get("suffix_automaton", follow="first")
