"""The files of a comparison: ``results.jsonl`` (one finished cell a line) and ``run.json`` (what was run, on what).

A cell is on disk, whole, before the next one starts, so that an interruption at any moment costs one cell at most.
A directory belongs to one run, known by its fingerprint: the same model, task, seed, machine and settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Self

from laconic.errors import LaconicError

RESULTS, HEADER = "results.jsonl", "run.json"


def fingerprint(identity: dict[str, Any]) -> str:
    """16 hex digits that are the same exactly when ``identity`` is."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a crash, sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError, kept: int | None = None) -> LaconicError:
    reason = error.strerror or str(error)
    if kept is None:
        return LaconicError(f"Cannot write {path} ({reason}): give a directory that you can write to with --output.")
    return LaconicError(
        f"Cannot write {path} ({reason}): {kept} finished cells are kept in it; "
        "make room and run the same command again to go on."
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON text, NaN and infinity as null, other objects as their ``str``."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def prepare_directory(directory: Path) -> None:
    """Makes the report directory and proves that it can be written, before any long work starts."""
    probe = directory / f".probe.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"laconic")
        probe.unlink()
    except OSError as error:
        raise _cannot_write(directory, error) from error


def read_rows(path: Path) -> tuple[list[dict], list[str]]:
    """Rows of a ``results.jsonl`` and one sentence per line that is not a row; a missing file has none.

    A last line without its line end is what a killed process leaves: it is dropped like any broken line.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise LaconicError(f"Cannot read {path}: {error.strerror}.") from error
    rows, problems = [], []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if number == len(lines):
            problems.append(f"{path.name} line {number} was cut off in the middle; its cell is measured again")
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"run", "recipe", "task"} <= row.keys():
                raise ValueError("it lacks 'run', 'recipe' or 'task'")
            rows.append(row)
        except ValueError as error:  # JSON and UTF-8 errors are ValueErrors
            problems.append(f"{path.name} line {number} is not a result ({error}); its cell is measured again")
    return rows, problems


class ResultStore:
    """The open results of one run. ``rows`` holds the finished cells, old and new; use as a context manager."""

    def __init__(self, directory: Path, identity: dict[str, Any], *, overwrite: bool = False) -> None:
        self.directory, self.identity = directory, identity
        self.fingerprint = fingerprint(identity)
        self.path, self.header_path = directory / RESULTS, directory / HEADER
        prepare_directory(directory)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        try:
            self._lock()
            self._refuse_foreign_files()
            self.rows, self.problems = ([], []) if overwrite else self._load()
            if overwrite:
                os.ftruncate(self._file, 0)
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        """One writer at a time; the system lets go of the lock when the process ends, however it ends."""
        try:
            import fcntl
        except ImportError:  # no advisory locks on this system
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LaconicError(
                f"Another run is writing into {self.directory}: wait for it, or choose another --output."
            ) from error

    def _refuse_foreign_files(self) -> None:
        """Files of these names that Laconic did not write are never touched, not even with ``overwrite``."""
        rows, problems = read_rows(self.path)
        header = self._old_header()
        foreign_results = bool(problems) and not rows and header is None
        foreign_header = header is None and self.header_path.exists()
        if foreign_results or foreign_header:
            name = HEADER if foreign_header else RESULTS
            raise LaconicError(f"{self.directory / name} is not a file of Laconic: choose another --output.")

    def _old_header(self) -> dict | None:
        try:
            header = json.loads(self.header_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return header if isinstance(header, dict) and isinstance(header.get("identity"), dict) else None

    def _load(self) -> tuple[list[dict], list[str]]:
        rows, problems = read_rows(self.path)
        if any(row["run"] != self.fingerprint for row in rows):
            raise LaconicError(
                f"{self.directory} holds the results of a different run{self._difference()}: "
                "choose another --output, or replace them with --overwrite."
            )
        if problems:
            self._rewrite(rows)
        return rows, problems

    def _rewrite(self, rows: list[dict]) -> None:
        """Leaves only whole rows: the file is replaced in one step."""
        text = "".join(dumps(row) + "\n" for row in rows)
        write_atomic(self.path, text)
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        self._lock()

    @property
    def started(self) -> str | None:
        """When the run that is continued here was started."""
        return (self._old_header() or {}).get("started") if self.rows else None

    def _difference(self) -> str:
        """' (its seed is 1, not 0)', or nothing when the header does not tell."""
        old = (self._old_header() or {}).get("identity", {})
        new = json.loads(dumps(self.identity))
        changed = [key for key in new if old.get(key) != new[key]]
        if not old or not changed:
            return ""
        key = changed[0]
        more = f"; also different: {', '.join(changed[1:])}" if changed[1:] else ""
        return f" (its {key} is {_short(old.get(key))}, now {_short(new[key])}{more})"

    def finished(self, recipe: str, **where: Any) -> dict | None:
        """The row of a recipe if it has been measured already; ``where``: further columns that tell its rows apart."""
        wanted = {"recipe": recipe, **where}
        return next((row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())), None)

    def append(self, row: dict[str, Any]) -> dict[str, Any]:
        """Puts one finished cell on disk. On failure the file is as before and LaconicError says what to do."""
        row = {"run": self.fingerprint, **row}
        line = (dumps(row) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            done = 0
            while done < len(line):
                done += os.write(self._file, line[done:])
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise _cannot_write(self.path, error, kept=len(self.rows)) from error
        row = json.loads(line)
        self.rows.append(row)
        return row

    def write_header(self, header: dict[str, Any]) -> None:
        """Replaces ``run.json``; the fingerprint and what it is made of are added."""
        full = {**header, "fingerprint": self.fingerprint, "identity": self.identity}
        write_atomic(self.header_path, dumps(full, indent=2) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)


def _short(value: Any, limit: int = 60) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
