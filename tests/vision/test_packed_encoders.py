"""Patches that leave or merge in encoders that see one row of all patches (Qwen-VL): against the definitions, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import vlm
from test_window_merge import until_met

import laconic
from laconic.vision.flowcut import FlowCut

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
WHOLE = [1, 3, 5]  # blocks of the deep qwen2_5_vl that see whole pictures
Leave = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def deep() -> dict[str, Any]:
    """Models whose encoders have seven blocks."""
    import transformers

    models = {}
    for family in FAMILIES:
        config = vlm.config(family)
        config.vision_config.depth, config.vision_config.fullatt_block_indexes = 7, WHOLE
        torch.manual_seed(1)
        models[family] = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for name, weight in models[family].named_parameters():
                if name.endswith("qkv.weight"):
                    weight.mul_(30.0)
    return models


def cells_of(family: str, height: int, width: int) -> list[int]:
    """The cells of one frame, counted row by row, in the order in which the encoder has them; windows are 2 x 2 cells."""
    cells = [(row, column) for row in range(height) for column in range(width)]
    if family == "qwen2_5_vl":
        cells.sort(key=lambda at: (at[0] // 2, at[1] // 2))
    return [row * width + column for row, column in cells]


def parts(family: str, number: int, frames: list[tuple[int, int]]) -> torch.Tensor:
    """Which patches of the row see each other in a block: a number for each."""
    found: list[tuple] = []
    for frame, (height, width) in enumerate(frames):
        for cell in cells_of(family, height, width):
            windowed = family == "qwen2_5_vl" and number not in WHOLE
            window = (cell // width // 2, cell % width // 2) if windowed else (0, 0)
            found += [(frame, *window)] * 4
    names = {part: i for i, part in enumerate(dict.fromkeys(found))}
    return torch.tensor([names[part] for part in found])


def by_hand(model: Any, family: str, pixels: torch.Tensor, thw: torch.Tensor, leave: Leave) -> tuple[torch.Tensor, torch.Tensor]:
    """The tower, block by block on the patches that are there: which are there in the end, and what the merger makes of all."""
    tower, first = model.model.visual, {}

    def remember(_module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        first.update(kwargs, hidden=args[0] if args else kwargs["hidden_states"])

    hook = tower.blocks[0].register_forward_pre_hook(remember, with_kwargs=True)
    tower(pixels, grid_thw=thw)
    hook.remove()
    hidden, (cos, sin) = first["hidden"], first["position_embeddings"]
    alive = torch.ones(len(hidden), dtype=torch.bool)
    frames = [(h // 2, w // 2) for t, h, w in thw.tolist() for _ in range(t)]
    for number, block in enumerate(tower.blocks):
        rows = alive.nonzero()[:, 0]
        counts = parts(family, number, frames)[rows].unique_consecutive(return_counts=True)[1]
        borders = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        before, hidden = hidden, hidden.clone()
        hidden[rows] = block(before[rows], cu_seqlens=borders, position_embeddings=(cos[rows], sin[rows]))
        hidden, alive = leave(number, before, hidden, alive)
    return alive, tower.merger(hidden)


def in_order(family: str, thw: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
    """Values of the cells in the encoder's order, per picture row by row."""
    result, begin = [], 0
    for t, height, width in thw.tolist():
        frames = []
        for _ in range(t):
            cells = torch.tensor(cells_of(family, height // 2, width // 2))
            frames.append(values[begin : begin + len(cells)][cells.argsort()])
            begin += len(cells)
        result.append(torch.cat(frames))
    return result


def flowcut(model: Any, family: str, thw: torch.Tensor, target: Callable[[int], int], cos_sin: dict[str, Any]) -> Leave:
    """FlowCut's definition; the running worth counts blocks that see whole pictures."""
    tower = model.model.visual
    measured = [n for n in range(len(tower.blocks) - 1) if family != "qwen2_5_vl" or n in WHOLE]
    running: dict[int, torch.Tensor] = {}
    frame = torch.cat([torch.full((h * w,), i) for i, (h, w) in enumerate((h, w) for t, h, w in thw.tolist() for _ in range(t))])

    def leave(number: int, before: torch.Tensor, hidden: torch.Tensor, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if number not in measured:
            return hidden, alive
        block, alive, blocks = tower.blocks[number], alive.clone(), sum(n > number for n in measured)
        for i in frame.unique().tolist():
            rows = ((frame == i) & alive).nonzero()[:, 0]
            q, k, v = cos_sin["qkv"](block, before[rows], rows)
            a = (q.mean(1, keepdim=True) @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)[:, 0].mean(0)
            g = (v.mean(1, keepdim=True) @ v.mT).softmax(-1)[:, 0].mean(0)
            worth = (a / a.sum() + g / g.sum()) * v.mean(0).abs().sum(-1)
            worth, a = worth.view(-1, 4).sum(-1), a.view(-1, 4).sum(-1)  # of whole cells
            running[i] = worth if i not in running else (running[i] + worth) / 2
            left, stay = len(worth), target(int((frame == i).sum()) // 4)
            gone = 0
            if blocks == 0:
                gone = left - stay
            elif blocks % 2 == 0 and left > 1:
                p = a / a.sum()
                entropy = -float(torch.xlogy(p, p).sum()) / math.log(left)
                gone = min(round((left - stay) / math.sqrt(blocks) * (1 - entropy**2)), left - stay)
            keep = running[i].argsort(descending=True, stable=True)[: left - gone].sort().values
            running[i] = running[i][keep]
            alive[rows] = False
            alive[rows.view(-1, 4)[keep].flatten()] = True
        return hidden, alive

    return leave


def heads_of(model: Any, pixels: torch.Tensor, thw: torch.Tensor) -> dict[str, Any]:
    """What makes queries, keys and values, ``(heads, n, d)``, of states as the blocks do."""
    tower, got = model.model.visual, {}
    hook = tower.blocks[0].register_forward_pre_hook(lambda _m, _a, kwargs: got.update(kwargs), with_kwargs=True)
    tower(pixels, grid_thw=thw)
    hook.remove()
    cos, sin = got["position_embeddings"]

    def qkv(block: Any, states: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = block.attn.qkv(block.norm1(states)).view(len(rows), 3, 3, -1).permute(1, 2, 0, 3)

        def turn(t: torch.Tensor) -> torch.Tensor:
            half = t.shape[-1] // 2
            return t * cos[rows] + torch.cat([-t[..., half:], t[..., :half]], dim=-1) * sin[rows]

        return turn(q), turn(k), v

    return {"qkv": qkv}


def given(family: str, video: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Inputs of a model, and of its encoder."""
    x = vlm.inputs(family, (0, 0), videos=(2, 1)) if video else vlm.inputs(family, (2, 1))
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    return x, *(x[name] for name in names)


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_flowcut_is_its_definition_frame_by_frame(deep: dict[str, Any], family: str, video: bool) -> None:
    model = deep[family]
    x, pixels, thw = given(family, video)
    method = FlowCut(budget="40%")
    with torch.no_grad():
        heads = heads_of(model, pixels, thw)
        alive, made = by_hand(model, family, pixels, thw, flowcut(model, family, thw, method.budget.tokens, heads))
        assert 0 < int(alive.sum()) < len(alive)
        with laconic.apply(model, "flowcut:40%") as handle:
            assert bool(model(**x).logits.isfinite().all())
            pictures, reductions = handle.entry.pictures, handle.entry.reductions
    stays = in_order(family, thw, alive.view(-1, 4).all(-1))
    features = in_order(family, thw, made)
    assert len(pictures) == len(thw)
    for i, (picture, reduction) in enumerate(zip(pictures, reductions, strict=True)):
        assert len(reduction.kept) == method.budget.tokens(len(stays[i]))
        if len(stays[i].nonzero()) == len(reduction.kept):
            assert reduction.kept.tolist() == stays[i].nonzero()[:, 0].tolist()
        else:  # the frames' own budgets round up: the best of what is left
            assert set(reduction.kept.tolist()) <= set(stays[i].nonzero()[:, 0].tolist())
        torch.testing.assert_close(picture.features, features[i], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("budget", ["60%", "2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_window_merge_is_its_definition_frame_by_frame(deep: dict[str, Any], family: str, budget: str, video: bool) -> None:
    model, taken = deep[family], []
    x, pixels, thw = given(family, video)
    target = laconic.Budget.parse(budget).tokens

    def leave(number: int, before: torch.Tensor, hidden: torch.Tensor, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if number > 0:
            return hidden, alive
        cells, begin = hidden.view(-1, 4, hidden.shape[-1]).clone(), 0
        stays = torch.zeros(len(cells), dtype=torch.bool)
        for height, width in [(h // 2, w // 2) for t, h, w in thw.tolist() for _ in range(t)]:
            order = cells_of(family, height, width)
            at = {cell: begin + place for place, cell in enumerate(order)}
            states = torch.stack([cells[at[cell]] for cell in range(len(order))])
            into = until_met(states.mean(1), target(len(order)), 3, width)
            for cell in sorted(set(into)):
                cells[at[cell]] = states[[i for i, t in enumerate(into) if t == cell]].mean(0)
                stays[at[cell]] = True
            taken.append(into)
            begin += len(order)
        return cells.flatten(0, 1), stays.repeat_interleave(4)

    with torch.no_grad():
        alive, made = by_hand(model, family, pixels, thw, leave)
        with laconic.apply(model, f"window_merge:{budget}") as handle:
            assert bool(model(**x).logits.isfinite().all())
            pictures, reductions = handle.entry.pictures, handle.entry.reductions
    stays, features, frame = in_order(family, thw, alive.view(-1, 4).all(-1)), in_order(family, thw, made), 0
    for i, (picture, reduction) in enumerate(zip(pictures, reductions, strict=True)):
        torch.testing.assert_close(picture.features[reduction.kept], features[i][reduction.kept], atol=1e-4, rtol=1e-3)
        frames, count = int(thw[i, 0]), len(stays[i]) // int(thw[i, 0])
        into = torch.tensor([t + f * count for f in range(frames) for t in taken[frame + f]])
        frame += frames
        assert len(reduction.kept) <= target(len(stays[i]))
        known = reduction.into >= 0  # of several frames some windows may go, the smallest first
        assert torch.equal(reduction.into[known], into[known]) and bool(stays[i][reduction.kept].all())
        if frames == 1:
            assert bool(known.all()) and reduction.kept.tolist() == stays[i].nonzero()[:, 0].tolist()


def test_later_blocks_of_a_packed_encoder_can_be_asked_what_they_look_at() -> None:
    for family in FAMILIES:
        model, x = vlm.build(family), vlm.inputs(family, (2, 1))
        with torch.no_grad(), laconic.apply(model, "window_merge:60% + mustdrop(key_share=0.1):30%") as handle:
            model(**x)
            for picture, reduction in zip(handle.entry.pictures, handle.entry.reductions, strict=True):
                assert (picture.salience(-1) > 0).nonzero()[:, 0].tolist() == reduction.kept.tolist()


def test_an_encoder_without_a_block_that_sees_whole_pictures_is_refused() -> None:
    import transformers

    config = vlm.config("qwen2_5_vl")
    config.vision_config.fullatt_block_indexes = [2]
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with pytest.raises(laconic.LaconicError, match="sees whole pictures"):
        laconic.apply(model, "flowcut:50%")
    with laconic.apply(model, "window_merge:50%") as handle, torch.no_grad():
        model(**vlm.inputs("qwen2_5_vl", (1,)))
        assert len(handle.entry.reductions[0].kept) == 8


def test_fewer_patches_reach_the_later_blocks(deep: dict[str, Any]) -> None:
    model, widths = deep["qwen2_5_vl"], []
    parts = [block.mlp for block in model.model.visual.blocks]
    hooks = [part.register_forward_hook(lambda _m, args, _out: widths.append(len(args[0]))) for part in parts]
    with torch.no_grad(), laconic.apply(model, "flowcut:25%"):
        model(**vlm.inputs("qwen2_5_vl", (1,)))
    for hook in hooks:
        hook.remove()
    assert widths[:2] == [64, 64] and widths == sorted(widths, reverse=True) and widths[-1] == 16
