"""What a vision encoder's attention says of its tokens, taken from queries and keys while the fused attention runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from laconic.errors import LaconicError
from laconic.primitives.scores import full_attention_received

NAME = "laconic_vision"


@dataclass(frozen=True)
class Want:
    """One figure of one block. ``layer`` counts from 0, or from the last block backwards; -2 is the block whose output LLaVA
    takes as features.

    ``cls``: attention of the class token to every patch, mean over heads, ``(pictures, patches)``; it has been divided among all
    tokens, the class token among them. ``received``: attention that a patch gets from all tokens, summed over them and mean
    over heads: 1 everywhere where attention is even. ``salience``: ``cls`` where there is a class token, else ``received``.
    ``keys``, ``queries``: ``(pictures, heads, tokens, head_dim)``, the class token among them.
    """

    kind: str
    layer: int


@dataclass
class Trace:
    """Records what is wanted while the encoder runs. ``found[want]`` has one tensor per call of the block's attention.

    ``thinned``: patches leave between the blocks, which are watched for that.
    """

    tower: torch.nn.Module
    wants: frozenset[Want]
    thinned: bool = False
    found: dict[Want, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blocks = find_blocks(self.tower)
        self.depth = len(blocks)
        self.has_class = has_class_token(self.tower)
        self.wants = frozenset(Want(self._kind(want), want.layer) for want in self.wants)
        for want in sorted(self.wants, key=lambda w: w.kind):
            if want.kind == "cls" and not self.has_class:
                raise LaconicError(
                    "This vision encoder has no class token: use a method that needs none, such as hiprune or divprune."
                )
            if not -self.depth <= want.layer < self.depth:
                raise LaconicError(f"The vision encoder has {self.depth} blocks, not a block {want.layer}: give another layer.")
        wanted: dict[int, list[Want]] = {}
        for want in self.wants:
            wanted.setdefault(want.layer % self.depth, []).append(want)
        self._configs: list[tuple[Any, Any]] = []
        self._modules: list[torch.nn.Module] = []
        for number, wants in wanted.items():
            for module in blocks[number].modules():
                module.__dict__["_laconic_trace"] = (self, wants)
                self._modules.append(module)
        configs = {id(m.config): m.config for block in blocks for m in block.modules() if hasattr(m, "config")}
        for config in configs.values() if wanted or self.thinned else ():
            self._configs.append((config, config._attn_implementation))
            config._attn_implementation = NAME

    def _kind(self, want: Want) -> str:
        if want.kind == "salience":
            return "cls" if self.has_class else "received"
        return want.kind

    def stop(self) -> None:
        """Takes the recording out of the encoder; what was found stays."""
        for module in self._modules:
            module.__dict__.pop("_laconic_trace", None)
        for config, implementation in self._configs:
            config._attn_implementation = implementation
        self._modules, self._configs = [], []

    def record(
        self, want: Want, query: torch.Tensor, key: torch.Tensor, scale: float, spread: Callable | None = None
    ) -> None:
        """Takes one figure of one call of a block's attention. ``spread`` puts figures of patches that are there among all."""
        first = int(self.has_class)
        if want.kind == "cls":
            logits = (query[:, :, :1].float() @ key.float().transpose(-1, -2))[:, :, 0] * scale
            result = logits.softmax(-1).mean(1)[:, first:]
        elif want.kind == "received":
            result = full_attention_received(query, key, scale=scale)[:, first:]
        else:
            result = {"keys": key, "queries": query}[want.kind]
        if spread is not None:
            result = spread(result)
        self.found.setdefault(want, []).append(result.detach())

    def get(self, kind: str, layer: int) -> torch.Tensor:
        """What was recorded: calls of one picture each are joined, along the patches where they are parts of one."""
        pieces = self.found.get(Want(kind, layer))
        if not pieces:
            raise LaconicError(f"The vision encoder's attention did not pass by: {type(self.tower).__name__} is not understood.")
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces, dim=1 if kind in ("cls", "received") else 2)


def find_blocks(tower: torch.nn.Module) -> torch.nn.ModuleList:
    """The encoder's blocks: its longest list of modules that all are of one class."""
    lists = [m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len({type(part) for part in m}) == 1]
    if not lists:
        raise LaconicError(f"{type(tower).__name__} has no list of blocks, so its attention cannot be read.")
    return max(lists, key=len)


def has_class_token(tower: torch.nn.Module) -> bool:
    """Whether a learned token stands in front of the patches."""
    names = ("class_embedding", "cls_token")
    return any(name.rsplit(".", 1)[-1] in names for name, _ in tower.named_parameters())


def vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Stands in the encoder as its attention function: fused attention, and beside it what is wanted of this block."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    shortening = module.__dict__.get("_laconic_thinning")
    if shortening is not None:
        with torch.no_grad():
            attention_mask = shortening.see(query, key, value, attention_mask, scale)
    if "_laconic_trace" in module.__dict__:
        trace, wants = module.__dict__["_laconic_trace"]
        with torch.no_grad():
            for want in wants:
                trace.record(want, query, key, scale, shortening and shortening.spread)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
