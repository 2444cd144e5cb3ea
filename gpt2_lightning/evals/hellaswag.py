"""HellaSwag (Zellers et al. 2019): pick the right ending out of four, in the two styles of the published figures.

``nanogpt``: build-nanogpt's rules. The raw ``ctx``, then ``" " + ending``, each tokenized separately. acc compares the
summed loss, acc_norm the mean loss per token. GPT-2 124M scores 0.2955 acc_norm.

``harness``: lm-evaluation-harness, task ``hellaswag`` version 1.0. ``activity_label: ctx_a Ctx_b``, cleaned by its text
rules and tokenized together with the ending. acc compares the summed log-likelihood, acc_norm the log-likelihood
divided by the characters of the ending. GPT-2 124M scores 0.3114 acc_norm.
"""

import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from gpt2_lightning.errors import UserError
from gpt2_lightning.evals.multiple_choice import Request, completion_losses
from gpt2_lightning.evals.scores import ExampleScore, Score
from gpt2_lightning.model import GPT
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer

Style = Literal["nanogpt", "harness"]
BUILTIN = "builtin"
"""Path that stands for the examples shipped with this package."""
HUB_NAME = "Rowan/hellaswag"
_HUB_FILE = "data/validation-00000-of-00001.parquet"
_HUB_SECONDS = 2.0


@dataclass(frozen=True)
class Example:
    """One question, with the field names of the original files."""

    ctx: str
    """The context: ``ctx_a``, a space and ``ctx_b``."""
    endings: tuple[str, ...]
    """Four endings."""
    label: int
    """Index of the right one."""
    activity_label: str | None = None
    """Topic. It and the next two may be missing from files made for the nanogpt style."""
    ctx_a: str | None = None
    """Complete sentences of the context."""
    ctx_b: str | None = None
    """Start of the sentence that the endings complete; empty if they are sentences of their own."""


@dataclass(frozen=True)
class ExampleSet:
    """Examples and where they are from."""

    examples: tuple[Example, ...]
    name: str
    """``builtin``, the dataset's name on the hub, or the file's name."""
    note: str = ""
    """Tells the user if this is not the set they asked for."""

    @property
    def tag(self) -> str:
        """Name and size, to print beside a score: scores on different sets cannot be compared."""
        return f"{self.name}, {len(self.examples)} examples"


# -- reading -----------------------------------------------------------------------------------------------------------


def load_examples(path: str | Path | None = None) -> ExampleSet:
    """Reads examples from a ``.jsonl`` file in HellaSwag's format.

    Args:
        path: the file; ``"builtin"`` for the examples shipped with this package; None for the hub's validation split,
            or the built-in examples if the hub does not answer within two seconds and its file is not in the cache.

    Raises:
        UserError: the file does not exist, or one of its lines is not a HellaSwag example.
    """
    if path is None:
        records = _from_hub()
        if records is not None:
            examples = tuple(_parse(record, f"{HUB_NAME}, row {i}") for i, record in enumerate(records, start=1))
            return ExampleSet(examples, HUB_NAME)
        note = (
            f"HellaSwag: {HUB_NAME} cannot be reached on the Hugging Face hub, so the built-in examples are scored; "
            "their scores do not compare with published ones (for those, give the path of hellaswag_val.jsonl)"
        )
        return ExampleSet(load_examples(BUILTIN).examples, BUILTIN, note)
    if str(path) == BUILTIN:
        text = (files("gpt2_lightning") / "assets" / "hellaswag_builtin.jsonl").read_text(encoding="utf-8")
        return ExampleSet(_parse_lines(text, BUILTIN), BUILTIN)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a HellaSwag .jsonl file, or {BUILTIN!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # skips the byte order mark that some editors write
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: give a HellaSwag .jsonl file, or {BUILTIN!r}") from None
    return ExampleSet(_parse_lines(text, str(path)), path.name)


def _parse_lines(text: str, source: str) -> tuple[Example, ...]:
    examples = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also split at U+2028
        if line.strip():
            where = f"{source}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where} is not JSON ({error}): give HellaSwag's own .jsonl, or {BUILTIN!r}") from None
            examples.append(_parse(record, where))
    if not examples:
        raise UserError(f"{source} is empty: give HellaSwag's own .jsonl, or {BUILTIN!r}")
    return tuple(examples)


