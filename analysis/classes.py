"""What kind of text a model wrote about a graph: the six classes of section 5.2 of the paper. No MLX here.

A text is read by the form in which its data writes steps. After k thoughts that stand for k steps it should go on with
step k + 1, so its path is the rest of one. The paper defines the classes in words; the rules of `judge` decide where
those leave something open. `aligned` is not demanded, because the paper asks only that some path completes the text.
"""

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from analysis.graphs import Graph

CLASSES = ("Correct Path", "Longer Path", "Hallucination", "Wrong Target", "Correct Label", "Incorrect Label")
RIGHT_PATHS = CLASSES[:2]
MARK = "###"  # begins the answer

Path = list[tuple[str, str]]  # the edges that a text names


class TextForm(NamedTuple):
    """How a data set writes the steps of a path."""

    name: str  # in messages
    read_path: Callable[[str, Graph], Path | None]  # from the text before the answer; None where a line is no step
    lead: str  # what stands in a step before the name of its first node
    before_name: str  # what separates the two
    first_depth: int  # edges from the root to the first node that step 1 names


class Verdict(NamedTuple):
    """What one text is."""

    name: str  # of CLASSES
    agrees: bool | None  # whether the stated answer is the path's last node; None without a path
    aligned: bool | None  # whether the path begins where the thoughts should have ended; None without a path
    contradicts: bool  # whether path and answer disagree about being right


def read_sentences(text: str, graph: Graph) -> Path | None:
    """`Alex is a grimpus.` or `Every grimpus is a rorpus.`, one a line (ProsQA)."""
    sentence = re.compile(rf"(?:Every (\S+)|({re.escape(graph.root)})) is an? (\S+)\.")
    matches = [sentence.fullmatch(line) for line in text.split("\n") if line.strip()]
    path = [(match[1] or match[2], match[3]) for match in matches if match]
    return path if len(path) == len(matches) else None


def read_arrows(text: str, graph: Graph) -> Path | None:
    """`a>b`, with one letter for each node (preprocessing/prosqa.py --symbolic)."""
    text = "".join(text.split())
    return re.findall("(.)>(.)", text) if re.fullmatch("(.>.)*", text) else None


def read_nodes(text: str, graph: Graph) -> Path | None:
    """`ilm`: the nodes one after the other, the root left out, one letter each (preprocessing/graphs.py).

    The first edge begins at the first node's parent: the root, or where thoughts have ended.
    """
    nodes = "".join(text.split())
    if not nodes:
        return []
    first = graph.nearest_parent(nodes[0])
    return None if first is None else list(pairwise([first, *nodes]))


FORMS = (
    TextForm("sentences", read_sentences, "Every", " ", 0),
    TextForm("arrows", read_arrows, "", "", 0),
    TextForm("nodes", read_nodes, "", "", 1),
)


def find_form(steps: Iterable[list[str]], graphs: Iterable[Graph], separator: str) -> TextForm | None:
    """The form in which every item's own steps are a path from its root to its target; None where none is.

    separator: what ends a step, a Layout's.
    """
    pairs = list(zip(steps, graphs, strict=True))
    return next((form for form in FORMS if all(_fits(form, own, graph, separator) for own, graph in pairs)), None)


def _fits(form: TextForm, steps: list[str], graph: Graph, separator: str) -> bool:
    return judge("".join(step + separator for step in steps), graph, form, 0, True).name in RIGHT_PATHS


def judge(text: str, graph: Graph, form: TextForm, n_done: int, is_right: bool) -> Verdict:
    """The class of one generated text, by the first rule that fits.

    1. It names no step: Correct Label or Incorrect Label, by its answer.
    2. Hallucination: a line in another form, an edge that does not exist, a broken chain, or a path that does not begin
       at the root (no step done by thoughts) or at a node that the root reaches.
    3. The path ends at the target: Correct Path if it is as short as a path can be, else Longer Path.
    4. Otherwise it ends elsewhere: Wrong Target.

    n_done: steps that thoughts stand for; is_right: whether the stated answer is right.
    """
    path = form.read_path(text.split(MARK)[0], graph)
    if path is None:
        return Verdict("Hallucination", None, None, False)
    if not path:
        return Verdict("Correct Label" if is_right else "Incorrect Label", None, None, False)
    ahead, (first, _), (_, last) = graph.distances(graph.root), path[0], path[-1]
    if not _exists(path, graph, first in ahead if n_done else first == graph.root):
        name = "Hallucination"
    elif last != graph.target:
        name = "Wrong Target"
    else:
        name = "Correct Path" if ahead[first] + len(path) == ahead[last] else "Longer Path"
    contradicts = name != "Hallucination" and (name in RIGHT_PATHS) != is_right
    return Verdict(name, stated_node(text) == last, ahead.get(first) == n_done, contradicts)


def _exists(path: Path, graph: Graph, begins_well: bool) -> bool:
    is_chain = all(one[1] == other[0] for one, other in pairwise(path))
    return begins_well and is_chain and set(path) <= set(graph.edges)


def stated_node(text: str) -> str | None:
    """The node that the answer names, its last word; None for a text without an answer."""
    words = text.rpartition("#")[2].rstrip(". \n").split() if "#" in text else []
    return words[-1] if words else None
