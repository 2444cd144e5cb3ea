"""Files of strangers and folders of others: nothing in them is run, nothing leaves them, and they can be shared."""

import ast
import ctypes
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from processes import await_exit, fork, run_gpt2

from gpt2_lightning.__main__ import main
from gpt2_lightning.checkpoints.load import export, load
from gpt2_lightning.checkpoints.ours import PARTS
from gpt2_lightning.data.prepare.write import ensure_prepared, prepare
from gpt2_lightning.data.shards import read_manifest, verify
from gpt2_lightning.files import atomic_file
from gpt2_lightning.model import GPT, GPTConfig

PACKAGE = Path(__file__).parents[2] / "gpt2_lightning"

# -- the code ----------------------------------------------------------------------------------------------------------

RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system"}
UNPICKLES = {"dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy"}
HARMLESS_OF_NPY = {"read_magic", "read_array_header_1_0", "read_array_header_2_0", "write_array_header_1_0"}


def distrusted(source: str) -> list[str]:
    """What in a module could run what it reads, each with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            bad = (
                (re.fullmatch(r"torch\b.*\.load", name) and given.get("weights_only") != "True")
                or (name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False")
                or (re.fullmatch(r".*\blib\.format\.\w+", name) and name.rpartition(".")[2] not in HARMLESS_OF_NPY)
                or (re.fullmatch(r"yaml\.\w*load\w*", name) and not name.startswith("yaml.safe_load"))
                or any(given.get(name, "False") != "False" for name in ("allow_pickle", "trust_remote_code", "shell"))
                or name in RUNS_CODE
            )
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            bad = name.startswith(("pickle.", "torch.hub.", "torch.package.")) and name != "pickle.UnpicklingError"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            name = ", ".join(names)
            bad = UNPICKLES & set(names) or (isinstance(node, ast.ImportFrom) and name == "pickle")
        else:
            continue
        if bad:
            found.append(f"{node.lineno}: {name}")
    return found


def test_nothing_that_is_read_is_run() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert len(paths) > 40
    assert {str(path): found for path in paths if (found := distrusted(path.read_text()))} == {}
    assert sum(path.read_text().count("torch.load(") for path in paths) == 1, "one door"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(x)", "torch.load(x, weights_only=False)", "torch.load(x, weights_only=flag)", "torch.jit.load(x)",
        "np.load(x)", "np.load(x, allow_pickle=True)", "np.lib.format.read_array(x)", "numpy.load(x, None, True)",
        "yaml.load(x)", "yaml.unsafe_load(x)", "eval(x)", "exec(x)", "pickle.load(x)", "from pickle import load",
        "import dill", "os.system(x)", "load_dataset(x, trust_remote_code=True)", "subprocess.run(x, shell=True)",
        "torch.hub.load(x)",
    ],
)  # fmt: skip
def test_the_look_at_the_code_finds(line: str) -> None:
    assert distrusted(line)


@pytest.mark.parametrize(
    "line",
    ["torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)", "model.eval()", "yaml.safe_load(x)"],
)
def test_the_look_at_the_code_leaves(line: str) -> None:
    assert distrusted(line) == []


# -- a checkpoint that is a program ------------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


SHAPE = {"block_size": 16, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 8}


def weights() -> dict[str, Any]:
    state = {f"model.{name}": tensor for name, tensor in GPT(GPTConfig(**SHAPE)).state_dict().items()}
    return {"state_dict": state, "hyper_parameters": {"config": SHAPE}}


def write_malicious(kind: str, path: Path, marker: Path) -> None:
    whole = {part: {} for part in PARTS} | weights() | {"global_step": 3}
    bad: Any = whole | {"callbacks": {"x": Payload(marker)}}
    if kind == "zip":
        torch.save(bad, path)
    elif kind == "alone":
        torch.save(Payload(marker), path)
    elif kind == "legacy":
        torch.save(bad, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Payload(marker)))


@pytest.mark.parametrize("kind", ["zip", "alone", "legacy", "pickle"])
def test_a_checkpoint_that_is_a_program_is_refused_and_does_not_run(
    kind: str, refused: Callable[..., None], write_recipe: Callable[..., Path], make_shards: Callable[..., Path]
) -> None:
    marker, path = Path("ran").absolute(), Path("run/checkpoints/last.ckpt").absolute()
    path.parent.mkdir(parents=True)
    write_malicious(kind, path, marker)
    with path.open("rb") as file:  # that it would run is no fancy
        pickle.load(file) if kind == "pickle" else torch.load(file, weights_only=False)
    assert marker.exists()
    marker.unlink()

    recipe = ["--config", write_recipe(make_shards(), model={"config": SHAPE})]
    unshaped = [
        "--config",
        write_recipe(make_shards(name="b"), name="c", model={"config": None, "init_from": str(path)}),
    ]
    for args in (
        ["generate", path, "--prompt", "x"],
        ["hellaswag", path, "--examples", "builtin"],
        ["export", path, "out"],
        ["export", path, "out.bin", "--format", "llmc"],
        ["validate", *recipe, "--ckpt_path", path],
        ["validate", *recipe, "--model.init_from", path],
        ["validate", *recipe],  # the run's last
        ["fit", *recipe],  # resumes
        ["fit", *recipe, "--ckpt_path", path],
        ["fit", *recipe, "--model.init_from", path, "--run_dir", "other"],
        ["plan", *unshaped],
        ["report", path],
        ["report", path.parent.parent],
    ):
        refused(args, str(path) if args[0] != "report" else "run")
        assert not marker.exists(), args
    assert not Path("out").exists()
    assert not Path("out.bin").exists()


def test_a_model_folder_and_a_shard_that_are_programs_do_not_run(
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
    refused(["fit", "--config", write_recipe(root)], f"{shard} is not a whole shard: its tokens are object")
    refused(["prepare", "--verify", root], f"{shard} is not a whole shard: its tokens are object")
    assert not marker.exists()


# -- revisions ---------------------------------------------------------------------------------------------------------


def test_a_model_of_the_hub_can_be_pinned(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    torch.save(weights(), "a.ckpt")
    export("a.ckpt", "cache")
    asked: list[tuple[str, str | None]] = []

    def serve(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not [pattern for pattern in allow_patterns if pattern.endswith(".py") or pattern == "*"]
        if revision == "gone":
            raise RevisionNotFoundError("404", response=SimpleNamespace(status_code=404, headers={}, request=None))
        return str(Path("cache").absolute())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", serve)
    load("gpt2")
    load("org/some.name@v1.0")
    load("gpt2@refs/pr/7")
    load("gpt2@v1", revision="v1")
    load("gpt2", revision="v2")
    assert main(["generate", "org/name@c0ffee", "--prompt", "x", "--max_new_tokens", "1"]) == 0
    assert main(["export", "gpt2@c0ffee", "out"]) == 0
    assert asked == [
        ("gpt2", None),
        ("org/some.name", "v1.0"),
        ("gpt2", "refs/pr/7"),
        ("gpt2", "v1"),
        ("gpt2", "v2"),
        ("org/name", "c0ffee"),
        ("gpt2", "c0ffee"),
    ]
    with pytest.raises(ValueError, match="gpt2@v1 and revision=v2 are two revisions: leave one of them out"):
        load("gpt2@v1", revision="v2")
    refused(["generate", "gpt2@gone", "--prompt", "x"], "gpt2 is no path here", "does not give it at revision gone")
    monkeypatch.undo()
    for name in ("a..b", "a--b", "x" * 97, "gpt2.git"):
        refused(["generate", name, "--prompt", "x"], f"{name} is no path here")
    refused(["generate", "gpt2@../../x", "--prompt", "x"], "gpt2@../../x does not exist")


class Dataset:
    """As much of `datasets.IterableDataset` as is used."""

    num_shards = 1

    class info:
        splits: Any = None

    def shard(self, num_shards: int, index: int) -> "Dataset":
        return self

    def with_format(self, kind: str) -> "Dataset":
        return self

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        yield pa.table({"text": ["one", "two", "three"]})


def test_a_dataset_of_the_hub_can_be_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    asked: list[Any] = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Found:
        sha = commit

    def info(_: Any, repo: str, revision: str | None) -> Found:
        asked.append((repo, revision))
        return Found()

    def stream(repo: str, name: str | None, **options: Any) -> Dataset:
        asked.append((repo, options))
        return Dataset()

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    found = prepare("org/name@v9", tmp_path / "a", progress=False)
    pinned = {"split": "train", "streaming": True, "revision": commit}  # what was looked at is what is read
    assert asked == [("org/name", "v9"), ("org/name", pinned)]
    assert found.source == {"source": "org/name", "name": None, "revision": commit}
    assert (found.options["source"], found.options["revision"]) == ("org/name", "v9")
    assert prepare("org/name", tmp_path / "b", revision="v9", progress=False) == found
    asked.clear()
    for source in ("org/name@v9", "org/name", f"org/name@{commit}"):
        assert prepare(source, tmp_path / "a", progress=False) == found
        ensure_prepared(source, tmp_path / "a")
    with pytest.raises(ValueError, match="revision is v9 there and v10 here"):
        prepare("org/name@v10", tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="revision is v9 there and v10 here"):
        ensure_prepared("org/name@v10", tmp_path / "a")
    assert asked == []
    with pytest.raises(ValueError, match="org/name@v9 names one revision and --revision v10 another"):
        prepare("org/name@v9", tmp_path / "c", revision="v10")
    with pytest.raises(ValueError, match="only datasets on the hub have a --name or a --revision"):
        prepare("stdlib@v9", tmp_path / "c")
    with pytest.raises(ValueError, match="'org/name@' is no source"):
        prepare("org/name@", tmp_path / "c")
    prepare("fineweb-edu@v1", tmp_path / "d", shard_tokens=3, progress=False)
    assert asked[0] == ("HuggingFaceFW/fineweb-edu", "v1")
    assert list(tmp_path.joinpath("d").glob("edufineweb_*"))
    Path("at@home.txt").write_text("a file is a file, whatever its name")
    assert prepare("at@home.txt", tmp_path / "e", progress=False).options["revision"] is None


# -- paths -------------------------------------------------------------------------------------------------------------


def test_no_index_of_weights_leads_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "outside.bin")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    for name in (
        "../outside.bin",
        str(tmp_path / "outside.bin"),
        "a/b.bin",
        "..\\outside.bin",
        "..",
        "",
        None,
        ["x"],
        7,
    ):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(ValueError, match=r"model\.bin\.index\.json lists .*, which is no file's name"):
            load(folder)


@pytest.mark.skipif(os.name != "posix", reason="links need a right of their own on Windows")
def test_nothing_is_written_through_a_link_that_lies_in_the_way(tmp_path: Path) -> None:
    """A folder that somebody else packed may hold links under the names that we write under."""
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300)))
    precious = tmp_path / "precious"
    precious.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    names = [".lock", ".manifest.json.tmp", "manifest.json", ".corpus_val_000000.npy.part"]
    names += [f"{dot}corpus_{split}_00000{n}.npy{end}" for dot, end in (("", ""), (".", ".tmp")) for split, n in
              (("val", 0), ("train", 1), ("train", 2))]  # fmt: skip
    for name in names:
        if name != "manifest.json" and not name.startswith("corpus"):
            (out / name).symlink_to(precious)
    prepare("corpus.jsonl", out, shard_tokens=400, progress=False)
    verify(out)
    assert precious.read_text() == "precious"
    (out / ".lock").symlink_to(precious)  # of a preparation that was killed at its very end
    prepare("corpus.jsonl", out, shard_tokens=400, progress=False)
    assert precious.read_text() == "precious"
    assert not [path.name for path in out.iterdir() if path.is_symlink()]
    (tmp_path / ".file.tmp").symlink_to(precious)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    assert (precious.read_text(), (tmp_path / "file").read_text()) == ("precious", "new")


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o000])
def test_the_umask_says_who_may_read_and_write_what_we_write(
    mask: int, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    Path("corpus.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(300)))
    trainer, data = {"max_steps": 2}, {"source": "corpus.jsonl", "total_batch_tokens": 128, "micro_batch_size": 8}
    recipe = write_recipe(tmp_path / "data", model={"config": SHAPE}, trainer=trainer, data=data)
    there = set(tmp_path.rglob("*"))
    before = os.umask(mask)
    try:
        assert main(["fit", "--config", str(recipe), "--checkpoint.every_n_steps", "1"]) == 0
        assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "3"]) == 0
        assert main(["prepare", "--source", "corpus.jsonl", "--out", "bin", "--format", "bin"]) == 0
        assert main(["export", "run/checkpoints/last.ckpt", "hf"]) == 0
        assert main(["export", "run/checkpoints/last.ckpt", "model.llmc.bin", "--format", "llmc"]) == 0
        assert main(["report", "run", "--out", "report"]) == 0
    finally:
        os.umask(before)
    written = set(tmp_path.rglob("*")) - there
    names = {path.name for path in written}
    assert {"manifest.json", "last.ckpt", "config_1.yaml", "log.txt", "model.safetensors", "report.png"} <= names
    modes = {str(path): oct(path.stat().st_mode & 0o777) for path in written}
    expected = {str(path): oct((0o777 if path.is_dir() else 0o666) & ~mask) for path in written}
    assert modes == expected


# -- a folder of somebody else's ---------------------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter: pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="shared"))
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def as_a_mere_user(args: list[str], output: Path) -> None:
    """``gpt2 ARGS`` without root's right to write whatever belongs to others."""
    os.chdir(output.parent)
    if os.geteuid() == 0:
        nothing = (ctypes.c_uint32 * 6)()
        version_3_of_this_process = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert ctypes.CDLL(None, use_errno=True).capset(version_3_of_this_process, nothing) == 0
    run_gpt2(args, output)


