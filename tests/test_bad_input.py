"""Bad input: one clear sentence with the mend in it, an exit code that is not 0, no traceback, nothing lost."""

import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2_lightning.__main__ import main
from gpt2_lightning.model import GPTConfig
from gpt2_lightning.module import GPTModule

HUGE = str(10**21)  # more than 64 bits hold
NO_NUMBER = ["many", "[1, 2]", "{a: 1}", ""]
NO_WHOLE_NUMBER = [*NO_NUMBER, "2.5", ".nan", ".inf", "1e30"]
MUON = ["--model.optimizer", "gpt2_lightning.optim.Muon"]
STABLE = ["--model.lr_scheduler", "gpt2_lightning.schedule.WarmupStableDecay", "--model.lr_scheduler.warmup_steps", "1"]

WRONG = {
    "seed_everything": NO_WHOLE_NUMBER,
    "trainer.max_steps": [*NO_WHOLE_NUMBER, "null", "0", "-1"],
    "trainer.log_every_n_steps": NO_WHOLE_NUMBER,
    "trainer.gradient_clip_val": NO_NUMBER,
    "trainer.accumulate_grad_batches": [*NO_WHOLE_NUMBER, "0", "-1", HUGE],
    "model.config.block_size": [*NO_WHOLE_NUMBER, "null", "0", "-1"],
    "model.config.vocab_size": [*NO_WHOLE_NUMBER, "null", "0", "-1"],
    "model.config.n_layer": [*NO_WHOLE_NUMBER, "null", "0", "-1"],
    "model.config.n_head": [*NO_WHOLE_NUMBER, "null", "0", "-1", HUGE],
    "model.config.n_embd": [*NO_WHOLE_NUMBER, "null", "0", "-1"],
    "model.optimizer.lr": [*NO_NUMBER, "null", "-1", "-1e-30", "-.inf", ".nan"],
    "model.optimizer.betas": [*NO_NUMBER, "0.9", "[0.9]", "[0.9, 1.0]", "[-0.1, 0.9]", "[.nan, 0.9]"],
    "model.optimizer.eps": [*NO_NUMBER, "null", "-1e-8", ".nan"],
    "model.optimizer.weight_decay": [*NO_NUMBER, "null", "-0.1", ".nan"],
    "model.optimizer.adamw_lr": [*NO_NUMBER, "-1", "-.inf", ".nan"],
    "model.optimizer.momentum": [*NO_NUMBER, "null", "-0.1", "1", "1.5", ".inf", ".nan"],
    "model.optimizer.momentum_warmup_steps": [*NO_WHOLE_NUMBER, "null", "-1", HUGE],
    "model.lr_scheduler.warmup_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "model.lr_scheduler.max_steps": [*NO_WHOLE_NUMBER, "0", "-1"],
    "model.lr_scheduler.min_lr": [*NO_NUMBER, "null", "-1e-9", "1", ".inf", ".nan"],
    "model.lr_scheduler.decay_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "data.seed": [*NO_WHOLE_NUMBER, "null", "-1"],
    "data.total_batch_tokens": [*NO_WHOLE_NUMBER, "null", "0", "-1", "100", HUGE],
    "data.micro_batch_size": [*NO_WHOLE_NUMBER, "null", "0", "-1", "3", HUGE],
    "data.num_workers": [*NO_WHOLE_NUMBER, "null", "-1"],
    "data.batch_size_schedule.start_tokens": [*NO_WHOLE_NUMBER, "null", "0", "-1", "3", HUGE],
    "data.batch_size_schedule.ramp_tokens": [*NO_NUMBER, "null", "0", "-1", ".inf", ".nan"],
    "validation.every_n_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "validation.tokens": [*NO_WHOLE_NUMBER, "null"],
    "hellaswag.every_n_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "samples.every_n_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "samples.num_samples": [*NO_WHOLE_NUMBER, "null"],
    "samples.max_new_tokens": [*NO_WHOLE_NUMBER, "null"],
    "samples.temperature": [*NO_NUMBER, "null"],
    "samples.top_k": [*NO_WHOLE_NUMBER, "null"],
    "samples.seed": [*NO_WHOLE_NUMBER, "null"],
    "nonfinite.stop_after": [*NO_WHOLE_NUMBER, "null", "-1"],
    "checkpoint.every_n_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "checkpoint.keep": [*NO_WHOLE_NUMBER, "null", "-1", "1"],
}
"""Each number that a recipe may give, and what it may not be."""
BESIDE = {  # what makes a recipe have the number at all
    "model.optimizer.adamw_lr": MUON,
    "model.optimizer.momentum": MUON,
    "model.optimizer.momentum_warmup_steps": MUON,
    "model.lr_scheduler.decay_steps": STABLE,
    "data.batch_size_schedule.start_tokens": ["--data.batch_size_schedule.ramp_tokens", "100"],
    "data.batch_size_schedule.ramp_tokens": ["--data.batch_size_schedule.start_tokens", "64"],
}


