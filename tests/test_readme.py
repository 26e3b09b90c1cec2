"""The Python of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_readme_has_its_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from laconic import registry

    registry.methods()  # loads them all, so that what is put back is whole
    before = dict(registry._methods)
    try:
        exec(compile(BLOCKS[number], f"README.md block {number}", "exec"), {})
    finally:
        registry._methods.clear()
        registry._methods.update(before)
