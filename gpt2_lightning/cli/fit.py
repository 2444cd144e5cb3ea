"""``gpt2 fit``, ``validate`` and ``plan``: LightningCLI with our module, data module, callbacks and run folder."""

import json
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt2_lightning.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint
from gpt2_lightning.callbacks.progress import StepProgressBar
from gpt2_lightning.callbacks.signals import stop_signal
from gpt2_lightning.checkpoints.ours import read_checkpoint
from gpt2_lightning.cli.callbacks import SECTIONS, TRAINER_DEFAULTS, run_callbacks
from gpt2_lightning.cli.launchers import (
    check_nodes,
    check_strategy,
    check_world_size,
    end_with_launcher,
    is_rank0,
    requeue,
)
from gpt2_lightning.cli.run_folder import (
    Resume,
    SaveConfig,
    check_optimizer,
    check_seed,
    checkpoint_to_resume,
    claim,
    loggers,
)
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.errors import UserError
from gpt2_lightning.module import GPTModule
from gpt2_lightning.tokenizer import VOCAB_SIZE
from gpt2_lightning.tools.gpus import find_gpu
from gpt2_lightning.tools.plan import describe
from gpt2_lightning.tools.plan import plan as plan_recipe


def fit(args: list[str]) -> None:
    """``gpt2 fit``: train, or resume, the run of a recipe."""
    end_with_launcher()
    configure_libraries()
    cli = FitCLI(args)
    trainer, model = cli.trainer, cli.model
    if trainer.is_global_zero:
        shape = ", ".join(f"{name}={value}" for name, value in model.hparams["config"].items())
        print(f"model: {model.model.num_parameters():,} parameters ({shape})")
        if cli.checkpoint is not None:
            print(f"resuming from {cli.checkpoint} at step {cli.resumed_step}")
    with cli.claim:
        trainer.fit(model, datamodule=cli.datamodule, ckpt_path=cli.checkpoint)
    last = cli.run_dir / "checkpoints" / "last.ckpt"
    if stopped_by := stop_signal(trainer):
        end_after_signal(trainer, stopped_by, last)
    elif trainer.is_global_zero and last.exists():
        if cli.resumed_step >= trainer.max_steps:
            print(f"this run is complete: raise trainer.max_steps={trainer.max_steps} to train longer")
        else:
            print(f"\n{trainer.global_step} steps done; checkpoint: {last}")
        if model.model.config.vocab_size >= VOCAB_SIZE:
            prompt = shlex.quote(cli.config.samples.prompt)
            print(f"next: gpt2 generate {shlex.quote(str(last))} --prompt {prompt}")


def validate(args: list[str]) -> None:
    """``gpt2 validate``: validation loss and HellaSwag of a checkpoint or of published weights."""
    end_with_launcher()
    configure_libraries()
    cli = ValidateCLI(args)
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    if cli.trainer.is_global_zero:
        for name, expected in cli.config.expected.items():
            found = cli.trainer.callback_metrics.get(name)
            print(f"{name}: expected {expected}, found {'nothing' if found is None else f'{float(found):.4f}'}")


def plan(args: list[str]) -> None:
    """``gpt2 plan``: what a recipe needs, calculated before anything runs."""
    configure_libraries()
    config = PlanCLI(args).config
    check_trainer_settings(config.trainer)
    check_strategy(config.trainer.strategy)
    if config.micro_batch_size is not None:
        config.data.micro_batch_size = config.micro_batch_size
    gpu = None if config.gpu is None else find_gpu(config.gpu)
    found = plan_recipe(config, gpu, config.gpus, config.mfu, config.dollars_per_hour)
    print(json.dumps(found) if config.json else describe(found))


