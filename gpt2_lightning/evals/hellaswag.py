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
        FileNotFoundError: there is no such file.
        UserError: one of its lines is not a HellaSwag example.
    """
    if path is None:
        records = _from_hub()
        if records is not None:
            return ExampleSet(tuple(map(_example, records)), HUB_NAME)
        note = (
            f"HellaSwag: {HUB_NAME} cannot be reached on the Hugging Face hub, so the built-in examples are scored; "
            "their scores do not compare with published ones (for those, give the path of hellaswag_val.jsonl)"
        )
        return ExampleSet(load_examples(BUILTIN).examples, BUILTIN, note)
    if str(path) == BUILTIN:
        content = (files("gpt2_lightning") / "assets" / "hellaswag_builtin.jsonl").read_bytes()
        return ExampleSet(_parse(content, BUILTIN), BUILTIN)
    return ExampleSet(_parse(Path(path).read_bytes(), str(path)), Path(path).name)


def _parse(content: bytes, source: str) -> tuple[Example, ...]:
    examples = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            try:
                examples.append(_example(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{source}, line {number} is not a HellaSwag example ({error!r}): expected a JSON object with ctx "
                    "(a text), endings (four texts) and label (0 to 3; the test split has none, use val)"
                ) from None
    if not examples:
        raise UserError(f"{source} is empty: give HellaSwag's own .jsonl, or {BUILTIN!r}")
    return tuple(examples)


def _example(record: dict[str, Any]) -> Example:
    ctx, endings = record["ctx"], tuple(record["endings"])
    label = int(record["label"])  # the hub's labels are strings
    if not (ctx and len(endings) == 4 and label in range(4) and all(isinstance(text, str) for text in (ctx, *endings))):
        raise ValueError("wrong values")
    return Example(ctx, endings, label, record.get("activity_label"), record.get("ctx_a"), record.get("ctx_b"))


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


def evaluate(model: GPT, examples: ExampleSet, style: Style = "nanogpt", **how: Any) -> Score:
    """Score of this rank's examples: add up the ranks' scores. Arguments as in :func:`score_examples`."""
    return Score.of(score_examples(model, examples, style, **how))


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
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]
    """Of each ending: its context, cut to fit, and its own tokens."""
    lengths: tuple[int, ...]
    """Of each ending, in tokens or characters."""

    @property
    def requests(self) -> list[Request]:
        """One, or several if the context is cut to different lengths. Equal endings are scored once, so they tie."""
        contexts = dict.fromkeys(context for context, _ in self.pairs)  # each once, in order
        return [Request(c, tuple(dict.fromkeys(e for context, e in self.pairs if context == c))) for c in contexts]


def _plan(index: int, example: Example, style: Style, block_size: int) -> _Planned:
    context, endings = encode(example, style)
    longest = max(map(len, endings))
    if longest > block_size:
        raise UserError(
            f"HellaSwag example {index + 1} has an ending of {longest} tokens, which does not fit "
            f"block_size={block_size}: use a model with a longer context"
        )
    # + 1: an ending's last token is never an input
    pairs = [(context[-(block_size + 1 - len(ending)) :], ending) for ending in endings]
    measured = endings if style == "nanogpt" else render(example, style)[1]
    return _Planned(index, example.label, pairs, tuple(map(len, measured)))


def _score(model: GPT, planned: list[_Planned], batch_tokens: int, progress: str | None = None) -> list[ExampleScore]:
    requests = [request for example in planned for request in example.requests]
    losses = iter(completion_losses(model, requests, VOCAB_SIZE, batch_tokens, progress))
    scores = []
    for example in planned:
        loss_of = {
            (request.context, completion): loss
            for request in example.requests
            for completion, loss in zip(request.completions, next(losses), strict=True)
        }
        log_likelihoods = tuple(-loss_of[pair] for pair in example.pairs)
        scores.append(ExampleScore(example.index, example.label, log_likelihoods, example.lengths))
    return scores
