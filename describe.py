"""What a data set holds, before anything is trained on it: `python describe.py FILE`.

It stands beside run.py because it reads data as run.py does, with the same modules: what passes here passes there.
"""

import stopping

if __name__ == "__main__":
    stopping.at_once()  # before the slow imports

import argparse
import sys
from collections import Counter

import numpy as np

from config import Config
from examples import Example, read_examples
from token_data import TokenDataset, tokenise
from tokenizer import load_tokenizer
from utils import UserError

MARKERS = 2  # start and end of the thoughts, for coconut
SHOWN = 5
BAR = 40  # characters of the longest bar


def describe(path: str, vocabulary: str | None, n_positions: int, max_new_tokens: int | None) -> str:
    """The whole report on a data set. Raises UserError where run.py would not take it either."""
    examples = read_examples(path)
    tokenizer = load_tokenizer(vocabulary)
    data = tokenise(examples, tokenizer, path)
    limit = Config(save_path="", name="", val_path=path, max_new_tokens=max_new_tokens).answer_limit
    sections = [
        [f"{path}: {len(examples):,} items, vocabulary from {tokenizer.source}"],
        describe_steps(data),
        describe_lengths(data, n_positions),
        describe_longest(data, examples),
        describe_answers(data, limit),
        describe_repeats(examples),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def describe_steps(data: TokenDataset) -> list[str]:
    """A histogram of the number of steps."""
    counts = np.bincount(data.n_steps)
    lines = [f"steps per item (mean {data.n_steps.mean():.2f})"]
    for n_steps in np.flatnonzero(counts):
        share = counts[n_steps] / len(data)
        bar = "#" * round(BAR * counts[n_steps] / counts.max())
        lines.append(f"  {n_steps:3}  {counts[n_steps]:9,}  {share:6.1%}  {bar}".rstrip())
    return lines


def describe_lengths(data: TokenDataset, n_positions: int) -> list[str]:
    """Token lengths of the parts and of the whole, against the model's positions."""
    whole = whole_lengths(data)
    answers = data.lengths_from(data.n_steps)
    parts = {"question": data.question_lengths, "all steps": data.lengths_from(0) - answers, "answer": answers}
    lines = [f"{'tokens':<12}{'mean':>9}{'median':>9}{'95 %':>9}{'longest':>9}"]
    for name, lengths in (parts | {"whole item": whole}).items():
        middle, high = np.percentile(lengths, [50, 95])
        lines.append(f"  {name:<10}{lengths.mean():9.1f}{middle:9.0f}{high:9.0f}{lengths.max():9,}")
    n_long = int((whole > n_positions).sum())
    fact = f"{n_long:,} of {len(data):,} items are longer, see drop_too_long" if n_long else "every item fits"
    return [
        *lines,
        f"model's positions: {n_positions:,}: {fact}",
        f"(A whole item counts end of text and the {MARKERS} markers of coconut. Later stages put in c_thought",
        "positions for every step they leave out; run.py checks the stages it will reach.)",
    ]


def describe_longest(data: TokenDataset, examples: list[Example]) -> list[str]:
    """The longest items, by index in the file."""
    whole = whole_lengths(data)
    order = np.argsort(-whole, kind="stable")[:SHOWN]
    return ["longest items", *(f"  item {i}: {whole[i]:,} tokens: {examples[i].question[:60]!r}" for i in order)]


def whole_lengths(data: TokenDataset) -> np.ndarray:
    """Positions each item takes before any step is replaced by thoughts [n]."""
    return data.question_lengths + data.lengths_from(0) + MARKERS


def describe_answers(data: TokenDataset, limit: int) -> list[str]:
    """How many answers greedy decoding would cut off; the end of text itself needs no room."""
    alone, with_steps = data.lengths_from(data.n_steps) - 1, data.lengths_from(0) - 1
    return [
        f"longer than max_new_tokens {limit:,}, so that they could never be right",
        f"  answers alone                       {int((alone > limit).sum()):9,}  (longest {alone.max():,} tokens)",
        f"  answers behind all their steps, cot {int((with_steps > limit).sum()):9,}  (longest {with_steps.max():,})",
    ]


def describe_repeats(examples: list[Example]) -> list[str]:
    """Items and questions that occur more than once."""
    items = Counter((e.question, e.answer, *e.steps) for e in examples)
    questions = Counter(e.question for e in examples)
    answers: dict[str, set[str]] = {}
    for e in examples:
        answers.setdefault(e.question, set()).add(e.answer)
    return [
        "repeated",
        f"  items that equal an earlier one     {len(examples) - len(items):9,}",
        f"  questions that equal an earlier one {len(examples) - len(questions):9,}",
        f"  questions with different answers    {sum(len(a) > 1 for a in answers.values()):9,}",
    ]


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status: 0, or 2 for data that run.py would not take."""
    parser = argparse.ArgumentParser(prog="python describe.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a file, folder or Hub data set, as for train_path and val_path")
    parser.add_argument("--tokenizer", help="vocabulary, as the config key; default GPT-2's")
    parser.add_argument("--n-positions", type=int, default=1024, help="the model's positions (default 1024, GPT-2's)")
    parser.add_argument("--max-new-tokens", type=int, help="default as in run.py: 64 if FILE contains gsm, else 128")
    options = parser.parse_args(arguments)
    try:
        print(describe(options.file, options.tokenizer, options.n_positions, options.max_new_tokens))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
