"""Profiles: what a method has to know about a model, measured once and kept as JSON.

A method that needs one says ``needs = "calibration"``, has a parameter ``profile`` (a path; empty for the one that comes with a
built-in model) and a class method ``calibrate(model, texts) -> tables``, whose tables are JSON; one that learns from right
answers takes ``answers=None`` too, one that draws random numbers ``seed``, one that can be trained longer ``steps``.
``find_profile`` gives the tables back, and refuses those of another model in one sentence that names the command which makes
them. Where ``calibrates_on`` is "pictures", the texts are the inputs of prompts with pictures, one dict of tensors each; where it
is "answered pictures", those that the model answers right, and ``answers`` what it says itself.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from laconic.errors import LaconicError, quote

if TYPE_CHECKING:
    from laconic.cache import KVLayer

ZOO = Path(__file__).parent / "models" / "zoo"


@dataclass(frozen=True)
class Profile:
    """Tables of one method for one model.

    Attributes:
        method: the method's id. model: see ``fingerprint``. seed, data: of the texts, and a hash of their token ids.
        tables: what ``calibrate`` gave.
    """

    method: str
    model: dict[str, Any]
    seed: int
    data: str
    tables: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        try:
            Path(path).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        except OSError as error:
            raise LaconicError(f"The profile cannot be written to {path}: {error.strerror}.") from error

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads what ``save`` wrote."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise LaconicError(f"The profile {quote(str(path))} cannot be read: {error.strerror}.") from error
        except (TypeError, ValueError) as error:
            raise LaconicError(f"{quote(str(path))} is not a profile: make one with laconic profile.") from error


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """What tells a model from others: architecture, sizes, RoPE (see ``describe``), and a hash of some of its weights."""
    from laconic.attention.rope import describe, find_ropes

    config = model.config.get_text_config()
    heads = config.num_attention_heads
    digest = hashlib.sha256()
    for _, weight in sorted(model.named_parameters())[:8]:
        digest.update(weight.detach().flatten()[:4096].float().cpu().numpy().tobytes())
    return {
        "architecture": type(model).__name__,
        "layers": config.num_hidden_layers,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "rope": describe(find_ropes(model)),
        "weights": digest.hexdigest()[:16],
    }


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Inside, no weight of the model takes gradients."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def weights_to_json(module: torch.nn.Module) -> dict[str, Any]:
    """The weights of a small network: 16-bit floats in base64, by name, with their shapes."""
    return {
        name: {"shape": list(t.shape), "data": base64.b64encode(t.detach().cpu().half().numpy().tobytes()).decode()}
        for name, t in module.state_dict().items()
    }


def weights_from_json(tables: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What ``weights_to_json`` gave as a state, float32."""
    return {
        name: torch.from_numpy(np.frombuffer(base64.b64decode(t["data"]), np.float16).reshape(t["shape"]).astype(np.float32))
        for name, t in tables.items()
    }


def make_profile(
    method: str,
    model: torch.nn.Module,
    texts: Sequence[torch.Tensor | dict[str, torch.Tensor]],
    seed: int,
    answers: Sequence[torch.Tensor] | None = None,
    steps: int | None = None,
) -> Profile:
    """Calibrates ``method`` on token ids, one 1-D tensor per text; on right ``answers`` to them, where it learns from such; in
    so many ``steps``, where it is trained (by default its own number).

    A method that calibrates on pictures gets the inputs of a prompt, a dict, in the place of its token ids.
    """
    from laconic.registry import find

    cls = find(method)
    if not hasattr(cls, "calibrate"):
        raise LaconicError(f"{method} needs no profile: use it as it is.")
    taken = inspect.signature(cls.calibrate).parameters
    if steps is not None and "steps" not in taken:
        raise LaconicError(f"{method} has no number of training steps: leave it out.")
    given = {"answers": answers, "seed": seed, "steps": steps}
    options = {k: v for k, v in given.items() if v is not None and k in taken}
    used = [*(t["input_ids"].flatten() if isinstance(t, dict) else t for t in texts), *options.get("answers", [])]
    data = hashlib.sha256(b"".join(ids.to(torch.int64).numpy().tobytes() for ids in used)).hexdigest()[:16]
    return Profile(method, fingerprint(model), seed, data, cls.calibrate(model, texts, **options))


def need_file(method: str, path: str) -> None:
    """Refuses a ``path`` at which there is nothing, where a recipe is written rather than where it runs."""
    if path and not Path(path).is_file():
        raise LaconicError(f"{method}: profile={quote(path)} is no file: make one with laconic profile {method} --model MODEL.")


def find_profile(method: str, path: str, model: Any) -> dict[str, Any]:
    """The tables of ``method``, from ``path`` or from what comes with a built-in model.

    ``model`` is the model that they are for, or None where it is not known, and then not checked.
    """
    command = f"laconic profile {method} --model MODEL --output FILE"
    if not path:
        name = Path(str(getattr(getattr(model, "config", None), "_name_or_path", ""))).name
        own = ZOO / name / "profiles" / f"{method}.json"
        if not name or not own.is_file():
            raise LaconicError(f"{method} needs a profile of this model: make one with {command}, and write profile=FILE.")
        path = str(own)
    profile = _load(path)
    if profile.method != method:
        raise LaconicError(f"{quote(path)} is a profile for {profile.method}: make one for {method} with {command}.")
    if model is not None and _known(model) != profile.model:
        raise LaconicError(f"The profile {quote(path)} is of another model: make one of this model with {command}.")
    return profile.tables


def layer_tables(method: str, path: str, layer: KVLayer) -> dict[str, Any]:
    """As ``find_profile``, for the model that a cache layer belongs to."""
    policy = layer.request.policy
    return find_profile(method, path, policy.model if policy is not None else None)


@functools.lru_cache(maxsize=64)
def _load(path: str) -> Profile:
    return Profile.load(path)


def _known(model: torch.nn.Module) -> dict[str, Any]:
    """The fingerprint, taken once per model."""
    if "laconic_fingerprint" not in model.__dict__:
        model.__dict__["laconic_fingerprint"] = fingerprint(model)
    return model.__dict__["laconic_fingerprint"]
