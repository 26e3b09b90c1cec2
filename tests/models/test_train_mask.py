"""What the diffusion models learn from: the weights of the masks, and that training sees what decoding will show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from laconic.decoding.canvas import Run
from laconic.models import load
from laconic.models.templates import WORDS
from laconic.models.text_data import train_tokenizer
from laconic.models.train_mask import BLOCK, LEAST, Noise, TwoStreams, build_model, masked_loss, two_stream_loss, two_stream_mask


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS) + " 1 2 3 4 5 = ; ,\n"] * 5)


@pytest.fixture(scope="module")
def writer(tokenizer, tmp_path_factory):
    """A folder with a small Llama that writes from left to right."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("writer")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(writer):
    return [build_model(writer, size)[0] for size in ("mask", "mask-causal")]


def corpus(tokenizer):
    return np.random.default_rng(0).integers(4, len(tokenizer), 4000).astype(np.uint16)


def test_the_config_says_what_the_model_is(small, tokenizer, tmp_path):
    for model, kind in zip(small, ("masked", "causal"), strict=True):
        model.save_pretrained(tmp_path / kind)
        config = type(model.config).from_pretrained(tmp_path / kind)
        assert (config.diffusion, config.mask_token_id) == (kind, tokenizer.mask_token_id)


def test_training_starts_from_a_model_that_writes(small, writer, tokenizer, tmp_path):
    first = load(writer)[0]
    others = torch.arange(len(tokenizer)) != tokenizer.mask_token_id
    for model in small:
        for (name, ours), theirs in zip(model.named_parameters(), first.parameters(), strict=True):
            rows = others if "embed" in name else slice(None)
            assert torch.equal(ours[rows], theirs[rows])
    small[0].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = build_model(tmp_path, "mask-causal")[0]  # a mask that was learned stays
    assert torch.equal(again.get_input_embeddings().weight, small[0].get_input_embeddings().weight)
    assert (again.config.diffusion, again.config.diffusion_shift) == ("causal", False)


def test_masks_weigh_the_inverse_of_their_ratio(tokenizer):
    feed = Noise(tokenizer, corpus(tokenizer), 0)
    for turn in range(8):
        noisy, begins, chosen, true, given = feed.take(4, 256)
        masked = noisy == tokenizer.mask_token_id
        assert len(set(chosen)) == len(chosen) == len(true) == len(given) >= int(0.7 * noisy.size)
        weight = np.zeros(noisy.shape, np.float32)
        weight.flat[chosen] = given
        np.testing.assert_array_equal(weight > 0, masked)
        np.testing.assert_array_equal(true[given == 0], noisy.flat[chosen][given == 0])
        assert (weight.max(1) * masked.size >= masked.any(1)).all() and weight.max() * (~masked).size <= 4 / LEAST
        for row, marks in zip(weight, masked, strict=True):
            assert len(set(row[marks])) <= 1, "one ratio per row"
        assert begins.shape == noisy.shape and bool(begins.any()) == (turn % 3 < 2)
        assert not masked[:, 0].any(), "nothing stands before the first position that could predict it"
    totals = [feed.take(4, 256)[4].sum() for _ in range(60)]
    assert abs(np.mean(totals) - 1) < 0.1, "a maskable token weighs 1 / their number in the mean"


def test_the_loss_is_a_weighted_cross_entropy_with_full_attention_in_a_document(small):
    model = small[0]
    ids = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    noisy = ids.clone()
    noisy[0, 3] = noisy[1, 7] = 3
    chosen, weight = torch.tensor([3, 5, 12 + 7]), torch.tensor([0.5, 0.0, 2.0])
    begins = torch.tensor([[0] * 12, [0] * 5 + [5] * 7])
    with torch.no_grad():
        first = model(input_ids=noisy[:1], attention_mask=torch.zeros(1, 1, 12, 12)).logits.log_softmax(-1)
        second = model(input_ids=noisy[1:, 5:], attention_mask=torch.zeros(1, 1, 7, 7)).logits.log_softmax(-1)
        expected = -0.5 * first[0, 2, ids[0, 3]] - 2.0 * second[0, 1, ids[1, 7]]  # said one position before
        torch.testing.assert_close(masked_loss(model, noisy, begins, chosen, ids.flatten()[chosen], weight), expected)


