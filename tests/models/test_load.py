"""Opening models: built in, from a folder, and what cannot be opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import laconic
from laconic import LaconicError
from laconic.evaluation.tasks import load_task
from laconic.models import ZOO, builtin_models, load


@pytest.fixture(scope="module")
def needle():
    return load("needle")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that is not there, as on a machine without a network."""

    def refuse(*_args: object, **_named: object) -> None:
        raise OSError("We couldn't connect to the hub.\nMore lines.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)


def test_needle_is_a_small_llama_of_standard_architecture(needle) -> None:
    model, tokenizer = needle
    assert "needle" in builtin_models()
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"
    assert model.config.num_attention_heads > model.config.num_key_value_heads  # grouped queries are exercised
    assert (ZOO / "needle" / "model.safetensors").stat().st_size < 4e6
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 0
    assert len(tokenizer) == model.config.vocab_size
    assert (ZOO / "needle" / "README.md").read_text(encoding="utf-8").startswith("#")


def test_only_the_model_itself_is_in_the_package() -> None:
    suffixes = {path.suffix for path in (ZOO / "needle").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md"}


def test_tokenizer_keeps_text_and_names(needle) -> None:
    from laconic.models.names import code_names

    _, tokenizer = needle
    for text in ("The naïve café — 東京 🙂\n\ttabs", " ".join(code_names()[:4]), "no names, just text."):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    names = [tokenizer(" " + name, add_special_tokens=False)["input_ids"] for name in code_names()]
    assert len({ids[0] for ids in names}) == len(names) and {len(ids) for ids in names} == {1}


@pytest.mark.parametrize("task", ["needle", "threads"])
def test_needle_answers_at_1024_tokens(needle, task: str) -> None:
    from laconic.evaluation.metrics import score

    model, tokenizer = needle
    work = load_task(task, tokenizer, samples=6, lengths=[1024], seed=3)
    right = 0.0
    for example in work.examples:
        ids = tokenizer(example.prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=example.max_new_tokens, do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        right += score(work.metric, text, example.answer, example.choices)
    assert right >= 5


def test_dtype(needle) -> None:
    assert load("needle", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert load("needle", dtype="bfloat16")[0].dtype == torch.bfloat16
    for wrong in ("int8", "float33", torch.int64):
        with pytest.raises(LaconicError, match="float32"):
            load("needle", dtype=wrong)


def test_a_local_folder_keeps_its_weights(tiny, tiny_path: str) -> None:
    model, tokenizer = laconic.load(tiny_path)
    assert not model.training and tokenizer.pad_token == tokenizer.eos_token
    for mine, theirs in zip(model.parameters(), tiny[0].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["/no/such/model", "./missing", "a/b/c", "~/nothing-here", "", "  "])
def test_missing_folder(name: str) -> None:
    with pytest.raises(LaconicError, match="needle") as caught:
        load(name)
    assert "\n" not in str(caught.value) and "hub gives none" not in str(caught.value)


def test_misspelt_and_unreachable_names(no_network: None) -> None:
    with pytest.raises(LaconicError, match="did you mean 'needle'") as caught:
        load("neddle")
    assert "\n" not in str(caught.value)
    with pytest.raises(LaconicError, match="hub gives none"):
        load("someone/some-model")


def _folder(path: Path, config: object) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return str(path)


def test_folders_that_hold_no_causal_model(tmp_path: Path) -> None:
    encoder = {"model_type": "vit", "architectures": ["ViTModel"]}
    cases = {
        "not a causal language model": _folder(tmp_path / "vision", encoder),
        "cannot be read": _folder(tmp_path / "broken", "{"),
        "names no model_type": _folder(tmp_path / "bare", {}),
        "are missing or broken|tokenizer of": _folder(tmp_path / "no-weights", {"model_type": "llama"}),
        "has no config.json": str(tmp_path),
        "is a file": str(tmp_path / "broken" / "config.json"),
    }
    for reason, path in cases.items():
        with pytest.raises(LaconicError, match=reason) as caught:
            load(path)
        assert "\n" not in str(caught.value)


def test_a_model_without_tokenizer(tiny, tmp_path: Path) -> None:
    tiny[0].save_pretrained(tmp_path)
    with pytest.raises(LaconicError, match="tokenizer of"):
        load(tmp_path)


def test_damaged_and_incomplete_weights(tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for part in tiny:
        part.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    whole = weights.read_bytes()
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, weights, {"format": "pt"})
    with pytest.raises(LaconicError, match=r"incomplete \(1 tensors such as lm_head.weight"):
        load(tmp_path)
    for damage in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 2000):
        weights.write_bytes(damage)
        with pytest.raises(LaconicError, match="missing or broken") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(LaconicError, match="missing or broken"):
        load(tmp_path)


def test_encoders_are_refused_even_if_transformers_would_open_them(tmp_path: Path) -> None:
    for config in (
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "bart", "architectures": ["BartForCausalLM"], "is_encoder_decoder": True},
    ):
        with pytest.raises(LaconicError, match="not a causal language model"):
            load(_folder(tmp_path / config["model_type"], config))


def test_weights_that_do_not_fit_into_memory(tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")):

        def refuse(*_: object, _error: Exception = error, **__: object) -> None:
            raise _error

        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
        with pytest.raises(LaconicError, match="does not fit into memory"):
            load(tiny_path)


def test_without_a_network_the_hub_is_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def unknown(*_: object) -> None:
        raise OSError("Name or service not known")

    asked = []
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("time.sleep", asked.append)
    with pytest.raises(LaconicError, match=r"hub gives none.*not reachable from here.*no copy lies in the cache"):
        load("someone/no-such-model")
    assert not asked


def test_loading_leaves_the_logging_of_transformers_alone(tiny_path: str) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(tiny_path)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
