"""Train the built-in `needle` model: ``python -m laconic.models.train_needle --data DIR --out DIR``.

The curriculum starts at 16 tokens and doubles the length each time the accuracy on the answers' names passes 90 % (96 %
from 512 tokens on); starting with long documents ends on a plateau. The learning rate falls over the last third of the
time. State is saved beside the model, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from laconic.evaluation.haystack import read_text, reference_text
from laconic.models.checkpoint import save, saved_state
from laconic.models.needle_data import IGNORED, DocumentMaker
from laconic.models.needle_tokenizer import train_tokenizer

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SPAN = 16384
PASS = 0.96  # accuracy on the names of the answers that doubles the length; short documents only prepare: EARLY
EARLY = 0.9


def build_model(vocabulary: int):
    """A Llama of standard architecture with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=SPAN,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.09,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # tokens must stand out in the residual stream, or looking them up is not learned for long
        model.model.embed_tokens.weight.normal_(0.0, 1.0)
    return model


def load_texts(data: Path | None) -> list[str]:
    """Books, WikiText and technical documents below `data/text`, and the training half of the Python reference."""
    texts = [reference_text(held_out=False)]
    if data is not None:
        texts += [read_text(path) for path in sorted((data / "text").glob("*/*.xz"))]
    return texts


def prepare(data: Path | None, out: Path, seed: int):
    """The tokenizer (trained once, then read from `out`) and the corpus as one array of token ids."""
    from transformers import AutoTokenizer

    texts = load_texts(data)
    rng = np.random.default_rng(seed)
    if (out / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(out)
    else:
        tokenizer = train_tokenizer(text[:600_000] for text in texts)
        tokenizer.save_pretrained(out)
    pieces = [text[i : i + 20_000] for text in texts for i in range(0, len(text), 20_000)]
    rng.shuffle(pieces)
    encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    return tokenizer, np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])


def losses(model, batch, text_weight: float, name_start: int):
    """Loss, and accuracy on the names in the answers. Logits are computed at supervised positions only."""
    ids = torch.from_numpy(batch.ids)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=ids,
            position_ids=torch.from_numpy(batch.positions),
            attention_mask=torch.ones_like(ids),  # without it, jumps in the positions would pass for packed documents
            use_cache=False,
        ).last_hidden_state[:, :-1]
    answers, text = (torch.from_numpy(part)[:, 1:] for part in (batch.answers, batch.text))
    asked, read = answers != IGNORED, text != IGNORED
    logits, target = model.lm_head(hidden[asked].float()), answers[asked]
    loss = cross_entropy(logits, target)
    names = target >= name_start
    accuracy = (logits.argmax(-1) == target)[names].float().mean().item()
    text_loss = torch.zeros(())
    if read.any():
        text_loss = cross_entropy(model.lm_head(hidden[read].float()), text[read])
        loss = loss + text_weight * text_loss
    return loss, accuracy, text_loss.item()


def train(data: Path | None, out: Path, minutes: float, seed: int) -> None:
    """Train for `minutes` of wall clock, counted over all resumed runs."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tokenizer, corpus = prepare(data, out, seed)
    name_start = len(tokenizer) - 512
    model = build_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    state = {"step": 0, "stage": 0, "elapsed": 0.0}
    if (saved := saved_state(out)) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = {key: saved[key] for key in state}
    maker = DocumentMaker(tokenizer, corpus, seed=seed + state["step"])
    print(f"{len(corpus):,} tokens of text, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    loop(model, optimizer, maker, state, out, minutes, name_start)


def loop(model, optimizer, maker, state, out: Path, minutes: float, name_start: int) -> None:
    """The training loop: one batch of 4,096 to 8,192 tokens a step."""
    begun, before, last_save = time.time(), state["elapsed"], time.time()
    recent: list[float] = []
    text_mean = 0.0
    while state["elapsed"] < minutes * 60:
        step, top = state["step"], LENGTHS[state["stage"]]
        share = state["elapsed"] / (minutes * 60)
        rate = 1e-3 * min(1.0, (step + 1) / 50) * min(1.0, max(0.05, (1 - share) / 0.35))
        for group in optimizer.param_groups:
            group["lr"] = rate
        last = top == LENGTHS[-1]  # once the longest documents are learned, every second batch is of shorter ones
        shorter = (step % 4 == 3 and state["stage"] > 2) or (last and step % 4 == 1)
        length = int(maker.rng.choice(LENGTHS[2 : state["stage"]])) if shorter else top
        span = SPAN if length >= 256 and step % 2 else 0
        batch = maker.batch(max(1, (2048 if top <= 64 else 4096) // length), length, span)
        loss, accuracy, text_loss = losses(model, batch, 0.1 if top < 512 else 0.3, name_start)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        text_mean = 0.98 * text_mean + 0.02 * text_loss if text_mean else text_loss
        if length == top:
            recent = [*recent[-29:], accuracy]
        state["step"] += 1
        state["elapsed"] = before + time.time() - begun
        mean = sum(recent) / max(1, len(recent))
        if step % 25 == 0:
            print(
                f"{state['elapsed']:6.0f} s  step {step}  length {top}  names {mean:.3f}  text {text_mean:.2f}  "
                f"loss {loss.item():.3f}  rate {rate:.1e}",
                flush=True,
            )
        passed = len(recent) >= 30 and mean > (PASS if top >= 512 else EARLY) and state["stage"] + 1 < len(LENGTHS)
        if passed:
            print(f"{state['elapsed']:6.0f} s  step {step}  passed {top} tokens", flush=True)
            state["stage"] += 1
            recent = []
        if passed or time.time() - last_save > 120:
            save(model, out, optimizer=optimizer.state_dict(), **state)
            last_save = time.time()
    save(model, out, optimizer=optimizer.state_dict(), **state)


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Train the built-in needle model on CPU, in about an hour.")
    parser.add_argument("--data", type=Path, help="folder with text/*/*.xz; without it, the Python reference is used")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, tokenizer and resume state")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.data, arguments.out, arguments.minutes, arguments.seed)


if __name__ == "__main__":
    main()
