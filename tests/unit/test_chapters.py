"""The tables and links of the README files name things that exist."""

import contextlib
import importlib
import io
import json
import re
from pathlib import Path

import pytest

from gpt2_lightning.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]
CHAPTERS = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in (ROOT / "notebooks" / "README.md").read_text().splitlines()
    if line.startswith("| ") and "`gpt2 " in line
]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    """What ``gpt2 COMMAND --help`` prints, for each command of the table."""
    texts = {}
    for command in {chapter[2].split()[1] for chapter in CHAPTERS}:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([command, "--help"]) == 0
        texts[command] = out.getvalue()
    return texts


def headings(number: str) -> list[str]:
    """The headings of the notebook whose name begins with this number."""
    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"]
    return [line.lstrip("# ") for cell in cells for line in cell["source"] if line.startswith("#")]


def test_the_table_covers_the_video_and_each_command():
    assert len(CHAPTERS) == 25
    assert {chapter[2].split()[1] for chapter in CHAPTERS} == set(COMMANDS)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter[0])
def test_a_chapter_names_code_flags_a_heading_and_a_test_that_exist(chapter, help_texts):
    _, code, command, notebook, test = chapter
    module, _, name = code.rpartition(".")
    assert callable(getattr(importlib.import_module(f"gpt2_lightning.{module}"), name))
    _, subcommand, *flags = command.split()
    for flag in flags:
        assert re.search(rf"{re.escape(flag)}\b", help_texts[subcommand]), flag
    number, _, heading = notebook.partition(" ")
    assert any(found.startswith(heading) for found in headings(number)), notebook
    assert f"def {test}(" in TESTS


@pytest.mark.parametrize("readme", ["README.md", "configs/README.md", "notebooks/README.md"])
def test_the_links_lead_to_files_and_headings(readme):
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", (ROOT / readme).read_text()):
        file, _, anchor = target.partition("#")
        path = (ROOT / readme).parent / file if file else ROOT / readme
        assert path.exists(), target
        if anchor:
            anchors = [line.lstrip("# ").lower().replace(" ", "-") for line in path.read_text().splitlines()]
            assert anchor in anchors, target
