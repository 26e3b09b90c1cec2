"""Constraints: what they allow, what is a text, and that masks of grammars are what their checks say."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import laconic
from laconic import LaconicError
from laconic.decoding.constraints import (
    Vocabulary,
    characters,
    json_schema,
    lark,
    masked,
    predicate,
    regex,
    token_bytes,
)
from laconic.decoding.engine import decode
from laconic.decoding.sampling import Sampling, Text
from laconic.decoding.tree import DraftTree, TreeShape
from tests import tiny

ASCII = Vocabulary((None, None, *(bytes([code]) for code in range(32, 127))), frozenset([1]))  # fits the tiny models
PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
}  # fmt: skip


def ids(text: str) -> list[int]:
    return [ord(c) - 30 for c in text]


@pytest.fixture(scope="module")
def tokenizer():
    return laconic.load("needle")[1]


def even(limit: int = 4):
    """Texts of a's and b's with as many of one as of the other, ``limit`` of each at most."""
    def prefix(text):
        return set(text) <= {"a", "b"} and max(text.count("a"), text.count("b")) <= limit

    return predicate(prefix, lambda text: text.count("a") == text.count("b") and prefix(text), ASCII)


def test_a_predicate_says_what_may_follow_and_where_a_text_may_end():
    constraint = even()
    for text in map("".join, itertools.product("abc", repeat=4)):
        assert constraint.accepts(ids(text)) == (text.count("a") == text.count("b") == 2)
        assert constraint.accepts([*ids(text), 1, 70]) == constraint.accepts(ids(text))  # what follows the end is not looked at
    state = constraint.start
    assert state.complete and state.ok(1) and not state.ok(0) and not state.ok(200)
    one = state.after(ids("a")[0])
    assert not one.complete and not one.ok(1) and one.after(ids("b")[0]).ok(1)
    assert state.after(ids("a")[0]) is one  # particles that share a past share what was found out
    assert np.flatnonzero(one.mask()).tolist() == ids("ab")


def test_a_character_may_come_in_pieces():
    vocabulary = Vocabulary((None, b"\xc3", b"\xa9", b"e", b"\xff"), frozenset([0]))
    constraint = predicate(lambda text: set(text) <= {"é"}, lambda text: text == "éé", vocabulary)
    assert [constraint.start.ok(token) for token in range(5)] == [False, True, False, False, False]
    half = constraint.start.after(1)
    assert not half.complete and half.ok(2) and not half.ok(1) and not half.ok(0)
    assert constraint.accepts([1, 2, 1, 2]) and not constraint.accepts([1, 2, 1])
    full = half.after(2).after(1).after(2)
    assert full.complete
    done = predicate(lambda text: text in ("", "é"), lambda text: text == "é", vocabulary).start.after(1).after(2)
    assert np.flatnonzero(done.mask()).tolist() == [0]  # where nothing can follow, no character can begin


@given(st.characters(exclude_categories=["Cs"]), st.integers(1, 3))
def test_what_a_character_may_become_begins_as_it_does(character, cut):
    rest = character.encode()[:cut]
    if len(rest) < len(character.encode()):
        found = characters(rest)
        assert 0 < len(found) <= 64 and all(other.encode().startswith(rest) for other in found)
        assert len(character.encode()) - len(rest) > 1 or character in found


def test_the_bytes_of_tokens_are_those_that_the_tokenizer_writes(tokenizer):
    pieces = token_bytes(tokenizer)
    text = "Naïve café: 3 × 4 = 12\n\tdef f(x):  # ünïcode 漢字 🙂"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(pieces[token] for token in tokens) == text.encode()
    assert all(pieces[token] is None for token in tokenizer.all_special_ids)
    assert all(pieces[tokenizer.convert_tokens_to_ids(name)].startswith(b" ") for name in list(tokenizer.get_added_vocab())[3:6])


@pytest.mark.parametrize("kind", ["sentencepiece", "wordpiece", "suffix"])
def test_the_bytes_of_other_kinds_of_tokens(kind):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words, expected, decoder = {
        "sentencepiece": (["<s>", "<0xC3>", "<0xA9>", "▁the", "n", "▁"], [None, b"\xc3", b"\xa9", b" the", b"n", b" "],
                          decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])),
        "wordpiece": (["<s>", "the", "##n"], [None, b" the", b"n"], decoders.WordPiece()),
        "suffix": (["<s>", "the</w>", "n"], [None, b"the ", b"n"], decoders.BPEDecoder()),
    }[kind]  # fmt: skip
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    core.decoder = decoder
    core.add_special_tokens(["<s>"])
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<s>")) == expected


def test_tokenizers_that_do_not_say_what_tokens_write_are_refused(tokenizer):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    core.decoder = decoders.CTC()
    with pytest.raises(LaconicError, match="CTC"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=core))
    with pytest.raises(LaconicError, match="fast tokenizer"):
        token_bytes(object())
    with pytest.raises(LaconicError, match="ends="):
        Vocabulary.of(object())
    with pytest.raises(LaconicError, match="cannot be satisfied"):
        predicate(lambda text: False, lambda text: False, ASCII)


class TestGrammars:
    """Of llguidance."""

    @pytest.fixture(autouse=True)
    def _library(self):
        pytest.importorskip("llguidance")

    @given(st.text(alphabet="ab-0", max_size=8))
    @settings(max_examples=60, deadline=None)
    def test_a_pattern_accepts_what_python_matches(self, text):
        constraint = regex(r"(ab|0+)-?b{1,3}", ASCII)
        assert constraint.accepts(ids(text)) == bool(re.fullmatch(r"(ab|0+)-?b{1,3}", text))

    @pytest.mark.parametrize("make", [
        lambda t: regex(r" [0-9]{3}/[0-9]{4}\.", t), lambda t: regex(" Hello world, (yes|no)", t),
        lambda t: json_schema(PERSON, t),
        lambda t: json_schema(json.dumps(PERSON), t, spaces=True), lambda t: lark('start: "a" start "b" | " " /[0-9]+/', t),
    ])  # fmt: skip
    def test_masks_say_what_checks_say_and_prefixes_stay_valid(self, make, tokenizer):
        constraint, rng = make(tokenizer), np.random.default_rng(0)
        end = tokenizer.eos_token_id
        for _ in range(3):
            state, text = constraint.start, []
            for _ in range(25):
                mask = state.mask()
                assert (mask == state.test_all()).all() and mask[end] == state.complete == constraint.accepts(text)
                following = np.flatnonzero(mask)
                following = following[following != end]
                if not len(following):
                    break
                text.append(int(rng.choice(following)))
                state = state.after(text[-1])

    def test_json_that_is_accepted_is_json_of_the_schema(self, tokenizer):
        constraint = json_schema(PERSON, tokenizer)
        good, bad = '{"name":"Ann","age":42}', '{"name":"Ann","age":420}'
        tokens = tokenizer(good, add_special_tokens=False)["input_ids"]
        assert constraint.accepts(tokens) and not constraint.accepts(tokens[:-1])
        assert not constraint.accepts(tokenizer(bad, add_special_tokens=False)["input_ids"])
        spaced = tokenizer('{"name": "Ann", "age": 42}', add_special_tokens=False)["input_ids"]
        assert not constraint.accepts(spaced) and json_schema(PERSON, tokenizer, spaces=True).accepts(spaced)

    @pytest.mark.parametrize(("make", "reason"), [
        (lambda: regex("[", ASCII), "The pattern '\\[' cannot be used"), (lambda: lark("start: x", ASCII), "unknown name"),
        (lambda: json_schema({"enum": []}, ASCII), "Unsatisfiable schema"), (lambda: json_schema("{", ASCII), "not JSON"),
        (lambda: lark("start: A\nA: /a+/ & /b+/", ASCII), "cannot be"), (lambda: regex("é", ASCII), "cannot be satisfied"),
    ])  # fmt: skip
    def test_what_cannot_work_is_one_sentence(self, make, reason):
        with pytest.raises(LaconicError, match=reason) as error:
            make()
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("name", ["llama", "gpt_neox"])
    def test_greedy_text_under_a_grammar_is_valid_with_any_draft(self, name):
        constraint = json_schema(PERSON, ASCII)
        sampling = Sampling(processors=(masked(constraint),))
        plain = decode(tiny.shared(name), tiny.prompt(2, 30, pads=(0, 5)), max_new_tokens=40, sampling=sampling, ends=[1])
        for row in plain.rows:  # ages have three digits at most, so that all end
            made = json.loads("".join(chr(token + 30) for token in row[:-1]))
            assert row[-1] == 1 and constraint.accepts(row) and set(made) == {"name", "age"} and made["age"] <= 150
        for draft in ("prompt_lookup:5", "token_recycling:8"):
            drafted = decode(tiny.shared(name), tiny.prompt(2, 30, pads=(0, 5)), draft, max_new_tokens=40, sampling=sampling,
                             ends=[1])  # fmt: skip
            assert drafted.rows == plain.rows


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    for make in (lambda: regex("a", ASCII), lambda: json_schema({}, ASCII), lambda: lark('start: "a"', ASCII)):
        with pytest.raises(LaconicError, match=r"pip install 'laconic\[constrain\]'"):
            make()


def test_masks_follow_the_nodes_of_a_tree():
    constraint = even()
    text = Text([ids("xy")])
    text.rows[0] += ids("a")
    a, b, c = ids("abc")
    tree = DraftTree(torch.tensor([[a, b, a, c, b]]), TreeShape(torch.tensor([[-1, 0, 0, 0, 2]])))
    left = masked(constraint)(torch.zeros(1, 5, 97), text, tree)
    allowed = [np.flatnonzero((row == 0).numpy()).tolist() for row in left[0]]
    assert allowed == [[a, b], [1, a, b], [a, b], [1], [a, b]]  # nothing can follow c: the text ends


def test_a_dead_end_ends_the_text_unfinished():
    constraint = predicate(lambda text: text in ("", "a"), lambda text: False, ASCII)
    sampling = Sampling(processors=(masked(constraint),))
    out = decode(tiny.shared(), tiny.prompt(1, 10), max_new_tokens=5, sampling=sampling, ends=[1])
    assert out.rows == [[*ids("a"), 1]] and not constraint.accepts(out.rows[0])
