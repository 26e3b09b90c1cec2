"""What holds for every method of the catalogue. A new method is tested here without a line."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from tiny import WINDOW, build, generate, prompt, shared

import laconic
from laconic import registry
from laconic.attention import engine
from laconic.attention.base import AttentionMethod, EvictMethod, ReadMethod, ReweightMethod
from laconic.attention.retrieval_heads import RetrievalHeads
from laconic.attention.snapkv import SnapKV

PADS = (0, 15, 31)  # 70, 55 and 39 tokens: the last row passes a budget of 40 while it answers
LENGTH, STEPS, BUDGET = 70, 6, 40
METHODS = {
    row["id"]: registry.find(row["id"])
    for row in laconic.methods()
    if issubclass(registry.find(row["id"]), AttentionMethod) and row["stage"] == "attention"
    and not issubclass(registry.find(row["id"]), ReweightMethod)  # these change the output by intention, at any budget
}
CHOOSING = [name for name, cls in METHODS.items() if issubclass(cls, EvictMethod | ReadMethod)]
SPREADING = ("pyramidkv", "spatten")  # these share the budget out over the layers themselves


def get_chain(name: str) -> list[Any]:
    """The stages by which a reader searches."""
    return laconic.get(name).chain


# the same methods where their memory over time matters
LASTING = [
    "tokenselect(refresh=-1)",
    "tokenselect(refresh=0.3)",
    "tokenselect(refresh=2)",
    "tokenselect(per_head=true)",
    "tokenselect(positions=compact, refresh=-1)",
    "recycled_attention(every=1)",
    "recycled_attention(every=2)",
    "recycled_attention(every=1, similarity=2)",
    "h2o(normalise=true)",
    "tova(per_head=true)",
    "actqkv(block=4, recent=4, share=0.5, least=1)",
]


@pytest.fixture(autouse=True)
def profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile for every model, so that methods which need one run on tiny random ones."""

    def tables(method: str, path: str, model: Any) -> dict[str, Any]:
        config = model.config.get_text_config()
        pairs = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) // 2
        heads = config.num_key_value_heads
        scores = [[1.0 / (1 + layer + head) for head in range(heads)] for layer in range(config.num_hidden_layers)]
        return {
            "fasa": {"rope": "half", "ranking": [[list(range(pairs))] * heads] * config.num_hidden_layers},
            "razor_attention": {"induction": scores, "echo": scores},
            "duo_attention": {"gates": scores},
            "tca_attention": {
                "configurations": [[-4.0, 1.0], [-1.0, 0.5], [0.0, 0.0]],
                "mass": [[[0.5, 0.9, 1.0]] * heads] * config.num_hidden_layers,  # only the last retains enough
            },
        }[method]

    monkeypatch.setattr("laconic.profiles.find_profile", tables)


def protected(name: str) -> dict[str, int]:
    """Protection parameters of a method, set to something other than their defaults."""
    known = [f.name for f in fields(METHODS[name])]
    return {k: v for k, v in {"sinks": 2, "recent": 3}.items() if k in known}


def small(name: str, window: int, sinks: int, recent: int) -> str:
    """Parameters of a method that leave room in a small budget."""
    if name in ("razor_attention", "duo_attention"):  # without heads that keep everything
        return f"(sinks={sinks}, recent={recent}, {'heads=0' if name == 'duo_attention' else 'induction=0, echo=0'})"
    if name == "tca_attention":
        return f"(sinks={sinks}, recent={recent}, block=2)"
    if name == "adakv":
        return f"(keydiff(sinks={sinks}, recent={recent}))"  # not knorm: equal tokens have keys of equal length, which tie
    return f"(window={window})" if issubclass(METHODS[name], SnapKV) else f"(sinks={sinks}, recent={recent})"


@functools.cache
def gentle(kv_heads: int) -> torch.nn.Module:
    """Weights of a size at which single precision keeps logits to 1e-5."""
    return build(sharpen=2.0, num_key_value_heads=kv_heads)


