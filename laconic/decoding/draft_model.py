"""What methods with a draft model share: a smaller model of the same vocabulary, kept in step with the texts."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic import models
from laconic.decoding.base import Drafter, DraftMethod, Setting
from laconic.decoding.runner import Runner, left_padded
from laconic.decoding.sampling import Text
from laconic.decoding.tree import NONE, DraftTree, TreeShape
from laconic.decoding.verify import match
from laconic.hooks import apply
from laconic.method import parameter
from laconic.models.reading import text_side

SAME = 0.99  # share of the pieces that two tokenizers have to agree in: reserved ones are often named anew


class Loaded(str):
    """A model that the user has loaded, in the place of its name."""

    network: torch.nn.Module
    tokenizer: Any

    @classmethod
    def of(cls, given: Any) -> Loaded:
        network, tokenizer = given if isinstance(given, tuple) else (given, None)
        loaded = cls(_source(network) or type(network).__name__)
        loaded.network, loaded.tokenizer = network, tokenizer
        return loaded


@dataclass(frozen=True, kw_only=True)
class DraftModelMethod(DraftMethod):
    """Base of methods that ask a draft model.

    ``model`` is the name of a built-in model, a path or a hub id, opened once per process in the target's dtype and on its
    device; or, in Python, the model itself, alone or as ``(model, tokenizer)``. A built-in model finds its own: that of the same
    name with ``-draft``. Both models need the same tokenizer.
    """

    model: str = parameter("", "draft model: name, path or hub id; empty for that of a built-in model", search=())

    def __post_init__(self) -> None:
        if isinstance(self.model, (torch.nn.Module, tuple)):
            object.__setattr__(self, "model", Loaded.of(self.model))
        super().__post_init__()

    def parameters(self) -> dict[str, Any]:
        return {name: str(value) if name == "model" else value for name, value in super().parameters().items()}

    def prepare(self, model: torch.nn.Module) -> None:
        self.open(model)

    def open(self, target: torch.nn.Module) -> torch.nn.Module:
        """The draft model for a target model. Raises LaconicError for one that cannot draft for it."""
        if isinstance(self.model, Loaded):
            network, tokenizer = self.model.network, self.model.tokenizer
            self.require(hasattr(network, "config"), "model is not a causal language model: load one with laconic.load.")
            at = f"move it to {target.device}."
            self.require(network.device.type == target.device.type, f"the draft model is on {network.device}: {at}")
            pieces = text_side(tokenizer).get_vocab() if tokenizer is not None else models.vocabulary(_source(network))
        else:
            name = self.model or self._sibling(target)
            network, tokenizer = _load(name, target.dtype, target.device)
            pieces = text_side(tokenizer).get_vocab()
        self._compare(network, pieces, target)
        return network

    def _sibling(self, target: torch.nn.Module) -> str:
        path = Path(_source(target))
        name = f"{path.name}-draft" if path.parent == models.ZOO else ""
        ask = "it needs a draft model: add model= with a small one of the same tokenizer."
        self.require(name in models.builtin_models(), ask)
        return name

    def _compare(self, network: torch.nn.Module, pieces: dict[str, int] | None, target: torch.nn.Module) -> None:
        """Sizes may differ by padding where the tokenizers are known; where they are not, sizes are all there is to compare."""
        ask = "give one that was trained with the same tokenizer."
        known = models.vocabulary(_source(target))
        if pieces is None or known is None:
            sizes = [m.config.get_text_config().vocab_size for m in (network, target)]
            self.require(sizes[0] == sizes[1], f"the draft model has {sizes[0]} tokens and the model {sizes[1]}: {ask}")
            return
        agree = sum(pieces.get(piece) == i for piece, i in known.items())
        self.require(agree >= SAME * max(len(known), len(pieces)), f"draft model and model have different tokenizers: {ask}")


def _source(network: torch.nn.Module) -> str:
    """The folder or hub id that a model came from; empty when nobody knows."""
    return getattr(getattr(network, "config", None), "_name_or_path", "") or ""


@functools.cache
def _load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, Any]:
    network, tokenizer = models.load(name, dtype)
    return network.to(device), tokenizer


class ModelDrafter(Drafter):
    """Runs a draft model over a growing tree. A method says in ``draft`` what hangs on what.

    The nodes that the draft model has read are numbered in their order, the root 0. What of them became text stays in its cache,
    so that the next tree costs the new tokens only.
    """

    method: DraftModelMethod

    def __init__(self, method: DraftModelMethod, setting: Setting) -> None:
        super().__init__(method, setting)
        self.network = method.open(setting.model)
        self._device, self._last = self.network.device, self.network.config.get_text_config().vocab_size - 1
        self.handle = apply(self.network, "dense")
        self.handle.remove()  # it is in the model while that drafts only: others may use the same one
        self.text: Text | None = None

    @property
    def draws(self) -> bool:
        """Whether drafts are drawn from the draft model's law; all other verifiers are served best by its likeliest tokens."""
        return not self.setting.sampling.greedy and self.method.verifier in ("rejection", "k_seq")

    @property
    def bytes(self) -> int:
        own = () if self.network is self.setting.model else self.network.parameters()
        weights = sum(p.numel() * p.element_size() for p in own)
        return weights + (0 if self.text is None else sum(layer.bytes_kept for layer in self.runner.cache.layers))

    def propose(self, text: Text, room: int) -> DraftTree:
        room = min(room, self._reach(text))
        if room < 1:
            return DraftTree.chain(text.roots()[:, None])
        with self.handle:
            return self.draft(self._begin(text), room)

    def draft(self, scores: torch.Tensor, room: int) -> DraftTree:
        """The tree, no deeper than ``room``.

        Args:
            scores: ``(batch, 1, vocabulary)``: the draft model's, after the root.
        """
        raise NotImplementedError

    def grow(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Scores ``(batch, new, vocabulary)`` after new nodes ``(batch, new)``, in one forward.

        Args:
            parents: int64 ``(batch, new)`` on the CPU, -1 for empty nodes.
        """
        first = self._feed.shape[1]
        pending = torch.where(parents > 0, first + parents - 1, self._roots[:, None]).masked_fill(parents < 0, NONE)
        output = self.runner.grow(self._ids(tokens), pending)
        self._tokens, self._parents = torch.cat([self._tokens, tokens], 1), torch.cat([self._parents, parents], 1)
        return self._scores(output.logits)

    def _reach(self, text: Text) -> int:
        """How deep a tree may be, for the draft model's positions: the deepest nodes are not read."""
        limit = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return self.method.nodes
        longest = max(len(ids) for ids, done in zip(text.rows, text.done, strict=True) if not done)
        if text is self.text:
            longest = max(longest, int(self.runner.lengths.max()) + 1)  # finished rows go along
        return limit + 1 - longest

    def _begin(self, text: Text) -> torch.Tensor:
        """Reads what is new in the texts; the scores ``(batch, 1, vocabulary)`` after their newest tokens."""
        if text is not self.text:
            self._prefill(text)
        else:
            self._settle()
        known = self.runner.lengths.tolist()
        new = [ids[-1:] if done else ids[n:] for ids, done, n in zip(text.rows, text.done, known, strict=True)]
        feed = DraftTree.of_rows([(ids, list(range(-1, len(ids) - 1))) for ids in new])
        self._feed, self._roots = feed.shape.real, feed.shape.depths.amax(-1)
        self._tokens, self._parents = text.roots(self._device)[:, None], torch.full((len(new), 1), NONE)
        self._starts = [len(ids) for ids in text.rows]
        self._logits: torch.Tensor | None = None
        output = self.runner.run(self._ids(feed.tokens), feed.shape)
        at = self._roots.to(output.logits.device)
        return self._scores(output.logits[torch.arange(len(new), device=at.device), at][:, None])

    def _prefill(self, text: Text) -> None:
        """Reads all but the newest token of each text into a new cache."""
        self.text, self.runner = text, Runner(self.handle)
        inputs = left_padded([row[:-1] for row in text.rows], self._device)
        self.runner.prefill({**inputs, "input_ids": self._ids(inputs["input_ids"])})

    def _settle(self) -> None:
        """Keeps what was read and became text: what was fed, and the nodes that the texts went on with."""
        shape = TreeShape(self._parents)
        text, width = self.text, shape.depth + 1
        came = [[] if done else ids[start : len(ids) - 1][:width]
                for ids, done, start in zip(text.rows, text.done, self._starts, strict=True)]  # fmt: skip
        came = torch.tensor([[*ids, *[NONE] * (width - len(ids))] for ids in came])
        path = match(DraftTree(self._tokens.cpu(), shape), came.gather(1, shape.depths.clamp(min=0))).path[:, 1:]
        first, last = self._feed.shape[1], self.runner.pending
        kept = torch.where(path > 0, first + path - 1, last)
        fed = torch.where(self._feed, torch.arange(first), last)
        going = ~torch.tensor(text.done)[:, None]
        kept = torch.where(going, torch.cat([fed, kept], 1), last).sort(-1).values
        count = max(int((kept < last).sum(-1).max()), 1)
        self.runner.settle(kept[:, :count].masked_fill(kept[:, :count] == last, NONE))

    def _ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """On the draft model's device, and within its vocabulary where the target's has more padding."""
        return tokens.to(self._device).clamp(max=self._last)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """As the target model's would be: in a row as long as its own, and changed by the same processors."""
        logits = torch.nn.functional.pad(logits, (0, self.setting.vocabulary - logits.shape[-1]), value=float("-inf"))
        if not self.setting.sampling.processors:
            return logits.float()
        self._logits = logits if self._logits is None else torch.cat([self._logits, logits], 1)
        tree = DraftTree(self._tokens, TreeShape(self._parents.to(logits.device)))  # processors look at the way to a node
        return self.setting.sampling.scores(self._logits, self.text, tree)[:, -logits.shape[1] :]
