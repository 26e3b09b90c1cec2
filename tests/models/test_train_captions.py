"""Descriptions of scenes, and a step of learning them."""

from __future__ import annotations

import numpy as np
import torch

from laconic.models import load
from laconic.models.scenes import Scene, Sign, Thing
from laconic.models.shapes_processor import make_tokenizer
from laconic.models.train_captions import describe, loss_of, make_batch
from laconic.models.train_shapes import IGNORED, Frame


def thing(shape: str, colour: str, radius: float = 20) -> Thing:
    return Thing(shape, colour, 50, 50, radius, 0)


def test_a_description_goes_through_kinds_of_shapes_and_ends_with_the_sign():
    things = (thing("star", "red", 13), thing("ring", "blue"), thing("circle", "pink", 27), thing("ring", "white"))
    scene = Scene(336, things, Sign("42", (0, 0, 10, 10)), (0, 0, 0, 0), 0)
    told = describe(scene)
    assert told.answer == "the circle is larger pink the star is smaller red there are 2 rings the number on the sign is 4 2"
    assert describe(Scene(336, things[1:2], None, (0, 0, 0, 0), 0)).answer == "the ring is blue there is no sign"
    ids = make_tokenizer()(f"{told.text} {told.answer}")["input_ids"]
    assert make_tokenizer().unk_token_id not in ids


def test_a_step_teaches_everything_but_the_encoder():
    model, processor = load("shapes")
    model.model.vision_tower.requires_grad_(False)
    batch = make_batch(np.random.default_rng(0), Frame.of(processor), 56, 2, 2)
    loss, right = loss_of(model, batch)
    loss.backward()
    asked = batch.answers[batch.answers != IGNORED]
    assert 0 <= right <= 1 and float(loss) > 0 and len(asked) > 12
    learned = {name.split(".")[1] for name, weight in model.named_parameters() if weight.grad is not None}
    assert learned == {"language_model", "multi_modal_projector", "weight"}
    assert all(bool(torch.isfinite(weight.grad).all()) for weight in model.parameters() if weight.grad is not None)
