"""Shared by the preprocessing scripts: pinned checksums, atomic writing, errors. Standard library only.

The bash scripts call it as a command:

    python datafiles.py check NAME PATH [--source ADDRESS] [--advice TEXT]   compare PATH with NAME in checksums.txt
    python datafiles.py pin NAME KIND                                        print one value of checksums.txt

Exit status: 0 success, 1 PATH is not the expected file, 2 the call or checksums.txt is wrong.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(HERE))
from startup import signals

# The scripts import this file first, so that the handler is in place before slower imports. Other programs, such as
# scripts/demo.py, keep their own handler.
if os.path.dirname(os.path.abspath(sys.argv[0])) == HERE:
    signals.at_once()

import argparse
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

from text.stand_ins import find_stand_in

PINS = Path(__file__).with_name("checksums.txt")
KINDS = ("sha256", "gitblob", "sha256-hint", "items", "commit")


class DataError(Exception):
    """An error shown as one message. Exit status 2: a wrong file or option of the user; 1: network, server or disk."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def run(main):
    """Call main() and turn a DataError or OSError into its message and exit status."""
    try:
        main()
        sys.stdout.flush()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except BrokenPipeError:
        sys.exit(signals.reader_left())
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def argument_parser(docstring):
    """Create a script's argument parser, whose --help shows the docstring as it is written."""
    return argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)


@contextmanager
def replacing(path):
    """Open a temporary text file that replaces `path` on success and is removed otherwise.

    `path` therefore never holds a partial file. Like utils.replacing, but without its dependencies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # one name per process
    signals.unfinished.add(str(temporary))
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        signals.unfinished.discard(str(temporary))


def write_json(items, path):
    """Write an iterable as a JSON list, with the same bytes as json.dump, and return its length.

    The items are written one by one, so that the list need not fit in memory.
    """
    count = 0
    with replacing(Path(path)) as file:
        file.write("[")
        for item in items:
            file.write((", " if count else "") + json.dumps(item))
            count += 1
        file.write("]")
    return count


def listed(problems, limit=10):
    """Format the first problems, one per line, and the number of the others."""
    more = [f"... and {len(problems) - limit:,} more"] if len(problems) > limit else []
    return "\n".join(f"  {line}" for line in list(problems[:limit]) + more)


def describe(path):
    """Say what kind of file an unexpected file is."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        found = find_stand_in(file.read(512))
    if size == 0:
        return "an empty file"
    return f"{found[0]} ({size:,} bytes) instead of data" if found else f"another file of {size:,} bytes"


def measure(path, kind):
    """Return the file's value of a kind in checksums.txt, as text; None if it has none (not a JSON list)."""
    if kind == "items":
        return _count_items(path)
    digest = hashlib.sha1() if kind == "gitblob" else hashlib.sha256()
    if kind == "gitblob":
        digest.update(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _count_items(path):
    try:
        with open(path, encoding="utf-8") as file:
            items = json.load(file)
    except ValueError:  # not UTF-8 or not JSON
        return None
    return str(len(items)) if isinstance(items, list) else None


def pins_path():
    """Return the checksum file in use."""
    return os.environ.get("COCONUT_CHECKSUMS") or PINS


def read_pins():
    """Read the checksum file as {name: {kind: value}}."""
    path, pins = pins_path(), {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            words = line.split("#")[0].split()
            if not words:
                continue
            if len(words) != 3 or words[1] not in KINDS:
                raise DataError(f"{path}, line {number}: expected 'NAME KIND VALUE', found {line.strip()!r}")
            pins.setdefault(words[0], {})[words[1]] = words[2]
    return pins


def pin(name, kind):
    """Return one value of the checksum file."""
    try:
        return read_pins()[name][kind]
    except KeyError:
        raise DataError(f"{pins_path()}: no {kind} for {name}") from None


def check(name, path, source=None, advice=""):
    """Raise a DataError (status 1) unless the file has every value that the checksum file lists for this name."""
    pins = read_pins().get(name)
    if not pins:
        raise DataError(f"{pins_path()}: no entry for {name}")
    for kind, expected in pins.items():
        found = measure(path, kind)
        if found == expected:
            continue
        if kind == "sha256-hint":
            print(f"note: {path}: sha256 {found}, second-hand sum {expected}; the other sums agree, the file is kept")
            continue
        value = "not a JSON list" if found is None else f"{kind} {found}"
        raise DataError(
            f"{path}{f', from {source},' if source else ''} is not the expected file.\n"
            f"  expected: {name} with {kind} {expected}\n  found:    {describe(path)}, {value}"
            + (f"\n  what to do: {advice}" if advice else ""),
            status=1,
        )


def main():
    parser = argument_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check")
    checking.add_argument("name")
    checking.add_argument("path")
    checking.add_argument("--source")
    checking.add_argument("--advice", default="")
    pinned = commands.add_parser("pin")
    pinned.add_argument("name")
    pinned.add_argument("kind", choices=KINDS)
    args = parser.parse_args()
    if args.command == "check":
        check(args.name, args.path, args.source, args.advice)
    else:
        print(pin(args.name, args.kind))


if __name__ == "__main__":
    run(main)
