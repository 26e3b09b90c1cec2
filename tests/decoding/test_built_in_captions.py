"""The built-in `shapes-captions` describes scenes, and the drafter that comes with it foretells how a description goes on."""

from __future__ import annotations

import difflib

import numpy as np
import pytest

import laconic
from laconic.decoding.engine import decode
from laconic.decoding.train_flash import scene_prompts
from laconic.models.scenes import make_scene
from laconic.models.train_captions import describe

SEED, SCENES = 21_000_000, 5


@pytest.fixture(scope="module")
def captions():
    return laconic.load("shapes-captions")


def described(captions, recipe: str) -> tuple[list[list[int]], int]:
    """What is said of held-out scenes, and in how many forwards behind the prompt."""
    model, reader = captions
    runs = [
        decode(model, prompt, recipe, max_new_tokens=64, ends=[model.generation_config.eos_token_id])
        for prompt in scene_prompts(reader, SEED, SCENES)
    ]
    return [run.rows[0] for run in runs], sum(sum(run.accepted) for run in runs)


def test_descriptions_are_mostly_right_and_flash_needs_a_third_of_the_forwards(captions):
    plain, _ = described(captions, "dense")
    rng, found, wanted = np.random.default_rng(SEED), 0, 0
    for ids in plain:
        said = captions[1].tokenizer.decode(ids, skip_special_tokens=True).split()
        true = describe(make_scene(rng)).answer.split()
        found += sum(match.size for match in difflib.SequenceMatcher(None, said, true).get_matching_blocks())
        wanted += len(true)
    assert found > 0.75 * wanted
    drafted, fewer = described(captions, "flash_sd(depth=4):8")
    assert drafted == plain and fewer < 0.45 * sum(map(len, plain))
    assert fewer < 0.7 * described(captions, "token_recycling:8")[1]


def test_it_drafts_behind_a_shortened_picture(captions):
    plain, _ = described(captions, "divprune:25%")
    drafted, fewer = described(captions, "divprune:25% + flash_sd(depth=4):8")
    assert drafted == plain and fewer < 0.6 * sum(map(len, plain))
