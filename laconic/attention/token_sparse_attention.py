"""Token Sparse Attention: in layers that change little, each head attends among its own tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from laconic import kernels
from laconic.attention.base import Call, PrefillMethod
from laconic.cache import KVLayer
from laconic.claims import Claim
from laconic.method import parameter
from laconic.primitives.reduce import pool
from laconic.profiles import layer_tables, need_file
from laconic.registry import register

TOGETHER = 4  # heads: with one at a time, threads would share its rows, and the last rows have the most to do
LAYERS = ("upper", "drift", "all")


@register
@dataclass(frozen=True, kw_only=True)
class TokenSparseAttention(PrefillMethod):
    """Prompts: in half of the layers each head attends among the tokens that matter to it, and leaves the others as they are.

    A token's worth is the attention that the last ``window`` tokens pay to it, smoothed over neighbours. Of the mean over heads,
    the least worthy tokens go that together hold ``coverage`` of it; each head then drops as many by its own scores. Queries,
    keys and values of what stays are gathered, attended to causally, and scattered back; to a token that was left out this
    layer's attention adds nothing, and it is there again in the next layer. The cache and the steps stay as they are. A budget,
    when given, says how many tokens each head keeps in place of ``coverage``. The pairs computed fall with the square of what
    stays. Prompts in pieces, sliding windows and capped logits are attended to in full.
    """

    id: ClassVar[str] = "token_sparse_attention"
    paper: ClassVar[str] = "Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection (2026)"
    claims: ClassVar[tuple[Claim, ...]] = (
        Claim("dense", by=-0.05, budget="50%"), Claim("dense", "pairs", by=1.5, budget="50%"),
    )  # fmt: skip

    coverage: float = parameter(0.005, "share of the attention received that the tokens which go may hold", least=0)
    window: int = parameter(128, "last tokens whose attention is the score; always kept", least=1)
    kernel: int = parameter(7, "width of the average pooling over positions, odd; 1 switches it off", least=1)
    least: int = parameter(1024, "tokens that every head keeps besides the window, where coverage decides", least=1)
    layers: str = parameter("upper", "which layers: the upper half; drift: the half that changes least, by a profile; all")
    profile: str = parameter("", "with layers=drift: a file of laconic profile; empty: the one that comes with a built-in model")

    def check(self) -> None:
        need_file(self.id, self.profile)
        self.require(self.layers in LAYERS, f"layers must be one of {', '.join(LAYERS)}.")
        self.require(self.kernel % 2 == 1, f"kernel={self.kernel} is even, which would shift positions: use an odd one.")
        self.require(self.coverage < 1, "coverage is a share of the attention: give less than 1.")

    def attend_prompt(self, layer: KVLayer, call: Call) -> tuple[torch.Tensor, float] | None:
        if call.window is not None or layer.n != call.query.shape[2] or call.softcap is not None or not self.sparse(layer):
            return None
        pads = [0] * len(call.query) if not layer.padded else layer.starts()[:, 0].tolist()
        chosen = [self.choose_tokens(layer, call, row, pad) for row, pad in enumerate(pads)]
        if all(tokens is None for tokens in chosen):
            return None
        output, shares = torch.zeros_like(call.query), []
        for row, (tokens, pad) in enumerate(zip(chosen, pads, strict=True)):
            part = [t[row, :, pad:] for t in (call.query, layer.keys, layer.values)]
            length = layer.n - pad
            if tokens is None:
                tokens = torch.arange(length, device=call.query.device).expand(call.query.shape[1], -1)
            output[row, :, pad:] = attend_among(*part, tokens, call.scale)
            count = tokens.shape[1]
            shares.append(count * (count + 1) / (length * (length + 1)) if length else 1.0)
        return output, sum(shares) / len(shares)

    def sparse(self, layer: KVLayer) -> bool:
        """Whether this layer leaves tokens out."""
        if self.layers != "drift":
            return self.layers == "all" or layer.index >= (layer.layers + 1) // 2
        drift = layer_tables(self.id, self.profile, layer)["drift"]
        return layer.index in sorted(range(len(drift)), key=drift.__getitem__)[: len(drift) // 2]

    def choose_tokens(self, layer: KVLayer, call: Call, row: int, pad: int) -> torch.Tensor | None:
        """The tokens that each head of a row keeps, counted from its first, ascending: int64 (heads, k); None for all of them."""
        length = layer.n - pad
        prefix = length - self.window
        if prefix <= 0:
            return None
        query, keys = call.query[row : row + 1, :, -self.window :], layer.keys[row : row + 1, :, pad:]
        received = pool(kernels.column_sums(query, keys, scale=call.scale)[..., :prefix], self.kernel)[0]
        if self.budget.is_full:
            shares = received.mean(0).sort().values
            removed = int((shares.cumsum(0) < self.coverage * shares.sum()).sum())
            count = prefix if removed == 0 else max(min(self.least, prefix), prefix - removed - 1)
        else:
            quota = self.budget.tokens(length, layer=layer.index, layers=layer.layers)
            self.require(quota >= self.window, f"a budget of {quota} tokens cannot hold the last {self.window}: lower window.")
            count = min(prefix, quota - self.window)
        if count == prefix:
            return None
        newest = torch.arange(prefix, length, device=received.device).expand(len(received), -1)
        return torch.cat([kernels.topk(received[None], count)[0], newest], 1) if count else newest

    @classmethod
    def calibrate(cls, model: torch.nn.Module, texts: Sequence[torch.Tensor]) -> dict[str, Any]:
        """How much each layer changes the hidden states: the length of the change over the length before, mean over tokens.

        Returns:
            ``drift``: ``[layers]``.
        """
        count = model.config.get_text_config().num_hidden_layers
        total = torch.zeros(count, dtype=torch.float64)
        for ids in texts:
            with torch.no_grad():
                states = model(ids[None].to(model.device), output_hidden_states=True, logits_to_keep=1).hidden_states
            for i in range(count):
                before, change = states[i].float(), states[i + 1].float() - states[i].float()
                total[i] += float((change.norm(dim=-1) / (before.norm(dim=-1) + 1e-8)).mean())
        return {"drift": [round(float(v) / len(texts), 5) for v in total]}


def attend_among(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention in which only ``tokens`` (heads, k), ascending, ask and are asked; zeros for all other rows.

    Args:
        query: ``(heads, n, dim)``; keys, values: ``(kv_heads, n, dim)``.

    Returns:
        ``(heads, n, dim)``. The tokens of a few heads are gathered at a time.
    """
    output, group = query.new_zeros(*query.shape[:2], values.shape[-1]), query.shape[0] // keys.shape[0]
    heads = torch.arange(query.shape[0], device=query.device)[:, None]
    for some in heads.split(TOGETHER):
        mine = tokens[some[:, 0]]
        part = (query[some, mine], keys[some // group, mine], values[some // group, mine])
        output[some, mine] = sdpa(*(t[None] for t in part), is_causal=True, scale=scale)[0]
    return output
