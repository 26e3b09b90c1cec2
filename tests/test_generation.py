"""``laconic.generate``: texts, batches, what ends a text, and what is written while it comes."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

import laconic
from laconic import LaconicError
from laconic.decoding.constraints import regex
from laconic.decoding.engine import Progress
from laconic.decoding.show import TreeView

PROMPT = "The quick brown fox jumps over the lazy dog. The quick"


@pytest.fixture(scope="module")
def needle():
    return laconic.load("needle")


def test_drafts_leave_the_text_as_it_is(needle):
    plain = laconic.generate(needle, PROMPT, max_new_tokens=20)
    drafted = laconic.generate(needle, PROMPT, "dense", drafter="prompt_lookup:4", max_new_tokens=20)
    both = laconic.generate(needle, PROMPT, "prompt_lookup:4", max_new_tokens=20)
    assert drafted["text"] == both["text"] == plain["text"]
    assert drafted["forwards"] < plain["forwards"] and drafted["guarantee"] == "exact in distribution"
    assert plain["tokens_per_forward"] == 1 and plain["guarantee"] is None


def test_several_prompts_are_one_batch(needle):
    prompts = [PROMPT, "One two", "A much longer prompt than the others, one two three four five six seven"]
    alone = [laconic.generate(needle, prompt, max_new_tokens=12)["text"] for prompt in prompts]
    together = laconic.generate(needle, prompts, drafter="token_recycling:8", max_new_tokens=12)
    assert together["text"] == alone


def test_each_model_and_method_goes_its_own_way(needle):
    with pytest.raises(LaconicError, match="is no diffusion model"):
        laconic.generate(needle, PROMPT, "local_leap")
    with pytest.raises(LaconicError, match="draws under a constraint"):
        laconic.generate(needle, PROMPT, "awrs")


@pytest.mark.parametrize("recipe", ["dense", "prompt_lookup:4", "awrs(particles=4,tail=0)"])
def test_an_answer_under_a_constraint_satisfies_it(needle, recipe):
    pytest.importorskip("llguidance")
    found = laconic.generate(needle, PROMPT, recipe, constraint=lambda tokenizer: regex("[0-9]{3}-[0-9]{2}", tokenizer),
                             max_new_tokens=16)  # fmt: skip
    assert re.fullmatch("[0-9]{3}-[0-9]{2}", found["text"]) and found["satisfied"]
    assert found["tokens_per_forward"] >= 0.5


@pytest.mark.parametrize("draft", [None, "prompt_lookup:4"])
def test_a_text_is_cut_before_what_ends_it(needle, draft):
    whole = laconic.generate(needle, PROMPT, max_new_tokens=24)["text"]
    end = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stream = io.StringIO()
    found = laconic.generate(needle, PROMPT, drafter=draft, max_new_tokens=24, stop=[end, "never"], stream=stream)
    assert found["text"] == whole[: whole.index(end)]
    assert stream.getvalue() == found["text"] + "\n"


def test_what_is_streamed_is_the_text(needle):
    stream = io.StringIO()
    found = laconic.generate(needle, PROMPT, drafter="token_recycling:8", max_new_tokens=24, temperature=1.0, top_k=20, top_p=0.9,
                             penalty=1.2, stream=stream)  # fmt: skip
    assert stream.getvalue() == found["text"] + "\n"


def test_in_a_terminal_the_tree_is_drawn(needle):
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    ids = needle[1](" the one two", add_special_tokens=False)["input_ids"]
    with TreeView(console, needle[1]).watching() as view:
        view(Progress([ids], [[-1, *[0] * (len(ids) - 1)]], [[1]], [[ids[1], ids[2]]]))
    shown = console.file.getvalue()
    assert "─" in shown and "\x1b[" in shown