def state_of(root: Path) -> dict[str, Any]:
    paths = (root, *sorted(root.iterdir()))
    return {path.name: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in paths}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="takes root's rights away as Linux does")
@pytest.mark.parametrize("left", ["", ".lock"])  # the owner's process may have been killed at the very end
def test_two_at_a_time_train_from_a_folder_that_is_neither_theirs_nor_writable(
    left: str, shared: Path, write_recipe: Callable[..., Path]
) -> None:
    corpus, root = shared / "corpus.jsonl", shared / "data"
    corpus.write_text("".join(json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(300)))
    prepare(str(corpus), root, shard_tokens=10_000, progress=False)
    if left:
        (root / left).touch()
    for path in (*root.iterdir(), root):
        path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
    before = state_of(root)
    recipe = write_recipe(
        root, model={"config": SHAPE}, data={"source": str(corpus), "total_batch_tokens": 128, "micro_batch_size": 8}
    )
    recipe = shutil.copy(recipe, shared)

    def both(*args: list[Any]) -> None:
        outputs = [shared / f"said{i}.txt" for i in range(len(args))]
        processes = [fork(list(map(str, a)), o, as_a_mere_user) for a, o in zip(args, outputs, strict=True)]
        for process, output in zip(processes, outputs, strict=True):
            assert await_exit(process) == 0, output.read_text()
        assert state_of(root) == before

    denied = shared / "denied.txt"
    assert await_exit(fork(["prepare", "--source", str(corpus), "--out", str(root / "x")], denied, as_a_mere_user)) == 1
    assert "give this user the right to write there" in denied.read_text()
    run = ["--config", recipe, "--run_dir"]
    both(["fit", *run, shared / "one"], ["fit", *run, shared / "two", "--data.num_workers", "1"])
    last = shared / "one" / "checkpoints" / "last.ckpt"
    both(["validate", *run, shared / "one", "--ckpt_path", last], ["prepare", "--verify", root])
    again = ["prepare", "--source", corpus, "--out", root, "--shard_tokens", 10_000]
    both(again, ["prepare", "--source", shared / "gone" / "corpus.jsonl", *again[3:]])
    both(["prepare", "--verify", root], ["plan", "--config", recipe])
    assert "step     6 | val/loss" in (shared / "said0.txt").read_text()
    manifest = read_manifest(root)
    assert manifest is not None
    assert manifest.complete
