"""Fresh interpreters, for what cannot be measured twice in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import laconic
from laconic.errors import LaconicError


def run_child(*arguments: str) -> str:
    """Standard output of ``python ARGUMENTS`` in a fresh interpreter that finds this very laconic.

    Raises:
        LaconicError: when it ends with an error; the last line of its complaint is named.
    """
    root = str(Path(laconic.__file__).parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    child = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    if child.returncode:
        complaint = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise LaconicError(f"A fresh Python could not run `{' '.join(arguments)[:60]}`: {complaint}")
    return child.stdout
