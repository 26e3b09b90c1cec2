"""Prompts with and without pictures as the inputs of a model: what differs between tokenizers and processors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from laconic.errors import LaconicError, quote

if TYPE_CHECKING:
    from PIL.Image import Image


def text_side(reader: Any) -> Any:
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(reader, "tokenizer", None) or reader


def sees(reader: Any) -> bool:
    """Whether it can take pictures."""
    return getattr(reader, "image_processor", None) is not None


def open_picture(picture: Any) -> Image:
    """An RGB picture from a path, a Pillow image, or anything that can ``render()`` one."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if hasattr(picture, "render"):
        return picture.render()
    if isinstance(picture, Image.Image):
        found = picture
    else:
        path = os.fspath(picture)
        try:
            found = ImageOps.exif_transpose(Image.open(path))
            found.load()
        except FileNotFoundError:
            raise LaconicError(f"There is no picture {path}: check the path.") from None
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise LaconicError(f"The picture {path} cannot be read ({quote(str(error), 100)}): save it as PNG or JPEG.") from None
    if 0 in found.size:
        raise LaconicError("A picture has no pixels: give one with at least one.")
    return found.convert("RGB")


def read(reader: Any, prompt: str, pictures: Sequence[Any] = ()) -> dict[str, torch.Tensor]:
    """The inputs of one prompt, batch 1: ``input_ids`` and, with pictures, what the model's processor makes of them.

    A prompt that does not say where its pictures go gets them in front: by the chat template where there is one.
    """
    if not pictures:
        ids = torch.tensor([list(text_side(reader)(prompt)["input_ids"])])
        return {"input_ids": ids}
    if not sees(reader):
        raise LaconicError("This model reads text only: leave the pictures out, or use a vision-language model.")
    opened = [open_picture(picture) for picture in pictures]
    text = _place(reader, prompt, len(opened))
    try:
        found = reader(images=opened, text=text, return_tensors="pt")
    except ImportError as error:
        missing = quote(str(error).strip().splitlines()[0], 120)
        raise LaconicError(f"The model's processor needs a package that is missing: {missing}.") from None
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise LaconicError(f"The model's processor does not take this picture ({quote(str(error), 120)}).") from None
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _place(reader: Any, prompt: str, count: int) -> str:
    """The prompt with marks for ``count`` pictures."""
    mark = getattr(reader, "image_token", None) or getattr(text_side(reader), "image_token", None) or "<image>"
    written = prompt.count(mark)
    if written == count:
        return prompt
    if written:
        raise LaconicError(f"The prompt has {written} marks {mark} for {count} pictures: write one for each, or none.")
    if getattr(reader, "chat_template", None):
        content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": prompt}]
        return reader.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    return f"{mark} " * count + prompt
