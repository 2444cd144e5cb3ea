"""The house: each file has its floor, and imports point down, never up, sideways in a circle, or to a heavy library."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gpt2_lightning"

FLOORS = {
    "model": 0,
    "loss": 0,
    "optim": 0,
    "schedule": 0,
    "tokenizer": 0,
    "files": 0,
    "errors": 0,
    "checkpoint_file": 0,
    "baselines": 0,
    "run_folder": 0,
    "gpus": 0,
    "compile_cache": 0,
    "data.shards": 0,
    "evals.multiple_choice": 0,
    "weights": 1,
    "hf": 1,
    "hf_export": 1,
    "llmc": 1,
    "generate": 1,
    "data.order": 1,
    "data.sources": 1,
    "data.documents": 1,
    "data.encode": 1,
    "data.prepare": 1,
    "data.show": 1,
    "memory": 1,
    "evals.hellaswag": 1,
    "sharding": 2,
    "module": 2,
    "data.datamodule": 2,
    "callbacks.*": 3,
    "job": 3,
    "bench": 3,
    "charts": 3,
    "report": 3,
    "plan": 3,
    "bench_table": 3,
    "cli": 4,
    "__main__": 4,
}
LAZY = {"datasets", "transformers", "matplotlib", "pyarrow", "requests"}


def _modules() -> dict[str, Path]:
    paths = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in paths}


def _floor(module: str) -> int:
    return FLOORS["callbacks.*" if module.startswith("callbacks.") else module]


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file) of each import, ours without the package's name."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            if node.module == "gpt2_lightning":
                names = [alias.name for alias in node.names if alias.name != "__version__"]
                found += [(f"gpt2_lightning.{name}", id(node) in top) for name in names]
            else:
                found.append((node.module, id(node) in top))
    return found


MODULES = _modules()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    for name, _ in _imports(MODULES[module]):
        if name.startswith("gpt2_lightning."):
            other = name.removeprefix("gpt2_lightning.")
            assert _floor(other) <= _floor(module), f"{module} imports {other} from a floor above"


def test_nothing_is_imported_in_a_circle():
    ours = {
        m: {n.removeprefix("gpt2_lightning.") for n, _ in _imports(p) if n.startswith("gpt2_lightning.")}
        for m, p in MODULES.items()
    }
    while ready := [m for m, needs in ours.items() if not needs]:
        for m in ready:
            del ours[m]
        for needs in ours.values():
            needs.difference_update(ready)
    assert not ours, f"these import each other: {sorted(ours)}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_where_they_belong(module):
    for name, at_the_top in _imports(MODULES[module]):
        root = name.split(".")[0]
        if root in ("lightning", "torchmetrics"):
            assert _floor(module) >= 2, f"{module} imports {name}"
        if root in LAZY:
            assert not at_the_top, f"{module} imports {name} before anybody needs it"
        if module == "__main__" and at_the_top:
            assert root not in ("torch", "lightning", "numpy", "tiktoken"), f"gpt2 --help would pay for {name}"


def test_network_data_and_optimizer_do_not_know_each_other():
    for module in ("model", "optim", "data.shards", "data.order", "data.prepare", "data.show", "data.datamodule"):
        others = {"model", "optim", "module"} if module.startswith("data") else {"optim", "model", "data"} - {module}
        for name, _ in _imports(MODULES[module]):
            assert name.removeprefix("gpt2_lightning.").split(".")[0] not in others, f"{module} imports {name}"
