"""Videos are shortened as pictures are: one video is one picture whose crops are its frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vlm
from test_entry import by_hand, entered, stays
from test_inside import maps, top
from test_picture_properties import BEFORE, INSIDE, METHODS, UNSIZED, profiles  # noqa: F401 (a fixture)

import laconic
from laconic.budget import Budget
from laconic.vision.picture import Picture, pool_cells

NATIVE = [family for family in vlm.WATCHING if family.startswith("qwen")]
FRAMED = [family for family in vlm.WATCHING if family not in NATIVE]
SHAPES = {family: ((2, 4),) * 3 if family in NATIVE else ((2, 2),) * 3 for family in vlm.WATCHING}


def mixed(family: str) -> dict[str, torch.Tensor]:
    """Rows with a video in front of a picture, two videos, and a picture alone."""
    x = vlm.inputs(family, (1, 0, 1), videos=(1, 2, 0))
    row = x["input_ids"][0]
    image, video = ((row == token).nonzero()[:, 0] for token in (vlm.IMAGE, vlm.VIDEO))
    ends = [int(image[0]) - 1, int(image[-1]) + 2, int(video[-1]) + 2]  # with the marks around them, where there are such
    x["input_ids"][0, ends[0] : ends[2]] = torch.cat([row[ends[1] : ends[2]], row[ends[0] : ends[1]]])
    if "mm_token_type_ids" in x:
        x["mm_token_type_ids"] = (x["input_ids"] == vlm.IMAGE).long() + 2 * (x["input_ids"] == vlm.VIDEO)
    return x


@pytest.mark.parametrize("family", vlm.WATCHING)
def test_everything_kept_is_the_stock_model(family: str) -> None:
    model, x = vlm.build(family), mixed(family)
    real = x["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**x).logits
        ways = [{"max_new_tokens": 4, "do_sample": False}, {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}]
        tokens = [model.generate(**x, **way) for way in ways]
        with laconic.apply(model, "random_prune:100%"):
            torch.testing.assert_close(model(**x).logits[real], expected[real], atol=1e-4, rtol=1e-4)
            assert all(torch.equal(model.generate(**x, **way), found) for way, found in zip(ways, tokens, strict=True))
        assert torch.equal(model(**x).logits, expected)


@pytest.mark.parametrize("recipe", ["random_prune:40%", "uniform:7", "random_prune(positions=compact):40%"])
@pytest.mark.parametrize("family", vlm.WATCHING)
def test_what_stays_equals_the_prompt_shortened_by_hand(family: str, recipe: str) -> None:
    if "compact" in recipe and family in NATIVE:
        pytest.skip("refused, as for pictures")
    model, x = vlm.build(family), mixed(family)
    given = entered(model, x)
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        logits = model(**x).logits
        left, (video, picture, *_) = stays(handle, x), handle.entry.pictures
        assert torch.equal(model.generate(**x, max_new_tokens=1, do_sample=False)[:, -1], logits[:, -1].argmax(-1))
    assert video.layout.shapes == SHAPES[family] and picture.layout.shapes != SHAPES[family]  # in the order of the prompt
    if "compact" in recipe:
        given = {**given, "position_ids": (left.long().cumsum(-1) - 1).clamp(min=0)}
    for row in range(3):
        torch.testing.assert_close(logits[row, left[row]], by_hand(model, given, x["input_ids"], left, row), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", vlm.WATCHING)
def test_texts_written_after_a_video_follow_from_what_is_cached(family: str) -> None:
    """Step by step as in one forward over the prompt and what was written."""
    model, x = vlm.build(family), vlm.inputs(family, (1, 0), videos=(1, 1))
    special = [vlm.IMAGE, vlm.VIDEO, vlm.START, vlm.END]
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with laconic.apply(model, "uniform:6") as handle, torch.no_grad():
        out = model.generate(**x, **options, suppress_tokens=special)
        assert handle.latest.layers[-1].n < x["input_ids"].shape[1]
        whole = {**x, "input_ids": out.sequences, "attention_mask": torch.cat([x["attention_mask"], torch.ones(2, 5).long()], 1)}
        if "mm_token_type_ids" in x:
            whole["mm_token_type_ids"] = torch.cat([x["mm_token_type_ids"], torch.zeros(2, 5).long()], 1)
        expected = model(**whole).logits[:, -6:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=2e-4, rtol=1e-3)


def watched(family: str, recipe: str, x: dict[str, torch.Tensor]) -> list[Picture]:
    with laconic.apply(vlm.build(family), recipe) as handle, torch.no_grad():
        vlm.build(family)(**x)
        return handle.entry.pictures


@pytest.mark.parametrize("family", vlm.WATCHING)
def test_a_token_of_a_frame_lies_where_the_projector_made_it(family: str) -> None:
    for picture in watched(family, "zoo_prune:50%", mixed(family)):
        made = picture.of_inputs(picture.project(picture.projector_input()))[picture.cells]
        if not any(picture.layout.parts):  # parts are cut and resized behind the projector
            torch.testing.assert_close(made, picture.features[picture.cells].float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", NATIVE)
def test_a_frame_of_a_video_is_seen_as_the_same_picture(family: str) -> None:
    """These encoders let a frame see only itself, so that all that is said of it is what is said of a picture of its pixels."""
    x = vlm.inputs(family, (0,), videos=(1,))
    frames, height, width = x["video_grid_thw"][0].tolist()
    ids = [1, *([vlm.IMAGE] * (height * width // 4) + [9]) * frames, 5]
    still = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    still |= {"pixel_values": x["pixel_values_videos"], "image_grid_thw": torch.tensor([[1, height, width]] * frames)}
    still["mm_token_type_ids"] = (still["input_ids"] == vlm.IMAGE).long()
    for method in ("token_corr:50%", "hiprune:50%"):
        (video,), pictures = watched(family, method, x), watched(family, method, still)
        assert torch.equal(video.layout.crop, torch.arange(frames).repeat_interleave(height * width // 4))
        for said in (lambda p: p.salience(-2), lambda p: p.features, lambda p: p.encoded_tokens()):
            torch.testing.assert_close(said(video), torch.cat([said(p) for p in pictures]), atol=1e-5, rtol=1e-4)
        kind = video.recorded("received", -2)
        assert len(kind) == frames and torch.allclose(kind.mean(-1), torch.ones(frames), atol=1e-4)


@pytest.mark.parametrize("family", FRAMED)
def test_attention_of_a_frame_is_summed_over_the_patches_of_a_token(family: str) -> None:
    """The encoder sees the frames one by one; the model pools 2 x 2 patches."""
    (video,) = watched(family, "token_corr:50%", vlm.inputs(family, (0,), videos=(1,)))
    found = video.salience(-2)[video.cells].view(3, 2, 2)
    patches = video.recorded("cls" if video.trace.has_class else "received", -2).view(3, 2, 2, 2, 2)
    torch.testing.assert_close(found, patches.sum((2, 4)), atol=1e-6, rtol=1e-5)
    assert video.layout.shapes == ((2, 2),) * 3 and int(video.layout.separators.sum()) == (family == "llava_onevision")


@pytest.mark.parametrize("family", FRAMED)
@pytest.mark.parametrize("poked", [0, 2])
def test_other_pixels_in_a_frame_change_its_tokens_only(family: str, poked: int) -> None:
    x = vlm.inputs(family, (1,), videos=(2,))
    before = watched(family, "uniform:50%", x)
    x["pixel_values_videos"][1, poked] += 1.0
    after = watched(family, "uniform:50%", x)
    moved = [(new.features - old.features).norm(dim=-1) > 1e-4 for new, old in zip(after, before, strict=True)]
    assert [bool(m.any()) for m in moved] == [False, False, True]
    assert torch.equal(moved[2], after[2].layout.crop == poked)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_next_video"])
def test_fastv_keeps_what_the_last_token_looks_at_of_a_whole_video(family: str) -> None:
    x = vlm.inputs(family, (0,), videos=(1,))
    video = (x["input_ids"][0] == vlm.VIDEO).nonzero()[:, 0].tolist()
    with laconic.apply(vlm.build(family), "fastv(layers=1):25%") as handle, torch.no_grad():
        vlm.build(family)(**x)
        held = [[p for p in layer.positions[0, 0].tolist() if p in video] for layer in handle.latest.layers]
    assert held[0] == video
    assert held[1] == held[2] == top(maps(family, x)[0][0, -1], Budget.parse("25%").tokens(len(video)), video)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next_video", "llava_onevision"])
def test_every_method_keeps_its_budget_of_a_whole_video(family: str) -> None:
    model, x = vlm.build(family), vlm.inputs(family, (0,), videos=(1,))
    for name in BEFORE + INSIDE:
        try:
            handle = laconic.apply(model, f"{name}:7" if METHODS[name].takes_budget else f"{name}({UNSIZED[name]})")
        except laconic.LaconicError as error:
            assert "class token" in str(error)
            continue
        with handle, torch.no_grad():
            assert bool(model(**x).logits[:, -1].isfinite().all())
            if name in BEFORE:
                kept = handle.entry.reductions[0].kept
                assert len(kept) == 7 and bool(torch.isin(kept, handle.entry.pictures[0].cells).all()), name


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision"])
def test_a_later_turn_chooses_again_what_of_a_video_it_sees(family: str) -> None:
    model, x = vlm.build(family), vlm.inputs(family, (1,), videos=(1,))
    said = torch.tensor([[17, 33, 52, 8]])
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), laconic.apply(model, "mmtok(share=0.01, rest=park):20%") as handle:
        one = model.generate(**x, past_key_values=handle.cache(), **options, suppress_tokens=[90, 91, 92, 93])
        ids = torch.cat([one.sequences, said], dim=1)
        whole: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in x:
            whole["mm_token_type_ids"] = (ids == vlm.IMAGE).long() + 2 * (ids == vlm.VIDEO)
        first = [reduction.kept for reduction in handle.entry.reductions]
        two = model.generate(**whole, past_key_values=one.past_key_values, **options)
        again = [reduction.kept for reduction in handle.entry.reductions]
        fresh = model.generate(**{**x, **whole}, **options)
        assert all(torch.equal(a, r.kept) for a, r in zip(again, handle.entry.reductions, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(torch.stack(two.logits), torch.stack(fresh.logits), atol=2e-4, rtol=1e-3)


def test_tokens_of_a_frame_may_share_patches() -> None:
    """5 x 5 patches become 3 x 3 tokens, as 27 x 27 become 14 x 14 in released models."""
    import transformers as t

    config = vlm.config("llava_onevision")
    config.vision_config.image_size = 20
    model = t.LlavaOnevisionForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 7, *[vlm.VIDEO] * (2 * 9 + 1), 8, 9]])
    pixels = torch.randn(1, 2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}
    with laconic.apply(model, "token_corr:7") as handle, torch.no_grad():
        model(**x)
    (video,) = handle.entry.pictures
    assert video.layout.shapes == ((3, 3),) * 2 and len(handle.entry.reductions[0].kept) == 7
    made = video.of_inputs(video.project(video.projector_input()))
    torch.testing.assert_close(made[video.cells], video.features[video.cells], atol=1e-5, rtol=1e-4)
    patches = video.recorded("received", -2).view(2, 1, 5, 5)
    weighed = torch.nn.functional.interpolate(patches, size=(3, 3), mode="bilinear") * 25 / 9  # patches per token
    torch.testing.assert_close(video.salience(-2)[video.cells], weighed.flatten(), atol=1e-5, rtol=1e-4)
    with laconic.apply(model, "flowcut:7"), pytest.raises(laconic.LaconicError, match="share patches"):
        model(**x)


def test_cells_that_share_patches_weigh_them() -> None:
    """5 x 5 patches to 3 x 3 tokens: a straight slope stays one, and sums keep the whole within what the edges weigh less."""
    slope = torch.arange(5.0)[None, :, None].expand(5, 5, 1).reshape(1, 25, 1)
    cells = pool_cells(slope, 3, 3, "mean").view(3, 3)
    torch.testing.assert_close(cells, torch.tensor([1 / 3, 2.0, 11 / 3]).expand(3, 3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pool_cells(torch.ones(1, 25, 1), 3, 3, "sum").sum(), torch.tensor(25.0))


def test_videos_that_are_not_understood_are_refused_in_one_sentence() -> None:
    import transformers as t

    with laconic.apply(vlm.build("llava"), "uniform:5"), pytest.raises(laconic.LaconicError, match=r"videos.*not understood"):
        vlm.build("llava")(**vlm.inputs("llava"), pixel_values_videos=torch.zeros(1, 2, 3, 16, 16))
    config = t.VideoLlavaConfig(
        vision_config=t.CLIPVisionConfig(**vlm.EYES, image_size=16), text_config=t.LlamaConfig(**vlm.TEXT, head_dim=8),
        image_token_index=vlm.IMAGE, video_token_index=vlm.VIDEO, image_seq_length=17, video_seq_length=8 * 17,
    )  # fmt: skip
    model = t.VideoLlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[vlm.VIDEO] * 8 * 17, 5, 6]])
    x = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": torch.randn(1, 8, 3, 16, 16)}
    with laconic.apply(model, "uniform:5"), pytest.raises(laconic.LaconicError, match=r"videos.*not understood"):
        model(**x)
