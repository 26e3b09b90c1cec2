"""FLASH: what its network makes of pictures, how its state follows the text, and that drafts change no token."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic import LaconicError, get
from laconic.decoding import train_flash
from laconic.decoding.engine import decode
from laconic.decoding.flash_net import VIEWS, FlashForm, FlashNet
from laconic.decoding.sampling import Sampling
from laconic.models.pictures import pictured_tokens
from laconic.profiles import Profile, fingerprint, weights_to_json
from tests import tiny, vlm

SEEING = ("llava", "qwen2_vl", "qwen2_5_vl")
FORM = FlashForm(width=32, heads=4, kv_heads=2, head_dim=8, offsets=3, latents=5)


def net_of(form: FlashForm = FORM, seed: int = 0) -> FlashNet:
    torch.manual_seed(seed)
    return FlashNet(form).eval().requires_grad_(False)


@pytest.fixture
def recipe(tmp_path):
    """Writes a profile of a drafter with random weights, and gives the start of a recipe for it."""

    def make(model, seed=0, ranks=3, **form):
        net = net_of(FlashForm.of_model(model, **{"offsets": 3, "latents": 5, **form}), seed)
        accuracy = [[0.6 / (depth + rank + 1) for rank in range(ranks)] for depth in range(net.form.offsets)]
        tables = {"form": asdict(net.form), "accuracy": accuracy, "weights": weights_to_json(net)}
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        Profile("flash_sd", fingerprint(model), seed, "random", tables).save(path)
        return f"flash_sd(profile={path}"

    return make


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 1000))
def test_a_picture_becomes_latents_that_are_weighted_means_in_any_order(count, seed):
    dice = torch.Generator().manual_seed(seed)
    net, picture = net_of(), torch.randn(count, 32, generator=dice)
    latents = net.compress(picture)
    rows = [torch.cat([part.T, torch.ones(1, len(part))]).double() for part in (picture, latents)]
    weights = torch.linalg.lstsq(*rows)
    assert latents.shape == (5, 32)
    assert bool((latents <= picture.amax(0) + 1e-5).all()) and bool((latents >= picture.amin(0) - 1e-5).all())
    if count <= 32:  # then the weights can be told from the outcome
        assert bool((weights.solution > -1e-4).all())
        torch.testing.assert_close(weights.solution.sum(0), torch.ones(5, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(net.compress(picture[torch.randperm(count, generator=dice)]), latents, atol=1e-5, rtol=1e-4)


def test_text_alone_is_not_compressed_and_each_picture_is():
    hidden, following = torch.randn(2, 20, 32, generator=torch.Generator().manual_seed(1))
    pictured = torch.zeros(20, dtype=torch.bool)
    net, plain = net_of(), net_of(FlashForm(**{**asdict(FORM), "view": "none"}))
    plain.load_state_dict({name: weight for name, weight in net.state_dict().items() if name != "queries"})
    assert torch.equal(net.entries(hidden, following, pictured), plain.entries(hidden, following, pictured))
    pictured[3:9] = pictured[12:18] = True
    seen, unseen = net.entries(hidden, following, pictured), plain.entries(hidden, following, pictured)
    words = torch.tensor([*range(3), *range(3 + 5, 3 + 5 + 3), *range(3 + 5 + 3 + 5, 18)])
    assert len(seen) == 8 + 2 * 5 and torch.equal(seen[words], unseen)
    torch.testing.assert_close(seen[3:8], net.compress(hidden[3:9]))
    every = net_of(FlashForm(**{**asdict(FORM), "view": "all"}))
    assert len(every.entries(hidden, following, pictured)) == 20


def test_entries_in_pieces_and_with_padding_give_the_same_as_all_at_once():
    net, entries = net_of(), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2))
    places = torch.arange(9).expand(2, -1)
    whole, _ = net(entries, torch.ones(2, 9, dtype=torch.bool), places)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    _, past = net(torch.where(real[..., None], entries[:, :5], 7.0), real, places[:, :5])
    rest = torch.stack([entries[0, 5:8], entries[1, 3:6]])
    later, _ = net(rest, torch.ones(2, 3, dtype=torch.bool), torch.tensor([[5, 6, 7], [3, 4, 5]]), past)
    torch.testing.assert_close(later, torch.stack([whole[0, 5:8], whole[1, 3:6]]))


@pytest.mark.parametrize("family", SEEING)
def test_any_drafter_leaves_the_greedy_text_as_it_is(family, recipe):
    model = vlm.build(family)
    for counts, drafts in (
        ((1,), [f"{recipe(model, view='all')}):7", f"{recipe(model, view='none')}):7", "token_recycling:12"]),
        ((1, 2), [f"{recipe(model, seed=2)}):7", "token_recycling:12", "prompt_lookup:6"]),
        ((2, 0), [f"{recipe(model)},depth=7):10"]),
    ):
        inputs = vlm.inputs(family, counts)
        plain = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        plain = plain[:, inputs["input_ids"].shape[1] :].tolist()
        for draft in drafts:
            assert decode(model, inputs, draft, max_new_tokens=12).rows == plain


def test_models_that_only_read_are_drafted_for_as_well(recipe):
    model, inputs = tiny.shared("llama"), tiny.prompt(3, 30, pads=(0, 7, 3))
    assert decode(model, inputs, f"{recipe(model)}):7", max_new_tokens=40).rows == decode(model, inputs, max_new_tokens=40).rows


def trained(model, family, path) -> str:
    """As ``recipe``, of a drafter that has learned what the model writes to six prompts."""
    prompts = [vlm.inputs(family, (1,), seed=seed) for seed in range(6)]
    tables = train_flash.train_flash(model, prompts, steps=100, offsets=3, latents=5)
    Profile("flash_sd", fingerprint(model), 0, "six prompts", tables).save(path)
    return f"flash_sd(profile={path}"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_state_is_that_of_the_whole_text_seen_at_once(family, tmp_path):
    """After any number of accepted tokens: the true hidden states of all that was kept, each with the token after it."""
    model, inputs = vlm.build(family), vlm.inputs(family, (1,), seed=1)
    out = decode(model, inputs, f"{trained(model, family, tmp_path / 'p.json')}):9", max_new_tokens=25)
    assert sum(out.accepted[1:]) > 0 and out.forwards < 25
    text, drafter = torch.tensor(out.drafter.setting.text.rows), out.drafter
    ids, more = text[:, :-1], {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = (ids == vlm.IMAGE).long()
    with torch.no_grad():
        states = model(input_ids=ids, **more, output_hidden_states=True).hidden_states
        following = torch.cat([states[0][0, 1:], model.get_input_embeddings()(text[0, -1:])])
        entries = drafter.net.entries(states[-1][0], following, pictured_tokens(model, ids[0]))[None]
        places = torch.arange(entries.shape[1])[None]
        whole, past = drafter.net(entries, places >= 0, places)
    assert drafter.positions.tolist() == [[entries.shape[1]]]  # counted in what the drafter sees, not in the target's positions
    torch.testing.assert_close(drafter.past.keys[drafter.past.real[:, None].expand(-1, 2, -1)],
                               past.keys[0].flatten(0, 1), atol=1e-4, rtol=1e-3)  # fmt: skip
    torch.testing.assert_close(drafter.ahead, drafter.net.ahead(whole[:, -1]), atol=1e-4, rtol=1e-3)


def test_drafts_are_what_the_head_reads_from_what_is_foretold(recipe):
    """Depth by depth the tokens of the best ranks, the same under every parent; deeper ones from what was foretold before."""
    model, inputs = vlm.build("llava"), vlm.inputs("llava", (1, 2))
    drafter = decode(model, inputs, f"{recipe(model, ranks=2)},depth=4):30", max_new_tokens=5).drafter
    with torch.inference_mode():
        tree, net, head = drafter.propose(drafter.setting.text, 9), drafter.net, model.get_output_embeddings()
        best = head(drafter.ahead).topk(2, dim=-1).indices
        entries = net.fuse(torch.cat([model.get_input_embeddings()(best[..., 0]), drafter.ahead], dim=-1))
        at = drafter.positions + torch.arange(3)
        states, _ = net(entries, at >= 0, at, drafter.past)
        deeper = head(net.ahead(states[:, -1])[:, :1]).topk(2, dim=-1).indices
    best = torch.cat([best, deeper], dim=1)
    assert tree.shape.depth == 4 and tree.nodes == 31
    for row in range(2):
        for node in range(1, 31):
            depth, rank = int(tree.shape.depths[0, node]), int(tree.shape.ranks[0, node])
            assert tree.tokens[row, node] == best[row, depth - 1, rank]


def test_sampling_with_drafts_follows_the_law_of_the_model(recipe):
    model, inputs = tiny.build("llama", sharpen=1.5, vocab_size=7), tiny.prompt(1, 8)
    many = {name: (value % 7 if name == "input_ids" else value).expand(4000, -1) for name, value in inputs.items()}
    counts = []
    for draft in ("dense", f"{recipe(model)}):6"):
        out = decode(model, many, draft, max_new_tokens=3, sampling=Sampling(temperature=0.9, top_k=6), seed=1)
        codes = torch.tensor(out.rows) @ torch.tensor([49, 7, 1])
        counts.append(torch.bincount(codes, minlength=343).double())
    both = counts[0] + counts[1]
    cells = both >= 20
    chi = ((counts[0] - counts[1]) ** 2 / both)[cells].sum()
    freedom = int(cells.sum()) - 1
    assert freedom > 20 and chi < freedom + 4 * (2 * freedom) ** 0.5


def drafted_entries(out) -> list[int]:
    """Entries that the drafter holds of each row."""
    return out.drafter.past.real.sum(-1).tolist()


@pytest.mark.parametrize("family", SEEING)
def test_pictures_may_be_shortened_before_the_first_layer(family, recipe):
    model, inputs = vlm.build(family), vlm.inputs(family, (1, 2))
    for pruning in ("divprune:25%", "divprune(positions=compact):25%" if family == "llava" else "uniform:50%"):
        alone = decode(model, inputs, pruning, max_new_tokens=8).rows
        for view in VIEWS:
            out = decode(model, inputs, f"{pruning} + {recipe(model, view=view)}):7", max_new_tokens=8)
            assert out.rows == alone
            out = decode(model, inputs, f"{pruning} + {recipe(model, view=view)}):7", max_new_tokens=2)
            words = (~pictured_tokens(model, inputs["input_ids"]) & inputs["attention_mask"].bool()).sum(-1)
            kept = out.drafter.setting.places.ge(0).sum(-1) - words
            seen = {"all": kept, "latents": torch.tensor([5, 10]), "none": torch.zeros(2)}[view]
            assert bool((kept < pictured_tokens(model, inputs["input_ids"]).sum(-1)).all())
            assert drafted_entries(out) == (words + seen + 1).tolist()


def test_pictures_may_be_shortened_between_layers(recipe):
    model, inputs = vlm.build("llava"), vlm.inputs("llava", (1,))
    alone = decode(model, inputs, "fastv:25%", max_new_tokens=12).rows
    assert decode(model, inputs, f"fastv:25% + {recipe(model)}):7", max_new_tokens=12).rows == alone


def test_training_lets_the_target_alone_and_foretells_what_it_writes():
    model = vlm.build("llava")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    flags = [weight.requires_grad for weight in model.parameters()]
    prompts = [vlm.inputs("llava", (1,), seed=seed) for seed in range(6)]
    texts = list(train_flash.written(model, prompts, [2], 24))
    for text, inputs in zip(texts, prompts, strict=True):
        plain = decode(model, inputs, max_new_tokens=24, ends=[2]).rows[0]
        assert text.ids[text.prompt :].tolist() == plain
    head, net = model.get_output_embeddings(), FlashNet(FORM)
    untrained = train_flash.accuracy(net, head, texts)
    train_flash.fit(net, head, texts, steps=150, seed=0)
    trained = train_flash.accuracy(net, head, texts)
    assert all(row[0] > 0.5 > other[0] for row, other in zip(trained, untrained, strict=True))
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_offsets_are_learned_of_the_tokens_that_come_then():
    """A head that foretells perfectly has no loss: the pairs are hidden states of the tokens t + 1 + i, tokens of t + 2 + i."""
    dice = torch.Generator().manual_seed(4)
    head = torch.nn.Linear(32, 11, bias=False)
    ids, hidden = torch.randint(0, 11, (13,), generator=dice), torch.randn(12, 32, generator=dice)
    text = train_flash.Written(hidden, torch.randn(12, 32, generator=dice), torch.zeros(12, dtype=torch.bool), ids, prompt=5)
    _, _, came = train_flash.losses(net_of(), head, [text])
    expected = [(int(ids[t + 2 + i]), i) for t in range(4, 11) for i in range(3) if t + 1 + i < 12]
    assert came.tolist() == [list(pair) for pair in expected]


@pytest.mark.parametrize(("text", "reason"), [
    ("flash_sd:8", "needs a profile of this model"), ("flash_sd(profile=nothing.json):8", "is no file"),
    ("flash_sd(verifier=k_seq):8", "verifier must be one of"), ("flash_sd(depth=-1):8", "at least 0"),
])  # fmt: skip
def test_what_cannot_work_is_one_sentence(text, reason):
    with pytest.raises(LaconicError, match=reason):
        decode(vlm.build("llava"), vlm.inputs("llava", (1,)), text)


def test_a_drafter_is_for_its_own_text_and_model(recipe):
    model, inputs = vlm.build("llava"), vlm.inputs("llava", (1,))
    first = decode(model, inputs, f"{recipe(model)}):7", max_new_tokens=8)
    with pytest.raises(LaconicError, match="new drafter"):
        decode(model, inputs, f"{recipe(model)}):7", max_new_tokens=8, drafter=first.drafter)
    with pytest.raises(LaconicError, match="of another model"):
        decode(vlm.build("llava", seed=1), inputs, f"{recipe(model)}):7")
    assert get("flash_sd").promise == "exact in distribution"
