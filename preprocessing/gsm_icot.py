"""Convert one split of GSM8K (Internalize-CoT text) to JSON: data/gsm_SPLIT.txt becomes data/gsm_SPLIT.json.

    python preprocessing/gsm_icot.py valid

Each line reads `question||<<1+2=3>> <<3*4=12>> #### 12`. preprocessing/gsm_icot.bash downloads the three files and
runs this script on them. It also converts text of your own in the same form.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))  # Python leaves it out where PYTHONSAFEPATH is set
from datafiles import DataError, argument_parser, describe, listed, run, write_json

import re
from pathlib import Path


def convert_line(line):
    """Convert one line by the rules of the official preprocessing/gsm_icot.py.

    A line without steps gets one empty step, [""], as in the official data.
    """
    fields = line.split("||")
    return {
        "question": fields[0],
        "steps": fields[1].split("##")[0].strip().split(" "),
        "answer": line.split("##")[-1].strip(),
    }


def read_lines(path):
    """Yield the lines of the file, without a byte-order mark, which would become part of the first question."""
    with open(path, encoding="utf-8-sig") as file:
        yield from file


def lines_where(is_wrong, path):
    """List the lines of the file for which is_wrong(line), with their numbers."""
    try:
        return [f"line {n:,}: {line.strip()[:60]!r}" for n, line in enumerate(read_lines(path), 1) if is_wrong(line)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def splits_wrongly(line):
    """Whether the official rules cut a question or a step apart: `||` in it, or spaces in or beside a step."""
    fields = line.split("||")
    steps = convert_line(line)["steps"]
    return len(fields) > 2 or (len(steps) > 1 and any(not (s.startswith("<<") and s.endswith(">>")) for s in steps))


def joins_steps(line):
    """Whether the official rules take two steps as one, because something else than a space is between them."""
    return any(step.count("<<") > 1 for step in convert_line(line)["steps"])


def answers_oddly(line):
    """Whether a line has a `##`, but not one mark behind its steps with an answer behind that."""
    marks = re.findall("##+", line.partition("||")[2])
    return "##" in line and (len(marks) != 1 or not convert_line(line)["answer"])


def check_lines(path):
    """Raise a DataError for text of another form. Warn of lines that the official rules accept, but convert oddly."""
    if wrong := lines_where(lambda line: "||" not in line, path):
        raise DataError(
            f"{path}: found {describe(path)}.\n  expected lines 'question||steps #### answer'; "
            f"{len(wrong):,} have no '||':\n{listed(wrong)}"
        )
    oddities = {
        "have no '##'; by the official rules, the whole line is the answer": lambda line: "##" not in line,
        "hold '||' twice, or spaces in or beside a step; by the official rules, a question ends at the first '||', "
        "steps at the next, and each space ends a step": splits_wrongly,
        "hold two steps without a space between them; by the official rules, they are one step": joins_steps,
        "have '##' in the question alone, twice, or with nothing behind it; by the official rules, the answer is what "
        "follows the line's last '##'": answers_oddly,
    }
    for what, is_odd in oddities.items():
        if found := lines_where(is_odd, path):
            print(f"warning: {path}: {len(found):,} lines {what}:\n{listed(found)}", file=sys.stderr)


def convert(split):
    """Convert data/gsm_SPLIT.txt; return the JSON file's path and its number of items."""
    raw, converted = Path(f"data/gsm_{split}.txt"), Path(f"data/gsm_{split}.json")
    if not raw.is_file():
        raise DataError(f"{raw}: not found. Run 'bash preprocessing/gsm_icot.bash', or copy the raw text there.")
    if raw.stat().st_size == 0:
        raise DataError(f"{raw}: an empty file. Delete it and run 'bash preprocessing/gsm_icot.bash'.")
    check_lines(raw)
    return converted, write_json(map(convert_line, read_lines(raw)), converted)


def main():
    parser = argument_parser(__doc__)
    parser.add_argument("split", help="train, valid, test, or the SPLIT of a data/gsm_SPLIT.txt of your own")
    converted, count = convert(parser.parse_args().split)
    print(f"{converted}: {count:,} items")


if __name__ == "__main__":
    run(main)
