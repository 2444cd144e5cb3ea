"""Whatever value or key of a recipe is wrong, it is named in one sentence; test_misuse.py has whole command lines."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest
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
    "seed_everything": [*NO_WHOLE_NUMBER, "-1", HUGE],
    "trainer.max_steps": [*NO_WHOLE_NUMBER, "null", "0", "-1", HUGE],
    "trainer.devices": [*NO_WHOLE_NUMBER, "null", "0", "-1"],
    "trainer.log_every_n_steps": [*NO_WHOLE_NUMBER, "-1"],
    "trainer.gradient_clip_val": [*NO_NUMBER, "-1", "-1e-30", "-.inf", ".nan"],
    "trainer.accumulate_grad_batches": [*NO_WHOLE_NUMBER, "0", "-1", HUGE],
    "model.config.block_size": [*NO_WHOLE_NUMBER, "null", "0", "-1", HUGE],
    "model.config.vocab_size": [*NO_WHOLE_NUMBER, "null", "0", "-1", HUGE],
    "model.config.n_layer": [*NO_WHOLE_NUMBER, "null", "0", "-1", HUGE],
    "model.config.n_head": [*NO_WHOLE_NUMBER, "null", "0", "-1", HUGE],
    "model.config.n_embd": [*NO_WHOLE_NUMBER, "null", "0", "-1", HUGE],
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
    "data.seed": [*NO_WHOLE_NUMBER, "null", "-1", HUGE],
    "data.total_batch_tokens": [*NO_WHOLE_NUMBER, "null", "0", "-1", "100", HUGE],
    "data.micro_batch_size": [*NO_WHOLE_NUMBER, "null", "0", "-1", "3", HUGE],
    "data.num_workers": [*NO_WHOLE_NUMBER, "null", "-1", HUGE],
    "data.batch_size_schedule.start_tokens": [*NO_WHOLE_NUMBER, "null", "0", "-1", "3", HUGE],
    "data.batch_size_schedule.ramp_tokens": [*NO_NUMBER, "null", "0", "-1", ".inf", ".nan"],
    "validation.every_n_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "validation.tokens": [*NO_WHOLE_NUMBER, "null", "0", "-1"],
    "hellaswag.every_n_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "samples.every_n_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "samples.num_samples": [*NO_WHOLE_NUMBER, "null", "0", "-1", HUGE],
    "samples.max_new_tokens": [*NO_WHOLE_NUMBER, "null", "0", "-1", HUGE],
    "samples.temperature": [*NO_NUMBER, "null", "0", "-1", "1e-320", ".nan"],
    "samples.top_k": [*NO_WHOLE_NUMBER, "null", "0", "-1"],
    "samples.seed": [*NO_WHOLE_NUMBER, "null", "-1", HUGE],
    "nonfinite.stop_after": [*NO_WHOLE_NUMBER, "null", "-1"],
    "checkpoint.every_n_steps": [*NO_WHOLE_NUMBER, "null", "-1"],
    "checkpoint.keep": [*NO_WHOLE_NUMBER, "null", "-1", "1"],
}
"""Each number that a recipe may give, and what it may not be."""
TEXT = ["--model.config.vocab_size", "50257", "--model.config.n_embd", "2", "--samples.every_n_steps", "1"]
TEXT += ["--samples.prompt", "a"]
BESIDE = {  # what makes a recipe have the number at all
    "model.optimizer.adamw_lr": MUON,
    "model.optimizer.momentum": MUON,
    "model.optimizer.momentum_warmup_steps": MUON,
    "model.lr_scheduler.decay_steps": STABLE,
    **{f"samples.{name}": TEXT for name in ("num_samples", "max_new_tokens", "temperature", "top_k", "seed")},
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
