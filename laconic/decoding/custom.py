"""The engine behind transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from laconic.decoding.engine import decode
from laconic.decoding.sampling import Processor, Sampling, Text
from laconic.decoding.tree import DraftTree
from laconic.errors import LaconicError
from laconic.recipe import Recipe


def custom_generate(recipe: Any) -> Callable[..., torch.Tensor]:
    """``model.generate(**inputs, custom_generate=laconic.decoding.custom_generate("token_recycling"))``.

    Length, end tokens, stopping criteria, sampling and all logits processors are those of the call. Beams and outputs besides
    the ids are refused.
    """
    recipe = Recipe.parse(recipe)

    def run(
        model: torch.nn.Module, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **inputs: Any,
    ) -> torch.Tensor:  # fmt: skip
        if generation_config.num_beams > 1 or generation_config.return_dict_in_generate:
            raise LaconicError("Drafts are checked for one text at a time, and ids come back: leave beams and return_dict out.")
        given = {name: value for name, value in inputs.items() if value is not None and name not in _OWN}
        mask = given.setdefault("attention_mask", torch.ones_like(input_ids))
        fronts = [[i for i, real in zip(row, keep, strict=True) if not real]
                  for row, keep in zip(input_ids.tolist(), mask.tolist(), strict=True)]  # fmt: skip
        rows = input_ids.tolist()
        sampling = Sampling(
            temperature=1.0 if generation_config.do_sample else 0.0, processors=(_processor(logits_processor, fronts),)
        )
        out = decode(
            model, {"input_ids": input_ids, **given}, recipe, seed=None, sampling=sampling,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            stop=lambda row, new: bool(stopping_criteria(torch.tensor([rows[row] + new], device=input_ids.device), None).all()),
        )  # fmt: skip
        pad = generation_config.pad_token_id
        longest = max(map(len, out.rows))
        new = [row + [pad if pad is not None else 0] * (longest - len(row)) for row in out.rows]
        return torch.cat([input_ids, torch.tensor(new, device=input_ids.device)], dim=1)

    return run


_OWN = {"cache", "past_key_values", "use_cache", "logits_to_keep", "position_ids", "streamer", "synced_gpus"}


def _processor(processors: Any, fronts: list[list[int]]) -> Processor:
    """Processors of transformers, which are given whole texts.

    Some remember the size of the batch and something of each row, so that of several rows every node is shown to them as a batch
    in which each row is the node's; a single row's nodes of one depth are shown together.
    """
    batch = len(fronts)

    def process(logits: torch.Tensor, text: Text, tree: DraftTree) -> torch.Tensor:
        if not processors:
            return logits
        changed = logits.clone()
        for row, nodes in _groups(tree, alone=batch > 1):
            ways = tree.tokens[row].expand(len(nodes), -1)[tree.shape.ancestors[row, nodes]].view(len(nodes), -1)
            before = torch.tensor(fronts[row] + text.rows[row][:-1], device=ways.device).expand(len(nodes), -1)
            ids, rows = torch.cat([before, ways], dim=1), logits[row, nodes]
            if batch == 1:
                changed[row, nodes] = processors(ids, rows)
            else:
                changed[row, nodes] = processors(ids.expand(batch, -1), rows.expand(batch, -1))[row : row + 1]
        return changed

    return process


def _groups(tree: DraftTree, alone: bool) -> Iterator[tuple[int, list[int]]]:
    """Rows with nodes that stand equally deep; each node by itself if ``alone``."""
    for row, depths in enumerate(tree.shape.depths.tolist()):
        groups: dict[int, list[int]] = {}
        for node, depth in enumerate(depths):
            if depth >= 0:
                groups.setdefault(node if alone else depth, []).append(node)
        yield from ((row, nodes) for nodes in groups.values())
