"""Tiny vision-language models of real architectures with random weights, and prompts with pictures for them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

IMAGE, VIDEO, START, END = 90, 91, 92, 93
WORDS = 80  # ids below are words
TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EYES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 4}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
FAMILIES = (
    "llava", "llava_siglip", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3",
    "smolvlm", "gemma3", "paligemma",
)  # fmt: skip
WATCHING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video")  # that have tokens for videos
PACKED = ("llava_next", "llava_onevision", "llava_next_video")  # that cut pictures into parts


def config(family: str) -> Any:
    """A small configuration of the family's own classes."""
    import transformers as t

    def llama() -> Any:
        return t.LlamaConfig(**TEXT, head_dim=8)

    def clip(side: int) -> Any:
        return t.CLIPVisionConfig(**EYES, image_size=side, projection_dim=16)

    def siglip(side: int) -> Any:
        return t.SiglipVisionConfig(**EYES, image_size=side)

    llava = {"image_token_index": IMAGE, "vision_feature_layer": -2}
    if family == "llava":
        return t.LlavaConfig(vision_config=clip(32), text_config=llama(), image_seq_length=64, **llava)
    if family == "llava_siglip":
        return t.LlavaConfig(
            vision_config=siglip(32), text_config=llama(), image_seq_length=64, vision_feature_select_strategy="full", **llava
        )
    pins = [[16, 32], [32, 16], [32, 32]]
    if family == "llava_next":
        return t.LlavaNextConfig(vision_config=clip(16), text_config=llama(), image_grid_pinpoints=pins, **llava)
    if family == "llava_next_video":
        return t.LlavaNextVideoConfig(
            vision_config=clip(16), text_config=llama(), image_grid_pinpoints=pins, video_token_index=VIDEO, **llava
        )
    if family == "llava_onevision":
        return t.LlavaOnevisionConfig(
            vision_config=siglip(16), text_config=t.Qwen2Config(**TEXT), image_grid_pinpoints=pins, image_token_index=IMAGE,
            video_token_index=VIDEO, vision_feature_layer=-1, vision_feature_select_strategy="full",
        )  # fmt: skip
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    if family == "qwen2_vl":
        text = {**TEXT, "rope_parameters": ROPE}
        eyes = {"depth": 3, "embed_dim": 24, "hidden_size": 32, "num_heads": 3, "mlp_ratio": 2, "patch_size": 4}
        return t.Qwen2VLConfig(text_config=text, vision_config=eyes, **tokens)
    if family == "qwen2_5_vl":
        text = {**TEXT, "rope_parameters": ROPE}
        eyes = {
            "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "patch_size": 4, "out_hidden_size": 32,
            "window_size": 16, "fullatt_block_indexes": [1],
        }  # fmt: skip
        return t.Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **tokens)
    if family == "qwen3_vl":
        text = {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}
        eyes = {
            "depth": 3, "hidden_size": 24, "intermediate_size": 40, "num_heads": 3, "patch_size": 4, "out_hidden_size": 32,
            "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64,
        }  # fmt: skip
        return t.Qwen3VLConfig(text_config=text, vision_config=eyes, **tokens)
    if family == "internvl":
        eyes = t.InternVLVisionConfig(**{**EYES, "image_size": [32, 32], "patch_size": [4, 4]})
        return t.InternVLConfig(vision_config=eyes, text_config=t.Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=16)
    if family in ("idefics3", "smolvlm"):
        eyes = {**EYES, "image_size": 32}
        whole, part = t.Idefics3Config, t.Idefics3VisionConfig
        if family == "smolvlm":
            whole, part = t.SmolVLMConfig, t.SmolVLMVisionConfig
        return whole(
            vision_config=part(**eyes), text_config=llama(), image_token_id=IMAGE, scale_factor=2,
            pad_token_id=0,
        )  # fmt: skip
    if family == "gemma3":
        text = t.Gemma3TextConfig(**{**TEXT, "num_hidden_layers": 4}, head_dim=8, sliding_window=24, sliding_window_pattern=2)
        return t.Gemma3Config(
            text_config=text, vision_config=siglip(32), mm_tokens_per_image=16, image_token_index=IMAGE, boi_token_index=START,
            eoi_token_index=END,
        )  # fmt: skip
    if family == "paligemma":
        return t.PaliGemmaConfig(
            text_config=t.GemmaConfig(**TEXT, head_dim=8), vision_config=siglip(32), image_token_index=IMAGE, projection_dim=32
        )
    raise ValueError(family)


