"""Find data sets of {question, steps, answer} items, read them and check every item.

A data set is a JSON list or a JSON Lines file, plain or gzipped, or what the optional package `datasets` opens: a local
folder (`FOLDER` or `FOLDER:split`) or a data set of the Hub (`ORG/NAME:split`). The format of a file is recognized by
its content, not by its name.
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from text.stand_ins import COMPRESSED, find_stand_in
from text.tokenizer import SPECIAL_TOKENS
from utils import UserError, can_redraw, human_size, memory_size, read_file, warn

KEYS = ("question", "answer", "steps")
SHOWN = 10  # problems listed in one message
BOMB_BYTES, BOMB_RATIO = 1 << 28, 200  # a gzipped file that unpacks to more than both is no text
IN_A_FOLDER = "put it into a folder of its own and name the folder, which the package datasets opens"
FOREIGN = (  # first bytes of files of other kinds, what they are, and what to do with them
    (b"PAR1", "a Parquet file", IN_A_FOLDER),
    (b"ARROW1", "an Arrow file", IN_A_FOLDER),
    (b"\xff\xff\xff\xff", "an Arrow file", f"name the folder that save_to_disk wrote, or {IN_A_FOLDER}"),
    *COMPRESSED,
    (b"PK\x03\x04", "a zip archive", "unpack it with `unzip FILE`, and name the file in it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it, and name the file in it"),
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class Example(NamedTuple):
    """One item of a data set, as text."""

    question: str
    steps: list[str]
    answer: str


@dataclass(frozen=True)
class Source:
    """A data set that is not parsed yet: the bytes of a file, or the rows that `datasets` returned."""

    path: str
    content: bytes | list[dict]

    def digest(self) -> str:
        """SHA-256 of the content: equal digests mean equal examples."""
        content = self.content if isinstance(self.content, bytes) else json.dumps(self.content, default=repr).encode()
        return hashlib.sha256(content).hexdigest()

    def examples(self, limit: int | None = None) -> list[Example]:
        """Parse and check the first `limit` items (default: all). Keys besides question, steps and answer are ignored.

        Raises UserError that names the file and up to ten problems, each with the item's index and key.
        """
        items = _parse(self.path, self.content) if isinstance(self.content, bytes) else self.content
        if not items:
            raise UserError(f"{self.path}: the list is empty; at least one item is needed")
        items = items[:limit]
        found = [f"item {index}: {problem}" for index, item in enumerate(items) for problem in _problems(item)]
        raise_if_any(found, f"{self.path}: ", f" in {len(items):,} items")
        return [Example(item["question"], item["steps"], item["answer"]) for item in items]


def open_source(path: str) -> Source:
    """Read the bytes or rows of a data set; see the module for what `path` may be. Raises UserError if that fails."""
    name, _, split = path.partition(":")  # at the first colon: a split may be a slice, train[:100]
    if Path(path).is_dir():
        return Source(path, _rows(path, None))
    if name and split and not Path(path).exists() and (Path(name).is_dir() or HUB_NAME.fullmatch(name)):
        if Path(name).is_file():
            raise UserError(f"{path}: {name} is a file and has no splits; leave out `:{split}`")
        return Source(path, _rows(name, split))
    try:
        return Source(path, read_file(Path(path), limit=memory_size()))
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot read the data ({reason}); see docs/data.md. A data set of the Hub is written "
            "ORG/NAME:split"
        ) from error


def read_examples(path: str, limit: int | None = None) -> list[Example]:
    """Open a data set and return its checked examples; see open_source and Source.examples."""
    return open_source(path).examples(limit)


def steps_with_mark(examples: list[Example]) -> list[int]:
    """Indices of items with `#` in a step: a generated chain ends before its first `#`, so cot_match is never true."""
    return [index for index, example in enumerate(examples) if any("#" in step for step in example.steps)]


def warn_of_marked_steps(path: str, examples: list[Example]) -> None:
    """Warn of items whose chain of thought cannot be matched; their answers can."""
    if found := steps_with_mark(examples):
        shown = ", ".join(map(str, found[:SHOWN])) + (", ..." if len(found) > SHOWN else "")
        warn(
            f"{path}: {len(found):,} of {len(examples):,} items have `#` in a step (items {shown}): a chain of thought "
            "ends before the first `#`, so their cot_match, and eval/cot_em, can never be true for them"
        )


def raise_if_any(problems: list[str], before: str, after: str = "") -> None:
    """Raise UserError if there are problems: their number between `before` and `after`, then the first ten."""
    if problems:
        count = f"{len(problems):,} problem{'s' * (len(problems) > 1)}"
        shown = "\n".join(f"  - {problem}" for problem in problems[:SHOWN])
        rest = f"\n  ... and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
        raise UserError(f"{before}{count}{after}\n{shown}{rest}")


def _parse(path: str, content: bytes) -> list:
    """Parse the items of a JSON list or of JSON Lines, gzipped or not; the items are not checked here."""
    text = _decode(path, content)
    start = text.lstrip()[:1]
    if not start:
        raise UserError(f"{path}: the file is empty")
    if start == "{":
        return _parse_lines(path, text)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of more than 4300 digits
        raise UserError(f"{path}: not JSON ({error}){_hint(text)}") from error
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a JSON list of items, found {_kind(items)}")
    return items


def _decode(path: str, content: bytes) -> str:
    try:
        if content.startswith(b"\x1f\x8b"):
            content = _unpacked(path, content)
        _refuse_foreign(path, content)
        return content.decode("utf-8-sig")  # -sig: without the byte-order mark
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); download or create it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def _unpacked(path: str, content: bytes) -> bytes:
    """The content of a gzip file. Raises UserError for a file that would fill the memory, as soon as that shows."""
    result = io.BytesIO()
    with gzip.open(io.BytesIO(content)) as file:
        while chunk := file.read(1 << 22):
            result.write(chunk)
            size = result.tell()
            if size > BOMB_BYTES and size > BOMB_RATIO * len(content):
                raise UserError(
                    f"{path}: {human_size(len(content))} unpack to over {human_size(size)}; no data set does"
                )
    return result.getvalue()


def _refuse_foreign(path: str, content: bytes) -> None:
    for head, what, remedy in FOREIGN:
        if content.startswith(head):
            raise UserError(f"{path}: {what}; expected JSON. To use it, {remedy}")
    if content[257:262] == b"ustar":
        raise UserError(f"{path}: a tar archive; expected JSON. To use it, unpack it with `tar -xf FILE`")


def _parse_lines(path: str, text: str) -> list:
    """Parse one object per line and skip blank lines. Lines end with \\n only: JSON text may contain U+2028."""
    items, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                items.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    if problems and _is_json(text):
        raise UserError(f"{path}: expected a JSON list of items (or one object per line), found one object")
    raise_if_any(problems, f"{path}: not JSON Lines, ")
    return items


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _hint(text: str) -> str:
    """Say what a file that is not JSON may be."""
    if found := find_stand_in(text[:64].encode()):
        return f"; this is {found[0]}, not a data set: {found[1]}"
    return "; expected a list of {question, steps, answer} objects, or one such object per line"


def _problems(item) -> Iterator[str]:
    """Yield what is wrong with one item; each problem begins with its key."""
    if not isinstance(item, dict):
        yield f"expected an object, found {_kind(item)}"
        return
    yield from (f"{key} is missing" for key in KEYS if key not in item)
    steps = item.get("steps", [])
    if isinstance(steps, list):
        yield from _text_problems((f"steps[{i}]", step) for i, step in enumerate(steps))
    else:
        hint = "; make it a list, one text per step" if isinstance(steps, str) else ""
        yield f"steps should be a list of text, found {_kind(steps)}{hint}"
    yield from _text_problems((key, item[key]) for key in ("question", "answer") if key in item)
    yield from _content_problems(item.get("question", "?"), item.get("answer", "?"))


def _text_problems(texts: Iterable[tuple[str, object]]) -> Iterator[str]:
    """Yield what is wrong with (key, text) pairs: not text, or text that tokens cannot represent faithfully."""
    for key, text in texts:
        if not isinstance(text, str):
            hint = f'; write it as text, "{text}"' if type(text) in (int, float) else ""
            yield f"{key} should be text, found {_kind(text)}{hint}"
        elif "<|" in text and (names := [name for name in SPECIAL_TOKENS if name in text]):
            yield f"{key} contains {' and '.join(names)}, reserved for special tokens; remove it from the text"
        elif not text.isascii() and (lone := re.search("[\ud800-\udfff]", text)):
            yield f"{key} contains a lone surrogate (half a character), U+{ord(lone[0]):04X} at position {lone.start()}"


def _content_problems(question, answer) -> Iterator[str]:
    """Yield empty texts, and `#` in an answer: the official run.py compares only what follows the last `#`.

    This is an error and not a warning because scores would be silently wrong: `C#` is read as empty and equals `F#`.
    It is an error in training sets too: a model that learns to write `#` in answers is misread in every evaluation.
    """
    if isinstance(question, str) and not question.strip():
        yield "question is empty"
    if not isinstance(answer, str):
        return
    if not answer.replace(",", "").strip():  # commas are removed before answers are compared
        yield f"answer is empty{' but for commas' if answer.strip() else ''}"
    elif "#" in answer:
        yield f"answer contains `#` ({answer!r:.40}), which starts an answer: only text after the last # counts"


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true/false"}
    name = names.get(type(value), "null" if value is None else type(value).__name__)
    return name + (f" ({value!r:.40})" if isinstance(value, (str, int, float)) else "")


def _rows(name: str, split: str | None) -> list[dict]:
    """Return the rows that the package `datasets` reads, with our three columns only."""
    try:
        import datasets

        if not hasattr(datasets, "load_dataset"):
            found = getattr(datasets, "__file__", None) or "a folder named datasets"
            raise ImportError(f"{found} is taken for the package")
    except ImportError as error:
        raise UserError(
            f"{name}: folders and data sets of the Hub need the package datasets ({error}): pip install datasets"
        ) from error
    except Exception as error:  # it reads numbers from the environment, for example
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise UserError(
            f"{name}: the package datasets cannot be loaded ({reason}); check the variables that begin with HF_"
        ) from error
    if not can_redraw():
        datasets.disable_progress_bars()
    try:
        found = _open_with(datasets, name, split)
    except Exception as error:  # beside its own errors, what a proxy, a token or an address that is wrong raises
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name}: the package datasets cannot open it ({type(error).__name__}: {reason:.500})"
        ) from error
    if isinstance(found, dict):
        if len(found) > 1:
            raise UserError(f"{name}: name one of its splits, as in {name}:{next(iter(found))} ({', '.join(found)})")
        found = next(iter(found.values()))
    return found.select_columns([key for key in KEYS if key in found.column_names]).to_list()


def _open_with(datasets, name: str, split: str | None):
    """Return a Dataset, or, if no split is named, possibly a dictionary of them."""
    folder = Path(name)
    if any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):  # written by save_to_disk
        found = datasets.load_from_disk(name)
        if split is None:
            return found
        if not isinstance(found, dict):
            raise ValueError(f"it has no splits; leave out `:{split}`")
        if split not in found:
            raise ValueError(f"there is no split {split}; it has {', '.join(found)}")
        return found[split]
    if not folder.is_dir() and (cached := _cached(datasets, name, split)) is not None:
        return cached
    return datasets.load_dataset(name, split=split)


def _cached(datasets, name: str, split: str | None):
    """A data set of the Hub from the cache of `datasets`, without the network; None where it is not there."""
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True  # the switch that the package's own functions read
    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError):  # a ConnectionError where nothing is cached
        return None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
