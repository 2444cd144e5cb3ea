"""The README's table of the video's chapters names things that are there."""

import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import pytest

from gpt2_lightning.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in (ROOT / "README.md").read_text().partition("chapter by chapter")[2].splitlines()
    if line.startswith("| ") and "`" in line
]
HEADINGS = {
    path.name[:2]: [
        line.lstrip("# ")
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "markdown"
        for line in cell["source"]
        if line.startswith("#")
    ]
    for path in (ROOT / "notebooks").glob("*.ipynb")
}


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each command of the table says of its options."""
    said = {}
    for name in {row[2].split()[1] for row in ROWS}:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([name, "--help"]) == 0
        said[name] = out.getvalue()
    return said


def test_the_table_is_there():
    assert len(ROWS) == 25
    assert {row[2].split()[1] for row in ROWS} == set(COMMANDS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_chapter_names_what_exists(row, helps):
    _, code, command, cell, test = row
    module, _, name = code.rpartition(".")
    assert callable(getattr(importlib.import_module(f"gpt2_lightning.{module}"), name))
    _, subcommand, *flags = command.split()
    for flag in flags:
        assert re.search(rf"{re.escape(flag)}\b", helps[subcommand]), flag
    assert any(heading.startswith(cell[3:]) for heading in HEADINGS[cell[:2]]), cell
    file, _, function = test.partition(".")
    assert f"def {function}(" in (ROOT / "tests" / f"{file}.py").read_text()


def test_the_readme_is_not_a_book():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250
