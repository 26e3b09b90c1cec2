"""The processors of the built-in `shapes` models: a tokenizer of whole words, and each encoder's preparation of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laconic.models.scenes import CELL, COLOURS, SHAPES, SIDE, WORDS, plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, ProcessorMixin

VARIANTS = ("shapes", "shapes-siglip", "shapes-merger")
MERGE = 2  # patches along a side of a token of shapes-merger
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
SPOKEN = (
    "what how many which is are there the a an or of on left right above below larger smaller colour color shapes sign number "
    "word yes no"
)
MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")  # what Idefics3 puts around pictures and turns


def vocabulary(variant: str = "shapes") -> list[str]:
    """Every token, in the order of its number, which is the same in all variants that have it."""
    words = [*SPOKEN.split(), *(str(digit) for digit in range(10)), *COLOURS, *SHAPES, *map(plural, SHAPES), *WORDS]
    return [*SPECIAL_TOKENS, *dict.fromkeys(words), *(MARKS if variant == "shapes-merger" else ())]


def make_tokenizer(variant: str = "shapes") -> PreTrainedTokenizerFast:
    """Lower-cased words and single digits, no punctuation; a sequence begins with ``<bos>``. Pads on the left."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {token: i for i, token in enumerate(vocabulary(variant))}
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
        additional_special_tokens=["<image>", *(MARKS if variant == "shapes-merger" else ())],
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=4096,
    )


def make_processor(variant: str = "shapes") -> ProcessorMixin:
    """``processor(images=picture, text="<image> what colour is the star ?")``; the picture's tokens take the mark's place.

    One per patch, or in `shapes-merger` one per square of ``MERGE`` x ``MERGE`` patches, between marks.
    """
    import transformers as hf

    tokenizer, size = make_tokenizer(variant), {"height": SIDE, "width": SIDE}
    if variant == "shapes-merger":
        whole = {"longest_edge": SIDE}
        pictures = hf.Idefics3ImageProcessorPil(size=whole, max_image_size=whole, do_image_splitting=False)
        return hf.Idefics3Processor(pictures, tokenizer, image_seq_len=(SIDE // CELL // MERGE) ** 2)
    if variant == "shapes-siglip":
        return hf.LlavaProcessor(
            hf.SiglipImageProcessorPil(size=size), tokenizer, patch_size=CELL, vision_feature_select_strategy="full",
            num_additional_image_tokens=0,
        )  # fmt: skip
    pictures = hf.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    return hf.LlavaProcessor(
        pictures, tokenizer, patch_size=CELL, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
