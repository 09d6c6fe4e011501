"""Convert one split of GSM8K (Internalize-CoT text) to JSON: data/gsm_SPLIT.txt becomes data/gsm_SPLIT.json.

    python preprocessing/gsm_icot.py valid

Each line reads `question||<<1+2=3>> <<3*4=12>> #### 12`. preprocessing/gsm_icot.bash downloads the three files and
calls this; on text of your own of the same form it works alone.
"""

from datafiles import DataError, describe, listed, run, write_json

import argparse
import sys
from pathlib import Path


def convert_line(line):
    """One line as an item, by the rules of the official preprocessing/gsm_icot.py.

    A line without steps keeps one empty step, [""]: the official data have it so.
    """
    fields = line.split("||")
    return {
        "question": fields[0],
        "steps": fields[1].split("##")[0].strip().split(" "),
        "answer": line.split("##")[-1].strip(),
    }


def check_lines(path):
    """Refuse text of another form; warn of lines that convert officially, but hardly as meant."""
    wrong, doubtful = [], []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if "||" not in line:
                    wrong.append(f"line {number:,}: {line.strip()[:60]!r}")
                elif "##" not in line:
                    doubtful.append(f"line {number:,}: {line.strip()[:60]!r}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not utf-8 text ({error.reason}); save it as utf-8") from None
    if wrong:
        raise DataError(
            f"{path}: found {describe(path)}.\n  expected lines 'question||steps #### answer'; "
            f"{len(wrong):,} have no '||':\n{listed(wrong)}"
        )
    if doubtful:
        print(
            f"warning: {path}: {len(doubtful):,} lines have no '##'; as officially, the whole line is their answer:\n"
            f"{listed(doubtful)}",
            file=sys.stderr,
        )


def convert(split):
    """Convert data/gsm_SPLIT.txt; return the JSON file's path and its number of items."""
    raw, converted = Path(f"data/gsm_{split}.txt"), Path(f"data/gsm_{split}.json")
    if not raw.is_file():
        raise DataError(f"{raw}: not found. Run 'bash preprocessing/gsm_icot.bash', or copy the raw text there.")
    if raw.stat().st_size == 0:
        raise DataError(f"{raw}: an empty file. Delete it and run 'bash preprocessing/gsm_icot.bash'.")
    check_lines(raw)
    with open(raw, encoding="utf-8") as file:
        return converted, write_json(map(convert_line, file), converted)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", help="train, valid, test, or the SPLIT of a data/gsm_SPLIT.txt of your own")
    converted, count = convert(parser.parse_args().split)
    print(f"{converted}: {count:,} items")


if __name__ == "__main__":
    run(main)
