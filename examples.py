"""Question / steps / answer items: read from a file and checked before anything is built on them."""

import json
from dataclasses import dataclass
from pathlib import Path

from utils import UserError

SHOWN = 10  # problems listed in one message


@dataclass(frozen=True)
class Example:
    """One item of a data set, as text."""

    question: str
    steps: list[str]
    answer: str


def read_examples(path: str, limit: int | None = None) -> list[Example]:
    """Read a JSON list of objects with `question`, `answer` (text) and `steps` (list of text); other keys are ignored.

    limit: read no more than this many. Raises UserError that names the file and up to ten bad items with their keys.
    """
    items = _read_json(Path(path))
    if not isinstance(items, list):
        raise UserError(f"{path}: expected a JSON list of items, found {_kind(items)}")
    if not items:
        raise UserError(f"{path}: the list is empty; at least one item is needed")
    items = items[:limit]
    problems = [problem for index, item in enumerate(items) for problem in _problems(index, item)]
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:SHOWN])
        rest = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(f"{path}: {len(problems)} problem(s) in {len(items)} items\n{shown}{rest}")
    return [Example(item["question"], item["steps"], item["answer"]) for item in items]


def _read_json(path: Path):
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the data ({error.strerror}); see README, section Data") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error.msg} in line {error.lineno}, column {error.colno})") from error


def _problems(index: int, item) -> list[str]:
    if not isinstance(item, dict):
        return [f"item {index}: expected an object, found {_kind(item)}"]
    found = []
    for name in ("question", "answer"):
        value = item.get(name)
        if name not in item:
            found.append(f"item {index}: {name} is missing")
        elif not isinstance(value, str):
            found.append(f"item {index}: {name} should be text, found {_kind(value)}")
        elif not value.strip():
            found.append(f"item {index}: {name} is empty")
    return found + _step_problems(index, item)


def _step_problems(index: int, item: dict) -> list[str]:
    if "steps" not in item:
        return [f"item {index}: steps is missing"]
    steps = item["steps"]
    if not isinstance(steps, list):
        return [f"item {index}: steps should be a list of text, found {_kind(steps)}"]
    return [
        f"item {index}: step {i} should be text, found {_kind(s)}"
        for i, s in enumerate(steps)
        if not isinstance(s, str)
    ]


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true/false"}
    return names.get(type(value), "null") + (f" ({value!r:.40})" if isinstance(value, (str, int, float)) else "")
