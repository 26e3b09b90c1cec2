"""FLASH: a small network that sees pictures as a few latents drafts several tokens at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from laconic import profiles
from laconic.budget import Budget
from laconic.decoding.base import Drafter, DraftMethod, Setting, Step
from laconic.decoding.flash_net import FlashNet
from laconic.decoding.sampling import Text
from laconic.decoding.templates import best_tree
from laconic.decoding.tree import DraftTree, TreeShape
from laconic.errors import LaconicError
from laconic.method import parameter
from laconic.models.pictures import pictured_tokens
from laconic.registry import register

LITTLE = 1e-5  # share of every draft law that all tokens have in common, so that each rank has a token that can be drawn


class _Flash(Drafter):
    """Entries of the text so far are in ``past``; ``ahead`` are the hidden states foretold from the newest."""

    def __init__(self, method: FlashSD, setting: Setting) -> None:
        super().__init__(method, setting)
        model = setting.model
        tables = profiles.find_profile(method.id, method.profile, model)
        self.net = FlashNet.of(tables).to(model.device, model.dtype)
        self.accuracy = tuple(map(tuple, tables["accuracy"]))
        self.head, self.embed = model.get_output_embeddings(), model.get_input_embeddings()
        self.past, self.positions = None, torch.zeros(len(setting.text.rows), 1, dtype=torch.int64, device=model.device)
        with torch.inference_mode():
            self._absorb(*self._prompt())

    def begin(self, setting: Setting) -> None:
        raise LaconicError(f"{self.method.id} knows the text that it began with: start each text with a new drafter.")

    def propose(self, text: Text, room: int) -> DraftTree:
        depth = min(self.method.depth or len(self.accuracy), room)
        rows = [self.accuracy[i % len(self.accuracy)] for i in range(depth)]
        fixed = best_tree(tuple(rows), self.method.nodes)  # on the processor, where the runner counts
        laws, tokens = self._draft(text, fixed.depth, int(fixed.ranks.max()) + 1)
        depths, ranks = fixed.depths[0].to(tokens.device), fixed.ranks[0].to(tokens.device)
        drafted = tokens[:, (depths - 1).clamp(min=0), ranks]
        drafted[:, 0] = text.roots(tokens.device)
        shape = fixed.expand(len(text.rows))
        return DraftTree(drafted, shape, None if laws is None else laws[:, depths.clamp(max=fixed.depth - 1)])

    def observe(self, step: Step, text: Text) -> None:
        """The accepted tokens' true hidden states take the place of those foretold."""
        path = step.verdict.path
        path = path[:, : int((path >= 0).sum(-1).max())]
        every, at = torch.arange(len(path), device=path.device)[:, None], path.clamp(min=0)
        hidden = step.output.hidden_states[-1][every, at]
        after = torch.cat([step.tree.tokens[every, at], step.verdict.token[:, None]], dim=1)[:, 1:]
        last = (path >= 0).sum(-1, keepdim=True) - 1
        after = after.scatter(1, last, step.verdict.token[:, None])
        self._absorb(self.net.fuse(torch.cat([self.embed(after), hidden], dim=-1)), path >= 0)

    def _prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of the prompts, padded behind, and which are real."""
        states, places, rows = self.setting.prefill.hidden_states, self.setting.places, []
        for row, ids in enumerate(self.setting.text.rows):
            here = places[row] >= 0
            at = places[row][here].to(self.embed.weight.device)
            ids = torch.tensor(ids, device=at.device)
            following = torch.cat([states[0][row][here][1:], self.embed(ids[-1:])])
            rows.append(self.net.entries(states[-1][row][here], following, pictured_tokens(self.setting.model, ids[at])))
        lengths = torch.tensor([len(row) for row in rows])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        return pad_sequence(rows, batch_first=True), real.to(rows[0].device)

    def _absorb(self, entries: torch.Tensor, real: torch.Tensor) -> None:
        """Takes in entries that stay, ``(batch, n, width)``, padded behind."""
        positions = self.positions + torch.arange(entries.shape[1], device=entries.device)
        states, self.past = self.net(entries, real, positions, self.past)
        self.positions = self.positions + real.sum(-1, keepdim=True)
        last = states[torch.arange(len(states), device=real.device), real.sum(-1) - 1]
        self.ahead = self.net.ahead(last)

    def _draft(self, text: Text, depth: int, ranks: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Laws ``(batch, depth, vocabulary)`` after 0, 1, ... drafted tokens, unless greedy, and ``ranks`` tokens of each.

        Where ``depth`` is more than the network foretells at once, it runs again on what it foretold and the likeliest tokens.
        """
        ahead, past, positions, laws, tokens = self.ahead, self.past, self.positions, [], []
        while True:
            law, drawn = self._choose(self.head(ahead[:, : depth - sum(t.shape[1] for t in tokens)]), text, ranks)
            laws.append(law)
            tokens.append(drawn)
            if sum(t.shape[1] for t in tokens) >= depth:
                break
            entries = self.net.fuse(torch.cat([self.embed(drawn[..., 0]), ahead], dim=-1))
            at = positions + torch.arange(entries.shape[1], device=entries.device)
            states, past = self.net(entries, torch.ones_like(at, dtype=torch.bool), at, past)
            ahead, positions = self.net.ahead(states[:, -1]), positions + entries.shape[1]
        return None if laws[0] is None else torch.cat(laws, dim=1), torch.cat(tokens, dim=1)

    def _choose(self, logits: torch.Tensor, text: Text, ranks: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The likeliest tokens at each depth, or, to be verified by rejection, tokens drawn without replacement and their law."""
        sampling, roots = self.setting.sampling, text.roots(logits.device)
        tree = DraftTree(roots[:, None].expand(logits.shape[:2]), TreeShape.chain(logits.shape[1] - 1, len(roots), logits.device))
        scores = sampling.scores(logits, text, tree)
        if sampling.greedy or self.method.verifier != "rejection":
            return None, scores.topk(ranks, dim=-1).indices
        law = (1 - LITTLE) * sampling.law(scores) + LITTLE / scores.shape[-1]
        noise = torch.empty_like(law).exponential_(generator=self.setting.generator)
        return law, (law / noise).topk(ranks, dim=-1).indices

    @property
    def bytes(self) -> int:
        held = [*self.net.parameters(), *self.past]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


@register
@dataclass(frozen=True, kw_only=True)
class FlashSD(DraftMethod):
    """Drafts with one small attention layer, trained per model, which sees each picture of the prompt as a few latent tokens.

    It reads the target's hidden states after the last layer and its input embeddings, foretells several hidden states in one go,
    and lets the target's own head read the laws of the next tokens from them. All nodes of one depth of the tree share a law, and
    the tree is the one that is worth most by the accuracies per depth and rank that were measured when it was trained. Texts
    without pictures are drafted for just so. Pictures may be shortened before the first layer, as by divprune, or between layers.

    Raises a LaconicError without a profile of the model: ``python -m laconic.decoding.train_flash`` makes one for a model of
    scenes, ``laconic profile flash_sd`` for any model and task with pictures.
    """

    id: ClassVar[str] = "flash_sd"
    paper: ClassVar[str] = (
        "FLASH: Latent-Aware Semi-Autoregressive Speculative Decoding for Multimodal Tasks (2025), later SpecFLASH"
    )
    needs: ClassVar[str] = "training"
    calibrates_on: ClassVar[str] = "pictures"
    verifiers: ClassVar[tuple[str, ...]] = ("rejection", "match", "typical")
    hidden: ClassVar[bool] = True

    budget: Budget = parameter(Budget(amount=8), "tokens drafted in each forward; the original drafts 25")  # noqa: RUF009
    depth: int = parameter(0, "how far ahead it drafts; 0: as far as its network foretells in one go", least=0, search=())
    profile: str = parameter("", "file made by laconic profile; empty: the one that comes with a built-in model", search=())

    def check(self) -> None:
        profiles.need_file(self.id, self.profile)

    def drafter(self, setting: Setting) -> Drafter:
        return _Flash(self, setting)

    @classmethod
    def calibrate(cls, model: torch.nn.Module, texts: Sequence[dict[str, torch.Tensor]], seed: int = 0) -> dict[str, Any]:
        """Trains the network on what the model itself writes after prompts, pictures included.

        Returns:
            ``form`` and ``weights`` of a ``FlashNet``; ``accuracy``: how often the token of each rank is right, by depth, on
            a tenth of the prompts that it was not trained on.
        """
        from laconic.decoding.train_flash import train_flash

        return train_flash(model, texts, seed=seed)
