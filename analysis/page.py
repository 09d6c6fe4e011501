"""The HTML of a run's page: texts from the run are escaped here, and pictures become part of the page.

report.html is the frame: its style, its order, and what it forbids the browser (scripts and the network).
"""

import base64
import struct
from html import escape
from pathlib import Path
from string import Template

from utils import UserError

TEMPLATE = Path(__file__).with_name("report.html")
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
DPI = 150  # of the pictures of analysis commands
CSS_DPI = 96  # what a browser calls an inch
NARROW = 640  # CSS pixels; report.html has the same limit


def text(value: object) -> str:
    """A value as HTML text that also fits into a quoted attribute; half characters (lone surrogates) become `?`."""
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def fill(**parts: str) -> str:
    """The whole page. parts: HTML by the names in report.html."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(parts)


def paragraph(sentence: str) -> str:
    """A sentence about the page itself, such as what is missing."""
    return f'<p class="note">{text(sentence)}</p>'


def facts(values: dict[str, object]) -> str:
    """A list of names and values; those that are not known (None or empty) are left out."""
    rows = (f"<dt>{text(name)}</dt><dd>{text(v)}</dd>" for name, v in values.items() if v not in (None, ""))
    return f'<dl class="facts">{"".join(rows)}</dl>'


def table(head: list[str], rows: list[list[str]], marked: int | None = None) -> str:
    """A table of numbers, which scrolls sideways where it is too wide; `marked` is the row that stands out."""
    above = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = "".join(
        f"<tr{' class=marked' if i == marked else ''}>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>"
        for i, row in enumerate(rows)
    )
    html = f'<table class="numbers"><thead><tr>{above}</tr></thead><tbody>{body}</tbody></table>'
    return _scrolling(html, "table")


def keys_table(rows: list[tuple[str, str, object, object]]) -> str:
    """A table of configuration keys. rows: (key, meaning, value, default)."""
    body = "".join(
        f'<tr><th scope="row"><code>{text(name)}</code><small>{text(meaning)}</small></th>'
        f"<td><code>{text(value)}</code></td><td><code>{text(default)}</code></td></tr>"
        for name, meaning, value, default in rows
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("key", "value", "default"))
    return f'<table class="keys"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def folded(title: str, html: str) -> str:
    """Something that opens when its title is clicked."""
    return f"<details><summary>{text(title)}</summary>{html}</details>"


def curves_picture(wide: bytes, narrow: bytes, width: float) -> str:
    """An SVG for wide screens and paper, and one for phones; width: of the wide one, in inches."""
    return (
        f'<picture><source media="(max-width: {NARROW}px)" srcset="{_data_uri(narrow, "svg+xml")}">'
        f'<img src="{_data_uri(wide, "svg+xml")}" style="width: {width * CSS_DPI:.0f}px" '
        'alt="Accuracy and losses over the epochs"></picture>'
    )


def figure(path: Path, title: str, caption: str) -> str:
    """A PNG in the size that it was drawn in. Raises UserError for a damaged or another file."""
    content = path.read_bytes()
    if not (content.startswith(PNG_START) and content.endswith(PNG_END)):
        raise UserError(f"{path}: damaged, not a PNG picture; draw it again, or move it away")
    [width] = struct.unpack(">I", content[16:20])
    source, shown_width = _data_uri(content, "png"), width * CSS_DPI / DPI
    image = f'<img src="{source}" style="width: {shown_width:.0f}px" alt="{text(title)}">'
    return (
        f"<figure><h3>{text(title)}</h3>{_scrolling(image, 'picture')}<figcaption>{text(caption)}</figcaption></figure>"
    )


def predictions_column(title: str, cards: list[str]) -> str:
    """Some predictions under their title."""
    return f'<div class="column"><h3>{text(title)}</h3>{"".join(cards)}</div>'


def prediction(one: dict, thoughts: list[list[tuple[str, float]]]) -> str:
    """One record of predictions_N.jsonl; thoughts: for each thought its likeliest tokens and their probabilities."""
    rows = {"Question": one["question"], "Expected": one["expected_answer"]}
    if one["cot"] and one["cot"] != one["answer"]:
        rows["Wrote first"] = one["cot"]
    rows["Answered"] = one["answer"]
    values = "".join(f"<dt>{name}</dt><dd>{text(value) or '<em>nothing</em>'}</dd>" for name, value in rows.items())
    decoded = "".join(_thought(number, tokens) for number, tokens in enumerate(thoughts, 1))
    verdict = "right" if one["correct"] else "wrong"
    below = f'<table class="thoughts"><tbody>{decoded}</tbody></table>' if thoughts else ""
    return f'<article class="{verdict}"><h4>Item {one["idx"]}: {verdict}</h4><dl>{values}</dl>{below}</article>'


def _scrolling(html: str, kind: str) -> str:
    """A part that scrolls sideways where it is wider than the page, with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{kind}">{html}</div>'


def _thought(number: int, tokens: list[tuple[str, float]]) -> str:
    chips = " ".join(
        f'<span class="token" style="--share: {share:.0%}"><code>{text(repr(token))}</code> {share:.2f}</span>'
        for token, share in tokens
    )
    return f'<tr><th scope="row">thought {number}</th><td>{chips}</td></tr>'


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
