"""HellaSwag's rows per second: ours against the one-row-at-a-time loop of the video, in turn, in one run. Not a test.

    python tests/bench_hellaswag.py HELLASWAG.jsonl [rows]

A GPT-2 of the 124M shape with random weights, fp32, on the GPU where there is one. The loop computes the context with
each ending, and all logits.
"""

import sys
import time

import torch
from torch.nn import functional as F

from gpt2_lightning.evals.hellaswag import Example, Examples, load_examples, score_rows
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tokenizer import get_tokenizer

PARTS = 4  # the two take turns, so that a noisy machine is noisy for both


@torch.no_grad()
def one_by_one(model: GPT, rows: list[Example]) -> list[tuple[int, int]]:
    """The predictions by summed and by mean loss of each row, as the video's script makes them."""
    encode = get_tokenizer().encode_ordinary
    predictions = []
    for row in rows:
        context, endings = encode(row.ctx), [encode(" " + ending) for ending in row.endings]
        length = max(len(context) + len(ending) for ending in endings)
        tokens = torch.zeros(4, length, dtype=torch.long)
        mask = torch.zeros(4, length)
        for i, ending in enumerate(endings):
            tokens[i, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[i, len(context) : len(context) + len(ending)] = 1
        tokens, mask = tokens.to(model.lm_head.weight.device), mask.to(model.lm_head.weight.device)
        logits = model(tokens)[:, :-1]  # (4, T-1, V)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        sums = (losses * mask[:, 1:]).sum(1)
        predictions.append((int(sums.argmin()), int((sums / mask[:, 1:].sum(1)).argmin())))
    return predictions


def main(path: str, count: int = 200) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50257)).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    rows = load_examples(path).rows
    chosen = list(rows[:: max(1, len(rows) // count)][:count])
    one_by_one(model, chosen[:2])
    score_rows(model, Examples(tuple(chosen[:2]), ""))
    loop, ours, same = 0.0, 0.0, 0
    for part in range(PARTS):
        mine = chosen[part::PARTS]
        started = time.perf_counter()
        expected = one_by_one(model, mine)
        between = time.perf_counter()
        found = score_rows(model, Examples(tuple(mine), ""))
        ended = time.perf_counter()
        loop, ours = loop + between - started, ours + ended - between
        same += sum(a == (b.prediction, b.prediction_norm) for a, b in zip(expected, found, strict=True))
    n = len(chosen)
    print(f"{n} rows: loop {n / loop:.2f} rows/s, ours {n / ours:.2f} rows/s, ratio {loop / ours:.2f}; same {same}/{n}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
