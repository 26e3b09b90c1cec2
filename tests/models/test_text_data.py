"""The text of the built-in language models: what is held out is not trained on, and a tokenizer gives every byte back."""

from __future__ import annotations

import lzma

import numpy as np
import pytest

from laconic.errors import LaconicError
from laconic.models import text_data
from laconic.models.text_data import Batches, encode, held_out_text, prepare, python_sources, train_tokenizer, training_texts
from laconic.models.train_story import build_model, next_token_loss


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the whale and the sea\n" * 50, "def add(a, b):\n    return a + b\n" * 50])


@pytest.fixture
def data(tmp_path, monkeypatch):
    books = tmp_path / "data" / "text" / "books"
    books.mkdir(parents=True)
    with lzma.open(books / "one.txt.xz", "wt", encoding="utf-8") as file:
        file.write("".join(f"Line {i} of the book.\n" for i in range(1000)))
    monkeypatch.setattr(text_data, "python_sources", lambda held_out=True: [])
    return tmp_path / "data"


def test_the_end_of_a_book_is_held_out(data):
    end = held_out_text(data / "text" / "books" / "one.txt.xz")
    assert end.endswith("Line 999 of the book.\n") and end.startswith("Line 9")
    assert not any("Line 999 " in text for text in training_texts(data))
    assert training_texts(data)[0] + end == "".join(f"Line {i} of the book.\n" for i in range(1000))


def test_modules_are_either_learned_or_held_out():
    kept, held = python_sources(held_out=False), python_sources()
    assert kept and held and not set(kept) & set(held)


def test_a_folder_without_text_is_one_sentence(tmp_path):
    with pytest.raises(LaconicError, match=r"holds no text: give a folder"):
        training_texts(tmp_path)


def test_the_tokenizer_gives_every_byte_back(tokenizer):
    text = "naïve — 東京 \t\x00 the sea"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.mask_token_id == 3


def test_prepare_uses_the_tokenizer_that_lies_there(data, tmp_path):
    first, corpus = prepare(data, tmp_path)
    again, same = prepare(data, tmp_path)
    assert first.get_vocab() == again.get_vocab()
    np.testing.assert_array_equal(corpus, same)
    assert corpus[0] == first.bos_token_id and corpus[-1] == first.eos_token_id
    rows = Batches(corpus, 0).take(3, 16)
    assert rows.shape == (3, 16) and rows.dtype == np.int64


def test_long_documents_are_tokenized_in_shards(tokenizer, monkeypatch):
    monkeypatch.setattr(text_data, "SHARD", 7)
    text = "the whale and the sea\n" * 3
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids[1:-1].tolist()) == text


def test_the_loss_is_the_model_s_own(tokenizer):
    import torch

    torch.manual_seed(0)
    model = build_model(tokenizer, "draft")
    ids = torch.randint(4, len(tokenizer), (2, 12))
    torch.testing.assert_close(next_token_loss(model, ids), model(input_ids=ids, labels=ids).loss)


def test_every_token_is_judged_once(tokenizer, monkeypatch):
    import math

    import torch

    from laconic.models import evaluate_text

    monkeypatch.setattr(evaluate_text, "WINDOW", 16)
    torch.manual_seed(0)
    model = build_model(tokenizer, "draft").eval()
    text = "the whale and the sea, add(a, b)\n" * 4
    found = evaluate_text.judge(model, tokenizer, text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found["tokens"] == len(ids) and found["bytes"] == len(text)
    assert found["bits_per_byte"] == pytest.approx(math.log2(found["perplexity"]) * len(ids) / len(text))
    short = evaluate_text.judge(model, tokenizer, "the sea")  # one window: the model's own loss
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("the sea", add_special_tokens=False)["input_ids"]]])
    assert math.log(short["perplexity"]) == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)


def test_a_draft_learns_what_its_teacher_says(tokenizer):
    """The loss is least, and equal to the teacher's own entropy, for a model that says the same."""
    import torch

    from laconic.models.train_story import likeness_loss

    torch.manual_seed(0)
    teacher, other = build_model(tokenizer, "draft"), build_model(tokenizer, "draft")
    ids = torch.randint(4, len(tokenizer), (2, 12))
    loss = likeness_loss(teacher)
    law = teacher(input_ids=ids).logits[:, :-1].softmax(-1)
    assert loss(teacher, ids).item() == pytest.approx(-(law * law.log()).sum(-1).mean().item(), rel=1e-5)
    assert loss(other, ids) > loss(teacher, ids)
