"""The result files: nothing finished is lost, nothing foreign is touched, and different runs do not mix."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from laconic.errors import LaconicError
from laconic.evaluation import results
from laconic.evaluation.results import ResultStore, read_rows

IDENTITY = {"model": "tiny", "seed": 0}


def row(name: str) -> dict:
    return {"method": name, "recipe": name, "task": "t", "quality": 1.0}


def write_run(directory: Path, *names: str, identity: dict = IDENTITY) -> Path:
    with ResultStore(directory, identity) as store:
        store.write_header({"command": "laconic compare"})
        for name in names:
            store.append(row(name))
    return directory / "results.jsonl"


def test_a_run_is_found_again(tmp_path: Path) -> None:
    write_run(tmp_path, "dense", "h2o:10%")
    with ResultStore(tmp_path, IDENTITY) as store:
        assert [r["recipe"] for r in store.rows] == ["dense", "h2o:10%"]
        assert store.finished("h2o:10%")["quality"] == 1.0
        assert store.finished("h2o:20%") is None
        assert store.problems == []
    header = json.loads((tmp_path / "run.json").read_text())
    assert header["identity"] == IDENTITY and header["fingerprint"] == results.fingerprint(IDENTITY)


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_dropped_and_the_rest_stays(tmp_path: Path, cut: int) -> None:
    path = write_run(tmp_path, "dense", "h2o:10%")
    path.write_bytes(path.read_bytes()[:-cut])
    with ResultStore(tmp_path, IDENTITY) as store:
        assert [r["recipe"] for r in store.rows] == ["dense"]
        assert "line 2 was cut off" in store.problems[0]
        store.append(row("knorm"))
    rows, problems = read_rows(path)
    assert [r["recipe"] for r in rows] == ["dense", "knorm"] and problems == []


def test_a_broken_line_is_named_by_number_and_the_rest_stays(tmp_path: Path) -> None:
    path = write_run(tmp_path, "dense", "h2o:10%", "knorm")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + b'"a string"\n' + b"\xff\xfe\n" + lines[2])
    with ResultStore(tmp_path, IDENTITY) as store:
        assert [r["recipe"] for r in store.rows] == ["dense", "knorm"]
        assert [f"line {n} is not a result" in p for n, p in zip((2, 3, 4), store.problems, strict=True)] == [True] * 3


def test_a_different_run_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    path = write_run(tmp_path, "dense")
    before = path.read_bytes()
    with pytest.raises(LaconicError, match=r"different run \(its seed is 0, now 1\).*--overwrite"):
        ResultStore(tmp_path, {"model": "tiny", "seed": 1})
    assert path.read_bytes() == before
    with ResultStore(tmp_path, {"model": "tiny", "seed": 1}, overwrite=True) as store:
        assert store.rows == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["results.jsonl", "run.json"])
def test_foreign_files_are_never_touched(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text('{"mine": 1}\n')
    with pytest.raises(LaconicError, match=f"{name} is not a file of Laconic"):
        ResultStore(tmp_path, IDENTITY, overwrite=overwrite)
    assert (tmp_path / name).read_text() == '{"mine": 1}\n'


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with ResultStore(tmp_path, IDENTITY), pytest.raises(LaconicError, match="Another run is writing"):
        ResultStore(tmp_path, IDENTITY)
    with ResultStore(tmp_path, IDENTITY):
        pass


def test_disk_full_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ResultStore(tmp_path, IDENTITY) as store:
        store.append(row("dense"))
        real = os.write

        def half_then_full(file: int, data: bytes) -> int:
            if len(data) > 20:
                return real(file, data[:20])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(results.os, "write", half_then_full)
        with pytest.raises(LaconicError, match=r"No space left on device\): 1 finished cells are kept"):
            store.append(row("h2o:10%"))
        monkeypatch.undo()
        assert len(store.rows) == 1
        store.append(row("knorm"))
    rows, problems = read_rows(tmp_path / "results.jsonl")
    assert [r["recipe"] for r in rows] == ["dense", "knorm"] and problems == []


def test_a_real_file_size_limit_is_one_sentence(tmp_path: Path) -> None:
    """The system itself refuses the write, in a process of its own."""
    program = textwrap.dedent(
        f"""
        import resource
        from pathlib import Path
        from laconic.errors import LaconicError
        from laconic.evaluation.results import ResultStore
        with ResultStore(Path({str(tmp_path)!r}), {{}}) as store:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            try:
                for i in range(100):
                    store.append({{"recipe": str(i), "task": "t", "text": "x" * 300}})
            except LaconicError as error:
                print(len(store.rows), error)
        """
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    kept = int(out.split()[0])
    assert kept >= 1 and "make room" in out
    rows, problems = read_rows(tmp_path / "results.jsonl")
    assert len(rows) == kept and problems == []


def test_write_atomic_keeps_the_old_text_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    results.write_atomic(path, "old")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(LaconicError, match="No space left"):
        results.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_json_has_no_nan() -> None:
    text = results.dumps({"a": float("nan"), "b": [float("inf")], "c": Path("x")})
    assert json.loads(text) == {"a": None, "b": [None], "c": "x"}


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/laconic"])
def test_a_directory_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaconicError, match=r"Cannot write .*--output"):
        results.prepare_directory(tmp_path / place)
