"""The processor of the built-in `shapes` models: a tokenizer of whole words, and CLIP's preparation of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laconic.models.scenes import CELL, COLOURS, SHAPES, SIDE, WORDS, plural

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
SPOKEN = (
    "what how many which is are there the a an or of on left right above below larger smaller colour color shapes sign number "
    "word yes no"
)


def vocabulary() -> list[str]:
    """Every token, in the order of its number."""
    words = [*SPOKEN.split(), *(str(digit) for digit in range(10)), *COLOURS, *SHAPES, *map(plural, SHAPES), *WORDS]
    return [*SPECIAL_TOKENS, *dict.fromkeys(words)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words and single digits, no punctuation; a sequence begins with ``<bos>``. Pads on the left."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {token: i for i, token in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\bcolor\b"), "colour"),
            normalizers.Replace(Regex(r"[?.,!:;]"), " "),  # a question ends with what it asks for: quick to learn
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    core.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", numbers["<bos>"])])
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=4096,
    )


def make_processor(side: int = SIDE) -> LlavaProcessor:
    """``processor(images=picture, text="<image> what colour is the star ?")``; one token per patch takes the mark's place."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    pictures = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaProcessor(
        pictures,
        make_tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
