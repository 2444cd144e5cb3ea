"""The package is a house: folders are floors, and imports go down only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "gpt2_lightning"
ROOMS = (
    {"__main__"},
    {"cli"},
    {"tools"},
    {"callbacks"},
    {"module", "sharding"},
    {"data"},
    {"checkpoints"},
    {"evals"},
    {"generate"},
    {"model", "loss", "optim", "schedule", "tokenizer", "hardware"},
    {"errors", "files"},
)
"""From the roof to the ground: files and folders that may import from their own row and from the rows below."""
FILES = {
    path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE
} | {path.name: path for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"}


def floor(name: str) -> int:
    room = name.removesuffix(".py").partition("/")[0].partition(".")[0]
    return next(i for i, rooms in enumerate(ROOMS) if room in rooms)


def imports(path: Path, top_only: bool = False) -> set[str]:
    """The modules that a file imports, ours without the package's name."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{a.name}" for a in node.names} if node.module == "gpt2_lightning" else {node.module}
            )
    return {name.removeprefix("gpt2_lightning.") for name in found} - {"__version__"}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    ours = {path.removesuffix(".py").replace("/", ".") for path in FILES}
    for imported in imports(FILES[name]) & ours:
        assert floor(imported) >= floor(name), f"{name} imports {imported}, which is above it"


@pytest.mark.parametrize("name", FILES)
def test_heavy_libraries_stay_where_they_belong(name):
    roots = {module.partition(".")[0] for module in imports(FILES[name])}
    assert not ({"lightning", "torchmetrics"} & roots and floor(name) > floor("data")) or name == "evals/validation.py"
    assert not {"datasets", "transformers", "matplotlib"} & {m.partition(".")[0] for m in imports(FILES[name], True)}


def test_the_network_knows_no_optimizer_and_the_data_no_network():
    assert not imports(FILES["model.py"]) & {"optim", "schedule", "loss", "module"}
    for name in FILES:
        if name.startswith("data/"):
            assert not imports(FILES[name]) & {"model", "optim", "loss", "module"}


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES.values() if path.parent != PACKAGE}))
def test_each_folder_says_what_belongs_there(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
