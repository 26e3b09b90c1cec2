"""Which picture tokens an answer rests on: attention, weighted by its gradients and followed from the answer to the input.

Source: Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective (2025), later
Task-Related Token Compression in Multimodal Large Language Models from an Explainability Perspective (2026).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad, relu

from laconic.attention.base import Call
from laconic.attention.engine import Policy
from laconic.cache import KVLayer
from laconic.errors import LaconicError
from laconic.evaluation.measure import stop_ids
from laconic.hooks import apply
from laconic.kernels.ragged import dense
from laconic.models.pictures import find_eyes
from laconic.models.reading import open_picture, read, text_side
from laconic.vision.inside import weights_of
from laconic.vision.see import Shown, as_seen
from laconic.vision.student import label_of

if TYPE_CHECKING:
    from PIL.Image import Image


def relevance(model: torch.nn.Module, inputs: dict[str, torch.Tensor], answer_ids: torch.Tensor) -> torch.Tensor:
    """Relevance of every picture token of a prompt for an answer, float32 ``(n,)``, >= 0, in the order of the prompt.

    For each token of the answer R is the identity and grows by W R layer by layer, W being the mean over heads of the positive
    part of attention times the gradient of the token's logit with respect to it. Of R only the row that predicts the token is
    wanted, so that row v, at first 1 at itself, is followed from the last layer down: v + v W. Tokens of the answer count alike.

    It works offline, in float32 whatever the model's own type is: attention maps (heads, n, n) of all layers are held with what
    their gradients need. Meant for prompts of up to about a thousand tokens.

    Args:
        model: a vision-language model. It is as before afterwards.
        inputs: of one prompt with pictures, without padding, as its processor makes them.
        answer_ids: int64 ``(t,)``: what the model answers.

    Raises:
        LaconicError: where no gradient reaches a picture token ("no relevance"), or the inputs cannot be explained.
    """
    pictured = _pictured(model, inputs, answer_ids)
    maps, count = _Maps(len(pictured)), len(answer_ids)
    with _float32(model), apply(model, "dense") as handle, torch.enable_grad():
        handle.policy = maps
        logits = model(**_extended(model, inputs, answer_ids), use_cache=True, logits_to_keep=count).logits[0]
        found = torch.zeros(int(pictured.sum()), device=model.device)
        for step, token in enumerate(answer_ids.tolist()):
            v = _followed(logits[step, token], maps.weights, len(pictured) - 1 + step)
            found += v[: len(pictured)][pictured] / count
    if not bool(found.any()):
        raise LaconicError("The answer has no relevance for the picture: no gradient gets there, so explain another answer.")
    return found


@dataclass(frozen=True)
class Explained:
    """What an answer about a picture rests on.

    Attributes:
        answer: of the dense model. picture: as the encoder saw it.
        shown: the picture's layout with relevance as scores, and as depth that of the more relevant half over the largest.
    """

    answer: str
    shown: Shown
    picture: Image

    @property
    def tokens(self) -> int:
        return int((~self.shown.layout.separators).sum())

    @property
    def half(self) -> int:
        """How many of the most relevant tokens hold half of the relevance."""
        shares = (self.shown.scores / self.shown.scores.sum()).sort(descending=True).values.cumsum(0)
        return int((shares < 0.5).sum()) + 1

    def row(self) -> dict[str, Any]:
        """In JSON types, the relevance of the tokens in the order of the prompt."""
        return {"answer": self.answer, "tokens": self.tokens, "half": self.half, "relevance": self.shown.scores.tolist()}


def explain_answer(model: torch.nn.Module, reader: Any, picture: Any, question: str, max_new_tokens: int = 8) -> Explained:
    """Asks about one picture and tells which of its tokens the greedy answer rests on (see ``relevance``).

    Args:
        model, reader: a vision-language model and its processor, as ``laconic.load`` gives them.
        picture: a path, a Pillow image, or a scene.
    """
    opened = open_picture(picture)
    inputs = {name: t.to(model.device) for name, t in read(reader, question, [opened]).items()}
    tokenizer, prompt = text_side(reader), inputs["input_ids"].shape[1]
    stop = stop_ids(model, tokenizer)
    with apply(model, "uniform:100%") as handle, torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        (seen,) = handle.entry.pictures
    answer = [token for token in ids[0, prompt:].tolist() if token not in stop]
    if not answer:
        raise LaconicError("The model answers nothing, so there is no answer to explain: ask something else.")
    found = relevance(model, inputs, torch.tensor(answer)).cpu().masked_fill(seen.layout.separators, 0.0)
    label = label_of(found)
    shown = Shown(seen.layout, label / label.max(), scores=found)
    said = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return Explained(said, shown, as_seen(opened, inputs, reader, 0))


def _pictured(model: torch.nn.Module, inputs: dict[str, torch.Tensor], answer_ids: torch.Tensor) -> torch.Tensor:
    """Which tokens of the prompt are a picture's, boolean ``(n,)``; refuses what cannot be explained."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.shape[0] != 1 or (mask is not None and not bool(mask.all())):
        raise LaconicError("Relevance is found for one prompt at a time: give a batch of one row, without padding.")
    if answer_ids.dim() != 1 or not len(answer_ids):
        raise LaconicError("Relevance is that of an answer: give its token ids, one or more, as a 1-D tensor.")
    pictured = ids[0].to(model.device) == find_eyes(model).image
    if not bool(pictured.any()):
        raise LaconicError("There is no picture in this prompt whose relevance could be found: give one.")
    return pictured


