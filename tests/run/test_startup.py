"""What a command costs before it does anything: imports that it does not need, and code compiled anew."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from gpt2_lightning.__main__ import main
from gpt2_lightning.hardware import keep_compiled_code, keep_freed_memory
from gpt2_lightning.model import GPT, GPTConfig

PROBE = """
import json, sys
from gpt2_lightning.__main__ import main
code = main({args!r})
heavy = ("torch", "lightning", "jsonargparse", "numpy", "datasets", "transformers", "matplotlib", "tensorboard")
print(json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


def _imported_by(*args: str) -> set[str]:
    """Which heavy packages ``gpt2 ARGS`` imports."""
    command = [sys.executable, "-c", PROBE.format(args=list(args))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    return set(modules)


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(flag):
    assert _imported_by(flag) == set()


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpt2_lightning {version('gpt2_lightning')}\n"


def test_prepare_imports_neither_torch_nor_lightning():
    Path("poem.txt").write_text("Tyger Tyger, burning bright, In the forests of the night\n" * 50)
    assert _imported_by("prepare", "--source", "poem.txt", "--out", "shards") - {"jsonargparse"} == {"numpy"}


def test_export_imports_torch_but_not_lightning():
    config = {"block_size": 8, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 8}
    weights = {f"model.{name}": value for name, value in GPT(GPTConfig(**config)).state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": config}}, "tiny.ckpt")
    for format in ("hf", "llmc"):
        modules = _imported_by("export", "tiny.ckpt", f"out_{format}", "--format", format)
        assert modules - {"jsonargparse", "numpy"} == {"torch"}


@pytest.fixture
def user_cache(monkeypatch, tmp_path) -> Path:
    """A user's cache folder, in an environment without a choice of the user's own, as importing torch leaves it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpt2_lightning" / "inductor"


def test_compiled_code_is_kept_in_the_users_cache(user_cache):
    keep_compiled_code()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == user_cache


def test_a_compile_cache_that_the_user_chose_is_used(user_cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert not user_cache.exists()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_leaves_its_code_in_the_users_cache(user_cache, make_shards, write_recipe):
    recipe = str(write_recipe(make_shards(), trainer={"max_steps": 1}, validation={"every_n_steps": 0}))
    command = [sys.executable, "-m", "gpt2_lightning", "fit", "--config", recipe, "--model.compile", "true"]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run(command, check=True, timeout=300, env=environment)
    assert any(user_cache.rglob("*.so"))


FAULTS = f"""
import resource, torch
from {keep_freed_memory.__module__} import keep_freed_memory
keep_freed_memory()
for turn in range(8):
    block = torch.ones(6 * 2**20)  # 24 MB, as a gradient that each step allocates and frees
    del block
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    if turn > 5:  # by then no smaller block takes a piece of what it needs
        print(faults - before)
    before = faults
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's malloc is tuned")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "0"}, False)])
def test_freed_memory_is_kept_unless_the_user_has_tuned_malloc(environment, kept):
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    for faults in map(int, done.stdout.split()):
        assert (faults < 100) == kept  # 24 MB of fresh pages are 6,144 faults
