"""``gpt2 fit``, ``validate`` and ``plan``: LightningCLI over our module, data and callbacks. Wiring, nothing else."""

import os
import re
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt2_lightning.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint
from gpt2_lightning.callbacks.dashboard import Dashboard
from gpt2_lightning.callbacks.hellaswag import HellaSwag
from gpt2_lightning.callbacks.log_txt import LogTxt
from gpt2_lightning.callbacks.nonfinite import NonFinite
from gpt2_lightning.callbacks.progress import StepProgressBar
from gpt2_lightning.callbacks.samples import Samples
from gpt2_lightning.callbacks.signals import stop_signal
from gpt2_lightning.callbacks.validation import ValidationLoss
from gpt2_lightning.checkpoints.ours import read_checkpoint
from gpt2_lightning.cli.launchers import (
    TRAINER_DEFAULTS,
    Resume,
    check_nodes,
    check_optimizer,
    check_seed,
    check_strategy,
    check_trainer_settings,
    check_world_size,
    checkpoint_to_resume,
    claim,
    end_with_launcher,
    is_first_process,
    keep_freed_memory,
    requeue,
    run_callbacks,
    silence_libraries,
)
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.errors import UserError
from gpt2_lightning.files import atomic_file
from gpt2_lightning.module import GPTModule
from gpt2_lightning.tokenizer import VOCAB_SIZE

CONFIG_FLAGS = {"--config", "-c"}
SECTIONS = ("trainer", "model", "data", "validation", "hellaswag", "samples", "nonfinite", "checkpoint")


class Parser(LightningArgumentParser):
    """jsonargparse whose usage errors are one line of usage and one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        print("usage: gpt2 fit|validate|plan --config FILE [--trainer.… --model.… --data.…]", file=sys.stderr)
        print(f"gpt2: error: {one_sentence(' '.join(message.split()))}", file=sys.stderr)
        raise SystemExit(2)


KINDS = {
    "int": ["a whole number"],
    "float": ["a number"],
    "bool": ["true", "false"],
    "str": ["text"],
    "list": ["a list"],
    "NoneType": ["null"],
}
"""Types as jsonargparse calls them, and in words."""


def one_sentence(message: str) -> str:
    """What jsonargparse says of a value that does not fit, put in order: what it is, and what it may be."""
    key = re.match(r'Parser key "([^"]+)": ', message)
    value = re.match(r".*(?:Got value|Given value|import path string): (.*)", message)
    may_be: list[str] = []
    types = message.partition(" Errors: ")[0]  # what follows names them once more
    for kind, words, elements in re.findall(r"<class '(\w+)'>|Literal\[([^]]*)\]|tuple with (\d+)", types):
        may_be += KINDS.get(kind, []) + [word.strip("'") for word in words.split(", ") if word]
        may_be += [f"a list of {elements}"] if elements else []
    if "import path" in message:
        may_be.append("the import path of a class, such as torch.optim.AdamW")
    if key is None or value is None or not may_be:
        return f"{message.rstrip('.').replace('. ', '; ')}: correct it, or see `gpt2 fit --help`"
    *others, last = dict.fromkeys(may_be)
    return f"{key[1]} is {value[1]}: give {', '.join(others)}{' or ' if others else ''}{last}"


class SaveConfig(SaveConfigCallback):
    """The resolved config of each start, into the run's folder: config.yaml, config_1.yaml, …"""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Too early: a start that is refused leaves none."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        folder, number = Path(trainer.default_root_dir), 0
        while (path := folder / (f"config_{number}.yaml" if number else "config.yaml")).exists():
            number += 1
        config = self.config.clone()
        config.model.config = pl_module.hparams["config"]  # the weights' own, where it was null
        config.ckpt_path = None  # of this start alone
        with atomic_file(path) as file:
            file.write(self.parser.dump(config, skip_none=False, skip_validation=True).encode())


