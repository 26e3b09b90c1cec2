"""Teach a `shapes` model to describe scenes: ``python -m laconic.models.train_captions --out DIR``.

Answers about scenes are a word or two. A description goes through all kinds of shapes, which is long enough to be drafted. Each
scene carries a description and some questions in one sequence, so that the picture is paid for once; the encoder stays as it is.
Smaller pictures come first.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from laconic.models import load
from laconic.models.pictures import find_eyes
from laconic.models.scenes import SHAPES, SIDE, Question, Scene, ask, make_scene, plural
from laconic.models.train_shapes import IGNORED, Batch, Frame, assemble, encode, read_words

# sides of pictures in pixels, most things in them, pictures in a batch, and the share of the time up to which they are shown
STAGES = ((SIDE // 3, 3, 16, 0.25), (SIDE // 2, 5, 12, 0.6), (SIDE, 8, 4, 1.0))
QUESTIONS = ("count", "comparison")  # what is asked besides, lest it be forgotten
RATE = 6e-4
PROMPT = "what shapes are there ?"


def describe(scene: Scene) -> Question:
    """Names each kind of shape in the order of SHAPES, with size and colour or with a number where there are several, and what
    the sign says."""
    words: list[str] = []
    for shape in SHAPES:
        found = [thing for thing in scene.things if thing.shape == shape]
        if len(found) == 1:
            size = ["smaller"] if found[0].radius < 16 else ["larger"] if found[0].radius > 24 else []
            words += ["the", shape, "is", *size, found[0].colour]
        elif found:
            words += ["there", "are", str(len(found)), plural(shape)]
    if scene.sign is None:
        words += ["there", "is", "no", "sign"]
    else:
        kind, read = ("number", [*scene.sign.text]) if scene.sign.text.isdigit() else ("word", [scene.sign.text])
        words += ["the", kind, "on", "the", "sign", "is", *read]
    return Question("reading", PROMPT, " ".join(words))


def make_batch(rng: np.random.Generator, frame: Frame, side: int, most: int, count: int) -> Batch:
    """Scenes with a description and some questions each."""
    scenes = [make_scene(rng, side, (2, most)) for _ in range(count)]
    asked = [[describe(scene), *filter(None, (ask(scene, rng, kind) for kind in QUESTIONS))] for scene in scenes]
    return assemble(scenes, asked, frame, rng)


def loss_of(model, batch: Batch) -> tuple[torch.Tensor, float]:
    """Cross entropy of the answers, and the share of their tokens that are right."""
    with torch.no_grad():
        features, _ = encode(model, batch)
    hidden = read_words(model, features, batch)
    asked = batch.answers != IGNORED
    logits, target = model.lm_head(hidden[asked]).float(), batch.answers[asked]
    return cross_entropy(logits, target), float((logits.argmax(-1) == target).float().mean())


def train(out: Path, minutes: float, seed: int, start: str) -> None:
    """Trains for ``minutes`` of wall clock and saves in bf16."""
    torch.manual_seed(seed)
    model, processor = load(start)
    frame = Frame.of(processor)
    model.train()
    find_eyes(model).tower.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng, begun, saved, step = np.random.default_rng(seed + 7_000_000), time.time(), time.time(), 0
    while (share := (time.time() - begun) / (60 * minutes)) < 1:
        side, most, count, _ = next(stage for stage in STAGES if share < stage[3])
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * min(1.0, max(0.03, (1 - share) / 0.5))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss, right = loss_of(model, make_batch(rng, frame, side, most, count))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 20 == 0:
            at = f"{time.time() - begun:6.0f} s  step {step}  side {side}"
            print(f"{at}  loss {loss.item():.3f}  right {right:.3f}", flush=True)
        if time.time() - saved > 120:
            save(model, processor, out)
            saved = time.time()
        step += 1
    save(model, processor, out)


def save(model, processor, out: Path) -> None:
    """The weights in bf16, and the processor."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    processor.save_pretrained(out)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Teach a shapes model to describe scenes, on CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its processor")
    parser.add_argument("--minutes", type=float, default=30.0, help="wall-clock budget (default 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", default="shapes", help="a model to go on from (default the built-in shapes)")
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes, arguments.seed, arguments.start)


if __name__ == "__main__":
    main()