def logits(model: Any, recipe: str, chunk: int | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of a padded prompt (in chunks) and of four decode steps on fixed tokens, and the positions held then."""
    inputs = prompt(3, 44, pads=(0, 9, 25))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ends = [*(range(chunk, 40, chunk) if chunk else ()), 40, 41, 42, 43, 44]
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        cache, out = handle.cache(), []
        for begin, end in itertools.pairwise([0, *ends]):
            out.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    return torch.cat(out, dim=1)[mask.bool()], [layer.positions for layer in cache.layers]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_the_full_budget_is_dense(name: str, kv_heads: int) -> None:
    model = gentle(kv_heads)
    expected, everything = logits(model, "dense")
    for recipe in {name, f"{name}:100%", name if name == "dense" else f"{name}:4096"}:
        for chunk in (None, 16):
            got, positions = logits(model, recipe, chunk)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            assert all(torch.equal(a, b) for a, b in zip(positions, everything, strict=True))


@functools.cache
def local_and_global() -> torch.nn.Module:
    """Layers with and without a window, each kind with its own rotary embedding."""
    return build("gemma3", sharpen=2.0)


@functools.cache
def dense_with_windows(chunk: int | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of the same pieces: what has left a window goes between two of them."""
    return logits(local_and_global(), "dense", chunk)


COMPACT = [f"{name}(positions=compact)" for name, cls in METHODS.items() if "positions" in {f.name for f in fields(cls)}]


@pytest.mark.parametrize("method", [*METHODS, *COMPACT])
def test_the_full_budget_is_dense_with_a_table_for_each_kind_of_layer(method: str) -> None:
    for recipe in {method, method if method == "dense" else f"{method}:4096"}:
        for chunk in (None, 16):
            expected, everything = dense_with_windows(chunk)
            got, positions = logits(local_and_global(), recipe, chunk)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
            for held, all_held, sees in zip(positions, everything, (WINDOW, LENGTH), strict=True):  # behind it nobody looks
                assert torch.equal(held[:, :, -sees:], all_held[:, :, -sees:])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The slots of every partial read."""
    seen: list[torch.Tensor] = []
    original = engine.kernels.selected_attention

    def spy(query: Any, keys: Any, values: Any, indices: torch.Tensor, **options: Any) -> Any:
        seen.append(indices.clone())
        return original(query, keys, values, indices, **options)

    monkeypatch.setattr(engine.kernels, "selected_attention", spy)
    yield seen


def steps(
    recipe: str, reads: list[torch.Tensor] | None = None, model: Any = None, pads: tuple[int, ...] = PADS
) -> Iterator[tuple[Any, Any, int]]:
    """Runs a padded batch step by step: yields (cache, handle, tokens seen); ``reads`` holds those of one step."""
    model = model or shared()
    inputs = prompt(len(pads), LENGTH + STEPS, seed=3, pads=pads)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with laconic.apply(model, recipe) as handle, torch.no_grad():
        cache = handle.cache()
        for begin, end in [(0, LENGTH), *((i, i + 1) for i in range(LENGTH, LENGTH + STEPS))]:
            if reads is not None:
                reads.clear()
            model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            yield cache, handle, end


@pytest.mark.parametrize("budget", [str(BUDGET), "60%", f"pyramid:{BUDGET}", "pyramid:60%"])
@pytest.mark.parametrize("name", CHOOSING)
def test_a_budget_is_never_exceeded(name: str, budget: str, reads: list[torch.Tensor]) -> None:
    cls = METHODS[name]
    if budget.startswith("pyramid:") and (name in (*SPREADING, "tca_attention") or issubclass(cls, RetrievalHeads)):
        pytest.skip("refused: it spreads its budget over layers and heads itself")
    options = small(name, 8, 2, 3)
    limit, partial = laconic.Budget.parse(budget), 0
    for cache, _, seen in steps(f"{name}{options}:{budget}", reads):
        partial += len(reads)
        for index, layer in enumerate(cache.layers):
            allowed = [limit.tokens(LENGTH - p, layer=index, layers=2) for p in PADS]
            if issubclass(cls, EvictMethod):
                extra = seen - LENGTH if laconic.get(name).once else 0  # snapkv: what it generates stays
                counts = (layer.positions >= 0).sum(-1)
            elif len(reads) < 2:
                continue  # the prompt, which readers attend to as a whole
            else:
                extra, counts = 0, (reads[index] >= 0).sum(-1)
            for row, count in enumerate(counts.tolist()):
                most = max(allowed[row], 0) if limit.share is not None else limit.tokens(10**6, layer=index, layers=2)
                if name in SPREADING:  # what a layer has less, another has more
                    most = 2 * most - int((cache.layers[1 - index].positions[row] >= 0).sum(-1).max()) + extra
                shared_out = sum(count) / len(count) if name == "adakv" else max(count)  # by heads, or the same for all
                assert shared_out <= most + extra, (name, budget, index, row)
    if issubclass(cls, ReadMethod):
        assert partial, "this method never read a part: the test shows nothing"


@pytest.mark.parametrize("name", CHOOSING)
def test_protected_tokens_always_stay(name: str, reads: list[torch.Tensor]) -> None:
    options = protected(name)
    window = 8 if issubclass(METHODS[name], SnapKV) else 0
    text = ", ".join(f"{k}={v}" for k, v in options.items()) + (f", window={window}" if window else "")
    text = f"knorm(sinks=0, recent=0), {text}" if name == "adakv" else text
    unusual = name == "tca_attention" or issubclass(METHODS[name], RetrievalHeads)
    text = small(name, 0, **options)[1:-1] if unusual else text
    partial = 0
    for cache, _, seen in steps(f"{name}({text}):24", reads):
        partial += len(reads)
        for index, layer in enumerate(cache.layers):
            for row, pad in enumerate(PADS):
                end = seen - pad
                must = {*range(options["sinks"]), *range(end - max(options["recent"], window), end)}
                if issubclass(METHODS[name], EvictMethod):
                    sets = layer.positions[row].tolist()
                elif len(reads) >= 2 or (name == "tidaldecode" and len(reads) == index == 1):  # its first layer reads all
                    slots = reads[index - 2 + len(reads)][row]
                    sets = [layer.positions[row, 0][s[s >= 0]].tolist() for s in slots]
                else:
                    continue
                for kept in sets:
                    assert must <= set(kept), (name, seen, index, row)
    if issubclass(METHODS[name], ReadMethod):
        assert partial >= (1 if name == "tidaldecode" else 2) * (STEPS - 2)


@pytest.mark.parametrize("name", METHODS)
def test_positions_are_shaped_and_ascend(name: str) -> None:
    recipe = f"{name}:{BUDGET}" if name in CHOOSING else name
    with laconic.apply(shared(), recipe):
        out = generate(shared(), prompt(3, LENGTH, pads=PADS), STEPS, return_dict_in_generate=True)
    for layer in out.past_key_values.layers:
        assert layer.positions.shape == (3, 2, layer.keys.shape[2]) == (*layer.values.shape[:2], layer.n)
        assert layer.positions.dtype == torch.int64
        for row, pad in enumerate(PADS):
            for head in layer.positions[row].tolist():
                real = [p for p in head if p >= 0]
                assert head == [-1] * (len(head) - len(real)) + sorted(set(real))
                assert real[-1] == LENGTH - pad + STEPS - 2  # the last token of all was never an input


@functools.cache
def exact(sharpen: float) -> torch.nn.Module:
    """In float64: in float32 a processor rounds a row of a batch and a row alone differently, and scores that nearly tie flip."""
    return build(sharpen=sharpen).double()


def padded_rows(recipe: str, budget: str, sharpen: float = 4.0) -> None:
    model = exact(sharpen)
    inputs = prompt(3, LENGTH, seed=5, pads=PADS)
    with laconic.apply(model, f"{recipe}:{budget}"):
        together = generate(model, inputs, 12, return_dict_in_generate=True, output_logits=True)
        for row, pad in enumerate(PADS):
            ids = inputs["input_ids"][row : row + 1, pad:]
            alone = generate(model, {"input_ids": ids}, 12, return_dict_in_generate=True, output_logits=True)
            assert torch.equal(together.sequences[row, -12:], alone.sequences[0, -12:])
            for a, b in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], atol=1e-3, rtol=1e-3)
            for a, b in zip(together.past_key_values.layers, alone.past_key_values.layers, strict=True):
                for ours, theirs in zip(a.positions[row].tolist(), b.positions[0].tolist(), strict=True):
                    assert [p for p in ours if p >= 0] == [p for p in theirs if p >= 0]


@pytest.mark.parametrize("budget", ["40", "60%"])
@pytest.mark.parametrize("name", CHOOSING)
def test_a_left_padded_row_is_the_row_alone(name: str, budget: str) -> None:
    padded_rows(name + small(name, 8, 2, 3), budget)


@pytest.mark.parametrize("sharpen", [1.0, 4.0])  # queries that hardly turn, and queries that do
@pytest.mark.parametrize("recipe", LASTING)
def test_a_left_padded_row_is_the_row_alone_over_time(recipe: str, sharpen: float) -> None:
    padded_rows(recipe, "40", sharpen)


@pytest.mark.parametrize("name", CHOOSING)
def test_a_small_budget_changes_something_and_repeats(name: str) -> None:
    """Otherwise every test above could pass on a method that does nothing."""
    options = small(name, 8, 2, 3)
    inputs = prompt(2, LENGTH, seed=6)
    runs = []
    for recipe in ("dense", f"{name}{options}:12", f"{name}{options}:12"):
        with laconic.apply(shared(), recipe):
            runs.append(
                torch.stack(generate(shared(), inputs, 8, return_dict_in_generate=True, output_logits=True).logits)
            )
    assert not torch.allclose(runs[0], runs[1], atol=1e-3)
    assert torch.equal(runs[1], runs[2])


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_a_window_is_respected_whatever_is_kept(name: str, architecture: str, reads: list[torch.Tensor]) -> None:
    """No read reaches beyond the sliding window, and every row and head reads something."""
    model = shared(architecture)
    options = small(name, 4, 1, 2)
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 2
    for cache, _, seen in steps(f"{name}{options}:8", reads, model):
        for index, layer in enumerate(cache.layers):
            if len(reads) < 2 or kinds[index] != "sliding_attention":
                continue
            slots = reads[index].expand(-1, 2, -1)
            at = torch.where(slots < 0, 10**6, layer.positions.gather(2, slots.clamp(min=0)))
            assert bool((at > seen - 1 - 12 - torch.tensor(PADS)[:, None, None]).all())


@pytest.mark.parametrize("evictor", [n for n in CHOOSING if issubclass(METHODS[n], EvictMethod)])
@pytest.mark.parametrize("second", CHOOSING)
def test_an_evictor_composes_with_everything(evictor: str, second: str) -> None:
    def part(name: str, budget: int) -> str:
        return f"{name}{small(name, 4, 1, 2)}:{budget}"

    if evictor == second == "tca_attention":
        pytest.skip("refused: only one method computes a part of the prompt")
    recipe = f"{part(evictor, 30)} + {part(second, 12)}"
    for cache, last, seen in steps(recipe):
        handle = last
        for layer in cache.layers:
            most = 60 if evictor in (*SPREADING, "adakv") else 30  # a layer or a head may have up to twice the mean
            assert layer.n <= most + (seen - LENGTH)
            assert all(b.n == layer.n for b in (layer._keys, layer._values, layer._positions))
    if issubclass(METHODS[second], ReadMethod) or not laconic.get(second).once:
        most = {"recycled_attention": 60 if evictor == "adakv" else 30, "adakv": 24, "tidaldecode": 37}.get(second, 12)
        assert handle.stats()["kept"] <= most


@pytest.mark.parametrize("name", [n for n in CHOOSING if issubclass(METHODS[n], EvictMethod)])
def test_once_leaves_alone_what_is_generated(name: str) -> None:
    """The prompt is cut as ever, and then every head holds a token more with each step."""
    first = None
    for cache, _, seen in steps(f"{name}{small(name, 8, 2, 3)[:-1]}, once=true):24"):
        held = torch.stack([(layer.positions >= 0).sum(-1) for layer in cache.layers])
        first = held if first is None else first
        assert torch.equal(held, first + seen - LENGTH)
    assert bool((first.double().mean(0) < LENGTH - torch.tensor(PADS)[:, None]).all())


@pytest.mark.parametrize("evictor", [n for n in CHOOSING if issubclass(METHODS[n], EvictMethod)])
@pytest.mark.parametrize("reader", [n for n in CHOOSING if issubclass(METHODS[n], ReadMethod) and get_chain(n)])
def test_heads_share_what_they_read_of_what_any_evictor_left(evictor: str, reader: str) -> None:
    recipe = f"{evictor}{small(evictor, 4, 1, 2)}:30 + adakv({reader}{small(reader, 4, 1, 2)}):12"
    for _, last, _ in itertools.islice(steps(recipe, pads=(0, 15)), 3):
        handle = last
    assert handle.stats()["kept"] <= 12


@pytest.mark.parametrize("name", CHOOSING)
def test_a_prompt_in_pieces_with_a_row_that_starts_later(name: str) -> None:
    """The first pieces of the last row are padding; budgets and protection hold all the same."""
    options = small(name, 4, 1, 2)
    with laconic.apply(shared(), f"{name}{options}:8"):
        out = generate(shared(), prompt(3, LENGTH, pads=PADS), 4, prefill_chunk_size=10, return_dict_in_generate=True)
    for layer in out.past_key_values.layers:
        for row, pad in enumerate(PADS):
            newest = layer.positions[row, :, -1]
            assert newest.tolist() == [LENGTH - pad + 2] * 2
            real = layer.positions[row][layer.positions[row] >= 0]
            assert int(real.max()) == LENGTH - pad + 2 and int(real.min()) >= 0