class CLI(LightningCLI):
    """Adds to LightningCLI the callbacks' sections, the run's folder, and resuming."""

    command = "fit"
    """The one that is run: the parser of another would be half of the time that parsing takes."""

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        return {cls.command: LightningCLI.subcommands()[cls.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ValidationLoss, "validation")
        parser.add_lightning_class_args(HellaSwag, "hellaswag")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(NonFinite, "nonfinite")
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        into = "data.init_args" if self.subclass_mode_data else "data"
        parser.link_arguments("validation.tokens", f"{into}.validation_tokens")
        parser.add_argument("--run_dir", type=str | None, help="folder of the run (default: runs/<the config's name>)")
        parser.add_argument(
            "--expected", type=dict[str, float], default={}, help="figures to print beside `validate`'s, by their names"
        )
        parser.add_argument(
            "--resume",
            type=Resume,
            default="auto",
            help="go on from run_dir/checkpoints/last.ckpt: if it is there, only if it is there, or not at all",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        seed = self.config[self.config.subcommand].seed_everything
        if type(seed) is int and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything is {seed}: give a whole number from 0 to 2**32 - 1")

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's hyper-parameters never overrule what the user typed."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.run_dir == "":
            raise UserError("run_dir is empty: give the folder of the run, or leave it out")
        if config.run_dir is None:
            config.run_dir = str(Path("runs") / Path(str(config.config[-1])).stem)
        self.run_dir = Path(config.run_dir)
        if self.subcommand == "validate":
            last = self.run_dir / "checkpoints" / "last.ckpt"
            if config.ckpt_path is None and config.model.init_from is None:
                if not last.exists():
                    raise UserError("nothing to validate: give --ckpt_path FILE, or --model.init_from gpt2")
                if is_first_process():
                    print(f"validating {last}")
                config.ckpt_path = str(last)
            if config.trainer.limit_val_batches == 0:
                raise UserError("trainer.limit_val_batches is 0, so that nothing would be validated: leave it out")
            if config.ckpt_path is not None:  # one door to weights: whatever `load` opens
                config.model.init_from, config.ckpt_path = config.ckpt_path, None
            if config.trainer.strategy == "fully_shard":  # evaluation alone needs no more than the weights
                config.trainer.strategy = "auto"
            return
        check_trainer_settings(config.trainer)
        self.claim = claim(self.run_dir) if is_first_process() else nullcontext()
        self.resumed_step = 0
        # beside the config, whose saved copy is a recipe for other runs too
        typed = config.ckpt_path and Path(config.ckpt_path)
        self.checkpoint = checkpoint_to_resume(self.run_dir, config.resume, typed)
        self.begun_from = typed if typed != self.checkpoint else None
        if self.checkpoint is not None:
            checkpoint = read_checkpoint(self.checkpoint)
            self.resumed_step = checkpoint["global_step"]
            check_seed(checkpoint, config.seed_everything)
            check_optimizer(checkpoint, config.model.optimizer.class_path)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        fit = self.subcommand == "fit"
        if config["logger"] in (None, True):
            config["logger"] = self._loggers() if fit else False
        config["default_root_dir"] = str(self.run_dir)
        config["plugins"] = [*_listed(config["plugins"]), AtomicCheckpointIO()]
        for callback in callbacks:
            if isinstance(callback, StepCheckpoint) and fit:
                callback.ckpt_path = self.config.fit.ckpt_path and str(self.config.fit.ckpt_path)
        if config["enable_checkpointing"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, StepCheckpoint)]
        if config["enable_progress_bar"] is not False:
            callbacks = [StepProgressBar(), *callbacks]
        if fit:
            callbacks = [*run_callbacks(), Dashboard(self.config.fit.as_dict()), *callbacks]
        check_strategy(config["strategy"])
        if config["strategy"] == "ddp":  # gradients live in DDP's buckets: one copy of them less, 0.5 GB at 124M
            config["strategy"] = DDPStrategy(gradient_as_bucket_view=True)
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, RuntimeError, ValueError, TypeError, ImportError) as error:
            if "gpu backend" in str(error):
                raise UserError(
                    "trainer.accelerator is gpu, and torch finds none here: install its build for your GPU, or give "
                    "--trainer.accelerator cpu --trainer.devices 1, which configs/quickstart.yaml is made for"
                ) from error
            raise UserError(f"the trainer cannot be set up so ({error}): correct the trainer section") from error
        check_world_size(trainer)
        check_nodes(trainer)
        return trainer

    def _loggers(self) -> list[Logger]:
        """One folder for all starts of a run, whose events TensorBoard reads as one line."""
        while any(self.run_dir.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)  # files are read in the order of their names, which tell the second
        # a validation at the resumed step came before its checkpoint and stays; what came after is made again
        purge_step = self.resumed_step + 1 if self.resumed_step else 0
        events = TensorBoardLogger(
            self.run_dir.parent,
            self.run_dir.name,
            version="",
            default_hp_metric=False,
            purge_step=purge_step,
            filename_suffix=f".start{len(list(self.run_dir.glob('events.out.tfevents.*')))}",
        )
        return [events, LogTxt(self.run_dir, self.resumed_step)]

    def fit(self, model: GPTModule, **kwargs: Any) -> None:
        if self.trainer.is_global_zero:
            shape = ", ".join(f"{name}={value}" for name, value in model.hparams["config"].items())
            print(f"model: {model.model.num_parameters():,} parameters ({shape})")
            if self.checkpoint is not None:
                begun = f"; --ckpt_path {self.begun_from} is what the run began with" if self.begun_from else ""
                print(f"resuming from {self.checkpoint} at step {self.resumed_step}{begun}")
        with self.claim:
            self.trainer.fit(model, **kwargs | {"ckpt_path": self.checkpoint})
        last = self.run_dir / "checkpoints" / "last.ckpt"
        number = stop_signal(self.trainer)
        if number:
            if self.trainer.is_global_zero:
                print(f"\n{signal.Signals(number).name}: stopped after step {self.trainer.global_step}; ", end="")
                print(f"the same command goes on from {last}" if last.exists() else "no checkpoint, as asked")
            self.trainer.strategy.barrier("stopped")  # a rank that exits first would look like one that failed
            # SIGUSR1 is SLURM's warning of the time limit; scancel sends SIGTERM, and means it
            if number == signal.SIGUSR1 and self.trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
                requeue()
            raise SystemExit(128 + number)
        if self.trainer.is_global_zero and last.exists():
            if self.resumed_step >= self.trainer.max_steps:
                print(f"this run is finished, raise trainer.max_steps={self.trainer.max_steps} to go on")
            print(f"\n{self.trainer.global_step} steps done; checkpoint: {last}")
            if model.model.config.vocab_size >= VOCAB_SIZE:
                prompt = shlex.quote(self.config.fit.samples.prompt)
                print(f"next: gpt2 generate {shlex.quote(str(last))} --prompt {prompt}")
            else:  # not GPT-2's tokens, so there is no text to show
                recipe = shlex.quote(str(self.run_dir / "config.yaml"))
                print(f"next: gpt2 validate --config {recipe} --ckpt_path {shlex.quote(str(last))}")

    def validate(self, model: GPTModule, **kwargs: Any) -> None:
        self.trainer.validate(model, **kwargs | {"verbose": False})
        if not self.trainer.is_global_zero:
            return
        for name, value in self.config.validate.expected.items():
            found = self.trainer.callback_metrics.get(name)
            print(f"{name}: expected {value}, found {'nothing' if found is None else f'{float(found):.4f}'}")


