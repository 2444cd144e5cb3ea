"""HellaSwag (Zellers et al. 2019): the right ending of four, in the two styles that published figures come in.

``nanogpt``: build-nanogpt's rule. The raw ``ctx``, then ``" " + ending``, encoded apart and joined; acc by the summed,
acc_norm by the mean loss per token. GPT-2 124M scores 0.2955 acc_norm.

``harness``: lm-evaluation-harness, task ``hellaswag`` version 1.0. ``activity_label: ctx_a Ctx_b`` cleaned by its
rules, encoded together with the ending; acc by the summed log-likelihood, acc_norm by that over the characters of the
ending. GPT-2 124M scores 0.3114 acc_norm.
"""

import json
import re
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from gpt2_lightning.errors import UserError
from gpt2_lightning.evals.multiple_choice import Question, RowScore, Score, completion_losses, pack, token_losses
from gpt2_lightning.model import GPT
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer

Style = Literal["nanogpt", "harness"]
BUILTIN = "builtin"
"""What to give as a path for the questions that ship with this package, without asking the hub."""
HUB_NAME = "Rowan/hellaswag"
_HUB_SECONDS = 2.0
_SEQUENCE_LENGTH = 512  # one long row or six short ones: packed to 98%, whatever the mix, and attention stays cheap


@dataclass(frozen=True)
class Example:
    """One row, in the fields of the original files."""

    ctx: str
    """Context as it is shown: ``ctx_a``, a space and ``ctx_b`` where there is one."""
    endings: tuple[str, ...]
    """Four ways to go on."""
    label: int
    """Index of the right one."""
    activity_label: str | None = None
    """What the scene is about; this and the next two are None in files that carry only what ``nanogpt`` reads."""
    ctx_a: str | None = None
    """Whole sentences of the context."""
    ctx_b: str | None = None
    """Beginning of the sentence that the endings finish; empty where they are sentences of their own."""


@dataclass(frozen=True)
class Examples:
    """A set of rows and where it is from."""

    rows: tuple[Example, ...]
    name: str
    """``builtin``, the hub's name, or the file's."""
    note: str = ""
    """A line for the user where the set is not the one that was asked for."""

    @property
    def tag(self) -> str:
        """Which set and how many rows: figures of different sets must not be compared."""
        return f"{self.name}, {len(self.rows)} rows"


def load_examples(path: str | Path | None = None) -> Examples:
    """HellaSwag's rows: a local ``.jsonl`` in its format; without a path the hub's validation split, else the built-in.

    The hub gets two seconds to answer. A machine without it reads the copy in ``datasets``' cache if there is one.

    Args:
        path: a file; ``"builtin"`` for the questions of this package; None for the hub.

    Raises:
        ValueError: the file is not there or not HellaSwag; the sentence names the line.
    """
    if path is None:
        rows = _from_hub()
        if rows is not None:
            parsed = tuple(_parse(record, f"{HUB_NAME}, row {number}") for number, record in enumerate(rows, start=1))
            return Examples(parsed, HUB_NAME)
        note = (
            f"HellaSwag: no file was given and the hub's {HUB_NAME} cannot be reached, so the built-in questions are "
            "scored: their figures compare with no published ones (for those give the path of hellaswag_val.jsonl)"
        )
        return Examples(load_examples(BUILTIN).rows, BUILTIN, note)
    if str(path) == BUILTIN:
        text = (files("gpt2_lightning") / "assets" / "hellaswag_builtin.jsonl").read_text(encoding="utf-8")
        return Examples(_parse_lines(text, BUILTIN), BUILTIN)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (give a HellaSwag .jsonl, or {BUILTIN!r} for the built-in questions)")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} is not HellaSwag: not text in UTF-8, so fetch it again") from None
    try:
        return Examples(_parse_lines(text, str(path)), path.name)
    except ValueError as error:
        raise UserError(f"{error}: give HellaSwag's own .jsonl, or {BUILTIN!r}") from None


def _parse_lines(text: str, source: str) -> tuple[Example, ...]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): U+2028 is no end of line in JSON
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
                reason = getattr(error, "msg", error)
                raise UserError(f"{source}, line {number} is not HellaSwag: not JSON ({reason})") from None
            rows.append(_parse(record, f"{source}, line {number}"))
    if not rows:
        raise UserError(f"{source} has no rows")
    return tuple(rows)


