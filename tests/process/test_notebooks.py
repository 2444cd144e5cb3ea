"""The notebooks: run from a clean state, stored without what they print, and without library code of their own."""

import ast
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from torch.utils.tensorboard import SummaryWriter

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
LONGEST_FUNCTION = 10
"""Lines: a notebook may name an expression, but what is worth more is the package's."""


def _run(path: Path, folder: Path) -> tuple[str, int]:
    """What a notebook prints when it is run in a folder, and how many pictures it shows."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def _cpu_seconds() -> float:
    """Of the children that have ended."""
    if sys.platform == "win32":
        return 0.0
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures", "said"),
    [
        ("01_build_gpt2", 5, ["run/checkpoints/last.ckpt, 3,427,712 parameters", "ln(50304) = 10.8258"]),
        ("02_make_it_fast", 6, ["no bench.json: a tiny shape is timed now", "torch.compile"]),
        ("03_train_and_compare", 1, ["no run in ./runs or ../runs", "steps 0 to 59", "(n = 48, builtin)"]),
    ],
)
def test_each_runs_from_a_clean_state(name, pictures, said, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # without what this machine may have of the hub
    before = _cpu_seconds()
    text, shown = _run(next(path for path in NOTEBOOKS if path.stem == name), tmp_path)
    assert shown == pictures
    for part in said:
        assert part in text
    assert "Traceback" not in text
    # a third each of 5 minutes on 2 cores; by the processor's clock, for others may be using them
    assert _cpu_seconds() - before < 200


@pytest.mark.slow
def test_the_third_finds_the_runs_one_folder_up(tmp_path):
    for name in ("one", "two"):
        with SummaryWriter(str(tmp_path / "runs" / name)) as writer:
            for step in range(5):
                writer.add_scalar("train/loss", 5.0 - step, step)
            writer.add_scalar("val/loss", 2.5, 5)
        (tmp_path / "runs" / name / "log.txt").touch()
    (tmp_path / "notebooks").mkdir()
    text, shown = _run(NOTEBOOKS[2], tmp_path / "notebooks")
    assert text.startswith("one: ../runs/one, 1 start(s), 5 steps\ntwo: ../runs/two, 1 start(s), 5 steps\n")
    assert shown == 1
    assert not os.listdir(tmp_path / "notebooks")  # nothing is left where it runs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_stored_stripped_and_define_no_library_code(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for before, cell in zip([None, *notebook.cells], notebook.cells, strict=False):
        if cell.cell_type != "code":
            assert len(cell.source.splitlines()) <= 10
            continue
        assert cell.outputs == []
        assert cell.execution_count is None
        assert before.cell_type == "markdown", f"nothing is said before\n{cell.source}"
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, ast.ClassDef), node.name
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
    assert "gpt2_lightning" in "".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["01_build_gpt2", "02_make_it_fast", "03_train_and_compare"]