@pytest.fixture
def refuses_number(write_recipe, make_shards, capsys, tmp_path):
    """``gpt2 fit`` with one wrong number ends at start with one sentence that names it, and no run has begun."""
    recipe = write_recipe(make_shards())

    def check(field, value):
        capsys.readouterr()
        code = main(["fit", "--config", str(recipe), *BESIDE.get(field, []), f"--{field}={value}"])
        lines = capsys.readouterr().err.strip().splitlines()
        assert (code, len(lines)) in ((1, 1), (2, 2)), lines
        assert lines[-1].startswith("gpt2")
        assert ": error: " in lines[-1]
        assert field.rpartition(".")[2] in lines[-1] or f"{field.rpartition('.')[0]} cannot be set up" in lines[-1]
        assert not [*(tmp_path / "run").glob("config*"), *(tmp_path / "run").glob("checkpoints/*")]

    return check


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wrong=st.sampled_from([(field, value) for field, values in WRONG.items() for value in values]))
def test_a_wrong_number_anywhere_is_refused_in_one_sentence(wrong, refuses_number):
    refuses_number(*wrong)


@pytest.mark.slow
@pytest.mark.parametrize("field", WRONG)
def test_each_number_is_refused_where_it_is_wrong(field, refuses_number):
    for value in WRONG[field]:
        refuses_number(field, value)


def test_usage_errors_are_one_line_of_usage_and_one_sentence(refused, write_recipe, make_shards):
    recipe = write_recipe(make_shards())
    refused(["nonsense"], "no command 'nonsense'", "fit, validate, prepare", code=2)
    refused(["fit"], "no --config", code=2)
    refused(["fit", "--config", "absent.yaml"], "absent.yaml", "does not exist", code=2)
    refused(["fit", "--config", recipe, "--model.foo", "1"], "--model.foo", code=2)
    refused(["fit", "--config", recipe, "--trainer.max_stepz", "1"], "--trainer.max_stepz", code=2)
    refused(["fit", "--config", recipe, "--data.order", "random"], "sequential", "shuffled", code=2)
    refused(["fit", "--config", recipe, "--model.config.n_layer", "two"], "n_layer", "int", code=2)
    refused(["generate"], "PATH", code=2)
    refused(["prepare", "--source", "stdlib"], "--out", code=2)
    refused(["export", "a", "b", "--format", "gguf"], "gguf", "hf", "llmc", code=2)


