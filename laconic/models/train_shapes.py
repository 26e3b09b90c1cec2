"""Train a built-in `shapes` model: ``python -m laconic.models.train_shapes --out DIR [--variant NAME --start shapes]``.

The curriculum starts with few things in pictures of 4 x 4 patches, a window of the full grid, and goes to 24 x 24 and more
things in steps, each when most answers are right: with larger steps, attention that is spread over all patches stays spread.
Each scene carries several questions in one sequence, which see the picture and themselves but not each other; in a quarter of
the batches they are a conversation, in which each sees those before. While training, small extra heads name what each patch shows
and what the class token has seen, as pretraining would have taught, and half-way up the language model where the thing lies that
a word names and how large it is, without which two things are not compared for a long time. The first eighth of the time the
encoder learns alone, on crowded pictures. The heads are not saved; state is, beside the model, so that a stopped run goes on.

With ``--start`` most is known already: the encoder never learns alone, the curriculum begins at WARM, and steps are smaller.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, pad

from laconic.models.checkpoint import save, saved_state
from laconic.models.pictures import find_eyes
from laconic.models.scenes import CELL, COLOURS, RADII, SHAPES, SIDE, TYPES, WORDS, Scene, Thing, ask, covered, make_scene
from laconic.models.shapes_models import build_model, warm_start
from laconic.models.shapes_processor import VARIANTS, make_processor
from laconic.vision.encoder import has_class_token

# pixels of the pictures, the most things in them, and pictures in a batch, one stage after another: first the ground grows,
# then what stands on it
STAGES = ((56, 2, 64), (84, 3, 64), (112, 3, 36), (140, 4, 24), (168, 5, 16), (224, 5, 9), (280, 6, 6), (SIDE, 8, 4))
ALONE = ((0.08, (SIDE // 2, 9, 8)), (0.13, (SIDE, 16, 2)))  # share of the time up to which the encoder learns alone, and on what
PASS = 0.8  # share of right answers to every type of question that opens the next stage
LATEST, LATEST_WARM = 0.85, 0.5  # share of the time by which the last stage begins in any case
# about each scene: what takes longest, most
ASKED = (*TYPES, "comparison", "count", "position", "comparison", "count", "comparison")
RATE, RATE_ALONE, RATE_WARM = 1e-3, 2e-3, 5e-4
WARM = 3  # the stage at which a model begins that starts from another
GROUND = 0.1  # weight of patches that show nothing among those that the encoder is asked about
CHAT = 0.25  # share of the batches in which the questions about a scene are one conversation
IGNORED = -100
FACTS = {  # what each patch is asked: kinds of answers, 0 for none
    "shape": len(SHAPES) + 2, "colour": len(COLOURS) + 1, "middle": 2, "size": 4, "word": len(WORDS) + 1, "tens": 11, "ones": 11,
}  # fmt: skip
PLACE = ("row", "column")  # in the whole grid; of patches that show something, and of things that a word names
HALF_WAY, LATER = 2, 4  # layers of the language model after which it is asked that, and how far the thing named before it lies


class Heads(torch.nn.Module):
    """What patches and, where there is one, the class token are asked while training."""

    def __init__(self, width: int, words: int) -> None:
        super().__init__()
        self.named = torch.nn.Linear(words, len(PLACE) + len(RADII))
        self.apart = torch.nn.Linear(words, len(PLACE))
        self.patch = torch.nn.Linear(width, len(PLACE) + sum(FACTS.values()))
        kinds = len(SHAPES) * len(COLOURS)
        self.seen = torch.nn.Linear(width, kinds + sum(FACTS[name] for name in ("word", "tens", "ones")))

    def losses(self, patches: torch.Tensor, token: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """Sum of the cross entropies, patches ``(batch, n, width)`` and class token ``(batch, width)`` or None."""
        total = patches.new_zeros(())
        places, *parts = self.patch(patches).float().split([len(PLACE), *FACTS.values()], dim=-1)
        shown = batch.facts["shape"] > 0
        total = total + off_by(places[shown], torch.stack([batch.facts[name] for name in PLACE], dim=-1)[shown])
        for (name, kinds), logits in zip(FACTS.items(), parts, strict=True):
            weight = torch.ones(kinds)
            weight[0] = GROUND  # most patches show nothing
            if bool((batch.facts[name] != IGNORED).any()):  # a batch may be without a sign
                total = total + cross_entropy(logits.flatten(0, 1), batch.facts[name].flatten(), weight, ignore_index=IGNORED)
        if token is None:
            return total
        kinds = batch.kinds.shape[1]
        seen = self.seen(token).float()
        total = total + 10 * binary_cross_entropy_with_logits(seen[:, :kinds], batch.kinds)
        begin = kinds
        for name in ("word", "tens", "ones"):
            logits, begin = seen[:, begin : begin + FACTS[name]], begin + FACTS[name]
            total = total + 0.5 * cross_entropy(logits, batch.sign[name])
        return total

    def naming(self, hidden: torch.Tensor, later: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum of the losses at the words that name a thing, of the language model's ``hidden`` states after the two layers,
        ``(batch, text, width)`` each."""
        asked = batch.named[..., 0] != IGNORED
        if not bool(asked.any()):
            return hidden.new_zeros(())
        place, size = self.named(hidden[asked].float()).split([len(PLACE), len(RADII)], dim=-1)
        target = batch.named[asked]
        loss = off_by(place, target[:, : len(PLACE)]) + cross_entropy(size, target[:, len(PLACE)])
        second = batch.named[..., -1] != IGNORED
        if bool(second.any()):
            loss = loss + off_by(self.apart(later[second].float()), batch.named[second][:, -len(PLACE) :], middle=0.0)
        return loss


