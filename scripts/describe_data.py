"""Report what a data set contains, before you train on it: `python -m scripts.describe_data FILE`.

The data is read and checked by the same code as in run.py: a data set that passes here passes there.
"""

from startup import signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports

import sys
from collections import Counter

import numpy as np

from config import Config
from text.reader import Example, read_examples, steps_with_mark
from text.tokenizer import load_tokenizer
from text.tokens import TokenDataset, tokenize
from utils import command_parser, exit_status, say

N_SPECIAL = 2  # coconut puts one special token before the thoughts and one after them
SHOWN = 5  # items in the list of the longest
BAR = 40  # characters of the longest bar


def describe(path: str, vocabulary: str | None, n_positions: int, max_new_tokens: int | None) -> str:
    """Return the whole report. Raises UserError for data that run.py would reject too."""
    examples = read_examples(path)
    tokenizer = load_tokenizer(vocabulary)
    data = tokenize(examples, tokenizer, path)
    limit = Config(save_path="", name="", val_path=path, max_new_tokens=max_new_tokens).answer_limit
    sections = [
        [f"{path}: {len(examples):,} items, vocabulary from {tokenizer.source}"],
        describe_steps(data),
        describe_lengths(data, n_positions),
        describe_longest(data, examples),
        describe_answers(data, limit),
        describe_marks(examples),
        describe_duplicates(examples),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def describe_steps(data: TokenDataset) -> list[str]:
    """Histogram of the number of steps per item."""
    counts = np.bincount(data.n_steps)
    lines = [f"steps per item (mean {data.n_steps.mean():.2f})"]
    for n_steps in np.flatnonzero(counts):
        share = counts[n_steps] / len(data)
        bar = "#" * round(BAR * counts[n_steps] / counts.max())
        lines.append(f"  {n_steps:3}  {counts[n_steps]:9,}  {share:6.1%}  {bar}".rstrip())
    return lines


def describe_lengths(data: TokenDataset, n_positions: int) -> list[str]:
    """Statistics of token lengths, and how many items exceed the model's n_positions."""
    whole = whole_lengths(data)
    answers = data.lengths_from(data.n_steps)
    parts = {"question": data.question_lengths, "all steps": data.lengths_from(0) - answers, "answer": answers}
    lines = [f"{'tokens':<12}{'mean':>9}{'median':>9}{'95 %':>9}{'longest':>9}"]
    for name, lengths in (parts | {"whole item": whole}).items():
        middle, high = np.percentile(lengths, [50, 95])
        lines.append(f"  {name:<10}{lengths.mean():9.1f}{middle:9.0f}{high:9.0f}{lengths.max():9,}")
    n_long = int((whole > n_positions).sum())
    fit = f"{n_long:,} of {len(data):,} items are longer, see drop_too_long" if n_long else "every item fits"
    return [
        *lines,
        f"model's positions: {n_positions:,}: {fit}",
        f"(A whole item includes end of text and the {N_SPECIAL} special tokens of coconut. Later stages replace each",
        "dropped step by c_thought positions; run.py checks the stages that it will reach.)",
    ]


def describe_longest(data: TokenDataset, examples: list[Example]) -> list[str]:
    """The longest items, each with its index in the file."""
    whole = whole_lengths(data)
    order = np.argsort(-whole, kind="stable")[:SHOWN]
    return ["longest items", *(f"  item {i}: {whole[i]:,} tokens: {examples[i].question[:60]!r}" for i in order)]


def whole_lengths(data: TokenDataset) -> np.ndarray:
    """Positions of each item [n] before any step is replaced by latents."""
    return data.question_lengths + data.lengths_from(0) + N_SPECIAL


def describe_answers(data: TokenDataset, limit: int) -> list[str]:
    """How many answers greedy decoding would cut off at `limit` tokens; end of text does not count."""
    alone, with_steps = data.lengths_from(data.n_steps) - 1, data.lengths_from(0) - 1
    return [
        f"longer than max_new_tokens {limit:,}, so that they can never be correct",
        f"  answers alone                       {int((alone > limit).sum()):9,}  (longest {alone.max():,} tokens)",
        f"  answers after all their steps, cot  {int((with_steps > limit).sum()):9,}  (longest {with_steps.max():,})",
    ]


def describe_marks(examples: list[Example]) -> list[str]:
    """How many items can never count in eval/cot_em, and the first of them."""
    found = steps_with_mark(examples)
    first = f"  (the first is item {found[0]})" if found else ""
    return [
        "`#` in a step, where a generated chain ends, so that cot_match can never be true",
        f"  items                               {len(found):9,}{first}",
    ]


def describe_duplicates(examples: list[Example]) -> list[str]:
    """How many items and questions occur more than once."""
    items = Counter((e.question, e.answer, *e.steps) for e in examples)
    questions = Counter(e.question for e in examples)
    answers: dict[str, set[str]] = {}
    for example in examples:
        answers.setdefault(example.question, set()).add(example.answer)
    return [
        "duplicates",
        f"  items that equal an earlier one     {len(examples) - len(items):9,}",
        f"  questions that equal an earlier one {len(examples) - len(questions):9,}",
        f"  questions with different answers    {sum(len(a) > 1 for a in answers.values()):9,}",
    ]


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status: 0, or 2 for data that run.py would reject."""
    parser = command_parser("scripts.describe_data", __doc__)
    parser.add_argument("file", help="a file, folder or Hub data set, as for train_path and val_path")
    parser.add_argument("--tokenizer", help="vocabulary, as the config key; default GPT-2's")
    parser.add_argument("--n-positions", type=int, default=1024, help="the model's positions (default 1024, GPT-2's)")
    parser.add_argument("--max-new-tokens", type=int, help="default as in run.py: 64 if FILE contains gsm, else 128")
    o = parser.parse_args(arguments)
    return exit_status(lambda: say(describe(o.file, o.tokenizer, o.n_positions, o.max_new_tokens)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
