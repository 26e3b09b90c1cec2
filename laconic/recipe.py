"""A recipe: methods in order, as text, as a file, or in Python."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic import registry
from laconic.budget import Budget
from laconic.errors import LaconicError, quote
from laconic.method import Method

_HEAD = re.compile(r"(?P<name>[A-Za-z_][\w\-]*)\s*")
_BUDGET = re.compile(r"\s*:\s*(?P<budget>[\w:.%\-]+)")


def split(text: str, separator: str) -> list[str]:
    """The parts of ``text`` between separators that stand outside parentheses."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


@dataclass(frozen=True)
class Recipe:
    """An ordered composition of methods. ``str(recipe)`` parses back to an equal recipe."""

    methods: tuple[Method, ...]

    @classmethod
    def parse(cls, value: str | Method | Recipe | Iterable[Method]) -> Recipe:
        """From ``"snapkv:20% + tokenselect(refresh=0.95):256"``, from methods, or from the path of a recipe file.

        A part is ``name``, ``name:budget`` or ``name(parameter=value, ...):budget``; parts are joined by ``+``. A method that
        works on the scores of another takes it first: ``adakv(snapkv(window=64), floor=0.3):10%``.
        """
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Method):
            return cls((value,))
        if not isinstance(value, str):
            return cls(tuple(value) if isinstance(value, Iterable) else ())
        if value.lower().endswith((".json", ".yaml", ".yml")):
            return cls.load(value)
        return cls(tuple(_part(part) for part in split(value, "+")))

    def __post_init__(self) -> None:
        if not self.methods or not all(isinstance(method, Method) for method in self.methods):
            raise LaconicError("A recipe is one or more methods: write for instance 'tokenselect:256'.")

    def __str__(self) -> str:
        return " + ".join(str(method) for method in self.methods)

    def parts(self) -> list[dict[str, Any]]:
        """One dict per method, in JSON types: what a recipe file has under ``recipe``."""
        return [{"method": m.id, "budget": str(m.budget), **m.parameters()} for m in self.methods]

    def save(self, path: str | Path) -> None:
        """Writes JSON, or YAML when the name ends in .yaml or .yml."""
        try:
            Path(path).write_text(_dump({"recipe": self.parts()}, path), encoding="utf-8")
        except OSError as error:
            raise LaconicError(f"The recipe cannot be written to {path}: {error.strerror}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads what ``save`` wrote."""
        try:
            data = _read(path)
            parts = [dict(part) for part in data["recipe"]]
            names = [part.pop("method") for part in parts]
            if not all(isinstance(text, str) for text in (*names, *(key for part in parts for key in part))):
                raise TypeError
        except OSError as error:
            raise LaconicError(f"The recipe {quote(path)} cannot be read: {error.strerror}.") from error
        except (KeyError, TypeError, ValueError) as error:
            raise LaconicError(f"{quote(path)} is not a recipe: it needs a list 'recipe' of objects with 'method'.") from error
        return cls(tuple(registry.get(name, **part) for name, part in zip(names, parts, strict=True)))


def _part(text: str) -> Method:
    text = text.strip()
    head = _HEAD.match(text)
    rest = text[head.end() :] if head else ""
    inner, rest = _parentheses(rest) if rest.startswith("(") else ("", rest)
    budget = _BUDGET.fullmatch(rest)
    if head is None or inner is None or (rest and budget is None):
        raise LaconicError(f"{quote(text)} is not a method: write name, name:budget or name(parameter=value):budget.")
    parameters: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in split(inner, ","))):
        key, equals, value = item.partition("=")
        if not equals or "(" in key:
            if not hasattr(registry.find(head["name"]), "of"):
                raise LaconicError(f"{quote(item)} in {quote(text)} is not a parameter: write parameter=value.")
            key, value = "of", item
        if key.strip() in parameters or (key.strip() == "budget" and budget):
            raise LaconicError(f"{quote(text)} gives {key.strip()} twice: give it once.")
        parameters[key.strip()] = value.strip()
    if budget:
        parameters["budget"] = Budget.parse(budget["budget"])
    return registry.get(head["name"], **parameters)


def _parentheses(text: str) -> tuple[str | None, str]:
    """What stands between the first parenthesis and its partner, and what follows; None if there is no partner."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[1:i], text[i + 1 :]
    return None, ""


def _is_yaml(path: str | Path) -> bool:
    return str(path).lower().endswith((".yaml", ".yml"))


def _dump(data: dict, path: str | Path) -> str:
    if _is_yaml(path):
        import yaml

        return yaml.safe_dump(data, sort_keys=False)
    return json.dumps(data, indent=2) + "\n"


def _read(path: str | Path) -> Any:
    text = Path(path).read_text(encoding="utf-8")
    if _is_yaml(path):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    return json.loads(text)
