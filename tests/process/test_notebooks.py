"""The notebooks run from a clean state, are stored with their outputs, and define no library code of their own."""

import ast
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parents[2]
FIGURES = {"01_build_gpt2": 5, "02_make_it_fast": 6, "03_train_and_compare": 1}
LONGEST_FUNCTION = 10  # lines: more than that belongs in the package


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> tuple[str, int]:
    """What a notebook's cells print, and the number of figures that they show."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in found if output.output_type == "stream")
    return text, sum("image/png" in output.get("data", {}) for output in found)


def execute(name: str, root: Path) -> tuple[str, int]:
    """Executes a notebook in ``root/notebooks`` with the recipes beside it, as in a fresh clone."""
    (root / "notebooks").mkdir()
    shutil.copytree(ROOT / "configs", root / "configs")
    notebook = read(name)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(root / "notebooks")}}).execute()
    assert not os.listdir(root / "notebooks")
    return outputs(notebook)


def test_all_notebooks_are_tested():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(FIGURES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("01_build_gpt2", ["quickstart_60_steps: 3,427,712 parameters", "ln(50304) = 10.8258"]),
        ("02_make_it_fast", ["timing a tiny shape", "torch.compile"]),
        (
            "03_train_and_compare",
            ["quickstart_60_steps, 1 start(s), 60 steps", "0 to 59", "48 examples, builtin"],
        ),
    ],
)
def test_a_notebook_runs_from_a_clean_state(name, printed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # without the cache of this machine
    text, figures = execute(name, tmp_path)
    assert figures == FIGURES[name]
    for part in printed:
        assert part in text


@pytest.mark.slow
def test_the_third_notebook_shows_the_quickstart_run_that_exists(tmp_path):
    run = tmp_path / "runs" / "quickstart"
    with SummaryWriter(str(run)) as writer:
        for step in range(5):
            writer.add_scalar("train/loss", 5.0 - step, step)
        writer.add_scalar("val/loss", 2.5, 5)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    text, figures = execute("03_train_and_compare", tmp_path)
    assert text.startswith("quickstart: ../runs/quickstart, 1 start(s), 5 steps\n")
    assert figures == 1


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_is_stored_with_outputs_that_name_no_folder_of_a_machine(name):
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 1_000_000
    notebook = read(name)
    nbformat.validate(notebook)
    text, figures = outputs(notebook)
    assert figures == FIGURES[name]
    assert not re.search(r"Traceback|/(tmp|home|root|Users|work)/", text)
    assert "\r" not in text, "progress bars"
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("name", FIGURES)
def test_a_notebook_explains_each_cell_and_defines_no_library_code(name):
    notebook = read(name)
    for before, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        if cell.cell_type != "code":
            continue
        assert before.cell_type == "markdown", f"no text before\n{cell.source}"
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef), node.name
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
