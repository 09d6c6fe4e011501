"""What the preprocessing scripts share: pinned checksums, whole-or-nothing writing, one message per mistake.

The bash scripts call it as a command:

    python datafiles.py check NAME PATH [--source ADDRESS] [--advice TEXT]   is PATH what checksums.txt says of NAME?
    python datafiles.py pin NAME KIND                                        print one value of checksums.txt

Exit status: 0 as expected, 1 another file was found, 2 the call or checksums.txt is wrong.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(HERE))
import stopping  # noqa: E402

if os.path.dirname(os.path.abspath(sys.argv[0])) == HERE:  # a script of this folder was started, and nobody's module
    stopping.at_once()  # before the slower imports, which is why the scripts import this file first

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

PINS = Path(__file__).with_name("checksums.txt")
KINDS = ("sha256", "gitblob", "sha256-hint", "items", "commit")


class DataError(Exception):
    """A mistake to be told in one message. Status 2: the user's file or option; 1: network, server, disk."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


def run(main):
    """Run main() as a command: a DataError becomes its message and status."""
    try:
        main()
        sys.stdout.flush()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except OSError as error:
        print(f"error: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def write_json(items, path):
    """Write an iterable as one JSON list, byte for byte as json.dump would, and return its length.

    Item by item, so that the list need not fit in memory; to a temporary name first, so that path is whole or absent.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two of us may be at it
    stopping.unfinished.add(str(temporary))
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            out.write("[")
            for item in items:
                out.write((", " if count else "") + json.dumps(item))
                count += 1
            out.write("]")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        stopping.unfinished.discard(str(temporary))
    return count


def listed(problems, limit=10):
    """The first problems, one a line, and how many more there are."""
    more = [f"... and {len(problems) - limit:,} more"] if len(problems) > limit else []
    return "\n".join(f"  {line}" for line in list(problems[:limit]) + more)


def describe(path):
    """In words, what a file that is not the expected one seems to be."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer ({size:,} bytes) instead of the data it points to"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return f"a web page (HTML, {size:,} bytes) instead of data"
    return f"another file of {size:,} bytes"


def measure(path, kind):
    """The value of one kind (see checksums.txt) for a file, as text; None if the file has no such value."""
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
    except ValueError:  # not utf-8, not JSON
        return None
    return str(len(items)) if isinstance(items, list) else None


def read_pins():
    """checksums.txt, or the file COCONUT_CHECKSUMS names, as {name: {kind: value}}."""
    path = os.environ.get("COCONUT_CHECKSUMS") or PINS
    pins = {}
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
    """One value of checksums.txt."""
    try:
        return read_pins()[name][kind]
    except KeyError:
        raise DataError(f"{os.environ.get('COCONUT_CHECKSUMS') or PINS}: no {kind} for {name}") from None


def check(name, path, source=None, advice=""):
    """Raise a DataError (status 1) unless the file is the one checksums.txt pins under this name."""
    pins = read_pins().get(name)
    if not pins:
        raise DataError(f"{os.environ.get('COCONUT_CHECKSUMS') or PINS}: nothing is known of {name}")
    origin = f"{path}, from {source}," if source else path
    for kind, expected in pins.items():
        found = measure(path, kind)
        if found == expected:
            continue
        if kind == "sha256-hint":
            print(f"note: {path}: sha256 {found}, second-hand sum {expected}; the other sums agree, the file is kept")
            continue
        value = "not a JSON list" if found is None else f"{kind} {found}"
        raise DataError(
            f"{origin} is not the expected file.\n  expected: {name} with {kind} {expected}\n"
            f"  found:    {describe(path)}, {value}" + (f"\n  what to do: {advice}" if advice else ""),
            status=1,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