def _parse(record: Any, where: str) -> Example:
    if not isinstance(record, dict):
        raise UserError(f"{where} is not HellaSwag: expected a JSON object with ctx, endings and label")
    if missing := [field for field in ("ctx", "endings", "label") if field not in record]:
        raise UserError(f"{where} is not HellaSwag: it lacks {', '.join(missing)}")
    ctx, endings, label = record["ctx"], record["endings"], record["label"]
    if not isinstance(ctx, str) or not ctx:
        raise UserError(f"{where} is not HellaSwag: ctx must be a text that is not empty")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(ending, str) for ending in endings):
        raise UserError(f"{where} is not HellaSwag: endings must be a list of four texts")
    if not isinstance(label, int | str) or str(label) not in ("0", "1", "2", "3"):  # the hub has them as strings
        given = repr(label) if isinstance(label, int | str | float | None) else f"a {type(label).__name__}"
        raise UserError(f"{where}: label is {given[:40]}, and must be 0, 1, 2 or 3 (the test split has none: take val)")
    optional = {field: record.get(field) for field in ("activity_label", "ctx_a", "ctx_b")}
    if wrong := [field for field, value in optional.items() if not isinstance(value, str | None)]:
        raise UserError(f"{where} is not HellaSwag: {', '.join(wrong)} must be text")
    if re.search("[\ud800-\udfff]", "".join([ctx, *endings, *(text or "" for text in optional.values())])):
        raise UserError(f"{where} is not HellaSwag: its text holds half of a surrogate pair, which is no character")
    return Example(ctx=ctx, endings=tuple(endings), label=int(label), **optional)


def _from_hub() -> Iterable[Any] | None:
    """The hub's validation split, or datasets' cached copy of it; None where neither is to be had."""
    import datasets
    import huggingface_hub

    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # offline, refused, moved: all of them mean that the hub does not serve it
            huggingface_hub.HfApi().dataset_info(HUB_NAME, timeout=_HUB_SECONDS)
            answered.set()

    # in a thread, for a dead name server holds getaddrinfo longer than any timeout that an HTTP client knows
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    # load_dataset alone would try an absent hub for half a minute before it looks into its cache
    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        if not answered.is_set():
            for switch in switches:
                switch.HF_HUB_OFFLINE = True
        return datasets.load_dataset(HUB_NAME, split="validation")
    except OSError:
        return None
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def render(example: Example, style: Style) -> tuple[str, tuple[str, ...]]:
    """Context and four endings as a style's reference words them; both put one space between the two.

    Raises:
        ValueError: ``harness`` style, and the row lacks a field that it reads.
    """
    if style == "nanogpt":
        return example.ctx, example.endings
    if example.activity_label is None or example.ctx_a is None or example.ctx_b is None:
        raise UserError(
            "harness style reads activity_label, ctx_a and ctx_b, which these HellaSwag rows lack: "
            "give the original file, or take style nanogpt"
        )
    query = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    return _clean(query), tuple(_clean(ending) for ending in example.endings)


def _clean(text: str) -> str:
    """The harness's rules in its order: what the last two leave at the ends stays, and of three spaces two."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)  # wikiHow's markup
    return text.replace("  ", " ")


def encode(example: Example, style: Style) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Token ids of the context, and of the four endings after it."""
    tokenizer = get_tokenizer()
    context, endings = render(example, style)
    if style == "nanogpt":
        endings_ids = (tokenizer.encode_ordinary(" " + ending) for ending in endings)
        return tuple(tokenizer.encode_ordinary(context)), tuple(map(tuple, endings_ids))
    # spaces at the context's end go to the ending; both are encoded together and cut where the context alone would end
    query = context.rstrip()
    spaces = context[len(query) :]
    if not query:
        return (END_OF_TEXT,), tuple(tuple(_encode(f"{spaces} {ending}")) for ending in endings)
    ids = _encode(query)
    return tuple(ids), tuple(tuple(_encode(f"{context} {ending}")[len(ids) :]) for ending in endings)


def _encode(text: str) -> list[int]:
    return get_tokenizer().encode(text, allowed_special="all")  # as transformers' tokenizer does