def _parse(record: Any, where: str) -> Example:
    if not isinstance(record, dict) or not record.keys() >= {"ctx", "endings", "label"}:
        raise UserError(f"{where} is not a HellaSwag example: expected an object with ctx, endings and label")
    ctx, endings, label = record["ctx"], record["endings"], str(record["label"])  # the hub's labels are strings
    optional = {name: record.get(name) for name in ("activity_label", "ctx_a", "ctx_b")}
    four = isinstance(endings, list) and len(endings) == 4
    if not (ctx and four and all(isinstance(text, str) for text in (ctx, *endings, *filter(None, optional.values())))):
        raise UserError(f"{where} is not a HellaSwag example: ctx must be a text, and endings a list of four texts")
    if label not in ("0", "1", "2", "3"):
        raise UserError(f"{where}: label is {label!r}, not 0, 1, 2 or 3 (the test split has no labels: use val)")
    return Example(ctx, tuple(endings), int(label), **optional)


def _from_hub() -> list[dict[str, Any]] | None:
    """The validation split from the cache or the hub, or None if neither has it."""
    import pyarrow.parquet
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    fetch = partial(hf_hub_download, HUB_NAME, _HUB_FILE, repo_type="dataset")
    try:
        path = fetch(local_files_only=True)  # the split has never changed since 2019, so a cached copy is good
    except LocalEntryNotFoundError:
        if not _hub_answers():  # hf_hub_download would retry for 24 s
            return None
        try:
            path = fetch()
        except Exception:  # OSError, or an exception of the HTTP library that huggingface_hub uses
            return None
    records: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return records


def _hub_answers() -> bool:
    """Whether the hub serves the dataset's description within ``_HUB_SECONDS``."""
    from huggingface_hub import HfApi

    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):
            HfApi().dataset_info(HUB_NAME, timeout=_HUB_SECONDS)
            answered.set()

    # a thread, because no HTTP timeout limits getaddrinfo: 10 s per name server that does not respond
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    return answered.is_set()


# -- rendering ---------------------------------------------------------------------------------------------------------


def render(example: Example, style: Style) -> tuple[str, tuple[str, ...]]:
    """Context and endings as text. Both styles put one space between the two.

    Raises:
        UserError: the example lacks a field that the ``harness`` style reads.
    """
    if style == "nanogpt":
        return example.ctx, example.endings
    assert style == "harness", style
    if example.activity_label is None or example.ctx_a is None or example.ctx_b is None:
        raise UserError(
            "harness style reads activity_label, ctx_a and ctx_b, which these HellaSwag examples lack: "
            "give the original file, or use style nanogpt"
        )
    query = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    return _clean(query), tuple(_clean(ending) for ending in example.endings)


def _clean(text: str) -> str:
    """lm-evaluation-harness's ``preprocess``, in its order: a space may remain at the ends, and two of three spaces."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)  # wikiHow's markup
    return text.replace("  ", " ")


def encode(example: Example, style: Style) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Token ids of the context, and of each ending."""
    context, endings = render(example, style)
    if style == "nanogpt":
        tokenize = get_tokenizer().encode_ordinary
        return tuple(tokenize(context)), [tuple(tokenize(f" {ending}")) for ending in endings]
    # as in the harness: special tokens are recognised; trailing spaces of the context go to the ending; context and
    # ending are tokenized together and cut where the context alone would end; an empty context is <|endoftext|>
    tokenize_special = partial(get_tokenizer().encode, allowed_special="all")
    ids = tokenize_special(context.rstrip())
    whole = [tuple(tokenize_special(f"{context} {ending}")) for ending in endings]
    return tuple(ids) or (END_OF_TEXT,), [tokens[len(ids) :] for tokens in whole]


