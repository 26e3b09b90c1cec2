"""Peak memory of a piece of work, above what was in use before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
import threading
from types import TracebackType
from typing import Self

import torch

_STATUS, _CLEAR_REFS = "/proc/self/status", "/proc/self/clear_refs"


class PeakMemory:
    """Context manager; ``bytes`` after the block is the highest memory use inside it above the use at its start.

    On a CUDA device: the peak of the bytes that torch has allocated. On the CPU: the peak of the process's resident
    memory, read from the kernel's high-water mark, which the block resets (Linux), or sampled every millisecond where
    that cannot be done. Freed heap pages are handed back to the system first, so that memory which is only reused is
    counted too. ``source`` says which of the three was used.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.bytes = 0
        self.source = ""

    def __enter__(self) -> Self:
        gc.collect()
        if self.device.type == "cuda":
            self.source = "torch.cuda.max_memory_allocated"
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        _trim_heap()
        if _reset_high_water():
            self.source = "peak resident memory (kernel high-water mark)"
            self._start = _status("VmRSS")
        else:
            self.source = "peak resident memory (sampled every millisecond)"
            self._sampler = _Sampler()
            self._start = self._sampler.peak
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        elif "high-water" in self.source:
            peak = _status("VmHWM")
        else:
            peak = self._sampler.finish()
        self.bytes = max(0, peak - self._start)


def resident_bytes() -> int:
    """What this process holds in memory, without freed heap pages."""
    import psutil

    gc.collect()
    _trim_heap()
    return psutil.Process().memory_info().rss


class _Sampler(threading.Thread):
    """Reads the resident memory once a millisecond until ``finish``."""

    def __init__(self) -> None:
        import psutil

        super().__init__(daemon=True)
        self._process, self._done = psutil.Process(), threading.Event()
        self.peak = self._process.memory_info().rss

    def run(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def finish(self) -> int:
        self._done.set()
        self.join()
        return max(self.peak, self._process.memory_info().rss)


def _status(field: str) -> int:
    with open(_STATUS, encoding="ascii") as file:
        found = re.search(rf"{field}:\s+(\d+) kB", file.read())
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found[1]) * 1024


def _reset_high_water() -> bool:
    """Sets VmHWM back to the present use (Linux: 5 into clear_refs); False where that is not possible."""
    try:
        with open(_CLEAR_REFS, "w", encoding="ascii") as file:
            file.write("5")
        # some sandboxes accept the write and do nothing
        return _status("VmHWM") <= _status("VmRSS") + (1 << 20)
    except OSError:
        return False


def _trim_heap() -> None:
    """Gives freed heap pages back to the system (glibc only): else work that reuses them seems to need no memory."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
