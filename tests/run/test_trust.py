"""Files of strangers and shared folders: nothing read is executed, and nothing outside the folder is touched."""

import ctypes
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from processes import await_exit, fork, run_gpt2

from gpt2_lightning.__main__ import main
from gpt2_lightning.checkpoints.export import export
from gpt2_lightning.checkpoints.load import load
from gpt2_lightning.checkpoints.ours import RUN_KEYS
from gpt2_lightning.data.prepare.write import ensure_prepared, prepare
from gpt2_lightning.data.shards import read_manifest
from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPT, GPTConfig

# -- files that run code when they are unpickled -----------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


SHAPE = {"block_size": 16, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 8}


def weights() -> dict[str, Any]:
    state = {f"model.{name}": tensor for name, tensor in GPT(GPTConfig(**SHAPE)).state_dict().items()}
    return {"state_dict": state, "hyper_parameters": {"config": SHAPE}}


def write_malicious(kind: str, path: Path, marker: Path) -> None:
    checkpoint: Any = (
        {key: {} for key in RUN_KEYS} | weights() | {"global_step": 3, "callbacks": {"x": Payload(marker)}}
    )
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_no_command_runs_code_from_a_checkpoint(
    kind: str, refused: Callable[..., None], write_recipe: Callable[..., Path], make_shards: Callable[..., Path]
) -> None:
    marker, path = Path("ran").absolute(), Path("run/checkpoints/last.ckpt").absolute()
    path.parent.mkdir(parents=True)
    write_malicious(kind, path, marker)
    with path.open("rb") as file:  # an unsafe reader would run it
        pickle.load(file) if kind == "pickle" else torch.load(file, weights_only=False)
    assert marker.exists()
    marker.unlink()

    recipe = ["--config", write_recipe(make_shards(), model={"config": SHAPE})]
    for args in (
        ["generate", path, "--prompt", "x"],
        ["export", path, "out"],
        ["validate", *recipe, "--ckpt_path", path],
        ["fit", *recipe],  # resumes
        ["fit", *recipe, "--model.init_from", path, "--run_dir", "other"],
    ):
        refused(args, str(path))
        assert not marker.exists(), args
    assert not Path("out").exists()


def test_no_command_runs_code_from_a_model_folder_or_a_shard(
    refused: Callable[..., None], write_recipe: Callable[..., Path], make_shards: Callable[..., Path]
) -> None:
    marker, folder = Path("ran").absolute(), Path("model").absolute()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    torch.save({"transformer.wte.weight": Payload(marker)}, folder / "pytorch_model.bin")
    refused(["generate", folder, "--prompt", "x"], "pytorch_model.bin holds more than tensors and plain values")
    root = make_shards()
    shard = root / "tiny_train_000001.npy"
    np.save(shard, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    refused(["fit", "--config", write_recipe(root)], str(shard), "object")
    refused(["prepare", "--verify", root], str(shard), "object")
    assert not marker.exists()


# -- revisions ---------------------------------------------------------------------------------------------------------


def test_a_revision_of_a_model_on_the_hub_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None]
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    torch.save(weights(), "a.ckpt")
    export("a.ckpt", "cache")
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not [pattern for pattern in allow_patterns if pattern.endswith(".py") or pattern == "*"]
        if revision == "gone":
            raise RevisionNotFoundError("404", response=SimpleNamespace(status_code=404, headers={}, request=None))
        if name == "runs/missing":
            raise LocalEntryNotFoundError("no route to host\nand a second line")
        return str(Path("cache").absolute())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load("gpt2")
    load("org/some.name@v1.0")
    load("gpt2@refs/pr/7")
    load("gpt2@v1", revision="v1")
    load("gpt2", revision="v2")
    assert main(["generate", "org/name@c0ffee", "--prompt", "x", "--max_new_tokens", "1"]) == 0
    assert asked == [
        ("gpt2", None),
        ("org/some.name", "v1.0"),
        ("gpt2", "refs/pr/7"),
        ("gpt2", "v1"),
        ("gpt2", "v2"),
        ("org/name", "c0ffee"),
    ]
    with pytest.raises(UserError, match="gpt2@v1 and revision=v2 are two revisions: leave one of them out"):
        load("gpt2@v1", revision="v2")
    refused(["generate", "gpt2@gone", "--prompt", "x"], "gpt2 is not a local path", "at revision gone (404)")
    refused(["generate", "gpt2@../../x", "--prompt", "x"], "gpt2@../../x does not exist")
    refused(["generate", "runs/missing", "--prompt", "x"], "runs/missing is not a local path", "(no route to host)")
    monkeypatch.undo()
    refused(["generate", "a..b", "--prompt", "x"], "a..b is not a local path")  # not a name that the hub allows


