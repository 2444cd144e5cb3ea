"""The package declares what it imports, each version bound has a reason, and the archives hold what a user needs."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from importlib.metadata import metadata, version
from pathlib import Path
from zipfile import ZipFile

import pytest

import gpt2_lightning

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]
DEPENDENCIES = PROJECT["dependencies"]
EXTRAS = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]


def package_files() -> set[str]:
    """Files of the package as an archive names them."""
    paths = (path.relative_to(ROOT) for path in (ROOT / "gpt2_lightning").rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def test_the_installed_metadata_states_license_python_and_version():
    assert metadata("gpt2_lightning")["License-Expression"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert metadata("gpt2_lightning")["Requires-Python"] == ">=3.11"
    assert version("gpt2_lightning") == gpt2_lightning.__version__


def test_dependencies_are_what_the_package_imports():
    imported = set()
    for path in package_files():
        if path.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
    imported -= sys.stdlib_module_names | {"gpt2_lightning"}
    declared = {re.split(r"[\[<>=]", requirement)[0].replace("pyyaml", "yaml") for requirement in DEPENDENCIES}
    assert imported - declared == {"matplotlib"}, "gpt2 report says how to install it"
    assert declared == imported - {"matplotlib"}


@pytest.mark.parametrize("requirement", DEPENDENCIES + EXTRAS)
def test_each_version_bound_has_its_reason_beside_it(requirement):
    before, _, after = PYPROJECT.partition(f'"{requirement}"')
    comments = [after.splitlines()[0]]
    for line in reversed(before.splitlines()[:-1]):
        if not line.strip().startswith("#"):
            break
        comments.append(line)
    reason = " ".join(line.partition("#")[2] for line in comments)
    bounds = re.findall(r"[<>]=?([\d.]+)", requirement)
    assert bounds
    for bound in bounds:
        assert re.search(rf"(?<![\d.]){re.escape(bound)}: ", reason), f"{requirement}: why {bound}?"


def test_tensorboard_starts():
    shown = subprocess.run([sys.executable, "-m", "tensorboard.main", "--version"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == version("tensorboard")


def test_the_wheel_built_from_the_sdist_is_the_package_with_its_assets_and_license(tmp_path):
    tree, out = tmp_path / "tree", tmp_path / "out"
    shutil.copytree(ROOT / "gpt2_lightning", tree / "gpt2_lightning")
    for file in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / file, tree)
    for work in ("data/stdlib/a.npy", "runs/a/log.txt", "gpt2_lightning/__pycache__/a.pyc"):  # left by using it
        (tree / work).parent.mkdir(parents=True, exist_ok=True)
        (tree / work).touch()
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
    subprocess.run([sys.executable, "-c", build, "build_sdist", out], cwd=tree, check=True, capture_output=True)
    with tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        sdist.extractall(out, filter="data")
    source = next(path for path in out.iterdir() if path.is_dir())
    subprocess.run([sys.executable, "-c", build, "build_wheel", out], cwd=source, check=True, capture_output=True)
    with ZipFile(next(out.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    info = f"gpt2_lightning-{gpt2_lightning.__version__}.dist-info"
    assert {name for name in names if not name.startswith(f"{info}/")} == package_files()
    assert {"gpt2_lightning/assets/gpt2.tiktoken", "gpt2_lightning/assets/hellaswag_builtin.jsonl"} <= names
    assert f"{info}/licenses/LICENSE" in names
