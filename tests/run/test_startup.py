"""What a command pays before it does anything: imports that it has no use for, and code compiled anew."""

import json
import os
import shutil
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from gpt2_lightning.__main__ import main
from gpt2_lightning.compile_cache import keep_compiled_code
from gpt2_lightning.model import GPT, GPTConfig

PROBE = """
import json, sys
from gpt2_lightning.__main__ import main
code = main({args!r})
heavy = ("torch", "lightning", "torchmetrics", "numpy", "datasets", "transformers", "matplotlib", "tensorboard")
print(json.dumps([code, [name for name in heavy if name in sys.modules]]))
"""


def _imported_by(args: list[str]) -> tuple[int, set[str]]:
    done = subprocess.run([sys.executable, "-c", PROBE.format(args=args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize(
    "args", [["--help"], ["prepare", "--help"], ["export", "--help"], ["bench", "--help"]], ids=str
)
def test_help_imports_nothing_heavy(args):
    assert _imported_by(args) == (0, set())


def test_the_version_is_told_without_imports(capsys):
    assert _imported_by(["--version"]) == (0, set())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpt2_lightning {version('gpt2_lightning')}\n"


def test_prepare_imports_neither_torch_nor_lightning():
    Path("poem.txt").write_text("Tyger Tyger, burning bright, In the forests of the night\n" * 50)
    code, modules = _imported_by(["prepare", "--source", "poem.txt", "--out", "shards"])
    assert code == 0
    assert modules == {"numpy"}


@pytest.mark.parametrize("format", ["hf", "llmc"])
def test_export_does_not_import_lightning(format):
    model = GPT(GPTConfig(block_size=8, n_layer=1, n_head=1, n_embd=8))
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    config = {"block_size": 8, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 8}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": config}}, "tiny.ckpt")
    code, modules = _imported_by(["export", "tiny.ckpt", "out", "--format", format])
    assert code == 0
    assert "torch" in modules
    assert not {"lightning", "torchmetrics", "datasets", "transformers", "matplotlib", "tensorboard"} & modules


def test_fit_collects_garbage_but_not_among_what_was_imported():
    code = "import gc\nfrom gpt2_lightning.__main__ import main\nmain(['fit', '--help'])\n"
    code += "print(gc.isenabled(), gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    enabled, frozen = done.stdout.splitlines()[-1].split()
    assert enabled == "True"
    assert int(frozen) > 100_000


@pytest.fixture
def no_cache_chosen(monkeypatch, tmp_path):
    """As it is when torch has been imported and the user has said nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_compiled_code_goes_to_the_users_cache(no_cache_chosen, tmp_path):
    keep_compiled_code()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder == tmp_path / "cache" / "gpt2_lightning" / "inductor"
    assert os.name != "posix" or stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_without_xdg_it_is_below_the_home(no_cache_chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".cache" / "gpt2_lightning" / "inductor")


def test_a_users_own_choice_wins(no_cache_chosen, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("open_to_others", ["gpt2_lightning", "gpt2_lightning/inductor"])
def test_a_folder_that_others_can_write_to_is_not_taken(open_to_others, no_cache_chosen, tmp_path):
    (tmp_path / "cache" / "gpt2_lightning" / "inductor").mkdir(parents=True)
    (tmp_path / "cache" / open_to_others).chmod(0o777)
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()


def test_a_folder_that_cannot_be_made_leaves_torchs_choice(no_cache_chosen, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file, no folder")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()


def test_an_uncompiled_run_makes_no_cache_and_a_compiled_one_asks_for_it(
    no_cache_chosen, tmp_path, monkeypatch, make_shards, write_recipe
):
    recipe = str(write_recipe(make_shards(), trainer={"max_steps": 1}, validation={"every_n_steps": 0}))
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    assert main(["fit", "--config", recipe, "--run_dir", "plain"]) == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()
    assert main(["fit", "--config", recipe, "--run_dir", "compiled", "--model.compile", "true"]) == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_leaves_its_code_in_the_users_cache(make_shards, write_recipe, tmp_path):
    recipe = str(write_recipe(make_shards(), trainer={"max_steps": 1}, validation={"every_n_steps": 0}))
    command = [sys.executable, "-m", "gpt2_lightning", "fit", "--config", recipe, "--model.compile", "true"]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    subprocess.run(command, check=True, timeout=300, env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert any((tmp_path / "cache" / "gpt2_lightning" / "inductor").rglob("*.so"))


FAULTS = """
import resource, torch
from gpt2_lightning.cli.launchers import keep_freed_memory
keep_freed_memory()
for turn in range(8):
    block = torch.ones(6 * 2**20)  # 24 MB, as a gradient that each step allocates and frees
    del block
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    if turn > 5:  # by then no smaller block takes a piece of what it needs
        print(faults - before)
    before = faults
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "0"}, False)])
def test_a_run_keeps_what_it_frees_unless_the_user_has_set_the_allocator(environment, kept):
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    for faults in map(int, done.stdout.split()):
        assert (faults < 100) == kept  # fresh, its 24 MB are 6,144 pages
