"""How an answer, and a method's distribution, is scored.

Text metrics compare *normalised* text (see ``normalise``) and return 0..1; an example may have several right answers,
of which the best counts. ``kl`` and ``top1`` compare next-token distributions with the dense model's.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence

import torch

from laconic.errors import LaconicError

_APOSTROPHES = "'\u2018\u2019\u02bc"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def normalise(text: str) -> str:
    """Text as metrics compare it: NFKC, case folded, punctuation out, white space collapsed to one blank.

    Punctuation is Unicode category P plus modifier symbols such as the backtick; it becomes a blank, apostrophes vanish
    (``don't`` -> ``dont``). What changes a value stays: a point between digits (3.14), a minus in front of a number
    (-5), and symbols (C++, $5). Thousands separators go (1,000 -> 1000). Articles stay.
    """
    text = _THOUSANDS.sub("", unicodedata.normalize("NFKC", text).casefold())
    kept = []
    for i, char in enumerate(text):
        before, after = text[i - 1 : i], text[i + 1 : i + 2]
        category = unicodedata.category(char)
        if char in _APOSTROPHES:
            continue
        if (char == "." and before.isdigit() and after.isdigit()) or (
            char == "-" and after.isdigit() and not before.isalnum()
        ):
            kept.append(char)
        else:
            kept.append(" " if category[0] == "P" or category == "Sk" else char)
    return " ".join("".join(kept).split())


def _answers(answer: str | Sequence[str]) -> list[str]:
    return [answer] if isinstance(answer, str) else list(answer)


def _pair(prediction: str, answer: str) -> tuple[str, str]:
    """Both sides normalised; an answer that is punctuation only is compared as it stands."""
    normal = normalise(answer)
    return (normalise(prediction), normal) if normal else (prediction.strip(), answer.strip())


def exact(prediction: str, answer: str | Sequence[str]) -> float:
    """1 when the whole prediction equals an answer, both normalised."""
    return float(any(left == right for left, right in (_pair(prediction, a) for a in _answers(answer))))


def _find(answer: str, text: str) -> int:
    """Where ``answer`` stands in ``text`` as whole words (12 is not in 123), or -1; CJK text anywhere."""

    def edge(char: str) -> bool:
        return char.isalnum() and unicodedata.east_asian_width(char) not in "WF"

    pattern = re.escape(answer)
    if answer and edge(answer[0]):
        pattern = rf"(?<![\w]){pattern}"
    if answer and edge(answer[-1]):
        pattern = rf"{pattern}(?![\w])"
    match = re.search(pattern, text)
    return match.start() if match else -1


def contains(prediction: str, answer: str | Sequence[str]) -> float:
    """1 when an answer stands in the prediction as whole words, both normalised."""
    pairs = [_pair(prediction, a) for a in _answers(answer)]
    return float(any(bool(right) and _find(right, left) >= 0 for left, right in pairs))


def regex(prediction: str, answer: str | Sequence[str]) -> float:
    """1 when a pattern is found in the prediction as generated (``re.search``, nothing normalised)."""
    try:
        return float(any(re.search(pattern, prediction) for pattern in _answers(answer)))
    except re.error as error:
        raise LaconicError(f"The answer {answer!r} is not a regular expression: {error}.") from error


def pick_choice(prediction: str, choices: Sequence[str]) -> int | None:
    """Which choice the generated text names, as an index, or None.

    First the choice whose text comes earliest in the prediction as whole words (the longest on a tie: 'New York City'
    before 'New York'); if no text matches, a leading label, one letter per choice: 'B', '(b)', 'B.'.
    """
    text = normalise(prediction)
    places = [(_find(normal, text), -len(normal), i) for i, c in enumerate(choices) if (normal := normalise(c))]
    found = [place for place in places if place[0] >= 0]
    if found:
        return min(found)[2]
    label = re.match(r"(?:answer|option|choice)?\s*([a-z])(?!\w)", text)
    index = ord(label[1]) - ord("a") if label else len(choices)
    return index if index < len(choices) else None


def choice(prediction: str, answer: str | Sequence[str], choices: Sequence[str] | None) -> float:
    """1 when the prediction names a right choice. An answer is the text of a choice or its letter."""
    if not choices:
        raise LaconicError("A multiple-choice example needs 'choices': a list of texts, one of which is the answer.")
    right = {_choice_index(a, choices) for a in _answers(answer)}
    return float(pick_choice(prediction, choices) in right)


def _choice_index(answer: str, choices: Sequence[str]) -> int:
    normal = [normalise(c) for c in choices]
    if answer in choices:
        return list(choices).index(answer)
    if normalise(answer) in normal:
        return normal.index(normalise(answer))
    letter = answer.strip().lower()
    if len(letter) == 1 and 0 <= ord(letter) - ord("a") < len(choices):
        return ord(letter) - ord("a")
    raise LaconicError(f"The answer {answer!r} is none of the choices {list(choices)}: use a choice's text or letter.")


@functools.cache
def _rouge_scorer():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(prediction: str, answer: str | Sequence[str]) -> float:
    """ROUGE-L F-measure (Lin, 2004) by the rouge-score library, which has its own tokenisation; best answer counts."""
    return max(float(_rouge_scorer().score(a, prediction)["rougeL"].fmeasure) for a in _answers(answer))


TEXT_METRICS: dict[str, Callable[[str, str | Sequence[str]], float]] = {
    "exact": exact,
    "contains": contains,
    "regex": regex,
    "rouge_l": rouge_l,
}


def score(metric: str, prediction: str, answer: str | Sequence[str], choices: Sequence[str] | None = None) -> float:
    """Scores a generated text with a metric by name: exact, contains, regex, rouge_l or choice; 0..1."""
    if metric == "choice":
        return choice(prediction, answer, choices)
    if metric not in TEXT_METRICS:
        raise LaconicError(f"There is no metric '{metric}': use one of {', '.join([*TEXT_METRICS, 'choice'])}.")
    return TEXT_METRICS[metric](prediction, answer)


def kl(dense: torch.Tensor, method: torch.Tensor) -> torch.Tensor:
    """KL(dense || method) in nats per step. Log-probabilities (T, V) twice -> (T,); never below 0."""
    dense, method = dense.float(), method.float()
    terms = torch.where(dense == -torch.inf, 0.0, dense.exp() * (dense - method))
    return terms.sum(-1).clamp_min(0.0)


def top1(dense: torch.Tensor, method: torch.Tensor) -> torch.Tensor:
    """Whether the most likely next token is the same, per step. Logits or log-probabilities (T, V) twice -> (T,)."""
    return dense.argmax(-1) == method.argmax(-1)
