"""The example folder as a fixture, and no hub."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from example_folder import make_example_folder


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original")
    make_example_folder(root)
    return root


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # it reads the environment only once


@pytest.fixture
def shared_folder(original: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Works in the folder itself, and deletes what a test adds: for commands that must change nothing."""
    monkeypatch.chdir(original)
    known = set(Path().rglob("*"))
    yield
    for path in sorted(set(Path().rglob("*")) - known, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Works in a copy of the folder."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    return tmp_path
