"""What was run, on what: the identity of a run, so that different runs do not mix, and the machine for its report."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_UNIMPORTANT = ("_name_or_path", "transformers_version")


def identify(network: Any, model_id: str, task: Any, items: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share so that their rows may stand in one directory.

    The model (by its weights, not its name alone), the examples as tokens are fed, the settings, the versions, and the
    device and threads that the times depend on. Methods and budgets are not in it: a run can be widened later.
    """
    parameter = next(network.parameters())
    inputs = [(i.example.prompt, i.example.answer, i.example.choices, i.prefill, i.limit, *seen(i.inputs)) for i in items]
    return {
        "model": os.path.realpath(model_id) if os.path.exists(model_id) else model_id,
        "task": task.name,
        "metric": task.metric,
        **settings,
        "examples": digest(inputs),
        "weights": weights_digest(network),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": machine(parameter.device)["device"],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def seen(inputs: dict[str, torch.Tensor]) -> list[str]:
    """Digests of the pictures of a prompt, as the model gets them."""
    return [hashlib.sha256(v.float().numpy().tobytes()).hexdigest()[:16] for k, v in sorted(inputs.items()) if "pixel" in k]


def digest(value: Any) -> str:
    """16 hex digits of a value made of lists, tuples, strings and numbers."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def weights_digest(network: Any, values: int = 64) -> str:
    """Cheap at any size: the configuration, and every parameter's name, shape and ``values`` evenly spaced values."""
    config = {key: value for key, value in network.config.to_dict().items() if key not in _UNIMPORTANT}
    parts: list[Any] = [sorted((key, repr(value)) for key, value in config.items())]
    for name, weight in network.state_dict().items():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // values)][:values].float().cpu().tolist()
        parts.append((name, tuple(weight.shape), str(weight.dtype), sample))
    return digest(parts)


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    import transformers

    import laconic

    return {"laconic": laconic.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine as reports show it: device used, processor, cores, threads, memory (bytes), system, Python."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.device(device)
    plural = "core" if cores == 1 else "cores"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{name}, {cores} {plural}",
        "cpu": name,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def shell_command(arguments: Iterable[str]) -> str:
    """The command line as it can be pasted again."""
    return shlex.join(["laconic", *arguments])
