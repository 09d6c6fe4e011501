"""Convert ProntoQA's raw data: data/5hop_0shot_random.json becomes data/prontoqa_{train,valid,test}.json.

    python preprocessing/prontoqa.py

The generator of asaparov/prontoqa writes the raw file. preprocessing/prontoqa.bash runs it and then this script; if you
have the raw file already, copy it into data/. The first 9,000 items become the training set, the next 200 the
validation set and the last 800 the test set.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # Python leaves it out where PYTHONSAFEPATH is set
from datafiles import DataError, argument_parser, describe, listed, run, write_json

import json
from pathlib import Path

RAW = Path("data/5hop_0shot_random.json")
EXPECTED = 10_000
SPLITS = {"train": slice(0, 9_000), "valid": slice(9_000, 9_200), "test": slice(9_200, None)}


def convert_example(example):
    """Convert one raw example by the rules of the official preprocessing/prontoqa.py.

    A step is two sentences of the chain: a known fact and the rule applied to it. The last step may have one sentence.
    """
    chain = example["chain_of_thought"]
    return {
        "question": example["question"] + " " + example["query"],
        "steps": [" ".join(chain[i : i + 2]) for i in range(0, len(chain), 2)],
        "answer": example["answer"],
    }


def find_problem(entry):
    """Describe why a raw entry cannot be converted; None if it can."""
    example = entry.get("test_example") if isinstance(entry, dict) else None
    if not isinstance(example, dict):
        return "no object 'test_example'"
    for key in ("question", "query", "answer"):
        if not isinstance(example.get(key), str):
            return f"'{key}' is not a text"
    chain = example.get("chain_of_thought")
    if not isinstance(chain, list) or not chain or not all(isinstance(sentence, str) for sentence in chain):
        return "'chain_of_thought' is not a list of sentences"
    return None


def read_raw(path):
    """Return the raw file's examples in order. Raises a DataError if the file or an example is unusable."""
    if not path.is_file():
        raise DataError(f"{path}: not found. Run 'bash preprocessing/prontoqa.bash' or copy the raw file there.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: found {describe(path)}, not JSON ({error}). Generate or copy it again.") from None
    if not isinstance(raw, dict) or not raw:
        raise DataError(f"{path}: expected an object of example1, example2 ..., found {type(raw).__name__} {raw!r:.40}")
    problems = [f"{key}: {problem}" for key, entry in raw.items() if (problem := find_problem(entry))]
    if problems:
        raise DataError(f"{path}: {len(problems):,} of {len(raw):,} examples cannot be used:\n{listed(problems)}")
    return [entry["test_example"] for entry in raw.values()]


def main():
    argument_parser(__doc__).parse_args()
    items = [convert_example(example) for example in read_raw(RAW)]
    if len(items) != EXPECTED:
        sizes = ", ".join(f"{name} {len(items[part]):,}" for name, part in SPLITS.items())
        print(
            f"warning: {RAW} holds {len(items):,} examples, the paper's data {EXPECTED:,}; split by position: {sizes}",
            file=sys.stderr,
        )
    for name, part in SPLITS.items():
        path = Path(f"data/prontoqa_{name}.json")
        print(f"{path}: {write_json(items[part], path):,} items")


if __name__ == "__main__":
    run(main)
