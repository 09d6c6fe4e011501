"""Generate chains of arithmetic modulo 10 from a seed: data/chains_{train,valid}.json and data/chains_vocabulary.json.

    python preprocessing/chains.py                                    17,000 and 500 items of 3 operations, in a second
    python preprocessing/chains.py --operations 4 --modulus 7 --prefix sevens

A question is a number followed by operations, computed from left to right without precedence and modulo 10. The steps
are the intermediate values; the last one is the answer:

    {"question": "5 + 3 * 2 - 7", "steps": ["8", "6", "9"], "answer": "9"}

Each step needs the value before it, so a small model learns the chain in words or in thoughts, but hardly in one step.
No question appears twice, neither within a file nor across the two. The vocabulary is a value for the config key
`tokenizer`: it makes every number, operator and special token one token.

The paper does not use these data. The demo (scripts/demo.py) trains on them in minutes on a CPU.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # Python leaves it out where PYTHONSAFEPATH is set
from datafiles import DataError, argument_parser, listed, run, write_json

import math
import random
import re
from collections import Counter
from pathlib import Path

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def digits_of(number, bases):
    """Return a number's digits in mixed radix, most significant first. They are unique below the bases' product."""
    digits = []
    for base in reversed(bases):
        number, digit = divmod(number, base)
        digits.append(digit)
    return digits[::-1]


def make_item(number, operations, modulus):
    """Make the item with this number. Each number from 0 to count_questions() - 1 gives another question."""
    value, *drawn = digits_of(number, [modulus] + [len(OPERATIONS), modulus] * operations)
    question, steps = str(value), []
    for sign, operand in zip(drawn[::2], drawn[1::2], strict=True):
        symbol = list(OPERATIONS)[sign]
        value = OPERATIONS[symbol](value, operand) % modulus
        question += f" {symbol} {operand}"
        steps.append(str(value))
    return {"question": question, "steps": steps, "answer": str(value)}


def count_questions(operations, modulus):
    """Count the different questions."""
    return modulus * (len(OPERATIONS) * modulus) ** operations


def make_splits(options):
    """Draw items without repetition from all questions; return them by split."""
    total = count_questions(options.operations, options.modulus)
    numbers = random.Random(options.seed).sample(range(total), options.train + options.valid)
    items = [make_item(number, options.operations, options.modulus) for number in numbers]
    return {"train": items[options.valid :], "valid": items[: options.valid]}


def blind_guess(operations, modulus):
    """Compute the accuracy of the best guess from the operations alone, without the first number.

    A chain maps the first number x to a x + b (modulo `modulus`), so gcd(a, modulus) first numbers share an answer: all
    of them after `* 0`, five of them after `* 5` modulo 10. The best guess is therefore right more often than 1 in
    `modulus`.
    """
    factors = Counter({1: 1})  # {a: number of chains that have it}
    for _ in range(operations):
        longer = Counter({a: 2 * modulus * count for a, count in factors.items()})  # + and - do not change a
        for a, count in factors.items():
            for operand in range(modulus):
                longer[a * operand % modulus] += count
        factors = longer
    right = sum(count * math.gcd(a, modulus) for a, count in factors.items())
    return right / (modulus * sum(factors.values()))


def vocabulary(modulus):
    """List the tokens beyond single characters: those with a leading space and those with several characters."""
    numbers = [str(number) for number in range(modulus)]
    return ["###", *(f" {word}" for word in [*OPERATIONS, *numbers]), *(n for n in numbers if len(n) > 1)]


def option_problems(options):
    """List the problems of the options."""
    tests = [
        (1 <= options.operations <= 20, f"--operations {options.operations}: expected 1 to 20"),
        (2 <= options.modulus <= 100, f"--modulus {options.modulus}: expected 2 to 100"),
        (options.train >= 1, f"--train {options.train}: expected at least 1"),
        (options.valid >= 1, f"--valid {options.valid}: expected at least 1"),
        (re.fullmatch(r"[\w.-]+", options.prefix), f"--prefix {options.prefix!r}: expected a name without folders"),
    ]
    problems = [message for holds, message in tests if not holds]
    if not problems:
        total, wanted = count_questions(options.operations, options.modulus), options.train + options.valid
        if wanted > total:
            problems.append(f"--train and --valid: {wanted:,} items wanted, there are {total:,} different questions")
    return problems


def parse_args(arguments=None):
    parser = argument_parser(__doc__)
    parser.add_argument("--operations", type=int, default=3, help="operations in a question (default 3)")
    parser.add_argument("--modulus", type=int, default=10, help="values are 0 to MODULUS - 1 (default 10)")
    parser.add_argument("--train", type=int, default=17_000, help="training items (default 17,000)")
    parser.add_argument("--valid", type=int, default=500, help="validation items (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default 0)")
    parser.add_argument("--prefix", default="chains", help="first part of the file names (default chains)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to (default data)")
    options = parser.parse_args(arguments)
    if problems := option_problems(options):
        raise DataError(f"these options cannot work:\n{listed(problems)}")
    return options


def main(arguments=None):
    options = parse_args(arguments)
    for split, items in make_splits(options).items():
        path = options.out / f"{options.prefix}_{split}.json"
        print(f"{path}: {write_json(items, path):,} items, such as {items[0]['question']} = {items[0]['answer']}")
    path = options.out / f"{options.prefix}_vocabulary.json"
    print(f"{path}: {write_json(vocabulary(options.modulus), path)} words")
    guess = blind_guess(options.operations, options.modulus)
    print(f"accuracy of a random guess: {1 / options.modulus:.3f}; of a guess from the operations alone: {guess:.3f}")


if __name__ == "__main__":
    run(main)
