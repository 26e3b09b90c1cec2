"""The catalogue: every method by its identifier."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from laconic.errors import LaconicError, quote
from laconic.method import GUARANTEES, NEEDS, Method

FAMILIES = ("laconic.attention", "laconic.decoding", "laconic.vision")
_methods: dict[str, type[Method]] = {}
_loaded = False


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: puts a method into the catalogue under ``cls.id``."""
    if not (dataclasses.is_dataclass(cls) and issubclass(cls, Method)):
        raise LaconicError(f"{cls.__name__} is not a method: make it a frozen dataclass that derives from a Method.")
    if cls.guarantee not in GUARANTEES or cls.needs not in NEEDS:
        raise LaconicError(f"{cls.id}: guarantee must be one of {GUARANTEES} and needs one of {NEEDS}.")
    known = _methods.get(cls.id)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise LaconicError(f"Two methods call themselves '{cls.id}': rename {cls.__module__}.{cls.__qualname__}.")
    _methods[cls.id] = cls
    return cls


def _load() -> None:
    """Imports the families and the entry points, once, when the catalogue is first asked for."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for family in FAMILIES:
        package = importlib.import_module(family)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{family}.{module.name}")
    for entry in entry_points(group="laconic.methods"):
        try:
            register(entry.load())
        except Exception as error:  # somebody else's package must not take the library down, but must be named
            raise LaconicError(
                f"The method '{entry.name}' of {entry.value} cannot be loaded: repair or uninstall it ({quote(error, 200)})."
            ) from error


def find(name: str) -> type[Method]:
    """The class behind an identifier; unknown names get the nearest suggestion."""
    _load()
    if name not in _methods:
        near = difflib.get_close_matches(name.lower(), _methods, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "see `laconic methods`."
        raise LaconicError(f"There is no method {quote(name)}: {hint}")
    return _methods[name]


def get(name: str, /, **parameters: Any) -> Method:
    """One method with parameters: ``get("tokenselect", budget="256", refresh=0.9)``."""
    cls = find(name)
    fields = [f.name for f in dataclasses.fields(cls)]
    for key in parameters:
        if key not in fields:
            raise LaconicError(f"{name} has no parameter {quote(key)}: it has {', '.join(fields)}.")
    return cls(**parameters)


def methods() -> list[dict[str, Any]]:
    """The catalogue, sorted by stage and identifier: one dict per method (see ``Method.describe``)."""
    _load()
    return sorted((cls.describe() for cls in _methods.values()), key=lambda row: (row["stage"], row["id"]))
