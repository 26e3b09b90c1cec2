"""FLASH in small: a toy model that names the tiles of a picture, and drafters that see the picture in different ways.

    python benchmarks/flash_toy.py > flash_toy.json

A LLaVA of two layers learns to say of each of eight tiles how it is drawn and in which colour; two words in five need the
picture. Then drafters are trained that see it as all of its 64 tokens, as 64, 8 or 2 latents, or not at all, and foretell four
tokens at once or one, and all of them draft for held-out pictures. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flash import measure
from torch.nn.functional import cross_entropy

from laconic.bench.run import machine
from laconic.decoding.flash_net import FlashForm
from laconic.decoding.train_flash import learn, written
from laconic.profiles import Profile, fingerprint

SIDE, PATCH, TILES = 32, 4, 8
BOS, EOS, IMAGE, TILE, IS = 1, 2, 3, 4, 5
NUMBERS, DRAWN = 6, 14  # ids of the first of the eight numbers and of the four ways to draw; colours follow
COLOURS = np.array([[r, g, b] for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)], dtype=np.float32)
VOCABULARY = DRAWN + 4 + len(COLOURS)
PROMPT = [BOS, *[IMAGE] * (SIDE // PATCH) ** 2, TILE]
DRAFTERS: dict[str, dict[str, Any]] = {
    "latents64_k4": {"latents": 64, "offsets": 4}, "latents8_k4": {"latents": 8, "offsets": 4},
    "latents2_k4": {"latents": 2, "offsets": 4}, "all_k4": {"view": "all", "offsets": 4},
    "none_k4": {"view": "none", "offsets": 4}, "latents8_k1": {"latents": 8, "offsets": 1},
    "all_k1": {"view": "all", "offsets": 1},
}  # fmt: skip


def pictures(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels ``(count, 3, SIDE, SIDE)`` of two rows of four tiles, and ids of what is said of them, ``(count, 5 * TILES)``."""
    drawn, colours = rng.integers(4, size=(count, TILES)), rng.integers(len(COLOURS), size=(count, TILES))
    y, x = np.mgrid[:SIDE, :SIDE] // 2 % 2
    masks = np.stack([np.ones_like(x), y, x, (x + y) % 2])
    at = np.arange(SIDE)
    tile = (at // (SIDE // 2))[:, None] * 4 + at // (SIDE // 4)
    shown = masks[drawn[:, tile], at[:, None], at]
    pixels = (COLOURS[colours[:, tile]] * shown[..., None]).transpose(0, 3, 1, 2)
    pixels = pixels + rng.normal(0, 0.1, pixels.shape)
    numbers = np.broadcast_to(np.arange(TILES), drawn.shape)
    begins, is_ = np.full_like(drawn, TILE), np.full_like(drawn, IS)
    said = np.stack([begins, NUMBERS + numbers, is_, DRAWN + drawn, DRAWN + 4 + colours], axis=-1).reshape(count, -1)
    said = np.concatenate([said[:, 1:], np.full((count, 1), EOS)], axis=1)  # the prompt ends with the first word
    return torch.from_numpy(pixels).float(), torch.from_numpy(said)


def build() -> torch.nn.Module:
    """A LLaVA with random weights."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    eyes = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=3, image_size=SIDE, patch_size=PATCH,
        projection_dim=48,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.09, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=eyes, text_config=text, image_token_index=IMAGE, image_seq_length=64, vision_feature_layer=-1)
    )
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.normal_(0.0, 1.0)
        model.model.vision_tower.embeddings.position_embedding.weight.normal_(0.0, 0.5)
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            linear.weight.normal_(0.0, 0.15)
    model.generation_config.eos_token_id = EOS
    return model


def train_target(model: torch.nn.Module, rng: np.random.Generator, steps: int, batch: int = 24) -> float:
    """Teaches the model to name tiles; gives the share of right words in the last batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    right: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 30, max(0.03, 2 * (1 - step / steps)))
        pixels, said = pictures(rng, batch)
        ids = torch.cat([torch.tensor(PROMPT).expand(batch, -1), said[:, :-1]], dim=1)
        optimizer.zero_grad()
        logits = model(input_ids=ids, pixel_values=pixels, logits_to_keep=said.shape[1]).logits
        cross_entropy(logits.flatten(0, 1), said.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = [*right, float((logits.argmax(-1) == said).float().mean())][-20:]
        if right[-1] == 1 and len(right) == 20 and min(right) > 0.995:
            break
    return sum(right) / len(right)


def prompts(rng: np.random.Generator, count: int) -> list[dict[str, torch.Tensor]]:
    """Inputs of one picture each."""
    pixels, _ = pictures(rng, count)
    ids = torch.tensor([PROMPT])
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture[None]} for picture in pixels]


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=400, help="of each drafter")
    parser.add_argument("--texts", type=int, default=300, help="pictures that the drafters learn from")
    parser.add_argument("--scenes", type=int, default=30, help="pictures that are drafted for")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    model = build()
    right = train_target(model, rng, options.target_steps)
    model = model.eval().requires_grad_(False)
    texts = list(written(model, prompts(rng, options.texts), [EOS], 5 * TILES))
    asked = prompts(np.random.default_rng(options.seed + 1_000_000), options.scenes)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        recipes: dict[str, tuple[str, Any]] = {"dense": ("dense", None)}
        recipes |= {name: (f"{name}:{options.nodes}", None) for name in ("prompt_lookup", "token_recycling")}
        for name, form in DRAFTERS.items():
            tables = learn(model, texts, FlashForm.of_model(model, **form), options.steps, options.seed)
            Profile("flash_sd", fingerprint(model), options.seed, "tiles", tables).save(Path(folder) / f"{name}.json")
            firsts = [row[0] for row in tables["accuracy"]]
            recipes[name] = (f"flash_sd(profile={folder}/{name}.json,depth={options.depth}):{options.nodes}", firsts)
        plain: list[list[int]] = []
        for name, (recipe, firsts) in recipes.items():
            row, said = measure(model, asked, recipe, 5 * TILES)
            plain = plain or said
            rows.append({"name": name, "right_first": firsts, **row, "same_text": said == plain})
            print(name, firsts, row["tokens_per_forward"], file=sys.stderr, flush=True)
    print(json.dumps({**vars(options), "right_words": round(right, 4), "rows": rows, "machine": machine()}, indent=2))


if __name__ == "__main__":
    main()
