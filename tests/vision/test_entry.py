"""Pictures are really shortened, in every family: what stays gives the numbers of a stock model that was given only that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vlm

import laconic
from laconic.models.pictures import find_eyes, spans

FAMILIES = vlm.FAMILIES


def entered(model: Any, x: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the stock model hands to its language model."""
    found: dict[str, Any] = {}
    hook = model.get_decoder().register_forward_pre_hook(lambda m, a, kw: found.update(kw), with_kwargs=True)
    with torch.no_grad():
        model(**x)
    hook.remove()
    return found


def stays(handle: Any, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which of the prompt's tokens are left, boolean as the ids."""
    left, entry = x["attention_mask"].bool().clone(), handle.entry
    places = spans(x["input_ids"], entry.seen)
    for (_, _, row, slots), picture, reduction in zip(places, entry.pictures, entry.reductions, strict=True):
        keep = picture.layout.separators.clone()
        keep[reduction.kept] = True
        left[row, slots[~keep]] = False
    return left


def by_hand(model: Any, given: dict[str, Any], ids: torch.Tensor, left: torch.Tensor, row: int) -> torch.Tensor:
    """Logits (kept, vocabulary) of one row's remaining tokens through the stock language model."""
    rows = left[row].nonzero()[:, 0]
    positions = given.get("position_ids")
    if positions is None or (positions.dim() == 2 and positions.shape[0] == 1):
        positions = rows[None] if positions is None else positions[:, rows]
    else:
        positions = positions[..., row : row + 1, :][..., rows]
    options: dict[str, Any] = {}
    if given.get("deepstack_visual_embeds") is not None:
        marks = given["visual_pos_masks"]
        number = marks.flatten().cumsum(0).view(marks.shape) - 1
        picked = rows[marks[row, rows]]
        options = {
            "visual_pos_masks": marks[row : row + 1, rows],
            "deepstack_visual_embeds": [part[number[row, picked]] for part in given["deepstack_visual_embeds"]],
        }
    with torch.no_grad():
        out = model.get_decoder()(
            inputs_embeds=given["inputs_embeds"][row : row + 1, rows],
            position_ids=positions,
            use_cache=False,
            **options,
            attention_mask=mask_by_hand(model, given, rows, ids[row, rows]),
        )
        return model.lm_head(out.last_hidden_state)[0]


def mask_by_hand(model: Any, given: dict[str, Any], rows: torch.Tensor, ids: torch.Tensor) -> Any:
    """Who sees whom: text sees what is before it; in two families the tokens of a picture, or of a prompt, see each other."""
    kind = model.config.model_type
    if kind not in ("gemma3", "paligemma"):
        return torch.ones(1, len(rows), dtype=torch.int64)  # gaps in positions are no packed texts
    if kind == "paligemma":
        return torch.ones(1, 1, len(rows), len(rows), dtype=torch.bool)
    pictured = ids == vlm.IMAGE
    number = (pictured & ~torch.cat([torch.tensor([False]), pictured[:-1]])).cumsum(0)
    same = pictured[:, None] & pictured[None] & (number[:, None] == number[None])
    causal = rows[:, None] >= rows[None]
    near = rows[:, None] - rows[None] < model.config.get_text_config().sliding_window
    return {"full_attention": (causal | same)[None, None], "sliding_attention": ((causal & near) | same)[None, None]}


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_the_stock_model(family: str) -> None:
    model, x = vlm.build(family), vlm.inputs(family, (1, 2))
    real = x["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**x).logits
        tokens = model.generate(**x, max_new_tokens=5, do_sample=False)
        with laconic.apply(model, "random_prune:100%"):
            torch.testing.assert_close(model(**x).logits[real], expected[real], atol=1e-4, rtol=1e-4)
            assert torch.equal(model.generate(**x, max_new_tokens=5, do_sample=False), tokens)
        assert torch.equal(model(**x).logits, expected)  # and out again without a trace


@pytest.mark.parametrize("recipe", ["random_prune:40%", "uniform:7", "random_prune(positions=compact):40%"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_equals_the_prompt_shortened_by_hand(family: str, recipe: str) -> None:
    if "compact" in recipe and family.startswith("qwen"):
        pytest.skip("refused, see below")
    model, x = vlm.build(family), vlm.inputs(family, (1, 2, 0))
    given = entered(model, x)
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        logits = model(**x).logits
        left = stays(handle, x)
    if "compact" in recipe:
        given = {**given, "position_ids": (left.long().cumsum(-1) - 1).clamp(min=0)}
    for row in range(3):
        torch.testing.assert_close(logits[row, left[row]], by_hand(model, given, x["input_ids"], left, row), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["uniform:6", "uniform:6 + tokenselect(sinks=1, recent=4):12", "h2o:14 + random_prune:50%"])
def test_a_batch_is_each_prompt_alone(family: str, recipe: str) -> None:
    """Texts written after pictures of unequal counts; the last row has none."""
    model, x = vlm.build(family), vlm.inputs(family, (2, 1))
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        together = model.generate(**x, max_new_tokens=6, do_sample=False)[:, -6:]
        assert handle.latest.layers[-1].n < x["input_ids"].shape[1]
    for row, alone in enumerate(split(family, x, (2, 1))):
        if "random" in recipe and row:
            continue  # the numbers of a picture follow its place among all of the batch
        with laconic.apply(model, recipe), torch.no_grad():
            assert torch.equal(model.generate(**alone, max_new_tokens=6, do_sample=False)[0, -6:], together[row])


def split(family: str, x: dict[str, torch.Tensor], counts: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch as prompts of their own, without padding."""
    rows, done, patches = [], 0, 0
    for row, count in enumerate(counts):
        real = x["attention_mask"][row].bool()
        part = {k: v[row : row + 1, real] for k, v in x.items() if v.dim() == 2 and v.shape == x["input_ids"].shape}
        for name in ("image_sizes", "image_grid_thw", "batch_num_images"):
            if name in x:
                part[name] = x[name][done : done + count]
        if family in ("idefics3", "smolvlm"):
            part["pixel_values"] = x["pixel_values"][row : row + 1, :count]
        elif family.startswith("qwen"):
            size = int(part["image_grid_thw"].prod(-1).sum())
            part["pixel_values"] = x["pixel_values"][patches : patches + size]
            patches += size
        else:
            part["pixel_values"] = x["pixel_values"][done : done + count]
        done += count
        rows.append(part)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_holds_what_stays_and_counts_what_came(family: str) -> None:
    model, x = vlm.build(family), vlm.inputs(family, (1,))
    eyes = find_eyes(model)
    pictured = int((x["input_ids"] == eyes.image).sum())
    with laconic.apply(model, "uniform:5") as handle, torch.no_grad():
        cache = model(**x).past_key_values
        separators = sum(int(p.layout.separators.sum()) for p in handle.entry.pictures)
        for layer in cache.layers:
            assert layer.n == x["input_ids"].shape[1] - pictured + 5 + separators
            assert layer.get_seq_length() == x["input_ids"].shape[1]
            held = layer.positions[0, 0]
            assert bool((held.diff() > 0).all()) and held[-1] == x["input_ids"].shape[1] - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_lies_where_its_pixels_are(family: str) -> None:
    """Other pixels in one patch change the projected token of its cell more than any other: the encoder's attention is off."""
    model, x = vlm.build(family), vlm.inputs(family, (2,))
    tower = find_eyes(model).tower
    saved = {name: p.detach().clone() for name, p in tower.named_parameters()}
    try:
        with torch.no_grad():
            for name, p in tower.named_parameters():  # without attention every patch is for itself
                if name.endswith(("out_proj.weight", "attn.proj.weight", "projection_layer.weight")):
                    p.zero_()
        with laconic.apply(model, "uniform:5") as handle, torch.no_grad():
            model(**x)
            before = [p.features.clone() for p in handle.entry.pictures]
            layouts = [p.layout for p in handle.entry.pictures]
            for picture, token, changed in poked(family, x, layouts):
                model(**changed)
                moved = [(p.features - old).norm(dim=-1) for p, old in zip(handle.entry.pictures, before, strict=True)]
                assert int(moved[picture].argmax()) == token and float(moved[picture][token]) > 1e-4
                assert all(float(m.max()) < 1e-5 for i, m in enumerate(moved) if i != picture)
    finally:
        with torch.no_grad():
            for name, p in tower.named_parameters():
                p.copy_(saved[name])


def poked(family: str, x: dict[str, torch.Tensor], layouts: list) -> Any:
    """For some tokens of every picture: its number, the token, and the inputs with other pixels in the middle of its cell."""
    crops = 0
    for number, layout in enumerate(layouts):
        for token in [0, 3, len(layout) // 2 + 1, len(layout) - 2]:
            if layout.separators[token]:
                continue
            crop, row, column = int(layout.crop[token]), int(layout.row[token]), int(layout.column[token])
            pixels = x["pixel_values"].clone()
            if family.startswith("qwen"):
                width = layout.shapes[0][1]
                before = int(x["image_grid_thw"][:number].prod(-1).sum())
                pixels[before + 4 * (row * width + column)] += 3.0
            else:
                width = layout.shapes[crop][1]
                flat = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
                size = flat.shape[-1] // width
                at = number * pixels.shape[1] + crop if family in ("llava_next", "llava_onevision") else crops + crop
                patch = (..., slice(row * size, row * size + 4), slice(column * size, column * size + 4))
                flat[at][patch] += 3.0
                pixels = flat.view(x["pixel_values"].shape)
            yield number, token, {**x, "pixel_values": pixels}
        crops += len(layout.shapes)


def test_what_cannot_work_is_said_in_one_sentence() -> None:
    from tiny import shared

    with pytest.raises(laconic.LaconicError, match="reads text only"):
        laconic.apply(shared(), "uniform:8")
    with pytest.raises(laconic.LaconicError, match=r"no class token.*hiprune"):
        laconic.apply(vlm.build("llava_siglip"), "vtc_cls:8")
    with pytest.raises(laconic.LaconicError, match="pyramid"):
        laconic.get("uniform", budget="pyramid:10%")
    model, x = vlm.build("qwen2_vl"), vlm.inputs("qwen2_vl")
    with laconic.apply(model, "uniform(positions=compact):8"), pytest.raises(laconic.LaconicError, match="renumbered"):
        model(**x)
    model, x = vlm.build("llava"), vlm.inputs("llava")
    with laconic.apply(model, "uniform:8 + random_prune:4"), pytest.raises(laconic.LaconicError, match="shortened already"):
        model(**x)
    with torch.no_grad():
        model(**x)  # and the model works as before


def conversation(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A prompt with a picture and a second turn with another one, masked for both turns."""
    first, later = vlm.inputs(family, (1,)), vlm.inputs(family, (1,), text=5, seed=1)
    mask = torch.cat([first["attention_mask"], later["attention_mask"]], dim=1)
    return first, {**later, "attention_mask": mask}


def numbered_on(model: Any, turns: list[dict[str, torch.Tensor]], lefts: list[torch.Tensor]) -> torch.Tensor:
    """Logits of all tokens that are left of some turns, through the stock language model as one text without gaps."""
    given = [entered(model, {**x, "attention_mask": torch.ones_like(x["input_ids"])})["inputs_embeds"] for x in turns]
    embeddings = torch.cat([rows[0, left[0]] for rows, left in zip(given, lefts, strict=True)])
    with torch.no_grad():
        out = model.get_decoder()(inputs_embeds=embeddings[None], position_ids=torch.arange(len(embeddings))[None])
        return model.lm_head(out.last_hidden_state)[0]


@pytest.mark.parametrize("kept", [5, 20])
@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl", "smolvlm"])
def test_compact_positions_go_on_with_a_second_picture(family: str, kept: int) -> None:
    """With 20 tokens some families keep all of a picture."""
    model, (first, later) = vlm.build(family), conversation(family)
    lefts, logits = [], []
    with laconic.apply(model, f"uniform(positions=compact):{kept}") as handle, torch.no_grad():
        cache = model(**first).past_key_values
        lefts.append(stays(handle, first))
        logits.append(model(**later, past_key_values=cache).logits[0])
        lefts.append(stays(handle, {**later, "attention_mask": torch.ones_like(later["input_ids"])}))
        mask = torch.cat([later["attention_mask"], torch.ones(1, 3, dtype=torch.int64)], dim=1)
        said = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": mask}
        logits.append(model(**said, past_key_values=cache).logits[0])
        lefts.append(torch.ones(1, 3, dtype=torch.bool))
    whole = numbered_on(model, [first, later, said], lefts)
    torch.testing.assert_close(logits[1], whole[-3:], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(logits[0][lefts[1][0]], whole[int(lefts[0].sum()) : -3], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("removed", ["words", "picture"])
def test_a_cropped_conversation_keeps_its_compact_positions(removed: str) -> None:
    """What is cropped was never there: words, or a whole second turn with its picture."""
    model, (first, later) = vlm.build("llava"), conversation("llava")
    said = {"input_ids": torch.tensor([[7, 8, 9, 10]])}
    said["attention_mask"] = torch.ones(1, first["input_ids"].shape[1] + 4, dtype=torch.int64)
    words = {**said, "input_ids": torch.tensor([[40, 41, 42, 43]])}
    with laconic.apply(model, "uniform(positions=compact):5"), torch.no_grad():
        expected = model(**said, past_key_values=model(**first).past_key_values).logits
        cache = model(**first).past_key_values
        detour = words if removed == "words" else later
        model(**detour, past_key_values=cache)
        cache.crop(-detour["input_ids"].shape[1])
        torch.testing.assert_close(model(**said, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)


def test_drafted_tokens_that_are_taken_back_do_not_move_the_others() -> None:
    model, x = vlm.build("llava"), vlm.inputs("llava")
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with laconic.apply(model, "uniform(positions=compact):5"), torch.no_grad():
        plain = model.generate(**x, **options)
        drafted = model.generate(**x, **options, prompt_lookup_num_tokens=3, max_matching_ngram_size=1)
    assert torch.equal(drafted.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(drafted.logits), torch.stack(plain.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_handles_come_and_go_in_any_order(family: str) -> None:
    """Each works as if it were alone, although the first to come is the first to go, and nothing of them is left behind."""
    model, x = vlm.build(family), vlm.inputs(family)
    recipes = ("hiprune:50%", "divprune:25%", "fastv:50%", "corematching(neurons=0.5):50%")

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(**x).logits

    def state() -> list[tuple[str, set[str]]]:
        return [(name, {*vars(module)}) for name, module in model.named_modules()]

    stock, before, alone = logits(), state(), []
    for recipe in recipes:
        with laconic.apply(model, recipe):
            alone.append(logits())
    assert state() == before
    handles = [laconic.apply(model, recipe) for recipe in recipes]
    assert torch.equal(logits(), alone[-1])
    handles[0].remove()
    assert torch.equal(logits(), alone[-1])
    for handle in handles[1:]:
        handle.remove()
    handles[0].remove()
    assert state() == before and torch.equal(logits(), stock)
    for handle, expected in zip(handles, alone, strict=True):
        with handle:
            assert torch.equal(logits(), expected)
    assert state() == before
