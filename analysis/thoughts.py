"""What each thought decodes to, and how long it is: `python -m analysis.thoughts CHECKPOINT DATA`

    python -m analysis.thoughts pretrained/graph-coconut pretrained/graph_test.json

The lens is the model's own output layer: a thought is a hidden state after the final norm, so softmax(head(thought)) is
what the model would write in its place. Prints for each thought its most frequent first words, entropy (nats), norm and
cosine to the thought before it. The last row is the state behind the last thought, which is not fed back. --layers
shows the outputs of earlier layers through the final norm and the head as well (the last layer is the plain lens).

For items whose steps are written as <<3*60=180>> (GSM8K) it also prints how often their results stand among the --top
first words: any result, the one of the thought's own step, and two different ones at once. Only results that are one
token, with or without a leading space, can be found; items without one do not count. For items with a graph
analysis.frontier answers the like question: which nodes of the frontier and of the path each thought holds.

--control looks at a second checkpoint in the same way. In a model with pauses the states of the same places are shown;
nothing is fed back there.

Writes thoughts.jsonl (settings in the first line, then one line for each item, thought and layer) and thoughts.png (the
words of one item, norms, and hit rates where there are results).
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from startup import blas  # noqa: F401  before mlx

import mlx.core as mx
import numpy as np

from analysis.beside import Part, Subject, control_parser, open_places, require_item, save, say_reports
from analysis.intervals import mean, share
from analysis.pictures import draw_cells, draw_lines
from analysis.probing import BATCH, Probe, logits, open_thinking, prompt_batch, thought_columns, thoughts
from analysis.recording import record, require_gpt2
from dataset import Data
from text.tokenizer import Tokenizer
from text.tokens import TokenExample
from training.evaluation import wilson
from utils import Progress, UserError, exit_status, markdown_table

USED = "norm of the embedding's rows in use"
KEPT = 10  # first words in a record
SHOWN = 5  # of them in the picture
Hits = dict[tuple[int, int], dict[int, bool]]  # {(layer, thought): {index of an item: whether its thought hits}}
RESULT = re.compile(r"=\s*(-?[\d.,]*\d)\s*>>")  # of a step <<3*60=180>>


@dataclass(frozen=True)
class Decoded:
    """One thought of one item, seen through the output layer after one layer."""

    index: int  # of the item in the file
    thought: int  # from 1; n_thoughts + 1 is the state behind the last one, which is not fed back
    layer: int  # from 1
    ids: list[int]  # the KEPT most likely tokens, the first one first
    probabilities: list[float]
    entropy: float  # nats
    norm: float
    cosine: float | None  # to the thought before it
    results: list[set[int]]  # for each step of the item the tokens that are its result
    step: int  # the step, from 0, that this thought stands for

    def hits(self, top: int) -> list[int]:
        """The steps whose result is among the first `top` tokens; of equal results the first step."""
        found = set(self.ids[:top])
        return [step for step in self.distinct if self.results[step] & found]

    @cached_property
    def distinct(self) -> list[int]:
        """The steps with a result that is one token and differs from those of earlier steps."""
        return [i for i, ids in enumerate(self.results) if ids and ids not in self.results[:i]]

    @property
    def has_own(self) -> bool:
        """Whether the thought stands for a step whose result is one token."""
        return self.step < len(self.results) and bool(self.results[self.step])

    def hits_own(self, top: int) -> bool:
        """Whether the result of its own step is among the first `top` tokens."""
        return self.has_own and bool(self.results[self.step] & set(self.ids[:top]))

    def first(self, count: int) -> list[tuple[int, float]]:
        """The first words with their probabilities."""
        return list(zip(self.ids, self.probabilities, strict=True))[:count]

    def record(self, tokenizer: Tokenizer, top: int) -> dict:
        """A line of thoughts.jsonl."""
        words = self.first(KEPT)
        line = {
            "idx": self.index, "thought": self.thought, "layer": self.layer,
            "top": [{"token": tokenizer.spell(i), "id": i, "p": round(p, 6)} for i, p in words],
            "entropy": round(self.entropy, 4), "norm": round(self.norm, 4),
            "cosine": None if self.cosine is None else round(self.cosine, 4),
        }  # fmt: skip
        return {**line, "hits": self.hits(top), "own": self.hits_own(top)} if self.distinct else line


def layer_states(probe: Probe, examples: list[TokenExample], n_states: int) -> list[np.ndarray]:
    """Of each layer the states in the places of the first n_states thoughts after the final norm, [B, n_states, D].

    The last layer's are the thoughts. State k from a prompt with more latents is the same: nothing attends ahead.
    """
    batch = prompt_batch(probe, examples, n_states)
    recorded = record(probe.model, batch)
    places, norm = thought_columns(probe, batch, n_states)[..., None], probe.model.transformer.ln_f
    states = [norm(mx.take_along_axis(out, places, axis=1)) for out in recorded.outputs]
    return [np.array(layer.astype(mx.float32)) for layer in states]


def decode(probe: Probe, data: Data, count: int, all_layers: bool = False) -> list[Decoded]:
    """The thoughts of the first `count` items, and the state behind the last, after the last layer or after each."""
    found = []
    for start in Progress(range(0, count, BATCH), desc="Thoughts", unit=" batches", leave=False):
        items = range(start, min(start + BATCH, count))
        examples, n_states = [data.tokens[i] for i in items], probe.n_thoughts + 1
        by_layer = layer_states(probe, examples, n_states) if all_layers else [thoughts(probe, examples, n_states)]
        for layer, states in enumerate(by_layer, probe.model.transformer.config.n_layer - len(by_layer) + 1):
            for i, rows in zip(items, states, strict=True):
                found += list(_decoded(probe, data, i, layer, rows))
    return found


def _decoded(probe: Probe, data: Data, item: int, layer: int, states: np.ndarray) -> Iterator[Decoded]:
    """states [K + 1, D] of one item."""
    tokenizer = probe.curriculum.tokenizer
    results = [result_tokens(step, tokenizer) for step in data.examples[item].steps]
    norms = np.linalg.norm(states, axis=1)
    for k, (shares, state) in enumerate(zip(softmax(logits(probe, states)), states, strict=True)):
        ids = np.argpartition(-shares, KEPT)[:KEPT]
        ids = ids[np.argsort(-shares[ids])]
        entropy = -float((shares * np.log(np.maximum(shares, 1e-45))).sum())
        cosine = float(state @ states[k - 1] / (norms[k] * norms[k - 1])) if k else None
        step = k // probe.curriculum.thoughts_per_step
        found = ids.tolist(), shares[ids].tolist(), entropy, float(norms[k]), cosine
        yield Decoded(int(data.indices[item]), k + 1, layer, *found, results, step)


def softmax(rows: np.ndarray) -> np.ndarray:
    """Probabilities [..., V] of logits [..., V], in float64."""
    rows = np.exp(rows.astype(np.float64) - rows.max(axis=-1, keepdims=True))
    return rows / rows.sum(axis=-1, keepdims=True)


def result_tokens(step: str, tokenizer: Tokenizer) -> set[int]:
    """The tokens that are the result of a step <<a+b=c>>: c, and c behind a space, where that is one token."""
    found = RESULT.findall(step)
    spellings = [tokenizer.encode(space + found[-1].replace(",", "")) for space in ("", " ")] if found else []
    return {ids[0] for ids in spellings if len(ids) == 1}


def by_place(decoded: list[Decoded]) -> dict[tuple[int, int], list[Decoded]]:
    """{(layer, thought): that thought of every item}, in order."""
    found: dict[tuple[int, int], list[Decoded]] = {}
    for d in decoded:
        found.setdefault((d.layer, d.thought), []).append(d)
    return dict(sorted(found.items()))


def table(decoded: list[Decoded], probe: Probe) -> list[str]:
    """First words, entropy, norm and cosine, a Markdown row for each layer and thought."""
    rows = []
    for (layer, thought), those in by_place(decoded).items():
        words = Counter(d.ids[0] for d in those).most_common(3)
        first = ", ".join(f"{_word(probe.curriculum.tokenizer, i)} {share(count, len(those))}" for i, count in words)
        cosines = [d.cosine for d in those if d.cosine is not None]
        numbers = [[d.probabilities[0] for d in those], [d.entropy for d in those], [d.norm for d in those], cosines]
        rows.append([str(layer), _named(thought, probe.n_thoughts), first, *map(mean, numbers)])
    return markdown_table(
        ["layer", "thought", "most frequent first words", "probability", "entropy", "norm", "cosine"], rows
    )


def hits(decoded: list[Decoded], top: int) -> dict[str, Hits]:
    """{kind: for each layer and thought the items that could hit, and whether they did}; {} without any result."""
    kinds = {
        "any result": [(d, bool(d.hits(top))) for d in decoded if d.distinct],
        "own step's": [(d, d.hits_own(top)) for d in decoded if d.has_own],
        "two at once": [(d, len(d.hits(top)) > 1) for d in decoded if len(d.distinct) > 1],
    }
    found: dict[str, Hits] = {}
    for kind, pairs in kinds.items():
        for d, hit in pairs:
            found.setdefault(kind, {}).setdefault((d.layer, d.thought), {})[d.index] = hit
    return found


def hit_table(found: dict[str, Hits], n_thoughts: int) -> list[str]:
    """A Markdown row for each layer and thought, and for each layer one over all thoughts that are fed back."""
    rows = []
    for layer, thought in sorted(set().union(*found.values())):
        items = [list(places.get((layer, thought), {}).values()) for places in found.values()]
        rows.append([str(layer), _named(thought, n_thoughts), *(share(sum(own), len(own)) for own in items)])
    for layer in sorted({layer for places in found.values() for layer, _ in places}):
        rows.append([str(layer), "all", *(mean(*pooled(places, layer, n_thoughts)) for places in found.values())])
    return markdown_table(["layer", "thought", *found], rows)


def pooled(places: Hits, layer: int, n_thoughts: int) -> tuple[list[int], list[int]]:
    """For each item its hits over all thoughts that are fed back, and how many of them could hit."""
    own: dict[int, list[bool]] = {}
    for (of, thought), items in places.items():
        for index, hit in items.items():
            own.setdefault(index, []).extend([hit] * (of == layer and thought <= n_thoughts))
    return list(map(sum, own.values())), list(map(len, own.values()))


def all_equal(decoded: list[Decoded], n_thoughts: int) -> tuple[int, int]:
    """(items whose thoughts all have one first word, items), after the last layer."""
    last = max(d.layer for d in decoded)
    words: dict[int, set[int]] = {}
    for d in decoded:
        if d.layer == last and d.thought <= n_thoughts:
            words.setdefault(d.index, set()).add(d.ids[0])
    return sum(len(own) == 1 for own in words.values()), len(words)


def embedding_norms(probe: Probe, data: Data, count: int) -> dict[str, float]:
    """The scale of the embedding: the mean norm of the rows that the first `count` questions use, and of all rows.

    In a small vocabulary of bytes the rows of unused tokens are long, and alike: training pushes them away from all
    states. Last the norm of the mean row.
    """
    rows = np.array(probe.model.transformer.embed(mx.arange(probe.curriculum.tokenizer.vocab_size)).astype(mx.float32))
    used = np.unique(np.concatenate([data.tokens[i].question for i in range(count)]))
    norms = np.linalg.norm(rows, axis=1)
    return {
        USED: round(float(norms[used].mean()), 4),
        "of all its rows": round(float(norms.mean()), 4),
        "of its mean row": round(float(np.linalg.norm(rows.mean(axis=0))), 4),
    }


def _named(thought: int, n_thoughts: int) -> str:
    return str(thought) if thought <= n_thoughts else "not fed back"


def _word(tokenizer: Tokenizer, token: int) -> str:
    return repr(tokenizer.spell(token))


def part(subject: Subject, decoded: list[Decoded], norms: dict[str, float], options: argparse.Namespace) -> Part:
    """The picture: the words of one item, norms by thought, hit rates where there are results."""
    own = [d for d in decoded if d.index == options.item]
    rates, last = hits(decoded, options.top), max(d.layer for d in decoded)
    n_panels, n_thoughts = 2 + bool(rates), subject.probe.n_thoughts

    def draw(figure) -> list:
        panels = figure.subplots(1, n_panels, width_ratios=[1.5, *[1] * (n_panels - 1)])
        draw_words(panels[0], own, subject.probe)
        panels[0].set_title(f"item {options.item}: first words of its thoughts, probability")
        places = {t: those for (layer, t), those in by_place(decoded).items() if layer == last}
        names = [_named(t, n_thoughts).replace("not ", "not\n") for t in places]
        draw_norms(panels[1], places, norms[USED])
        if rates:
            draw_rates(panels[2], rates, last)
            panels[2].set_title(f"results among the first {options.top} words")
        for panel in panels[1:]:
            panel.set_xticks(list(places), names)
        return [panels[1]]

    return Part(4.6 * n_panels, 1.6 + 0.5 * max(len(own), 4), draw)


def draw_words(panel, own: list[Decoded], probe: Probe) -> None:
    """The first words of one item's thoughts with their probabilities."""
    has_layers = len({d.layer for d in own}) > 1
    words = [[_cell(probe.curriculum.tokenizer.spell(i), p) for i, p in d.first(SHOWN)] for d in own]
    names = [_named(d.thought, probe.n_thoughts) + (f", layer {d.layer}" if has_layers else "") for d in own]
    shares = np.array([d.probabilities[:SHOWN] for d in own])
    draw_cells(panel, shares, words, names, [str(i + 1) for i in range(shares.shape[1])])
    panel.set(xlabel="rank", ylabel="thought")