def evaluate(
    model: GPT,
    examples: Examples,
    style: Style = "nanogpt",
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> Score:
    """This rank's part of the score: add up the ranks' ``Score``s for the whole. Arguments as in :func:`score_rows`."""
    rows = score_rows(
        model, examples, style, rank=rank, world_size=world_size, batch_tokens=batch_tokens, progress=progress
    )
    return Score.of(rows)


@torch.no_grad()
def score_rows(
    model: GPT,
    examples: Examples,
    style: Style = "nanogpt",
    *,
    rank: int = 0,
    world_size: int = 1,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[RowScore]:
    """Every ``world_size``-th row from row ``rank`` on, scored on the model's device, under the caller's autocast.

    A row that is longer than ``block_size`` loses the beginning of its context, each ending as much as it must: so does
    lm-evaluation-harness, and build-nanogpt's script, which has no rule for it, stops there.

    Args:
        model: any GPT with GPT-2's vocabulary; it is left in the mode (train or eval) that it came in.
        examples: what to score.
        style: whose rules.
        rank: of this process.
        world_size: processes that share the rows.
        batch_tokens: tokens in a forward pass; the default fills a GPU and stays below 1 GB of activations at 124M.
        progress: show a bar on stderr.

    Raises:
        ValueError: the vocabulary is smaller than GPT-2's, an ending alone is longer than ``block_size``, or the rows
            lack a field that the style reads.
    """
    if style not in get_args(Style):
        raise UserError(f"HellaSwag has no style {style!r}: take one of {', '.join(get_args(Style))}")
    if model.config.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"HellaSwag needs GPT-2's {VOCAB_SIZE} tokens, and this model's vocab_size is {model.config.vocab_size}: "
            "score one that was trained on them"
        )
    rows = [
        _plan(i, examples.rows[i], style, model.config.block_size) for i in range(rank, len(examples.rows), world_size)
    ]
    was_training = model.training
    model.eval()
    try:
        scores = _score(model, rows, batch_tokens, progress)
        # where rounding decides, the row is scored again alone: the same answer, whatever its company was before
        for at, score in enumerate(scores):
            if score.close:
                (scores[at],) = _score(model, [rows[at]], batch_tokens=1, progress=False)
    finally:
        model.train(was_training)
    return scores


@dataclass(frozen=True)
class _Row:
    """A row as token ids: what to score, and where to find the four answers."""

    index: int
    label: int
    questions: list[Question]
    answers: list[tuple[int, int]]  # of each ending: which question, which of its completions
    lengths: tuple[int, ...]


def _plan(index: int, example: Example, style: Style, block_size: int) -> _Row:
    """One question for the row, or several where the context has to be cut to a different length for each ending.

    An ending that occurs twice is scored once: equals must tie, whatever the rounding at their places.
    """
    context, endings = encode(example, style)
    questions: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}  # context → its different endings, numbered
    answers = []
    for ending in endings:
        if len(ending) > block_size:
            raise UserError(
                f"HellaSwag row {index + 1} has an ending of {len(ending)} tokens, which does not fit "
                f"block_size={block_size}: take a model with a longer context"
            )
        kept = context[-(block_size + 1 - len(ending)) :]  # nothing is predicted from an ending's last token
        completions = questions.setdefault(kept, {})
        answers.append((list(questions).index(kept), completions.setdefault(ending, len(completions))))
    return _Row(
        index=index,
        label=example.label,
        questions=[Question(kept, tuple(completions)) for kept, completions in questions.items()],
        answers=answers,
        lengths=tuple(map(len, endings if style == "nanogpt" else render(example, style)[1])),
    )


def _score(model: GPT, rows: list[_Row], batch_tokens: int, progress: bool) -> list[RowScore]:
    questions = [question for row in rows for question in row.questions]
    losses = iter(_losses(model, questions, batch_tokens, progress))
    scores = []
    for row in rows:
        of_row = [next(losses) for _ in row.questions]
        log_likelihoods = tuple(-of_row[question][completion] for question, completion in row.answers)
        scores.append(RowScore(row.index, row.label, log_likelihoods, row.lengths))
    return scores


def _losses(model: GPT, questions: list[Question], batch_tokens: int, progress: bool) -> list[list[float]]:
    """Summed loss of every completion of every question, in nats."""
    device = model.lm_head.weight.device
    order: list[int] = []
    parts: list[torch.Tensor] = []  # left on the device, so that the CPU packs the next batch while this one runs
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=len(questions), desc="HellaSwag", unit="row", leave=False, mininterval=interval, disable=not progress
    ) as bar:
        for packed in pack(questions, min(_SEQUENCE_LENGTH, batch_tokens), batch_tokens):
            batch = packed.to(device)
            hidden = model.hidden(batch.idx, batch.positions, batch.mask())
            parts.append(token_losses(hidden, model.lm_head, batch, VOCAB_SIZE))
            order += batch.questions
            bar.update(len(batch.questions))
    lengths = [len(completion) for i in order for completion in questions[i].completions]
    flat = iter(completion_losses(torch.cat(parts), lengths) if parts else [])
    by_question = {i: [next(flat) for _ in questions[i].completions] for i in order}
    return [by_question[i] for i in range(len(questions))]