def test_the_version_is_told_without_imports(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gpt2_lightning {version('gpt2_lightning')}\n"


def test_an_unknown_key_in_the_recipe_is_named(refused, write_recipe, make_shards):
    recipe = write_recipe(make_shards(), data={"total_batch_size": 128})
    refused(["fit", "--config", recipe], "total_batch_size", code=2)


SECTIONS = ["trainer", "model", "model.config", "model.optimizer.init_args", "model.lr_scheduler.init_args", "data"]
SECTIONS += ["validation", "hellaswag", "samples", "checkpoint", "nonfinite", ""]


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(section=st.sampled_from(SECTIONS), key=st.text("abcxyz_", min_size=5, max_size=9))
def test_an_unknown_key_in_any_section_is_named(section, key, write_recipe, make_shards, refused, tmp_path):
    root = tmp_path / "shards"
    recipe = yaml.safe_load(write_recipe(root if root.exists() else make_shards()).read_text())
    place = recipe
    for name in filter(None, section.split(".")):
        place = place.setdefault(name, {})
    place[key] = 1
    Path("odd.yaml").write_text(yaml.safe_dump(recipe))
    refused(["fit", "--config", "odd.yaml"], key, code=2)


SHAPES = st.builds(GPTConfig, *[st.integers(1, 2)] * 3, st.just(1), st.integers(1, 2))


@given(ours=SHAPES, theirs=SHAPES)
def test_each_difference_of_a_checkpoint_s_shape_is_named_and_no_other(ours, theirs):
    module, checkpoint = GPTModule(ours), {"hyper_parameters": {"config": asdict(theirs)}}
    different = [f"{name}={value} (theirs: {asdict(theirs)[name]})" for name, value in asdict(ours).items()]
    different = [text for text in different if re.fullmatch(r".*=(\d) \(theirs: (?!\1).\)", text)]
    if not different:
        module.on_load_checkpoint(checkpoint)
        return
    with pytest.raises(ValueError, match=re.escape(f"to resume from: {', '.join(different)}; give the shape")):
        module.on_load_checkpoint(checkpoint)


def test_a_missing_folder_of_shards(refused, write_recipe, tmp_path):
    refused(["fit", "--config", write_recipe(tmp_path / "nowhere")], "there is no folder", "nowhere", "data.root")


def test_a_missing_text_file(refused, write_recipe, tmp_path):
    recipe = write_recipe(tmp_path / "shards", data={"source": "absent.txt"})
    refused(["fit", "--config", recipe], "absent.txt")


def test_an_empty_corpus(refused, write_recipe, tmp_path):
    Path("empty.txt").touch()
    refused(["fit", "--config", write_recipe(tmp_path / "shards", data={"source": "empty.txt"})], "empty.txt")


def test_a_corpus_too_short_for_one_validation_window(refused, write_recipe, make_shards):
    recipe = write_recipe(make_shards(val=16))
    refused(["fit", "--config", recipe], "validation", "16 tokens", "17", "lower model.config.block_size")


def test_a_corpus_too_short_for_one_training_window(refused, write_recipe, make_shards):
    refused(["fit", "--config", write_recipe(make_shards(train=16))], "training", "16 tokens", "17")


def test_a_token_beyond_the_vocabulary(refused, write_recipe, make_shards):
    tokens = np.zeros(5_000)
    tokens[4_000] = 64
    refused(["fit", "--config", write_recipe(make_shards(train=tokens))], "token id 64", "vocab_size=64")


def test_a_truncated_shard(refused, write_recipe, make_shards):
    root = make_shards()
    shard = root / "tiny_train_000001.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(["fit", "--config", write_recipe(root)], "tiny_train_000001.npy")


def test_a_step_that_does_not_divide_names_the_micro_batches_that_would_do(refused, write_recipe, make_shards):
    root = make_shards()
    recipe = write_recipe(root, data={"micro_batch_size": 3})
    refused(["fit", "--config", recipe], "total_batch_tokens=128", "set data.micro_batch_size to one of [1, 2, 4, 8]")
    recipe = write_recipe(root, data={"total_batch_tokens": 100})
    refused(["fit", "--config", recipe], "total_batch_tokens=100", "a multiple of 16")


def test_accumulation_that_disagrees_with_the_batch(refused, write_recipe, make_shards):
    recipe = write_recipe(make_shards(), trainer={"accumulate_grad_batches": 4})
    refused(["fit", "--config", recipe], "accumulate_grad_batches=4", "takes 2 micro-batches on 1 device")


def test_part_of_a_step_is_refused(refused, write_recipe, make_shards):
    recipe = write_recipe(make_shards())
    args = ["fit", "--config", recipe]
    refused([*args, "--trainer.overfit_batches", "1"], "overfit_batches=1", "set data.total_batch_tokens", "64")
    refused([*args, "--trainer.limit_train_batches", "3"], "set trainer.max_steps instead")
    refused([*args, "--trainer.gradient_clip_algorithm", "value"], "global norm")
    refused([*args, "--data.seed", "-1"], "data.seed is -1")
    refused([*args, "--data.num_workers", "-1"], "data.num_workers is -1")


def test_nothing_to_validate(refused, write_recipe, make_shards):
    refused(["validate", "--config", write_recipe(make_shards())], "--ckpt_path", "--model.init_from")


def test_a_run_without_an_end(refused, write_recipe, make_shards):
    refused(["fit", "--config", write_recipe(make_shards(), trainer={"max_steps": -1})], "trainer.max_steps")


def test_heads_that_do_not_divide_the_width(refused, write_recipe, make_shards):
    args = ["fit", "--config", write_recipe(make_shards()), "--model.config.n_head", "3"]
    refused(args, "n_head=3 does not divide n_embd=16", "set n_head to one of")


def test_an_optimizer_that_is_none(refused, write_recipe, make_shards):
    recipe = write_recipe(make_shards())
    refused(["fit", "--config", recipe, "--model.optimizer", "Foo"], "model.optimizer", "Foo", code=2)
    refused(["fit", "--config", recipe, "--model.optimizer", "torch.optim.LBFGS"], "LBFGS", "parameter groups")


def test_checkpoints_that_are_not_ours(refused, write_recipe, make_shards, tmp_path):
    recipe = write_recipe(make_shards())
    torch.save({"model": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    for path in ("foreign.ckpt", "text.ckpt", "absent.ckpt"):
        refused(["validate", "--config", recipe, "--ckpt_path", path], path)
        refused(["fit", "--config", recipe, "--ckpt_path", path], path)
        refused(["generate", path, "--prompt", "x"], path)
        refused(["hellaswag", path, "--examples", "builtin"], path)
        refused(["export", path, "out"], path)
        assert not Path("out").exists()


def test_a_checkpoint_of_another_shape(refused, write_recipe, make_shards, tmp_path):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe)]) == 0
    wider = ["--model.config.n_embd", "32"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    refused(["fit", "--config", recipe, *wider], "n_embd=32 (theirs: 16)", "resume")
    refused(["validate", "--config", recipe, "--ckpt_path", last, *wider], "n_embd=32 (theirs: 16)")
    refused(
        ["fit", "--config", recipe, "--model.init_from", last, *wider, "--run_dir", "new"], "n_embd=32 (theirs: 16)"
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (["--data.seed", "5"], "seed=1337, not 5"),
        (["--data.order", "shuffled"], "order=sequential, not shuffled"),
        (["--data.total_batch_tokens", "64"], "total_batch_tokens=128, not 64"),
        (["--data.root", "others"], "other shards than those in others"),
    ],
)
def test_resuming_on_other_data_is_refused_and_nothing_is_lost(
    change, part, refused, write_recipe, make_shards, tmp_path
):
    recipe = write_recipe(make_shards())
    make_shards(train=20_001, name="others")
    assert main(["fit", "--config", str(recipe)]) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    refused(["fit", "--config", recipe, "--trainer.max_steps", "9", *change], part, "another run_dir")
    assert last.read_bytes() == before


