"""Train the drafter of flash_sd: ``python -m laconic.decoding.train_flash --model DIR --output FILE``.

The target writes answers to prompts with pictures and is asked for its hidden states; from these a small network learns to
foretell those that follow. The target is only read. Prompts here ask for descriptions of rendered scenes;
``laconic profile flash_sd`` does the same for any task with pictures.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torch.nn.utils.rnn import pad_sequence

from laconic.decoding.flash_net import VIEWS, FlashForm, FlashNet
from laconic.errors import LaconicError
from laconic.profiles import Profile, fingerprint, weights_to_json

STATES, LAWS = 1.0, 0.1  # weights of the two losses: of hidden states, and of the laws that the head reads from them
NOISE = 0.2 * 512  # over the length of the text: width of the noise on the hidden states that are read
RATE, BETAS, CLIP, WARM = 1e-3, (0.9, 0.95), 0.5, 100  # of AdamW; the original, far wider, takes 3e-5
BATCH = 16
RANKS = 10  # tokens of a law whose accuracy is measured
LONGEST = 128  # tokens of an answer
HELD_OUT = 10  # every tenth prompt is not learned from
SEEDS = 9_000_000  # of the scenes that drafters learn from


@dataclass(frozen=True)
class Written:
    """A prompt and what the target wrote after it: ``hidden`` and ``following``, ``(n, width)``, and ``pictured``, as in
    ``FlashNet.entries``; ``ids``, int64 ``(n + 1,)``; ``prompt``: tokens of the prompt."""

    hidden: torch.Tensor
    following: torch.Tensor
    pictured: torch.Tensor
    ids: torch.Tensor
    prompt: int


def written(
    model: torch.nn.Module, prompts: Iterable[dict[str, torch.Tensor]], ends: Sequence[int], most: int
) -> Iterator[Written]:
    """What the target makes of prompts, one row each, greedily; those with no answer but its end are left out."""
    from laconic.decoding.runner import Runner
    from laconic.hooks import apply
    from laconic.models.pictures import pictured_tokens

    for batch in alike(prompts):
        inputs = {name: torch.cat([prompt[name] for prompt in batch]).to(model.device) for name in batch[0]}
        with torch.inference_mode(), apply(model, "dense") as handle:
            runner = Runner(handle, hidden=True)
            output = runner.prefill(inputs)
            following, hidden, ids = [output.hidden_states[0][:, 1:]], [output.hidden_states[-1]], [inputs["input_ids"]]
            done = torch.zeros(len(batch), dtype=torch.bool, device=model.device)
            for _ in range(most):
                ids.append(output.logits[:, -1:].argmax(-1))
                following.append(model.get_input_embeddings()(ids[-1]))
                done |= torch.isin(ids[-1][:, 0], torch.tensor(ends, device=done.device))
                if bool(done.all()):
                    break
                output = runner.step(ids[-1][:, 0])
                hidden.append(output.hidden_states[-1])
        count = inputs["input_ids"].shape[1]
        whole = [torch.cat(parts, dim=1) for parts in (ids, hidden, following)]
        for tokens, states, after in zip(*whole, strict=True):
            over = torch.isin(tokens[count:], torch.tensor(ends, device=tokens.device)).nonzero()[:, 0].tolist()
            n = count + over[0] if over else len(tokens) - 1
            if n > count:
                pictured = pictured_tokens(model, tokens[:n])
                yield Written(states[:n].clone(), after[:n].clone(), pictured, tokens[: n + 1].clone(), count)


def alike(prompts: Iterable[dict[str, torch.Tensor]]) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Neighbours that fit into one batch without padding, BATCH at most."""
    def shapes(prompt: dict[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
        return [(name, tensor.shape[1:]) for name, tensor in prompt.items() if name != "attention_mask"]

    for _, group in itertools.groupby(prompts, shapes):
        while batch := list(itertools.islice(group, BATCH)):
            yield batch


def losses(
    net: FlashNet, head: torch.nn.Module, batch: Sequence[Written], noise: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of a batch; the head's logits of what was foretold, ``(pairs, vocabulary)``, with the token that came, and its
    offset, ``(pairs, 2)``.

    Entry t of an answer foretells the hidden states of the tokens t + 1 + i, for all offsets i up to the last but one token.
    """
    rows, offsets = [], torch.arange(net.form.offsets, device=batch[0].hidden.device)
    for text in batch:
        hidden = text.hidden
        if noise is not None:
            width = NOISE / max(512, len(hidden))
            hidden = hidden + width * (torch.rand(hidden.shape, generator=noise).to(hidden) - 0.5)
        rows.append(net.entries(hidden, text.following, text.pictured))
    lengths = torch.tensor([len(row) for row in rows], device=offsets.device)
    places = torch.arange(int(lengths.max()), device=offsets.device).expand(len(rows), -1)
    states, _ = net(pad_sequence(rows, batch_first=True), places < lengths[:, None], places)
    foretold, truth, tokens, which = [], [], [], []
    for row, text in enumerate(batch):
        first, count = text.prompt - 1 + int(text.pictured[text.prompt - 1]), len(text.hidden)
        # counted from the end, for what became of pictures does not matter there
        mine = states[row, lengths[row] - (count - first) : lengths[row] - 1]
        at = torch.arange(first + 1, count, device=offsets.device)[:, None] + offsets
        inside = at < count
        foretold.append(net.ahead(mine)[inside])
        truth.append(text.hidden[at[inside]])
        tokens.append(text.ids[at[inside] + 1])
        which.append(offsets.expand(at.shape)[inside])
    foretold, truth = torch.cat(foretold), torch.cat(truth)
    logits = head(foretold)
    with torch.no_grad():
        laws = head(truth).float().softmax(-1)
    loss = STATES * smooth_l1_loss(foretold, truth) + LAWS * cross_entropy(logits.float(), laws)
    return loss, logits, torch.stack([torch.cat(tokens), torch.cat(which)], dim=1)


def fit(net: FlashNet, head: torch.nn.Module, texts: Sequence[Written], steps: int, seed: int) -> None:
    """AdamW with warm-up and a falling rate, in place. The head is used, and gets no gradient."""
    generator, order = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, betas=BETAS)
    batches: Iterator[torch.Tensor] = iter(())
    frozen = [weight.requires_grad for weight in head.parameters()]
    head.requires_grad_(False)
    with torch.enable_grad():
        for step in range(steps):
            picked = next(batches, None)
            if picked is None:
                batches = iter(torch.randperm(len(texts), generator=order).split(BATCH))
                picked = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / WARM) * max(0.02, 1 - step / steps)
            optimizer.zero_grad()
            losses(net, head, [texts[i] for i in picked.tolist()], generator)[0].backward()
            torch.nn.utils.clip_grad_value_(net.parameters(), CLIP)
            optimizer.step()
    for weight, before in zip(head.parameters(), frozen, strict=True):
        weight.requires_grad_(before)


@torch.no_grad()
def accuracy(net: FlashNet, head: torch.nn.Module, texts: Sequence[Written]) -> list[list[float]]:
    """For each offset how often the token of each rank came, ``(offsets, ranks)``."""
    hits = torch.zeros(net.form.offsets, min(RANKS, head.weight.shape[0]))
    total = torch.zeros(net.form.offsets, 1)
    for begin in range(0, len(texts), BATCH):
        _, logits, came = losses(net, head, texts[begin : begin + BATCH])
        right = logits.topk(hits.shape[1], dim=-1).indices == came[:, :1]
        hits.index_add_(0, came[:, 1].cpu(), right.float().cpu())
        total.index_add_(0, came[:, 1].cpu(), torch.ones(len(came), 1))
    table = (hits / total.clamp(min=1)).clamp(min=1e-4)  # a rank never seen right may yet be
    return [[round(float(share), 4) for share in row] for row in table]


def learn(model: torch.nn.Module, texts: Sequence[Written], form: FlashForm, steps: int, seed: int) -> dict[str, Any]:
    """The tables of a profile, from what the target has written."""
    if len(texts) < 2:
        raise LaconicError("The model wrote two answers of more than a word at least: give more prompts, or ask for more.")
    held = list(texts[::HELD_OUT])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FlashNet(form).to(model.device)
    head = model.get_output_embeddings()
    fit(net, head, [text for i, text in enumerate(texts) if i % HELD_OUT], steps, seed)
    net.eval()
    return {"form": asdict(form), "accuracy": accuracy(net, head, held), "texts": len(texts), "weights": weights_to_json(net)}


def train_flash(
    model: torch.nn.Module, prompts: Iterable[dict[str, torch.Tensor]], seed: int = 0, steps: int = 2000, **form: Any
) -> dict[str, Any]:
    """The tables of a profile, from prompts with pictures; ``form`` changes a ``FlashForm``."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return learn(model, list(written(model, prompts, ends, LONGEST)), FlashForm.of_model(model, **form), steps, seed)


def scene_prompts(reader: Any, seed: int, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """The inputs of prompts that ask for descriptions of scenes."""
    import numpy as np

    from laconic.models.reading import read
    from laconic.models.scenes import make_scene
    from laconic.models.train_captions import PROMPT

    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield read(reader, "<image> " + PROMPT, (make_scene(rng),))


def main() -> None:
    """Command line entry."""
    from laconic.models import load

    parser = argparse.ArgumentParser(description="Train the drafter of flash_sd on descriptions of scenes.")
    parser.add_argument("--model", required=True, help="a vision-language model that describes scenes")
    parser.add_argument("--output", type=Path, required=True, help="the profile to write")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--offsets", type=int, default=5, help="hidden states foretold at once")
    parser.add_argument("--latents", type=int, default=64, help="tokens that stand for a picture")
    parser.add_argument("--view", choices=VIEWS, default="latents", help="how pictures are seen")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, reader = load(options.model)
    prompts = scene_prompts(reader, SEEDS + options.seed, options.scenes)
    form = {"offsets": options.offsets, "latents": options.latents, "view": options.view}
    tables = train_flash(model, prompts, options.seed, options.steps, **form)
    Profile("flash_sd", fingerprint(model), options.seed, f"{options.scenes} scenes", tables).save(options.output)
    for depth, row in enumerate(tables["accuracy"]):
        print(f"depth {depth + 1}: right token first {row[0]:.2f}, among {len(row)} {sum(row):.2f}")


if __name__ == "__main__":
    main()