def test_a_revision_of_a_dataset_on_the_hub_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: list[Any] = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def dataset_info(_: Any, repo: str, revision: str | None) -> SimpleNamespace:
        asked.append((repo, revision))
        return SimpleNamespace(sha=commit)

    def load_dataset(repo: str, name: str | None, **options: Any) -> datasets.IterableDataset:
        asked.append((repo, options))
        return datasets.Dataset.from_dict({"text": ["one", "two", "three"]}).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = prepare("org/name@v9", tmp_path / "a", progress=False)
    # the revision is resolved once, and that commit is read
    assert asked == [("org/name", "v9"), ("org/name", {"split": "train", "streaming": True, "revision": commit})]
    assert found.source == {"source": "org/name", "name": None, "revision": commit}
    assert (found.options["source"], found.options["revision"]) == ("org/name", "v9")
    asked.clear()
    for source in ("org/name@v9", "org/name", f"org/name@{commit}"):
        assert prepare(source, tmp_path / "a", progress=False) == found
        ensure_prepared(source, tmp_path / "a")
    for again in (prepare, ensure_prepared):
        with pytest.raises(UserError, match=r"v9 .*v10"):
            again("org/name@v10", tmp_path / "a")
    assert asked == []
    with pytest.raises(UserError, match=r"v9 .*v10"):
        prepare("org/name@v9", tmp_path / "c", revision="v10")


# -- shared folders ----------------------------------------------------------------------------------------------------

DOCUMENTS = "".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(300))
DATA = {"total_batch_tokens": 128, "micro_batch_size": 8}


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_the_umask_decides_who_may_read_and_write_our_files(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    Path("corpus.jsonl").write_text(DOCUMENTS)
    recipe = write_recipe(tmp_path / "data", model={"config": SHAPE}, data=DATA | {"source": "corpus.jsonl"})
    existing = set(tmp_path.rglob("*"))
    before = os.umask(0o027)
    try:
        assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "2"]) == 0
        assert main(["export", "run/checkpoints/last.ckpt", "hf"]) == 0
        assert main(["export", "run/checkpoints/last.ckpt", "model.llmc.bin", "--format", "llmc"]) == 0
        assert main(["report", "run", "--out", "report"]) == 0
    finally:
        os.umask(before)
    written = set(tmp_path.rglob("*")) - existing
    names = {path.name for path in written}
    assert {"manifest.json", "last.ckpt", "config.yaml", "log.txt", "model.safetensors", "report.png"} <= names
    modes = {str(path): oct(path.stat().st_mode & 0o777) for path in written}
    assert modes == {str(path): oct(0o750 if path.is_dir() else 0o640) for path in written}


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="shared"))
    folder.chmod(0o755)
    yield folder
    (folder / "data").chmod(0o755)
    shutil.rmtree(folder)


def run_unprivileged(args: list[str], output: Path) -> None:
    """``gpt2 ARGS`` without root's right to write files of other users."""
    os.chdir(output.parent)
    if os.geteuid() == 0:
        no_capabilities = (ctypes.c_uint32 * 6)()
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
        assert ctypes.CDLL(None, use_errno=True).capset(header, no_capabilities) == 0
    run_gpt2(args, output)


def content_of(root: Path) -> dict[str, Any]:
    paths = (root, *sorted(root.iterdir()))
    return {path.name: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in paths}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="drops root's rights as on Linux")
def test_two_processes_can_use_a_read_only_data_folder_of_another_user(
    shared: Path, write_recipe: Callable[..., Path]
) -> None:
    corpus, root = shared / "corpus.jsonl", shared / "data"
    corpus.write_text(DOCUMENTS)
    prepare(str(corpus), root, shard_tokens=10_000, progress=False)
    (root / ".lock").touch()  # left by an owner whose process was killed
    for path in (*root.iterdir(), root):
        path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
    before = content_of(root)
    recipe = shutil.copy(write_recipe(root, model={"config": SHAPE}, data=DATA | {"source": str(corpus)}), shared)

    def both(*commands: list[Any]) -> None:
        outputs = [shared / f"output{i}.txt" for i in range(len(commands))]
        processes = [fork(list(map(str, c)), o, run_unprivileged) for c, o in zip(commands, outputs, strict=True)]
        for process, output in zip(processes, outputs, strict=True):
            assert await_exit(process) == 0, output.read_text()
        assert content_of(root) == before

    denied = shared / "denied.txt"
    prepare_inside = ["prepare", "--source", str(corpus), "--out", str(root / "x")]
    assert await_exit(fork(prepare_inside, denied, run_unprivileged)) == 1
    assert "change its permissions" in denied.read_text()
    run = ["--config", recipe, "--run_dir"]
    both(["fit", *run, shared / "one"], ["fit", *run, shared / "two", "--data.num_workers", "1"])
    last = shared / "one" / "checkpoints" / "last.ckpt"
    both(["validate", *run, shared / "one", "--ckpt_path", last], ["prepare", "--verify", root])
    again = ["prepare", "--source", corpus, "--out", root, "--shard_tokens", 10_000]
    both(again, again)
    manifest = read_manifest(root)
    assert manifest is not None
    assert manifest.complete