def off_by(places: torch.Tensor, target: torch.Tensor, middle: float = (SIDE / CELL - 1) / 2) -> torch.Tensor:
    """How far ``places`` (k, 2), from -1 to 1 over the grid, are from rows and columns: in a straight line, so that places can be
    compared by a difference."""
    return 5 * (places - (target - middle) / (SIDE / CELL / 2)).abs().sum(-1).mean()


@dataclass(frozen=True)
class Frame:
    """What a processor makes of a picture in a prompt.

    Attributes:
        before, after: ids of the tokens around the picture's own, ``<bos>`` the first of them.
        merge: patches along a side of what becomes one token.
        mean, std: of the colours.
    """

    tokenizer: Any
    before: tuple[int, ...]
    after: tuple[int, ...]
    merge: int
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, processor: Any) -> Frame:
        """That of a `shapes` model's processor."""
        from PIL import Image

        ids = processor(images=Image.new("RGB", (SIDE, SIDE)), text="<image>")["input_ids"][0]
        mark, colours = processor.tokenizer.convert_tokens_to_ids("<image>"), processor.image_processor
        first, count = ids.index(mark), ids.count(mark)
        merge = round(SIDE // CELL / count**0.5)
        mean, std = np.array(colours.image_mean), np.array(colours.image_std)
        return cls(processor.tokenizer, tuple(ids[:first]), tuple(ids[first + count :]), merge, mean, std)


@dataclass
class Batch:
    """Tensors of a batch of scenes, and of their questions in one sequence per scene behind the picture."""

    pixels: torch.Tensor  # (batch, 3, side, side)
    frame: Frame
    places: torch.Tensor  # (batch, patches): where they lie in the whole grid, row by row
    ids: torch.Tensor  # (batch, text)
    block: torch.Tensor  # (batch, text): which question a token belongs to, -1 for the beginning, -2 for padding
    chat: bool  # whether questions see those before them
    positions: torch.Tensor  # (batch, length) of the language model: frame, picture and text
    answers: torch.Tensor  # (batch, text): the token that follows where it is asked for, IGNORED elsewhere
    named: torch.Tensor  # (batch, text, 5): see ``naming``
    types: np.ndarray  # (batch, questions) of TYPES
    facts: dict[str, torch.Tensor]
    kinds: torch.Tensor
    sign: dict[str, torch.Tensor]


class SceneMaker:
    """Batches of rendered scenes with questions, made by a thread ahead of time."""

    def __init__(self, seed: int, variant: str = "shapes") -> None:
        self.rng = np.random.default_rng(seed)
        self.frame = Frame.of(make_processor(variant))
        self.stage = STAGES[0]
        self._ready: queue.Queue = queue.Queue(maxsize=4)
        threading.Thread(target=self._work, daemon=True).start()

    def batch(self, stage: tuple[int, int, int]) -> Batch:
        """The next batch of a stage: pixels of a side, the most things, and how many pictures."""
        self.stage = stage
        while True:
            made, batch = self._ready.get()
            if made == stage:
                return batch

    def _work(self) -> None:
        while True:
            stage = self.stage
            self._ready.put((stage, self._make(*stage)))

    def _make(self, side: int, most: int, count: int) -> Batch:
        scenes, asked = [], []
        while len(scenes) < count:
            scene = make_scene(self.rng, side, (2, most))
            questions = [question for type_ in ASKED if (question := ask(scene, self.rng, type_))]
            if len(questions) >= 3:
                scenes.append(scene)
                asked.append(list(dict.fromkeys(questions)))
        return assemble(scenes, asked, self.frame, self.rng)


def assemble(scenes: list[Scene], asked: list[list], frame: Frame, rng: np.random.Generator) -> Batch:
    """The tensors of scenes and their questions; the window of a small picture lies anywhere in the full grid."""
    n, full, merge = scenes[0].side // CELL, SIDE // CELL, frame.merge
    pixels = np.stack([np.asarray(scene.render()) for scene in scenes])
    pixels = ((pixels / 255.0 - frame.mean) / frame.std).transpose(0, 3, 1, 2)
    corner = merge * rng.integers(0, (full - n) // merge + 1, (len(scenes), 2))
    places = window(corner, n, full)
    picture = len(frame.before) + window(corner // merge, n // merge, full // merge)
    behind = len(frame.before) + (full // merge) ** 2
    around = (np.arange(len(frame.before)), behind + np.arange(len(frame.after)))
    first, after = (np.broadcast_to(part, (len(scenes), len(part))) for part in around)
    text_begin = behind + len(frame.after)
    rows = [[frame.tokenizer(f"{q.text} {q.answer} <eos>", add_special_tokens=False)["input_ids"] for q in qs] for qs in asked]
    longest, chat = max(sum(map(len, row)) for row in rows), bool(rng.random() < CHAT)
    ids, block = np.zeros((len(rows), longest), int), np.full((len(rows), longest), -2)
    answers, places_of_text = np.full((len(rows), longest), IGNORED), np.zeros((len(rows), longest), int)
    named = np.full((len(rows), longest, 5), IGNORED)
    for r, (row, questions) in enumerate(zip(rows, asked, strict=True)):
        at = 0
        for i, (tokens, question) in enumerate(zip(row, questions, strict=True)):
            end, spoken = at + len(tokens), len(question.answer.split()) + 1
            ids[r, at:end], block[r, at:end] = tokens, i
            places_of_text[r, at:end] = text_begin + np.arange(len(tokens)) + (at if chat else 0)
            answers[r, end - spoken - 1 : end - 1] = tokens[-spoken:]
            named[r, at : end - spoken] = naming(scenes[r], question.text, corner[r])
            at = end
    positions = np.concatenate([first, picture, after, places_of_text], axis=1)  # the language model, too, sees a window
    most = max(map(len, asked))
    types = np.array([[TYPES.index(q.type) for q in qs] + [-1] * (most - len(qs)) for qs in asked])
    facts, kinds, sign = label(scenes, corner)
    places, ids, block, positions, answers, named = map(torch.from_numpy, (places, ids, block, positions, answers, named))
    pixels = torch.from_numpy(pixels).float()
    return Batch(pixels, frame, places, ids, block, chat, positions, answers, named, types, facts, kinds, sign)


def window(corner: np.ndarray, n: int, full: int) -> np.ndarray:
    """Numbers of the cells of windows of ``n`` x ``n`` in a grid of ``full`` x ``full``, ``(batch, n * n)``."""
    grid = (corner[:, :1, None] + np.arange(n)[:, None]) * full + corner[:, 1:, None] + np.arange(n)
    return grid.reshape(len(corner), -1)


def naming(scene: Scene, text: str, corner: np.ndarray) -> np.ndarray:
    """``(words, 5)``: row and column in the whole grid, and size, of the one thing that a word names, and by how many rows and
    columns the one named before it lies farther down and right; or IGNORED."""
    words = text.replace("?", "").replace(",", "").split()
    found, before = np.full((len(words), 5), IGNORED), None
    for i, word in enumerate(words):
        things = [thing for thing in scene.things if thing.shape == word]
        if len(things) == 1:
            place = np.array([things[0].y // CELL, things[0].x // CELL])
            found[i, :3] = *(corner + place), size_of(things[0])
            found[i, 3:] = IGNORED if before is None else before - place
            before = place
    return found


def size_of(thing: Thing) -> int:
    """Which of RADII it has."""
    return sum(thing.radius > 1.2 * radius for radius in RADII[:-1])


def label(
    scenes: list[Scene], corner: np.ndarray
) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """What each patch shows, ``(batch, patches)`` by name, which kinds of things are there, and what the sign says.

    ``corner``: row and column of each picture in the whole grid, ``(batch, 2)``.
    """
    n = scenes[0].side // CELL
    facts = {name: np.zeros((len(scenes), n, n), dtype=int) for name in (*FACTS, *PLACE)}
    kinds = np.zeros((len(scenes), len(SHAPES), len(COLOURS)), dtype=np.float32)
    sign = {name: np.zeros(len(scenes), dtype=int) for name in ("word", "tens", "ones")}
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            cells = covered(thing, n)
            shape, colour = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)
            facts["shape"][i][cells], facts["colour"][i][cells] = shape + 1, colour + 1
            facts["size"][i][cells] = 1 + size_of(thing)
            facts["middle"][i][int(thing.y // CELL), int(thing.x // CELL)] = 1
            kinds[i, shape, colour] = 1
        facts["row"][i], facts["column"][i] = corner[i][:, None, None] + np.indices((n, n))
        plate = scene.cells("sign")
        facts["shape"][i][plate] = len(SHAPES) + 1
        for name in ("word", "tens", "ones"):
            facts[name][i][~plate] = IGNORED
        if scene.sign is not None:
            said = read(scene.sign.text)
            for name, value in said.items():
                facts[name][i][plate] = value
                sign[name][i] = value
    return (
        {name: torch.from_numpy(value.reshape(len(scenes), -1)) for name, value in facts.items()},
        torch.from_numpy(kinds.reshape(len(scenes), -1)),
        {name: torch.from_numpy(value) for name, value in sign.items()},
    )


def read(text: str) -> dict[str, int]:
    """A sign's text as numbers of classes, 0 for none."""
    if not text.isdigit():
        return {"word": WORDS.index(text) + 1, "tens": 0, "ones": 0}
    return {"word": 0, "tens": int(text[0]) + 1 if len(text) > 1 else 0, "ones": int(text[-1]) + 1}


def encode(model, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features of the patches as the projector is given them, ``(batch, patches, width)``, and the class token at the end of the
    tower, None where there is none."""
    tower = find_eyes(model).tower
    embeddings = tower.embeddings
    hidden, places = embeddings.patch_embedding(batch.pixels).flatten(2).transpose(1, 2), batch.places
    first = int(has_class_token(tower))
    if first:
        hidden = torch.cat([embeddings.class_embedding.expand(len(hidden), 1, -1), hidden], dim=1)
        places = pad(places + 1, (1, 0))
    hidden = hidden + embeddings.position_embedding(places)
    states = [tower.pre_layrnorm(hidden) if first else hidden]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], attention_mask=None))
    end, layer = tower.post_layernorm(states[-1]), getattr(model.config, "vision_feature_layer", None)
    features = end if layer is None else states[layer][:, first:]
    return features, end[:, 0] if first else None


def read_words(model, features: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Last hidden states of the words ``(batch, words, dim)`` behind the pictures: questions see the picture and themselves."""
    eyes, rows = find_eyes(model), len(batch.ids)
    words, around = eyes.language.embed_tokens, (batch.frame.before, batch.frame.after)
    before, after = (words(torch.tensor(part, dtype=torch.long)).expand(rows, -1, -1) for part in around)
    hidden = torch.cat([before, eyes.projector(features), after, words(batch.ids)], dim=1)
    begin = hidden.shape[1] - batch.ids.shape[1]
    block = torch.cat([torch.full((rows, begin), -1), batch.block], dim=1)
    own = (block[:, :, None] == block[:, None]) | (block[:, None] == -1) | (block[:, None] >= 0 if batch.chat else False)
    causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
    return eyes.language(
        inputs_embeds=hidden, attention_mask=(own & causal)[:, None], position_ids=batch.positions, use_cache=False
    ).last_hidden_state[:, begin:]


def losses(model, heads: Heads, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Loss of the answers, loss of the extra heads, and which questions were answered right ``(batch, questions)``."""
    features, token = encode(model, batch)
    extra = heads.losses(features, token, batch)
    count = batch.ids.shape[1]
    middle: list[torch.Tensor] = []
    layers = find_eyes(model).language.layers
    hooks = [layers[i].register_forward_hook(lambda _m, _a, out: middle.append(out[:, -count:])) for i in (HALF_WAY, LATER)]
    hidden = read_words(model, features, batch)
    for hook in hooks:
        hook.remove()
    extra = extra + heads.naming(*middle, batch)
    asked = batch.answers != IGNORED
    logits, target = model.lm_head(hidden[asked].float()), batch.answers[asked]
    wrong = torch.zeros(len(batch.ids), batch.types.shape[1], dtype=torch.bool)
    row, _ = asked.nonzero(as_tuple=True)
    miss = logits.argmax(-1) != target
    wrong[row[miss], batch.block[asked][miss]] = True
    return cross_entropy(logits, target), extra, ~wrong.numpy()


def train(out: Path, minutes: float, seed: int, variant: str, start: str | None) -> None:
    """Train for ``minutes`` of wall clock, counted over all resumed runs. ``start``: the model whose weights are taken over."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    make_processor(variant).save_pretrained(out)
    model = build_model(variant)
    heads = Heads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    state = {"step": 0, "stage": WARM if start else 0, "elapsed": 0.0, "scenes": 0}
    if (saved := saved_state(out)) is not None:
        for part, name in ((model, "model"), (heads, "heads"), (optimizer, "optimizer")):
            part.load_state_dict(saved[name])
        state = {key: saved[key] for key in state}
    elif start:
        warm_start(model, variant, start, seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    loop(model, heads, optimizer, state, out, minutes, SceneMaker(seed + state["step"], variant), warm=bool(start))


def loop(model, heads, optimizer, state: dict, out: Path, minutes: float, maker: SceneMaker, warm: bool) -> None:
    """The training loop: one batch of scenes a step. ``warm``: the model has started from another one."""
    eyes, full = find_eyes(model), RATE_WARM if warm else RATE
    first, begin, latest = (WARM, 0.0, LATEST_WARM) if warm else (0, ALONE[-1][0], LATEST)
    begun, before, last_save = time.time(), state["elapsed"], time.time()
    right: dict[str, list[float]] = defaultdict(list)
    while state["elapsed"] < minutes * 60:
        share = state["elapsed"] / (minutes * 60)
        alone = next((pictures for until, pictures in ALONE if share < until and not warm), None)
        rate = (RATE_ALONE if alone else full) * min(1.0, (state["step"] + 1) / 100) * min(1.0, max(0.03, (1 - share) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        stage = state["stage"]
        if state["step"] % 4 == 3 and stage:  # what was learned on smaller pictures is kept in practice
            stage = int(maker.rng.integers(stage))
        batch = maker.batch(alone or STAGES[stage])
        optimizer.zero_grad(set_to_none=True)
        if alone:
            loss, extra = torch.zeros(()), heads.losses(*encode(model, batch), batch)
        else:
            loss, extra, correct = losses(model, heads, batch)
            for i, name in enumerate(TYPES) if stage == state["stage"] else ():
                right[name] = [*right[name], *correct[batch.types == i]][-300:]
        (loss + 0.3 * extra).backward()
        for part in (eyes.tower, eyes.language):  # neither drowns the other
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizer.step()
        state.update(step=state["step"] + 1, scenes=state["scenes"] + len(batch.ids), elapsed=before + time.time() - begun)
        means = {name: float(np.mean(values)) for name, values in right.items() if values}
        if state["step"] % 25 == 0:
            said = "  ".join(f"{name} {value:.2f}" for name, value in means.items())
            at = f"{state['elapsed']:6.0f} s  step {state['step']}  stage {STAGES[state['stage']]}  scenes {state['scenes']}"
            print(f"{at}  loss {loss.item():.3f}  extra {extra.item():.3f}  {said}", flush=True)
        late = share > begin + (latest - begin) * (state["stage"] + 1 - first) / (len(STAGES) - 1 - first)
        asked = min(map(len, right.values())) if len(right) == len(TYPES) else 0
        passed = state["stage"] + 1 < len(STAGES) and (late or (asked >= 100 and min(means.values()) > PASS))
        if passed:
            print(f"{state['elapsed']:6.0f} s  step {state['step']}  passed {STAGES[state['stage']]}", flush=True)
            state["stage"] += 1
            right.clear()
        if passed or time.time() - last_save > 120:
            save(model, out, heads=heads.state_dict(), optimizer=optimizer.state_dict(), **state)
            last_save = time.time()
    save(model, out, heads=heads.state_dict(), optimizer=optimizer.state_dict(), **state)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Train a built-in shapes model on CPU, in one or two hours.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, processor and resume state")
    parser.add_argument("--minutes", type=float, default=120.0, help="wall-clock budget (default 120)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=VARIANTS, default="shapes", help="which of them (default shapes)")
    parser.add_argument("--start", help="name or folder of the shapes model to start from (default: random weights)")
    arguments = parser.parse_args()
    train(arguments.out, arguments.minutes, arguments.seed, arguments.variant, arguments.start)


if __name__ == "__main__":
    main()