def _listed(value: Any) -> list[Any]:
    """What Lightning takes alone or in a list, in a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def names_data_class(args: list[str]) -> bool:
    """Whether data is a class of the user's own, with ``class_path`` and ``init_args``, rather than plain settings."""
    if any(arg == "--data" or arg.startswith(("--data=", "--data.class_path")) for arg in args):
        return True
    pairs = zip(args, [*args[1:], ""], strict=True)
    paths = [arg.partition("=")[2] or following for arg, following in pairs if arg.partition("=")[0] in CONFIG_FLAGS]
    recipes = [recipe_in(path, args[0]) for path in map(Path, paths) if path.is_file()]
    return any("class_path" in (recipe.get("data") or {}) for recipe in recipes)


def recipe_in(path: Path, command: str) -> dict[str, Any]:
    """The settings in a file, each section of which holds settings again; ends the command where it is none."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        usage_error(command, f"{path} is no YAML in UTF-8 ({' '.join(str(error).split())}): correct it")
    if not isinstance(recipe, dict):
        usage_error(command, f"{path} holds no settings: give a recipe, such as configs/quickstart.yaml")
    for section in SECTIONS:
        if not isinstance(recipe.get(section), dict | None):  # the parser would take the defaults, without a word
            usage_error(command, f"{path} has {section}: {recipe[section]}, where settings belong: correct it")
    return recipe


def usage_error(command: str, sentence: str) -> NoReturn:
    print(f"usage: gpt2 {command} --config FILE [--trainer.… --model.… --data.…]", file=sys.stderr)
    print(f"gpt2 {command}: error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def run(args: list[str], cli: type[CLI] = CLI) -> CLI:
    """Runs ``fit …`` or ``validate …``."""
    if not {*CONFIG_FLAGS, "-h", "--help", "--print_config"} & {arg.partition("=")[0] for arg in args}:
        recipes = sorted(str(path) for path in Path("configs").glob("*.yaml"))
        which = ", ".join(recipes) or "those in configs/ of the repository, which is not this folder"
        usage_error(args[0], f"no --config: give a recipe, the recipes are {which}")
    end_with_launcher()
    silence_libraries()
    keep_freed_memory()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, as in the video; bf16-mixed does not care
    of_command = type(cli.__name__, (cli,), {"command": "validate" if args[0] == "validate" else "fit"})
    return of_command(
        GPTModule,
        TokenDataModule,
        subclass_mode_data=names_data_class(args),
        save_config_callback=SaveConfig,
        trainer_defaults=TRAINER_DEFAULTS,
        seed_everything_default=1337,
        parser_kwargs={"parser_mode": "yaml"},
        parser_class=Parser,
        args=args,
        auto_configure_optimizers=False,
    )


class Reader(CLI):
    """Parses as ``gpt2 fit`` does, and builds nothing: the devices of the recipe need not be there."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, ["fit", *args[1:]])

    def before_instantiate_classes(self) -> None:
        """No folder is claimed."""

    def instantiate_classes(self) -> None:
        """No trainer, no model, no data."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


def read_recipe(args: list[str]) -> Any:
    """What ``gpt2 fit`` would train with the arguments of ``plan …``: the sections of the recipe, as values."""
    return run(args, Reader).config.fit