def test_the_two_streams_are_the_same_tokens_in_another_order(tokenizer):
    feed = TwoStreams(tokenizer, corpus(tokenizer), 1)
    for _ in range(6):
        stream, places, true, weight, free, seen = feed.take(2, 256)
        rows, length = true.shape
        ids, second = stream[:, :length], stream[:, length:]
        size = len(tokenizer)  # tokens with their positions are the same in both streams
        pairs = [places[:, :length] * size + ids, places[:, length:] * size + true]
        np.testing.assert_array_equal(*(np.sort(part, 1) for part in pairs))
        hidden = weight > 0
        np.testing.assert_array_equal(second[~hidden], true[~hidden])
        assert (second[hidden] == tokenizer.mask_token_id).all() and abs(weight.sum() - 1) < 1e-4
        answers = [set(part[row].tolist()) for row, part in zip(free, pairs[0], strict=True)]
        for row in range(rows):
            assert set(pairs[1][row][hidden[row]].tolist()) <= answers[row], "only answers and text are masked"
        assert seen.shape == (rows, 1, 2 * length, 2 * length)
        for row in range(rows):  # a document begins anew, and nothing before it is seen
            inside = np.arange(length) - places[row, :length]
            known = seen[row, 0, :length, :length]
            np.testing.assert_array_equal(known, np.tril(inside[:, None] == inside[None]))
            later = seen[row, 0, length:, length:]
            assert not np.triu(later, 1).any() and later.diagonal().all()
            assert not (later & hidden[row][None] & ~hidden[row][:, None]).any(), "what is known does not see masks"
        assert not free[:, 0].any()


def test_who_sees_whom():
    seen = two_stream_mask(np.array([0, 0, 1, 1]))[0, 0].astype(int).tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]


@torch.inference_mode()
def test_training_shows_what_decoding_will(small, tokenizer):
    """Logits of a block in the masked stream are those of a WeDLM forward over the same block behind a cache of true tokens."""
    model, feed = small[1], TwoStreams(tokenizer, corpus(tokenizer), 2)
    feed.turn = 2  # text is next
    stream, places, true, _, _, seen = feed.take(2, 256)
    length = true.shape[1]
    trained = model(
        input_ids=torch.from_numpy(stream), position_ids=torch.from_numpy(places), attention_mask=torch.from_numpy(seen)
    ).logits[:, length:]
    for start in np.flatnonzero(np.diff(seen[0, 0, length:, :length].sum(1))) + 1:  # where a block begins
        begin, stop = int(start), min(int(start) + BLOCK, length)
        run, prefix, count = Run(model, torch.from_numpy(stream[:1, :begin]), 64), slice(0, begin), stop - begin
        place = torch.arange(begin)
        run.forward(run.ids[:, prefix], place, write=prefix, read=prefix, bias=None, keep=place[:0])
        later = torch.ones(count, stop, dtype=torch.bool).triu(begin + 1)
        logits = run.forward(
            torch.from_numpy(stream[:1, length + begin : length + stop]),
            torch.from_numpy(places[0, length + begin : length + stop]),
            write=slice(begin, stop), read=slice(0, stop), keep=torch.arange(count),
            bias=torch.zeros(later.shape).masked_fill(later, torch.finfo(torch.float32).min)[None, None],
        )  # fmt: skip
        torch.testing.assert_close(logits[0], trained[0, begin:stop], rtol=1e-3, atol=1e-3)


def test_the_causal_loss_is_half_masks_half_next_tokens(small, tokenizer):
    model = small[1]
    tensors = [torch.from_numpy(x) for x in TwoStreams(tokenizer, corpus(tokenizer), 3).take(1, 256)]
    stream, _, true, weight, free, _ = tensors
    length = true.shape[1]
    with torch.no_grad():
        whole = two_stream_loss(model, *tensors)
        plain = model(input_ids=stream[:, :length]).logits
        each = cross_entropy(plain[:, :-1].flatten(0, 1), stream[:, 1:length].flatten(), reduction="none")
        next_token = each[free[:, 1:].flatten()].mean()
        nothing = two_stream_loss(model, *tensors[:3], weight * 0, *tensors[4:])
    torch.testing.assert_close(nothing, next_token / 2, rtol=1e-4, atol=1e-4)
    assert float(whole) > float(nothing)
