"""What ``faithful_code=True`` changes: ``python benchmarks/faithful_code.py --output REPORT_DIR > faithful.json``.

Asks each method with and without it the same questions about rendered scenes (shapes_vqa) at the same budgets. Prints one JSON
object: per method and budget the share of right answers of both, their difference with its 95 % interval over the pairs, the
share of the tokens that each kept, and right answers by type. ``--parts``: of a model that sees a scene whole at half its size,
and in four parts. Those are the weights of `shapes` in a LLaVA-NeXT, not trained for it. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import laconic
from laconic.bench.run import machine

METHODS = (
    "hired", "globalcom2", "flowcut", "flashvlm", "recoverable_compression", "corematching", "attention_debias(pyramiddrop)",
)  # fmt: skip
PARTED = ("hired", "globalcom2", "flowcut", "holov", "hiprune")  # where parts of a picture make a difference
BUDGETS = ("33%", "11.1%", "5.6%")


def main() -> None:
    """Measures what is missing and prints the pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="those that have faithful_code; by default those of the documentation")
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--output", type=Path, default=Path("faithful-code"), help="the comparison's directory")
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    names = options.methods or (PARTED if options.parts else METHODS)
    asked = [spelling for name in names for spelling in (name, as_released(name))]
    model = str(in_parts(options.output / "model")) if options.parts else "shapes"
    with contextlib.redirect_stdout(sys.stderr):
        report = laconic.compare(
            model, methods=asked, budgets=options.budgets, task="shapes_vqa", samples=options.samples,
            output=options.output / "report",
        )  # fmt: skip
    dense = next(row["quality"] for row in report.rows if row["method"] == "dense")
    found = {"samples": options.samples, "dense": dense, "pairs": pairs(report.rows), "machine": machine()}
    print(json.dumps(found, indent=2))


def as_released(name: str) -> str:
    """The method with ``faithful_code``, its other parameters as they are."""
    bare, _, given = name.rstrip(")").partition("(")
    given = f"of={given}" if given and "=" not in given else given
    return f"{bare}({', '.join(filter(None, [given, 'faithful_code=true']))})"


def in_parts(folder: Path) -> Path:
    """Writes the model that sees the whole at half its size and four parts, and its processor, to ``folder``."""
    import transformers as t

    model, processor = laconic.load("shapes")
    config, state = model.config, dict(model.state_dict())
    vision, side = config.vision_config.to_dict(), config.vision_config.image_size
    across, half = side // config.vision_config.patch_size, side // 2
    vision["image_size"] = half
    (name,) = (key for key in state if key.endswith("position_embedding.weight"))
    middle = slice(across // 4, across // 4 + across // 2)  # every crop stands in the middle of the grid that the encoder knows
    grid = state[name][1:].unflatten(0, (across, across))[middle, middle].flatten(0, 1)
    state[name] = torch.cat([state[name][:1], grid])
    parted = t.LlavaNextForConditionalGeneration(
        t.LlavaNextConfig(
            vision_config=t.CLIPVisionConfig(**vision), text_config=config.text_config, image_grid_pinpoints=[[side, side]],
            image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
            vision_feature_select_strategy="default", tie_word_embeddings=False,
        )
    )  # fmt: skip
    parted.load_state_dict({**state, "model.image_newline": torch.zeros(config.text_config.hidden_size)})
    parted.generation_config = model.generation_config
    parted.save_pretrained(folder)
    pictures = t.LlavaNextImageProcessorPil(
        size={"shortest_edge": half}, crop_size={"height": half, "width": half}, image_grid_pinpoints=[[side, side]]
    )
    t.LlavaNextProcessor(
        pictures, processor.tokenizer, patch_size=config.vision_config.patch_size, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict per method and budget, from the rows of a comparison."""
    known = {(row["recipe"].rsplit(":", 1)[0].replace("True", "true"), row["budget"]): row for row in rows}
    found = []
    for (recipe, budget), row in known.items():
        released = next((known[spelling, budget] for spelling in known_as(recipe) if (spelling, budget) in known), None)
        if released is None:
            continue
        first, second = ([cell["correct"] for cell in one["cells"]] for one in (row, released))
        change, half = difference(first, second)
        found.append(
            {
                "method": recipe, "budget": budget, "default": row["quality"], "released": released["quality"], "change": change,
                "half_interval": half, "kept": [one["kept_share"] for one in (row, released)],
                "kinds": {kind: [by_kind(one)[kind] for one in (row, released)] for kind in by_kind(row)},
            }
        )  # fmt: skip
    return found


def known_as(recipe: str) -> tuple[str, ...]:
    """How a comparison may spell a recipe with ``faithful_code``."""
    return as_released(recipe), as_released(recipe).replace("of=", "")


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """The mean of ``second`` less ``first``, answer by answer, and half of its 95 % interval; the interval is that of a normal
    mean, 0 where all answers agree."""
    change = [b - a for a, b in zip(first, second, strict=True)]
    mean = sum(change) / len(change)
    variance = sum((c - mean) ** 2 for c in change) / max(len(change) - 1, 1)
    return mean, 1.96 * math.sqrt(variance / len(change))


def by_kind(row: dict[str, Any]) -> dict[str, float]:
    """Share of right answers for each type of question."""
    kinds = defaultdict(list)
    for cell in row["cells"]:
        kinds[cell["meta"]["type"]].append(cell["correct"])
    return {kind: sum(right) / len(right) for kind, right in kinds.items()}


if __name__ == "__main__":
    main()
