"""The verbs of attention methods: evict (forget for good), read (attend to a part, forget nothing), prefill (compute a part of
a prompt's attention), reweight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.attention.rope import Rope
from laconic.attention.search import Blocks, Tokens, search
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import Method, parameter
from laconic.primitives.select import keep_top
from laconic.selection import Selection

POSITIONS = ("keep", "compact")


@dataclass(frozen=True)
class Call:
    """One call of attention in one layer.

    Attributes:
        query: ``(batch, heads, new, head_dim)``, rotated; the layer's cache already holds the keys of these tokens.
        scale: what logits are multiplied by.
        window: sliding window of this layer in tokens, or None.
        softcap: logits pass ``softcap * tanh(logits / softcap)``, or None.
        reach: int64 ``(batch, new)``: the last position that each new token sees, where that is not its own: the tokens of a
            picture see each other in some models. None: every token sees itself and what is before it.
    """

    query: torch.Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    reach: torch.Tensor | None = None

    @property
    def last(self) -> torch.Tensor:
        """The newest query, ``(batch, heads, head_dim)``."""
        return self.query.select(2, -1)

    @property
    def decoding(self) -> bool:
        """Whether this is a decode step: a single new token."""
        return self.query.shape[2] == 1


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Method):
    """What evicting and reading methods share: a budget per row of the batch and protected tokens.

    A share is taken of the tokens of the prompt (what the last forward with more than one token left behind), so that a
    budget does not grow while an answer is written.
    """

    stage: ClassVar[str] = "attention"
    claims: ClassVar[tuple[Claim, ...]] = (Claim("random"), Claim("streaming"))  # what any score must be better than
    branches: ClassVar[bool] = True  # whether a step depends on nothing but its own layer and the steps before it there
    shortens: ClassVar[bool] = False  # whether it takes tokens out of what deeper layers compute (Request.onward)

    def quota(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Tokens that may stay per row, ``(batch,)``; never more than a row has visible."""
        visible = layer.lengths
        base = visible if self.budget.share is None else layer.memory["prompt"]
        if call.window is not None:
            base, visible = base.clamp(max=call.window), visible.clamp(max=call.window)
        quota = [self.budget.tokens(n, layer=layer.index, layers=layer.layers) for n in base.tolist()]
        return torch.minimum(torch.tensor(quota, device=visible.device), visible).clamp(max=layer.n)

    def choose(
        self, layer: KVLayer, call: Call, scores: torch.Tensor, *, sinks: int = 0, recent: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """Slots ``(batch, heads, kept)`` of the best ``scores`` (batch, heads, n) within the budget, ascending."""
        return keep_top(scores, self.quota(layer, call), layer.starts(call.window), sinks, recent, self.id)

    def attend_prompt(self, layer: KVLayer, call: Call) -> tuple[torch.Tensor, float] | None:
        """Attention of several new tokens at less than the full price; None to compute all of it, as most methods do.

        Returns:
            output ``(batch, heads, new, head_dim)``, zero in rows of padding, and the share of the visible pairs of query and
            key that was computed, mean over rows of the batch and heads.
        """
        return None

    def leave(self, layer: KVLayer, call: Call) -> None:
        """Called after a layer's attention of several new tokens: the place to say which of them go on (``Request.onward``)."""

    @property
    def attends(self) -> bool:
        """Whether ``attend`` may take the place of ordinary attention."""
        return False

    def attend(self, layer: KVLayer, call: Call) -> tuple[torch.Tensor, int] | None:
        """Output ``(batch, heads, new, head_dim)`` and the bytes of the cache that were read for it, for the score included;
        None: ordinary attention."""

    @property
    def reads(self) -> bool:
        """Whether it chooses what a step reads, rather than what stays."""
        return False

    @property
    def shortens_prompts(self) -> bool:
        """Whether it has an ``attend_prompt`` of its own."""
        return type(self).attend_prompt is not AttentionMethod.attend_prompt

    def need_rope(self, layer: KVLayer) -> Rope:
        """The layer's rotary embedding, for a method that cannot do without; a LaconicError where it is not known."""
        self.require(
            layer.rope is not None,
            "it turns keys or queries, and cannot tell how this model does (M-RoPE, no rotary embedding, or pictures that are "
            "renumbered): leave positions=keep here and for pictures, or take another method.",
        )
        return layer.rope

    def covers(self, layer: KVLayer, call: Call) -> bool:
        """Whether the budget already holds everything visible, so that there is nothing to leave out."""
        if self.budget.is_full or (self.budget.shape == "uniform" and (self.budget.amount or 0) >= layer.n):
            return True
        return bool(self.covered(layer, call).all())

    def covered(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Boolean ``(batch,)``: the rows whose budget holds everything that they see."""
        starts = layer.starts(call.window)
        return self.quota(layer, call) >= (layer.n if starts is None else layer.n - starts.amin(-1))


@dataclass(frozen=True, kw_only=True)
class EvictMethod(AttentionMethod):
    """Base of methods that forget: after each forward only the ``budget`` best-scored entries stay, per KV head.

    A subclass writes ``score``; higher stays.
    """

    verbs: ClassVar[tuple[str, ...]] = ("evict",)
    compensates: ClassVar[bool] = False  # whether one entry stands for those that it evicts
    reads_keys: ClassVar[bool] = True  # whether its score has to read all keys, for the bytes that are reported

    sinks: int = parameter(4, "first tokens that are always kept", least=0)
    recent: int = parameter(16, "newest tokens that are always kept", least=0)
    once: bool = parameter(False, "cut prompts only; what is generated afterwards all stays", search=())

    @property
    def compacts(self) -> bool:
        """Whether what stays is attended to as a text without gaps."""
        return False

    def drops_in_place(self, layer: KVLayer, call: Call) -> bool:
        """Whether ``keep`` may shift a few entries itself: in a step, unless the mass of what goes is to be measured on slots."""
        measured = layer.request.policy is not None and layer.request.policy.measure
        return call.decoding and call.window is None and not measured

    def evicts(self, call: Call) -> bool:
        """Whether it has a say after this forward."""
        return not (self.once and call.decoding)

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Worth of every entry of the layer, float ``(batch, kv_heads, n)``."""
        raise NotImplementedError

    def observe(self, layer: KVLayer, call: Call) -> None:
        """Called after every forward, also when nothing is evicted: the place to accumulate."""

    @property
    def watches(self) -> bool:
        """Whether ``observe`` looks at the keys in every step."""
        return type(self).observe is not EvictMethod.observe

    def protected(self, quota: torch.Tensor) -> tuple[int, int | torch.Tensor]:
        """How many first and newest tokens never compete, for budgets of ``quota`` (batch,) tokens."""
        return self.sinks, self.recent

    def keep(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        """Slots that stay after this forward, or None to keep all."""
        if self.covers(layer, call):
            return None
        sinks, recent = self.protected(self.quota(layer, call))
        return self.choose(layer, call, self.score(layer, call), sinks=sinks, recent=recent)


@dataclass(frozen=True, kw_only=True)
class RenumberMethod(EvictMethod):
    """Base of evicting methods that can attend to what stays as to a text without gaps, past the trained length too.

    The keys are stored as they were written, and turned to their new places for each forward: a copy of what stays.
    """

    positions: str = parameter("keep", "keep: where the tokens stand; compact: what stays is renumbered without gaps", search=())

    def check(self) -> None:
        self.require(self.positions in POSITIONS, f"positions must be one of {', '.join(POSITIONS)}.")

    @property
    def compacts(self) -> bool:
        return self.positions == "compact"


@dataclass(frozen=True, kw_only=True)
class ReadMethod(AttentionMethod):
    """Base of methods that read a part: each decode step attends to ``budget`` entries, and all stay in the cache.

    A subclass names the ``chain`` of its search, or writes ``score``; or ``select`` when its choice outlives the step.
    """

    verbs: ClassVar[tuple[str, ...]] = ("read",)
    reads_chunks: ClassVar[bool] = False

    sinks: int = parameter(4, "first tokens that are always read", least=0)
    recent: int = parameter(16, "newest tokens that are always read", least=0)

    @property
    def reads(self) -> bool:
        return True

    @property
    def chain(self) -> list[Blocks | Tokens]:
        """The stages by which it finds tokens (see ``laconic.attention.search``); empty where it chooses in another way."""
        return []

    def score(self, layer: KVLayer, call: Call) -> torch.Tensor:
        """Worth of every entry for this query, float ``(batch, kv_heads or 1, n)``."""
        raise NotImplementedError

    def observe(self, layer: KVLayer, call: Call) -> int | None:
        """Called after every forward: the place to prepare the next selection. Gives the bytes of the cache read for it."""

    def select(self, layer: KVLayer, call: Call) -> Selection | None:
        """The entries to read in this step, or None to read all."""
        if self.chain:
            return search(self, layer, call, self.chain)
        if self.covers(layer, call):
            return None
        slots = self.choose(layer, call, self.score(layer, call), sinks=self.sinks, recent=self.recent)
        return Selection(slots, bytes_scored=layer.keys.numel() * layer.keys.element_size())


@dataclass(frozen=True, kw_only=True)
class PrefillMethod(AttentionMethod):
    """Base of methods that compute a part of a prompt's attention: the cache and the steps after it stay as they are.

    A subclass writes ``attend_prompt``.
    """

    verbs: ClassVar[tuple[str, ...]] = ("prefill",)


@dataclass(frozen=True, kw_only=True)
class ReweightMethod(AttentionMethod):
    """Base of methods that change how much chosen entries weigh, in prompts and in steps; nothing is dropped or skipped.

    A subclass names a few ``columns`` and by what ``factor`` they weigh more or less against all other entries; the weights
    then sum to 1 again. There is no attention map (see ``laconic.attention.reweight``).
    """

    verbs: ClassVar[tuple[str, ...]] = ("reweight",)
    takes_budget: ClassVar[bool] = False
    claims: ClassVar[tuple[Claim, ...]] = ()

    def check(self) -> None:
        self.require(self.budget.is_full, "it keeps everything, so it takes no budget.")

    def columns(self, layer: KVLayer, call: Call) -> torch.Tensor | None:
        """Slots of the entries whose weight changes, int64 ``(batch, kv_heads or 1, m)``, -1 for none; None: nothing to do."""
        raise NotImplementedError

    def factor(self, layer: KVLayer, mass: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """What the columns are multiplied by against all others, >= 0, float32, broadcast to ``(batch, heads, rows)``.

        Args:
            mass: float32 ``(batch, heads, rows)``: what the columns weigh as they are; 0 in rows of padding.
            rest: the same of all other entries. Both are exact also where they are small.
        """
        raise NotImplementedError
