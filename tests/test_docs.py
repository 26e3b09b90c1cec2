"""The catalogue as Markdown, and that the committed one is what the classes say."""

from __future__ import annotations

from pathlib import Path

import pytest

import laconic
from laconic.docs import catalogue_markdown, main
from laconic.errors import LaconicError
from laconic.registry import find

COMMITTED = Path(__file__).parent.parent / "docs" / "methods.md"


def test_the_committed_catalogue_is_up_to_date() -> None:
    own = [row for row in laconic.methods() if find(row["id"]).__module__.startswith("laconic.")]  # no plug-ins, no tests
    assert COMMITTED.read_text(encoding="utf-8") == catalogue_markdown(own), "run python -m laconic.docs docs/methods.md"


def test_every_method_has_a_line_and_a_section_with_its_parameters() -> None:
    text = catalogue_markdown()
    assert len(laconic.methods()) >= 9
    for row in laconic.methods():
        assert f"| [`{row['id']}`](#{row['id']}) |" in text and f"\n### {row['id']}\n" in text
        section = text.split(f"\n### {row['id']}\n")[1].split("\n### ")[0]
        assert row["paper"] in section
        for item in row["parameters"][1:]:
            default = '""' if item["default"] == "" else item["default"]
            assert f"| `{item['name']}` | {item['type']} | `{default}` |" in section


def test_bars_do_not_break_the_table() -> None:
    parameter = {"name": "a", "type": "int", "default": 1, "help": "x | y"}
    row = {"id": "m", "stage": "s", "verbs": [], "guarantee": "lossy", "needs": "nothing", "paper": "p"}
    text = catalogue_markdown([{**row, "summary": "``a|b``", "text": "t", "parameters": [parameter], "measured": ["holds: x"]}])
    assert "| `a\\|b` |" in text and "| x \\| y |" in text


def test_it_goes_to_a_file_or_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "new" / "methods.md")])
    main([])
    assert (tmp_path / "new" / "methods.md").read_text() == capsys.readouterr().out == catalogue_markdown()
    with pytest.raises(LaconicError, match="Cannot write"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
