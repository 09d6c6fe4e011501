"""Generate chains of arithmetic modulo 10, from a seed: data/chains_{train,valid}.json and data/chains_vocabulary.json.

    python preprocessing/chains.py                                    17,000 and 500 items of 3 operations, in a second
    python preprocessing/chains.py --operations 4 --modulus 7 --prefix sevens

A question is a number and operations on it, worked off from left to right, without precedence, every value modulo 10;
the steps are the values on the way, the last one is the answer:

    {"question": "5 + 3 * 2 - 7", "steps": ["8", "6", "9"], "answer": "9"}

Each step needs the value before it, so that a small model learns the chain in words or in thoughts, but hardly at once.
No question appears twice, in one file or in both. The vocabulary is for the config key `tokenizer`: with it every
number, operator and marker is one token.

These are not data of the paper: the demo (demo.py) learns from them in minutes on a CPU.
"""

from datafiles import DataError, listed, run, write_json

import argparse
import math
import random
import re
from collections import Counter
from pathlib import Path

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def digits_of(number, bases):
    """A number in mixed radix, the last base counting fastest: every number below their product gives other digits."""
    digits = []
    for base in reversed(bases):
        number, digit = divmod(number, base)
        digits.append(digit)
    return digits[::-1]


def make_item(number, operations, modulus):
    """The item of that number: each question has one number from 0 to count_questions() - 1."""
    value, *drawn = digits_of(number, [modulus] + [len(OPERATIONS), modulus] * operations)
    question, steps = str(value), []
    for sign, operand in zip(drawn[::2], drawn[1::2], strict=True):
        symbol = list(OPERATIONS)[sign]
        value = OPERATIONS[symbol](value, operand) % modulus
        question += f" {symbol} {operand}"
        steps.append(str(value))
    return {"question": question, "steps": steps, "answer": str(value)}


def count_questions(operations, modulus):
    """How many different questions there are."""
    return modulus * (len(OPERATIONS) * modulus) ** operations


def make_splits(options):
    """Items by split, drawn without repetition from all questions."""
    total = count_questions(options.operations, options.modulus)
    numbers = random.Random(options.seed).sample(range(total), options.train + options.valid)
    items = [make_item(number, options.operations, options.modulus) for number in numbers]
    return {"train": items[options.valid :], "valid": items[: options.valid]}


def blind_guess(operations, modulus):
    """How often the best guess is right that sees all the operations, but not the number they start from.

    A chain maps the start x to a x + b (modulo), and gcd(a, modulus) starts share an answer: all of them after `* 0`,
    five after `* 5` modulo 10, and so on. That is why it is right more often than once in `modulus`.
    """
    factors = Counter({1: 1})  # how many chains have each a; sums and differences leave it as it is
    for _ in range(operations):
        longer = Counter({a: 2 * modulus * count for a, count in factors.items()})
        for a, count in factors.items():
            for operand in range(modulus):
                longer[a * operand % modulus] += count
        factors = longer
    right = sum(count * math.gcd(a, modulus) for a, count in factors.items())
    return right / (modulus * sum(factors.values()))


def vocabulary(modulus):
    """Words beside the single characters: what carries a leading space, and what has several characters."""
    numbers = [str(number) for number in range(modulus)]
    return ["###", *(f" {word}" for word in [*OPERATIONS, *numbers]), *(n for n in numbers if len(n) > 1)]


def problems_of(options):
    """What is wrong with the options, in words."""
    tests = [
        (1 <= options.operations <= 20, f"--operations {options.operations}: expected 1 to 20"),
        (2 <= options.modulus <= 100, f"--modulus {options.modulus}: expected 2 to 100"),
        (options.train >= 1, f"--train {options.train}: expected at least 1"),
        (options.valid >= 1, f"--valid {options.valid}: expected at least 1"),
        (re.fullmatch(r"[\w.-]+", options.prefix), f"--prefix {options.prefix!r}: a name without folders is needed"),
    ]
    problems = [message for holds, message in tests if not holds]
    if not problems:
        total, wanted = count_questions(options.operations, options.modulus), options.train + options.valid
        if wanted > total:
            problems.append(f"--train and --valid: {wanted:,} items wanted, there are {total:,} different questions")
    return problems


def parse_args(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=3, help="operations in a question (default 3)")
    parser.add_argument("--modulus", type=int, default=10, help="values are 0 to MODULUS - 1 (default 10)")
    parser.add_argument("--train", type=int, default=17_000, help="training items (default 17,000)")
    parser.add_argument("--valid", type=int, default=500, help="validation items (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default 0)")
    parser.add_argument("--prefix", default="chains", help="beginning of the files' names (default chains)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to (default data)")
    options = parser.parse_args(arguments)
    if problems := problems_of(options):
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
    print(f"guessing is right in {1 / options.modulus:.3f} of all cases; knowing the operations alone, in {guess:.3f}")


if __name__ == "__main__":
    run(main)