def draw_norms(panel, places: dict[int, list[Decoded]], scale: float) -> None:
    """Norms by thought; scale: the mean norm of the embedding's rows."""
    spread = {t: np.percentile([d.norm for d in those], [2.5, 50, 97.5]) for t, those in places.items()}
    draw_lines(panel, {"thoughts": spread}, "norm (median, 95 % of the items)")
    panel.axhline(scale, color="black", linestyle=":", linewidth=1, label="embedding's rows in use (mean)")
    panel.legend(frameon=False, fontsize=8)
    panel.set(title="norms", ylim=(0, None))


def _cell(word: str, probability: float) -> str:
    """A word as the picture's font can draw it: what is not ASCII is escaped."""
    return f"{ascii(word)[1:-1]}\n{probability:.2f}"


def draw_rates(panel, rates: dict[str, Hits], layer: int) -> None:
    """Hit rates by thought with their intervals, a line for each kind."""
    lines = {}
    for kind, places in rates.items():
        found = {t: list(items.values()) for (own, t), items in sorted(places.items()) if own == layer}
        lines[kind] = {t: np.insert(wilson(sum(own), len(own)), 1, np.mean(own)) for t, own in found.items()}
    draw_lines(panel, lines, "share (95 % interval)")
    panel.set_ylim(0, 1)
    panel.legend(frameon=False, fontsize=8)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: run(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = control_parser("analysis.thoughts", __doc__)
    parser.add_argument("--item", type=int, default=0, help="the item whose words are drawn (default 0)")
    parser.add_argument("--layers", action="store_true", help="decode the output of every layer")
    parser.add_argument("--top", type=int, default=KEPT, help=f"first words that count as a hit (default {KEPT})")
    options = parser.parse_args(arguments)
    if options.items is not None and options.items < 1:
        raise UserError(f"--items {options.items}: expected at least 1")
    if not 1 <= options.top <= KEPT:
        raise UserError(f"--top {options.top}: expected 1 to {KEPT}")
    return options


def run(options: argparse.Namespace) -> None:
    """Decode, print the tables, and write the lines and the picture."""
    subjects = open_places(options, open_thinking(options))
    require_item(subjects, options.item)
    for one in subjects if options.layers else []:
        require_gpt2(one.probe.model, "--layers")
    found = [decode(one.probe, one.data, one.count, options.layers) for one in subjects]
    norms = [embedding_norms(one.probe, one.data, one.count) for one in subjects]
    say_reports(subjects, (report(*one, options.top) for one in zip(subjects, found, norms, strict=True)))
    lines = [
        [d.record(one.probe.curriculum.tokenizer, options.top) for d in decoded]
        for one, decoded in zip(subjects, found, strict=True)
    ]
    parts = [part(*one, options) for one in zip(subjects, found, norms, strict=True)]
    save(subjects, options.out / "thoughts", {"layers": options.layers, "top": options.top, **norms[0]}, lines, parts)


def report(subject: Subject, decoded: list[Decoded], norms: dict[str, float], top: int) -> list[str]:
    """The printed lines about one checkpoint."""
    n_thoughts, found = subject.probe.n_thoughts, hits(decoded, top)
    return [
        *table(decoded, subject.probe),
        f"all first words of an item's thoughts equal: {share(*all_equal(decoded, n_thoughts))}",
        ", ".join(f"{name} {value:g}" for name, value in norms.items()),
        *(["", *hit_table(found, n_thoughts)] if found else []),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