def _extended(model: torch.nn.Module, inputs: dict[str, torch.Tensor], answer_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs on the model's device, as float32, with all tokens of the answer but the last behind the prompt."""
    ids, more = inputs["input_ids"], len(answer_ids) - 1
    longer = {name: pad(t, (0, more)) for name, t in inputs.items() if t.shape == ids.shape}  # token types: 0 is text
    longer["input_ids"] = torch.cat([ids, answer_ids[None, :-1].to(ids)], dim=1)
    if "attention_mask" in inputs:
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    moved = {name: t.to(model.device) for name, t in {**inputs, **longer}.items()}
    return {name: t.float() if t.is_floating_point() else t for name, t in moved.items()}


def _followed(logit: torch.Tensor, weights: list[torch.Tensor], at: int) -> torch.Tensor:
    """Relevance of every token for a ``logit`` at place ``at``, ``(n,)``, by the attention ``weights`` (kv_heads, group, n, n) of
    the layers in order."""
    gradients = torch.autograd.grad(logit, weights, retain_graph=True, allow_unused=True)
    v = torch.zeros(weights[0].shape[-1], device=logit.device)
    v[at] = 1.0
    for weight, gradient in zip(reversed(weights), reversed(gradients), strict=True):
        if gradient is not None:
            v = v + v @ relu(weight.detach() * gradient).mean((0, 1))
    return v


class _Maps(Policy):
    """Dense attention that holds its weights, (kv_heads, group, n, n) per layer, for their gradients. One row, one forward.

    ``prompt``: tokens before the answer, which do not see it.
    """

    def __init__(self, prompt: int) -> None:
        super().__init__(())
        self.prompt = prompt
        self.weights: list[torch.Tensor] = []

    def attend(self, layer: KVLayer, call: Call) -> torch.Tensor:
        if call.reach is not None:  # where a whole prompt sees itself, its answer would be taken for a part of it
            at = layer.shared_positions[:, 0]
            reach = torch.where(at < self.prompt, call.reach.clamp(max=self.prompt - 1), at)
            call = dataclasses.replace(call, reach=reach)
        weights, _ = weights_of(layer, call, 0, torch.arange(layer.n, device=call.query.device))
        if not weights.requires_grad:  # the first layer's: nothing before it is asked for a gradient
            weights.requires_grad_()
        self.weights.append(weights)
        return torch.einsum("kgrn,knd->kgrd", weights, dense(layer.values)[0]).flatten(0, 1)[None]


@contextmanager
def _float32(model: torch.nn.Module) -> Iterator[None]:
    """The model with weights in float32 that ask for no gradients; afterwards as it was, bit by bit."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t, t.data, t.requires_grad) for t in tensors if t.is_floating_point()]
    try:
        for t, data, _ in before:
            t.data = data.float()
            t.requires_grad_(False)
        yield
    finally:
        for t, data, asked in before:
            t.data = data
            t.requires_grad_(asked)