@functools.cache
def build(family: str, seed: int = 0) -> Any:
    """The model in eval mode, weights large enough for attention to be far from flat."""
    import transformers as t

    torch.manual_seed(seed)
    model = t.AutoModelForImageTextToText.from_config(config(family), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight", "qkv.weight")):
                weight.mul_(6.0)
            elif "embed" in name or "newline" in name or name.endswith("mm_input_projection_weight"):
                weight.normal_(0.0, 0.5)
    return model


@contextlib.contextmanager
def eager(family: str) -> Iterator[Any]:
    """The stock model with eager attention, which gives whole maps."""
    model = build(family)
    before = [(part, part._attn_implementation) for part in (model.config, model.config.get_text_config())]
    for part, _ in before:
        part._attn_implementation = "eager"
    try:
        yield model
    finally:
        for part, implementation in before:
            part._attn_implementation = implementation


def maps(family: str, x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The stock model's attention per layer, ``(batch, heads, n, n)``."""
    with eager(family) as model, torch.no_grad():
        return list(model(**x, output_attentions=True).attentions)


def inputs(
    family: str, counts: tuple[int, ...] = (1,), text: int = 9, seed: int = 0, videos: tuple[int, ...] = ()
) -> dict[str, torch.Tensor]:
    """A left-padded batch: row i has ``counts[i]`` pictures, then ``videos[i]`` videos, between words, and words at the end."""
    generator = torch.Generator().manual_seed(seed)
    pieces: dict[str, list] = {"pixel_values": [], "image_sizes": [], "image_grid_thw": [], "videos": [], "video_grid_thw": []}
    rows = []
    for i, count in enumerate(counts):
        row = [1, *_words(3 + i, generator)]
        for k in range(count):
            row += [*_image(family, k, generator, pieces), *_words(2, generator)]
        for k in range(videos[i] if videos else 0):
            row += [*_video(family, k, generator, pieces), *_words(2, generator)]
        rows.append([*row, *_words(text - i, generator)])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if pieces["pixel_values"]:
        batch |= _pictures(family, counts, pieces)
    if pieces["videos"]:
        batch["pixel_values_videos"] = torch.cat(pieces["videos"])
    if pieces["video_grid_thw"]:
        batch["video_grid_thw"] = torch.tensor(pieces["video_grid_thw"])
    if family.startswith("qwen"):
        batch["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO)
    if family in ("gemma3", "paligemma") and pieces["pixel_values"]:
        batch["token_type_ids"] = (ids == IMAGE).long() if family == "gemma3" else torch.zeros_like(ids)
    return batch


def _pictures(family: str, counts: tuple[int, ...], pieces: dict[str, list]) -> dict[str, torch.Tensor]:
    """All pictures of a batch as the model wants them."""
    if family in PACKED:
        most = max(len(p) for p in pieces["pixel_values"])
        padded = [torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in pieces["pixel_values"]]
        batch = {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(pieces["image_sizes"])}
        if family == "llava_onevision":
            batch["batch_num_images"] = torch.tensor([1] * sum(counts))
        return batch
    if family.startswith("qwen"):
        return {"pixel_values": torch.cat(pieces["pixel_values"]), "image_grid_thw": torch.tensor(pieces["image_grid_thw"])}
    if family in ("idefics3", "smolvlm"):
        most = max(counts)
        shape = pieces["pixel_values"][0].shape
        pixels, at = torch.zeros(len(counts), most, *shape[1:]), 0
        for i, count in enumerate(counts):
            if count:
                pixels[i, :count] = torch.cat(pieces["pixel_values"][at : at + count])
            at += count
        return {"pixel_values": pixels}
    return {"pixel_values": torch.cat(pieces["pixel_values"])}


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(5, WORDS, (count,), generator=generator).tolist()


def _image(family: str, number: int, generator: torch.Generator, pieces: dict[str, list]) -> list[int]:
    """Random pixels go to ``pieces``; gives the tokens that stand for them in a prompt."""

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if family in PACKED:
        size = [(28, 30), (14, 32), (40, 20)][number % 3]
        crops = {(28, 30): 4, (14, 32): 2, (40, 20): 2}[size] + 1
        pieces["pixel_values"].append(pixels(crops, 3, 16, 16))
        pieces["image_sizes"].append(size)
        return [IMAGE] * packed_length(family, size)
    if family.startswith("qwen"):
        grid = [(1, 8, 8), (1, 4, 12), (1, 8, 4)][number % 3]
        pieces["pixel_values"].append(pixels(grid[1] * grid[2], 3 * 2 * 4 * 4))
        pieces["image_grid_thw"].append(grid)
        return [START, *[IMAGE] * (grid[1] * grid[2] // 4), END]
    pieces["pixel_values"].append(pixels(1, 3, 32, 32))
    tokens = {"internvl": 16, "idefics3": 16, "smolvlm": 16, "gemma3": 16}.get(family, 64)
    return [START, *[IMAGE] * tokens, END] if family == "gemma3" else [IMAGE] * tokens


def _video(family: str, number: int, generator: torch.Generator, pieces: dict[str, list]) -> list[int]:
    """As ``_image``, for a video of three or two frames."""
    if family.startswith("qwen"):
        grid = [(3, 4, 8), (2, 8, 4)][number % 2]
        pieces["videos"].append(torch.randn(grid[0] * grid[1] * grid[2], 3 * 2 * 4 * 4, generator=generator))
        pieces["video_grid_thw"].append(grid)
        frame = [START, *[VIDEO] * (grid[1] * grid[2] // 4), END]
        if family == "qwen3_vl":  # with its time in front of every frame
            return [token for _ in range(grid[0]) for token in (*_words(2, generator), *frame)]
        return [START, *[VIDEO] * (grid[0] * grid[1] * grid[2] // 4), END]
    pieces["videos"].append(torch.randn(1, 3, 3, 16, 16, generator=generator))
    return [VIDEO] * (3 * 4 + (family == "llava_onevision"))


@functools.cache
def packed_length(family: str, size: tuple[int, int]) -> int:
    """Tokens of a picture cut into crops: the model's own packing of empty features says."""
    model = build(family).model
    crops = {(28, 30): 4, (14, 32): 2, (40, 20): 2}[size] + 1
    features = [torch.zeros(crops, 16, 32)]
    if family == "llava_onevision":
        packed, _ = model.pack_image_features(features, torch.tensor([size]), image_newline=model.image_newline)
    else:
        packed, _ = model.pack_image_features(features, torch.tensor([size]), "default", image_newline=model.image_newline)
    return len(packed[0])
