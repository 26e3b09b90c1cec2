"""Patches that merge inside the vision encoder, and drops inside the language model by the encoder's map: against definitions."""

from __future__ import annotations

import pytest
import torch
import vlm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inside import held, pictured, top

import laconic
from laconic.budget import Budget
from laconic.vision.schedule import falling
from laconic.vision.thinning import merge_windows
from laconic.vision.vflowopt import sink_map


def windows_by_hand(states: torch.Tensor, target: int, side: int, width: int) -> list[int]:
    """The definition on one picture: where each cell goes."""
    windows: dict[tuple[int, int], list[int]] = {}
    for cell in range(len(states)):
        windows.setdefault((cell // width // side, cell % width // side), []).append(cell)
    unit = torch.nn.functional.normalize(states, dim=-1)

    def alike(cells: list[int]) -> float:
        pairs = [float(unit[a] @ unit[b]) for a in cells for b in cells if a != b]
        return sum(pairs) / len(pairs)

    into, left = list(range(len(states))), len(states)
    for cells in sorted((w for w in windows.values() if len(w) > 1), key=lambda w: -alike(w)):
        members = cells[: left - target + 1]
        for cell in members if len(members) > 1 else ():
            into[cell] = members[len(members) // 2]
        left -= len(members) - 1 if len(members) > 1 else 0
    return into


def until_met(states: torch.Tensor, target: int, side: int, width: int) -> list[int]:
    """With larger windows where those of ``side`` leave too many."""
    while len(set(into := windows_by_hand(states, target, side, width))) > target:
        side *= 2
    return into


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(2, 4), st.data())
def test_windows_merge_as_defined(height: int, width: int, side: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(1, height * width))
    states = torch.randn(height * width, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    into = merge_windows(states, (height, width), target, side)
    assert into.tolist() == windows_by_hand(states, target, side, width)
    left, least = len(into.unique()), -(-height // side) * -(-width // side)
    assert left == max(target, least)


def test_alike_windows_go_first_and_identical_tokens_all_merge() -> None:
    states = torch.randn(81, 6, generator=torch.Generator().manual_seed(0))
    flat = [r * 9 + c for r in range(3, 6) for c in range(6, 9)]
    states[flat] = states[0].clone()
    into = merge_windows(states, (9, 9), 73, 3)
    assert (into != torch.arange(81)).nonzero()[:, 0].tolist() == sorted(set(flat) - {43}) and set(into[flat].tolist()) == {43}
    assert len(merge_windows(torch.ones(81, 4), (9, 9), 1, 3).unique()) == 9


@pytest.mark.parametrize("k", [40, 5])
def test_the_encoder_runs_on_merged_patches(k: int) -> None:
    """Against the tower written out: the first block, the merge, the other blocks on fewer tokens."""
    model, x = vlm.build("llava"), vlm.inputs("llava", (1, 1))
    tower, widths = model.model.vision_tower, []
    hook = tower.encoder.layers[1].mlp.register_forward_hook(lambda _m, args, _out: widths.append(args[0].shape[1]))
    with torch.no_grad(), laconic.apply(model, f"window_merge:{k}") as handle:
        model(**x)
        hook.remove()
        assert widths == [1 + k]
        for picture, reduction, pixels in zip(handle.entry.pictures, handle.entry.reductions, x["pixel_values"], strict=True):
            hidden = tower.encoder.layers[0](tower.pre_layrnorm(tower.embeddings(pixels[None])), attention_mask=None)[0]
            into = until_met(hidden[1:], k, 3, 8)
            assert reduction.into.tolist() == into and reduction.kept.tolist() == sorted(set(into))
            rows = [hidden[:1], *(hidden[1:][[i for i in range(64) if into[i] == t]].mean(0)[None] for t in sorted(set(into)))]
            out = tower.encoder.layers[1](torch.cat(rows)[None], attention_mask=None)
            expected = model.model.multi_modal_projector(out[:, 1:])[0]
            torch.testing.assert_close(picture.features[reduction.kept], expected, atol=1e-4, rtol=1e-3)


def test_later_blocks_can_be_asked_what_they_look_at() -> None:
    """Salience of the merged patches, which mustdrop takes its key tokens by; what left gets none."""
    model, x = vlm.build("llava"), vlm.inputs("llava", (1,))
    with torch.no_grad(), laconic.apply(model, "window_merge:40 + mustdrop(key_share=0.1):50%") as handle:
        model(**x)
        picture, reduction = handle.entry.pictures[0], handle.entry.reductions[0]
        salience = picture.salience(-1)
        layers = [set(layer.positions[0, 0].tolist()) for layer in handle.latest.layers]
    assert (salience > 0).nonzero()[:, 0].tolist() == reduction.kept.tolist()
    image = pictured(x)
    keys = {image[i] for i in salience.argsort(descending=True, stable=True)[:7].tolist()}
    assert keys <= layers[-1] and layers[0] & set(image) == {image[i] for i in reduction.kept.tolist()}
    with pytest.raises(laconic.LaconicError, match="keep one of the two"):
        laconic.apply(model, "window_merge:50% + vflowopt_layers:30%")  # which asks for queries and keys


@pytest.mark.parametrize("family", ["gemma3", "llava_next"])
def test_pooled_cells_and_crops_keep_their_budget(family: str) -> None:
    model, x = vlm.build(family), vlm.inputs(family, (1, 2))
    for budget in ("70%", "7", "1"):
        with torch.no_grad(), laconic.apply(model, f"window_merge:{budget}") as handle:
            logits = model(**x).logits
            assert bool(logits.isfinite().all())
            for picture, reduction in zip(handle.entry.pictures, handle.entry.reductions, strict=True):
                assert len(reduction.kept) == Budget.parse(budget).tokens(len(picture.cells))
                taken = reduction.into[picture.cells]
                crops = picture.layout.crop[picture.cells]
                assert bool((picture.layout.crop[taken[taken >= 0]] == crops[taken >= 0]).all())  # nobody joins another crop


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_vflowopt_drops_by_the_stored_map(family: str) -> None:
    x = vlm.inputs(family, (1,))
    image, model = pictured(x), vlm.build(family)
    with laconic.apply(model, "vflowopt_layers(sinks=1):60%") as handle, torch.no_grad():
        model(**x)
        worth = sink_map(handle.entry.pictures[0], 1.0)
    scores = torch.zeros(x["input_ids"].shape[1])
    scores[image] = worth
    layers = held(family, "vflowopt_layers(sinks=1):60%", x)
    for layer, count in falling(Budget.parse("60%"), len(image), len(layers), 3).items():
        assert [p for p in layers[layer + 1] if p in image] == top(scores, count, image)
    before = held(family, "vflowopt(sinks=1):60%", x)[0]
    both = held(family, "vflowopt(sinks=1):60% + vflowopt_layers(sinks=1):30%", x)
    assert both[0] == before and len(both[-1]) < len(before)
    gathered = [p for p in before if p in image]
    count = len([p for p in both[-1] if p in image])
    assert [p for p in both[-1] if p in image] == top(scores, count, gathered)
