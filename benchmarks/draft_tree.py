"""The picture of a draft tree in the documentation: one real forward, drawn as SVG.

    python benchmarks/draft_tree.py docs/images/draft-tree.svg --model story

Of all forwards of a text it draws the one that accepted the most drafted tokens among trees of several branches.
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

import torch

from laconic.decoding.engine import Progress, decode
from laconic.evaluation.drafting_texts import prompts
from laconic.models import load
from laconic.models.reading import text_side

WIDE, HIGH, LETTER = 96, 24, 7.2  # pixels between depths, between leaves, and of a letter
STYLE = """text { font: 12px ui-monospace, Menlo, Consolas, monospace; fill: #59626c; dominant-baseline: middle; }
rect { fill: #f3f3ef; stroke: #b9bcb8; } path { fill: none; stroke: #b9bcb8; stroke-width: 1.5; }
.yes rect { fill: #d8f0e4; stroke: #0a6b4b; } .yes text { fill: #0a4a35; font-weight: 600; }
.own rect { fill: #dbe9f8; stroke: #0b57a4; } .own text { fill: #0b3f78; font-weight: 600; }
path.yes { stroke: #0a6b4b; stroke-width: 2; } path.own { stroke: #0b57a4; stroke-width: 2; }"""


def best_step(model: torch.nn.Module, tokenizer: object, recipe: str, new: int) -> Progress:
    """The forward with the most accepted tokens whose tree has branches."""
    steps: list[Progress] = []
    ids = tokenizer(prompts("code", tokenizer, 1, 256, seed=0)[0], return_tensors="pt")["input_ids"]
    decode(model, {"input_ids": ids}, recipe, max_new_tokens=new, watch=steps.append)
    branched = [step for step in steps if len(set(step.parents[0])) < len(step.parents[0])]
    return max(branched, key=lambda step: len(step.accepted[0]))


def rows_of(parents: list[int]) -> list[float]:
    """Where each node stands: a leaf on a line of its own, a node in the middle of its children."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    rows, free = [0.0] * len(parents), 0

    def place(node: int) -> float:
        nonlocal free
        below = [place(child) for child in children.get(node, [])]
        if not below:
            free += 1
        rows[node] = (below[0] + below[-1]) / 2 if below else free - 1.0
        return rows[node]

    place(0)
    return rows


def draw(step: Progress, tokenizer: object) -> str:
    """The tree from left to right; accepted nodes green, the token that the model adds blue."""
    tokens, parents, accepted = step.tokens[0], step.parents[0], [0, *step.accepted[0]]
    depths = [0] * len(parents)
    for node in range(1, len(parents)):
        depths[node] = depths[parents[node]] + 1
    rows = rows_of(parents)
    last = accepted[-1]
    places = [(depth, row) for depth, row in zip(depths, rows, strict=True)]
    words = [tokenizer.decode([token]) for token in tokens]
    places.append((depths[last] + 1, max(rows) + 1.3 if last in parents else rows[last]))
    words.append(tokenizer.decode([step.new[0][-1]]))
    above, kinds = [*parents, last], ["yes" if node in accepted else "" for node in range(len(tokens))] + ["own"]
    lines, boxes = [], []
    for node, (depth, row) in enumerate(places):
        shown = escape(words[node].replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥"))[:24]
        x, y = 8 + depth * WIDE, 16 + row * HIGH
        size = 12 + LETTER * len(words[node])
        boxes.append(
            f'<g class="{kinds[node]}"><rect x="{x}" y="{y - 9:.0f}" width="{size:.0f}" height="18" rx="4"/>'
            f'<text x="{x + 6}" y="{y + 0.5:.1f}">{shown}</text></g>'
        )
        if above[node] >= 0:
            from_x, from_y = 8 + places[above[node]][0] * WIDE, 16 + places[above[node]][1] * HIGH
            start = from_x + 12 + LETTER * len(words[above[node]])
            curve = f"M{start:.0f} {from_y:.0f}C{x - 16} {from_y:.0f} {x - 24} {y:.0f} {x} {y:.0f}"
            lines.append(f'<path class="{kinds[node]}" d="{curve}"/>')
    width = max(depth for depth, _ in places) * WIDE + 120
    height = (max(row for _, row in places) + 1) * HIGH + 8
    title = f"A draft tree of {len(tokens) - 1} tokens, {len(accepted) - 1} accepted, and the model's own next token"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{title}">'
        f"<title>{title}</title><style>{STYLE}</style>{''.join(lines)}{''.join(boxes)}</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="story")
    parser.add_argument("--recipe", default="token_recycling:16")
    parser.add_argument("--new", type=int, default=96)
    given = parser.parse_args()
    model, reader = load(given.model)
    tokenizer = text_side(reader)
    given.output.write_text(draw(best_step(model, tokenizer, given.recipe, given.new), tokenizer), encoding="utf-8")


if __name__ == "__main__":
    main()
