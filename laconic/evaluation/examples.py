"""What a task is made of: examples, and how their answers are scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """One prompt, and what is expected of it.

    ``answer``: one right answer, or several of which any counts (for the metric ``regex``: patterns); None when only
    fidelity is measured. ``question``: the end of the prompt, so that ``prompt[: -len(question)]`` is the context.
    ``max_new_tokens``: for perplexity the most tokens scored. ``meta``: where in a task's grid the example lies
    (``length`` in tokens, ``depth`` as a share 0..1, ``hops``, ...), in JSON types. ``draw``: a seed with which the dense
    model draws its text, to the full length and past the end mark; without it the text is greedy and stops there.
    ``pictures``: what the prompt is about, as ``laconic.models.reading.open_picture`` takes them.
    """

    prompt: str
    answer: str | list[str] | None = None
    choices: list[str] | None = None
    question: str | None = None
    max_new_tokens: int = 32
    meta: dict[str, Any] = field(default_factory=dict)
    draw: int | None = None
    pictures: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Task:
    """Examples with one metric: exact, contains, regex, choice, rouge_l, perplexity, or None (fidelity only).

    ``problems``: one sentence for each thing that was left out, such as the broken lines of a file.
    """

    name: str
    metric: str | None
    examples: list[Example]
    problems: list[str] = field(default_factory=list)