class RecipeCLI(LightningCLI):
    """The parser that fit, validate and plan share: a recipe is valid for all three."""

    command = ""

    def __init__(self, args: list[str]) -> None:
        self.usage = f"gpt2 {self.command} --config RECIPE [--trainer.… --model.… --data.…]"
        if not any(arg.partition("=")[0] in ("--config", "-c", "-h", "--help", "--print_config") for arg in args):
            recipes = ", ".join(sorted(map(str, Path("configs").glob("*.yaml")))) or "in the repository's configs/"
            print("usage:", self.usage, file=sys.stderr)
            print(f"gpt2 {self.command}: error: no --config given; the recipes are {recipes}", file=sys.stderr)
            raise SystemExit(2)
        super().__init__(
            GPTModule,
            TokenDataModule,
            subclass_mode_data=names_data_class(args),
            save_config_callback=None,  # FitCLI adds ours
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            parser_kwargs={"prog": f"gpt2 {self.command}", "usage": self.usage, "description": None},
            args=args,
            run=False,
            auto_configure_optimizers=False,  # GPTModule makes the decay groups, and steps the schedule each step
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for section, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, section)
        data = "data.init_args" if self.subclass_mode_data else "data"
        parser.link_arguments("validation.tokens", f"{data}.validation_tokens")
        parser.add_argument("--run_dir", type=str | None, help="folder of the run (default: runs/<the recipe's name>)")
        parser.add_argument(
            "--resume",
            type=Resume,
            default="auto",
            help="resume from run_dir/checkpoints/last.ckpt if it exists (auto), only if it exists (must), or never",
        )
        parser.add_argument("--ckpt_path", type=str | None, help="checkpoint to resume from instead, or to validate")
        parser.add_argument(
            "--expected", type=dict[str, float], default={}, help="figures to print beside those that validate finds"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # Lightning's own warns if there are arguments in sys.argv as well

    def before_instantiate_classes(self) -> None:
        recipe = Path(str(self.config.config[-1]))
        self.run_dir = Path(self.config.run_dir or Path("runs") / recipe.stem)
        self.config.run_dir = str(self.run_dir)


class FitCLI(RecipeCLI):
    command = "fit"

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config
        check_trainer_settings(config.trainer)
        check_strategy(config.trainer.strategy)
        self.claim = claim(self.run_dir) if is_rank0() else nullcontext()
        self.checkpoint = checkpoint_to_resume(self.run_dir, config.resume, config.ckpt_path and Path(config.ckpt_path))
        self.resumed_step = 0
        if self.checkpoint is not None:
            checkpoint = read_checkpoint(self.checkpoint)
            self.resumed_step = checkpoint["global_step"]
            check_seed(checkpoint, config.seed_everything)
            check_optimizer(checkpoint, config.model.optimizer.class_path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = {**self.config_init.trainer}
        sections = [self.config_init[name] for name in SECTIONS]
        if config["enable_checkpointing"] is False:
            sections = [callback for callback in sections if not isinstance(callback, StepCheckpoint)]
        for callback in sections:
            if isinstance(callback, StepCheckpoint):
                callback.ckpt_path = self.config.ckpt_path
        callbacks = run_callbacks(sections, progress_bar=config["enable_progress_bar"] is not False)
        config["callbacks"] = [*callbacks, *listed(config["callbacks"]), SaveConfig(self.parser, self.config)]
        if config["logger"] in (None, True):
            config["logger"] = loggers(self.run_dir, self.resumed_step)
        if config["strategy"] == "ddp":  # gradients live in DDP's buckets: one copy less, 0.5 GB at 124M
            config["strategy"] = DDPStrategy(gradient_as_bucket_view=True)
        return make_trainer(config, self.run_dir)


class ValidateCLI(RecipeCLI):
    command = "validate"

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config, last = self.config, self.run_dir / "checkpoints" / "last.ckpt"
        if config.ckpt_path is None and config.model.init_from is None:
            if not last.exists():
                raise UserError("nothing to validate: give --ckpt_path FILE or --model.init_from gpt2")
            config.ckpt_path = str(last)
        if config.ckpt_path is not None:  # evaluation needs the weights alone: whatever `load` opens
            config.model.init_from = config.ckpt_path
        if config.trainer.strategy == "fully_shard":
            config.trainer.strategy = "auto"

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = {**self.config_init.trainer}
        bar = [] if config["enable_progress_bar"] is False else [StepProgressBar()]
        config["callbacks"] = [*bar, *(self.config_init[name] for name in SECTIONS), *listed(config["callbacks"])]
        if config["logger"] in (None, True):
            config["logger"] = False  # an evaluation is not part of a run's curves
        return make_trainer(config, self.run_dir)


class PlanCLI(RecipeCLI):
    command = "plan"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpu", type=str | None, help="kind of GPU, such as h100 or 4090, or its memory: 24GB")
        parser.add_argument(
            "--gpus", type=PositiveInt | None, help="how many, over all nodes (default: the recipe's devices)"
        )
        parser.add_argument("--mfu", type=ClosedUnitInterval, default=0.4, help="assumed share of the GPUs' peak")
        parser.add_argument("--dollars_per_hour", type=NonNegativeFloat | None, help="price of one GPU")
        parser.add_argument(
            "--micro_batch_size", type=PositiveInt | str | None, help="short for --data.micro_batch_size"
        )
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    def instantiate_classes(self) -> None:
        """Build nothing: the recipe's devices need not be in this machine."""


def make_trainer(config: dict[str, Any], run_dir: Path) -> Trainer:
    """The Trainer of ``config``, whose processes are those that were started."""
    config = config | {"default_root_dir": str(run_dir), "plugins": [*listed(config["plugins"]), AtomicCheckpointIO()]}
    try:
        trainer = Trainer(**config)
    except (MisconfigurationException, RuntimeError, ValueError, TypeError, ImportError) as error:
        no_gpu = "gpu backend" in str(error)  # the first thing that a newcomer without a GPU sees
        fix = "give --trainer.accelerator cpu --trainer.devices 1" if no_gpu else "correct the recipe's trainer section"
        raise UserError(f"the Trainer cannot be set up ({error}): {fix}") from error
    check_world_size(trainer)
    check_nodes(trainer)
    return trainer


def listed(value: Any) -> list[Any]:
    """``value`` as a list, as Lightning takes one or several."""
    return value if isinstance(value, list) else [] if value is None else [value]


UNSUPPORTED_SETTINGS = {
    "min_steps": "would keep a run from stopping: leave it out",
    "max_epochs": "has no meaning here, for a run is one epoch: give trainer.max_steps",
    "val_check_interval": "counts micro-batches: give validation.every_n_steps",
    "check_val_every_n_epoch": "counts epochs, of which a run has one: give validation.every_n_steps",
    "limit_val_batches": "counts micro-batches: give validation.tokens",
    "use_distributed_sampler": "would split the sequences over ranks a second time: leave it out",
    "default_root_dir": "is the folder of the run: give run_dir",
}
"""Settings of the Trainer that a run would ignore or obey wrongly."""


def check_trainer_settings(trainer: Any) -> None:
    """Check the recipe's trainer section before anything is built.

    Raises:
        UserError: no ``max_steps``, 16-bit weights, or one of ``UNSUPPORTED_SETTINGS``.
    """
    if trainer.max_steps < 1:
        raise UserError("trainer.max_steps is not set: give the number of optimizer steps of the whole run")
    if str(trainer.precision) in ("bf16-true", "16-true"):
        raise UserError(
            f"trainer.precision {trainer.precision} keeps the weights in 16 bits, which loses small updates: give "
            f"{trainer.precision.replace('true', 'mixed')}"
        )
    for name, reason in UNSUPPORTED_SETTINGS.items():
        if trainer[name] not in (None, TRAINER_DEFAULTS.get(name)):
            raise UserError(f"trainer.{name} {reason}")


def names_data_class(args: list[str]) -> bool:
    """Whether ``data`` is a class of the user's own (class_path, init_args): the parser is another one then."""
    if any(arg == "--data" or arg.startswith(("--data=", "--data.class_path")) for arg in args):
        return True
    following = [*args[1:], ""]
    paths = [
        Path(arg.partition("=")[2] or after)
        for arg, after in zip(args, following, strict=True)
        if arg.partition("=")[0] in ("--config", "-c")
    ]
    try:
        recipes = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        return any("class_path" in (recipe.get("data") or {}) for recipe in recipes)
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError):
        return False  # not a recipe: the parser will say so


def end_after_signal(trainer: Trainer, number: int, last: Path) -> None:
    """Leave with 128 + ``number``, the shells' code for a signal; put a SLURM job back into the queue first."""
    if trainer.is_global_zero:
        saved = f"the same command resumes from {last}" if last.exists() else "no checkpoint was asked for"
        print(f"\n{signal.Signals(number).name}: stopped after step {trainer.global_step}; {saved}")
    trainer.strategy.barrier("stopped")  # a rank that exits first would look like one that failed
    # SIGUSR1 is SLURM's warning of the time limit; scancel sends SIGTERM, and means it
    if signal.Signals(number).name == "SIGUSR1" and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
        requeue()
    raise SystemExit(128 + number)


def configure_libraries() -> None:
    """TF32, and no tips or warnings that do not apply here."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, as in the video; bf16-mixed does not use it
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # about Lightning's own calls
    threading.excepthook = _report_thread_error
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # a micro-batch is read in under 1 ms
    warnings.filterwarnings("ignore", ".*have no logger configured.*")  # `validate` logs into no run
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")  # today's callbacks count
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 with torch 2.13
    warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")  # it starts at global_step


def _report_thread_error(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's writer thread raises its error (a full disk) again in the main thread, where it is reported."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)