# -- scoring -----------------------------------------------------------------------------------------------------------


def evaluate(
    model: GPT,
    examples: ExampleSet,
    style: Style = "nanogpt",
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> Score:
    """Score of this rank's examples: add up the ranks' scores. Arguments as in :func:`score_examples`."""
    return Score.of(
        score_examples(
            model, examples, style, rank=rank, world_size=world_size, batch_tokens=batch_tokens, progress=progress
        )
    )


def score_examples(
    model: GPT,
    examples: ExampleSet,
    style: Style = "nanogpt",
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[ExampleScore]:
    """Scores examples ``rank``, ``rank + world_size``, … on the model's device, under the caller's autocast.

    If an example is longer than ``block_size``, its context is cut from the left, for each ending by as much as needed.
    lm-evaluation-harness does the same; build-nanogpt has no rule for it.

    Args:
        model: has GPT-2's vocabulary. It is left in the mode (train or eval) it was in.
        examples: what to score.
        style: whose rules to follow.
        rank: of this process.
        world_size: number of processes that share the examples.
        batch_tokens: tokens in a forward pass. 4096 keep a GPU busy, with less than 1 GB of activations at 124M.
        progress: show a progress bar on stderr.

    Raises:
        UserError: the vocabulary is smaller than GPT-2's, an ending alone is longer than ``block_size``, or an example
            lacks a field that the style reads.
    """
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"HellaSwag needs GPT-2's {VOCAB_SIZE} tokens, and this model's vocab_size is {model.config.vocab_size}: "
            "use a model trained on GPT-2 tokens"
        )
    indices = range(rank, len(examples.examples), world_size)
    planned = [_plan(i, examples.examples[i], style, model.config.block_size) for i in indices]
    was_training = model.training
    model.eval()
    try:
        scores = _score(model, planned, batch_tokens, "HellaSwag" if progress else None)
        # rounding depends on the batch: score near-ties again alone, so that any batches and ranks agree
        for i, score in enumerate(scores):
            if score.is_near_tie:
                (scores[i],) = _score(model, [planned[i]], batch_tokens=1)
    finally:
        model.train(was_training)
    return scores


@dataclass(frozen=True)
class _Planned:
    """An example as token ids."""

    index: int
    label: int
    requests: list[Request]
    """One, or several if the context is cut to different lengths."""
    endings: list[tuple[int, int]]
    """Of each ending: index of its request, and of its completion in there."""
    lengths: tuple[int, ...]
    """Of each ending, in tokens or characters."""


def _plan(index: int, example: Example, style: Style, block_size: int) -> _Planned:
    """Equal endings become one completion, so that they tie exactly."""
    context, tokens = encode(example, style)
    requests: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}  # context → its completions → their index
    endings = []
    for ending in tokens:
        if len(ending) > block_size:
            raise UserError(
                f"HellaSwag example {index + 1} has an ending of {len(ending)} tokens, which does not fit "
                f"block_size={block_size}: use a model with a longer context"
            )
        kept = context[-(block_size + 1 - len(ending)) :]  # + 1: an ending's last token is never an input
        completions = requests.setdefault(kept, {})
        endings.append((list(requests).index(kept), completions.setdefault(ending, len(completions))))
    return _Planned(
        index=index,
        label=example.label,
        requests=[Request(kept, tuple(completions)) for kept, completions in requests.items()],
        endings=endings,
        lengths=tuple(map(len, tokens if style == "nanogpt" else render(example, style)[1])),
    )


def _score(model: GPT, planned: list[_Planned], batch_tokens: int, progress: str | None = None) -> list[ExampleScore]:
    requests = [request for example in planned for request in example.requests]
    losses = iter(completion_losses(model, requests, VOCAB_SIZE, batch_tokens, progress))
    scores = []
    for example in planned:
        own = [next(losses) for _ in example.requests]
        log_likelihoods = tuple(-own[request][completion] for request, completion in example.endings)
        scores.append(ExampleScore(example.index, example.label, log_likelihoods, example.lengths))
    return scores
