from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laconic import Budget, LaconicError

AMOUNTS = st.integers(1, 10**7).map(lambda n: Budget(amount=n))
SHARES = st.floats(1e-9, 1.0, exclude_min=True).map(lambda s: Budget(share=s))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("256", Budget(amount=256)),
        (" 256 ", Budget(amount=256)),
        (256, Budget(amount=256)),
        ("10%", Budget(share=0.1)),
        ("12.5%", Budget(share=0.125)),
        ("100%", Budget(share=1.0)),
        ("pyramid:10%", Budget(share=0.1, shape="pyramid")),
        ("Pyramid:64", Budget(amount=64, shape="pyramid")),
    ],
)
def test_a_whole_number_is_tokens_and_a_percentage_is_a_share(text: str | int, expected: Budget) -> None:
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "0%", "-5%", "101%", "100.0001%", "0.1", "1.5", "ten", "10 %x", "%", "pyramid:", "cone:10%", "1e3",
     "nan%", "inf", "9" * 5000, "9" * 5000 + "%", "0." + "0" * 400 + "1%", "256:pyramid", None, 0, -3, 0.5],
)  # fmt: skip
def test_a_budget_that_means_nothing_is_refused_in_one_sentence(text: object) -> None:
    with pytest.raises(LaconicError) as error:
        Budget.parse(text)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 300


def test_a_share_and_an_amount_exclude_each_other() -> None:
    for wrong in ({}, {"amount": 3, "share": 0.5}, {"share": float("nan")}, {"share": 1.5}, {"amount": 0}):
        with pytest.raises(LaconicError):
            Budget(**wrong)


@given(st.one_of(AMOUNTS, SHARES), st.sampled_from(["uniform", "pyramid"]))
def test_text_parses_back_to_the_same_budget(budget: Budget, shape: str) -> None:
    budget = Budget(amount=budget.amount, share=budget.share, shape=shape)
    assert Budget.parse(str(budget)) == budget


@given(st.one_of(AMOUNTS, SHARES), st.integers(0, 10**6))
def test_tokens_stay_between_one_and_n(budget: Budget, n: int) -> None:
    kept = budget.tokens(n)
    assert (kept == 0) if n == 0 else (1 <= kept <= n)
    if budget.amount is not None:
        assert kept == min(n, budget.amount)
    else:
        assert budget.share * n - 1e-6 <= kept < max(budget.share * n, 0) + 1 + 1e-6


@given(st.integers(0, 5000), st.floats(0.001, 1.0), st.floats(0.001, 1.0))
def test_a_larger_share_keeps_no_less(n: int, a: float, b: float) -> None:
    small, large = sorted((a, b))
    assert Budget(share=small).tokens(n) <= Budget(share=large).tokens(n)


def test_ten_percent_of_ten_is_one_not_two() -> None:
    assert [Budget.parse("10%").tokens(n) for n in (10, 30, 70, 1000)] == [1, 3, 7, 100]


@given(st.integers(2, 64), st.integers(200, 4000), st.floats(0.02, 0.6))
def test_a_pyramid_has_the_same_total_and_never_grows(layers: int, n: int, share: float) -> None:
    budget = Budget(share=share, shape="pyramid")
    tokens = [budget.tokens(n, layer=layer, layers=layers) for layer in range(layers)]
    flat = Budget(share=share).tokens(n) * layers
    assert tokens == sorted(tokens, reverse=True)
    assert abs(sum(tokens) - flat) <= layers  # rounding up: at most one token per layer
    assert tokens[0] > tokens[-1]


def test_a_full_budget_is_full_at_every_layer_and_length() -> None:
    for text in ("100%", "pyramid:100%"):
        budget = Budget.parse(text)
        assert budget.is_full
        assert {budget.tokens(n, layer=3, layers=4) - n for n in (1, 7, 4096)} == {0}
    assert not Budget.parse("99.999%").is_full
    assert not Budget.parse(10**9).is_full  # nobody knows the length


def test_an_astronomic_amount_is_only_large() -> None:
    assert Budget(amount=10**400).tokens(50) == 50
