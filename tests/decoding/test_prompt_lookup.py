"""Prompt lookup against a search through the text."""

from __future__ import annotations

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import get
from laconic.decoding.base import go_on


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 9))
def test_what_followed_the_newest_words_before_is_drafted(ids, ngram, nodes):
    drafter = get("prompt_lookup", ngram=ngram, budget=str(nodes)).drafter(SimpleNamespace(text=SimpleNamespace(rows=[ids])))
    for known in range(1, len(ids) + 1):  # the text grows, as in decoding
        text = ids[:known]
        ends = ([e for e in range(k, known) if text[e - k : e] == text[-k:]] for k in range(min(ngram, known - 1), 0, -1))
        place = next((found[-1] for found in ends if found), None)
        expected = [] if place is None else go_on(text, place, nodes)
        assert drafter.propose_row(0, text, 100) == ([text[-1], *expected], list(range(-1, len(expected))))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.data(), st.integers(1, 30))
def test_a_text_goes_on_as_a_copy_that_overlaps_itself(ids, data, count):
    end = data.draw(st.integers(0, len(ids) - 1))
    longer = [*ids]
    for i in range(count):
        longer.append(longer[end + i])
    assert go_on(ids, end, count) == longer[len(ids) :]
