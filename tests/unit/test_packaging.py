"""What is declared is what is imported, each bound has its reason, and the archives hold what a user needs."""

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
TEXT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]
EXTRAS = PROJECT["optional-dependencies"]
FOLDERS = ("gpt2_lightning", "configs", "notebooks", "tests")
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
DISTRIBUTIONS = {"google": "protobuf", "yaml": "pyyaml"}
"""Of those whose module has another name; huggingface_hub is spelt as its module."""


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ]", requirement)[0]


def _imported() -> set[str]:
    """Distributions of all imports in the package, also of those inside functions."""
    found = set()
    for path in (ROOT / "gpt2_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in found - sys.stdlib_module_names - {"gpt2_lightning"}}


def test_the_installed_package_says_whose_it_is_and_where_it_runs():
    assert metadata("gpt2_lightning")["License-Expression"] == "MIT"
    assert metadata("gpt2_lightning")["Requires-Python"] == ">=3.11"
    assert version("gpt2_lightning") == gpt2_lightning.__version__


def test_every_import_is_declared_and_every_dependency_imported():
    declared = {_name(requirement) for requirement in PROJECT["dependencies"]}
    assert _imported() - declared == {"matplotlib"}, "which gpt2 report says how to install"
    assert declared - _imported() == {"jsonargparse"}, "which LightningCLI imports"
    for extra in ("notebooks", "dev"):
        assert "matplotlib" in map(_name, EXTRAS[extra])


def test_every_bound_has_its_reason_beside_it():
    requirements = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
    lines = TEXT.splitlines()
    for requirement in requirements:
        if requirement.startswith("gpt2_lightning["):
            continue
        bounds = re.findall(r"[<>]=?([\d.]+)", requirement)
        assert re.search(r">=[\d.]+", requirement), f"{requirement} has no lower bound"
        for index in [i for i, line in enumerate(lines) if f'"{requirement}"' in line]:
            first = index
            while lines[first - 1].strip().startswith("#"):
                first -= 1
            reason = " ".join(line.partition("#")[2] for line in lines[first : index + 1])
            for bound in bounds:
                assert re.search(rf"(?<![\d.]){re.escape(bound)}(?![\d.]*\d)", reason), f"{requirement}: why {bound}?"


def test_the_program_that_readme_shows_curves_with_starts():
    said = subprocess.run([sys.executable, "-m", "tensorboard.main", "--version"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() == version("tensorboard")


def test_outside_the_repository_fit_tells_where_the_recipes_are(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(["fit"], "no --config", "in configs/ of the repository", code=2)


def test_readme_tells_changes_citation_and_license():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    changes, citation, terms = (
        re.search(rf"^## {title}\n(.+?)(?=^## |\Z)", readme, re.M | re.S)[1]
        for title in ("Changes", "Citation", "License")
    )
    assert gpt2_lightning.__version__ in changes
    assert f"version {gpt2_lightning.__version__}" in citation
    assert "MIT" in terms
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def _here(*folders: str) -> set[str]:
    """Files of the work tree as an archive names them, without what tools leave behind."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = (path.relative_to(ROOT).as_posix() for path in paths)
    return {name for name in names if not re.search(r"/(__pycache__|\.)", name)}


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[set[str], set[str]]:
    """Names in the sdist, and in the wheel that is built from it, of a work tree that was worked in."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in FILES:
        shutil.copy(ROOT / file, tree)
    for junk in (
        "data/stdlib/a.npy",
        "runs/a/log.txt",
        "tests/__pycache__/a.pyc",
        "configs/.DS_Store",
        "notebooks/.ipynb_checkpoints/a.ipynb",
        "gpt2_lightning/__pycache__/a.pyc",
    ):
        (tree / junk).parent.mkdir(parents=True, exist_ok=True)
        (tree / junk).touch()

    def build(what: str, folder: Path) -> Path:
        code = f"from setuptools.build_meta import {what}; {what}({str(out)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
        return next(out.glob("*.whl" if what == "build_wheel" else "*.tar.gz"))

    with tarfile.open(build("build_sdist", tree)) as tar:
        tar.extractall(out)
    source = next(path for path in out.iterdir() if path.is_dir())
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    with ZipFile(build("build_wheel", source)) as wheel:
        return names, set(wheel.namelist())


def test_the_sdist_is_all_that_one_runs_and_tests(archives):
    names, _ = archives
    names = {name for name in names if not name.startswith("gpt2_lightning.egg-info/")}
    assert names - {"PKG-INFO", "setup.cfg"} == _here(*FOLDERS) | set(FILES)
    assert {"configs/quickstart.yaml", "tests/conftest.py", "tests/data/golden_fp32/init.npz"} <= names


def test_the_wheel_is_the_package_alone_with_its_ranks_and_license(archives):
    _, names = archives
    info = f"gpt2_lightning-{gpt2_lightning.__version__}.dist-info"
    assert {name for name in names if not name.startswith(f"{info}/")} == _here("gpt2_lightning")
    assert {"gpt2_lightning/assets/gpt2.tiktoken", "gpt2_lightning/assets/hellaswag_builtin.jsonl"} <= names
    assert f"{info}/licenses/LICENSE" in names