def test_resume_must_and_never(refused, write_recipe, make_shards, tmp_path):
    recipe = write_recipe(make_shards())
    refused(["fit", "--config", recipe, "--resume", "must"], "last.ckpt does not exist", "resume is must")
    assert main(["fit", "--config", str(recipe)]) == 0
    refused(["fit", "--config", recipe, "--resume", "never"], "last.ckpt exists", "another run_dir")


def test_a_prompt_that_the_model_cannot_take(refused, write_recipe, make_shards, tmp_path):
    from gpt2_lightning.model import GPT, GPTConfig

    shape = {"block_size": 8, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 8}
    weights = {f"model.{k}": v for k, v in GPT(GPTConfig(**shape)).state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": shape}}, "small.ckpt")
    refused(["generate", "small.ckpt", "--prompt", "one two three four five six seven eight nine"], "9 tokens", "8")
    refused(["generate", "small.ckpt", "--prompt", ""], "prompt is empty")
    refused(["generate", "small.ckpt", "--prompt", "a", "--temperature", "0"], "temperature is 0")
    refused(["generate", "small.ckpt", "--prompt", "a", "--top_p", "1.5"], "top_p is 1.5")
    long = "a " * 20
    recipe = write_recipe(
        make_shards(vocab_size=64), model={"config": shape}, samples={"every_n_steps": 1, "prompt": long}
    )
    refused(["fit", "--config", recipe], "samples.prompt", "block_size is 8")


def test_an_optimizer_other_than_the_runs(refused, write_recipe, make_shards):
    recipe = write_recipe(make_shards(), checkpoint={"every_n_steps": 3})
    assert main(["fit", "--config", str(recipe)]) == 0
    args = ["fit", "--config", recipe, "--model.optimizer", "gpt2_lightning.optim.Muon"]
    refused(args, "trained with AdamW, not Muon", "--model.init_from")


def test_settings_that_lead_nowhere(refused, write_recipe, make_shards):
    args = ["fit", "--config", write_recipe(make_shards())]
    refused([*args, "--trainer.precision", "bf16-true"], "give bf16-mixed")
    refused([*args, "--model.lr_scheduler.min_lr", "1"], "lr_scheduler.min_lr is 1")
    refused([*args, "--model.lr_scheduler", "gpt2_lightning.schedule.Warmup"], "lr_scheduler")
    muon = ["--model.optimizer", "gpt2_lightning.optim.Muon", "--model.optimizer.momentum", "1.5"]
    refused([*args, *muon], "momentum=1.5")


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(refused, write_recipe, make_shards):
    args = ["fit", "--config", write_recipe(make_shards()), "--trainer.accelerator", "gpu"]
    refused(args, "torch finds none here", "--trainer.accelerator cpu --trainer.devices 1")
