"""Open a trained model and read its thoughts. Shapes: B prompts, K thoughts of each, D = width of the model."""

import argparse
import re
from bisect import bisect
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from coconut import Batch, Coconut
from config import FIELDS, Config
from dataset import Curriculum, Data, collate
from models.loading import find_tokenizer, load_model
from models.source import find_source
from startup import settings
from text.reader import Example
from text.tokens import TokenExample, encode_example
from training import resume
from training.checkpoint import read_metadata, versions
from utils import Progress, UserError, command_parser, warn, write_json_lines

BATCH = 100  # prompts at a time
FACT_END = re.compile(r"(?<=;)|(?<=[.?!])(?=\s+\S)")  # of the graph's edges, and of sentences


class Probe(NamedTuple):
    """A trained model with what it was trained as."""

    model: Coconut
    curriculum: Curriculum

    @property
    def n_thoughts(self) -> int:
        """Thoughts of a prompt after the whole curriculum, where items have enough steps."""
        return self.curriculum.n_prompt_latents(*[self.curriculum.config.max_latent_stage] * 2)

    def data(self, path: str) -> Data:
        """A data set, checked as run.py does."""
        return Data(path, self.curriculum, self.model.transformer.config.n_positions, debug_limit=0)


def open_checkpoint(path: str, tokenizer: str | None = None) -> Probe:
    """Load a checkpoint folder, or the best checkpoint of a run, with the keys that it was trained with.

    tokenizer: the vocabulary, where the recorded one has moved. Raises UserError for anything else than a checkpoint of
    this code: other weights do not say how many thoughts they were trained with.
    """
    settings.exact_products()
    folder = Path(path)
    if folder.is_dir() and resume.holds_training(folder):
        folder = resume.best_checkpoint(folder)
    metadata = read_metadata(folder)
    if not metadata:
        raise UserError(
            f"{path}: expected a checkpoint folder of this code (with coconut.json) or a run that holds one"
        )
    resume.check_intact(folder)
    recorded = {name: value for name, value in metadata["config"].items() if name in FIELDS}
    keys = {"load_model_path": str(folder), "tokenizer": tokenizer or _vocabulary(recorded["tokenizer"], folder)}
    config = Config(**{**recorded, **keys, "only_eval": True, "resume": metadata["epoch"] - 1, "debug": False})
    source = find_source(config, folder)
    words = find_tokenizer(source, config)
    resume.check_tokenizer(folder, words)
    return Probe(Coconut(load_model(source, config, words)).eval(), Curriculum(config, words))


def _vocabulary(recorded: str | None, folder: Path) -> str | None:
    """The recorded vocabulary, or a file of its name in the checkpoint's folder or beside it."""
    if recorded is None:
        return None
    name = Path(recorded).name
    places = [Path(recorded), folder / name, folder.parent / name]
    return str(next((place for place in places if place.exists()), recorded))


def analysis_parser(module: str, docstring: str) -> argparse.ArgumentParser:
    """A parser with what every analysis command takes."""
    parser = command_parser(module, docstring)
    parser.add_argument("checkpoint", help="a checkpoint folder of a Coconut run, or the run's folder")
    parser.add_argument("data", help="a data set, as for val_path")
    parser.add_argument("--items", type=int, help="look at the first ITEMS items (default all)")
    parser.add_argument("--tokenizer", help="the vocabulary, where the one that the checkpoint names has moved")
    parser.add_argument("--out", type=Path, default=Path("runs/analysis"), help="folder to write to (runs/analysis)")
    return parser


def open_thinking(options: argparse.Namespace) -> Probe:
    """Load the model that the options of analysis_parser name. Raises UserError for one without thoughts."""
    probe = open_checkpoint(options.checkpoint, options.tokenizer)
    require_thoughts(probe, options.checkpoint)
    return probe


def write_records(path: Path, settings: dict, records: Iterable[dict]) -> None:
    """Write JSON Lines: what the command was told and with which versions, then one line for each record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, [{**settings, "versions": versions()}, *records])


def require_thoughts(probe: Probe, path: str) -> None:
    """Raise UserError where a model was trained without thoughts."""
    if not probe.n_thoughts or probe.curriculum.method.thought != "hidden":
        title = probe.curriculum.method.title
        raise UserError(f"{path}: trained as {title}, which feeds back no thoughts; a Coconut checkpoint is needed")


def require_room(probe: Probe, data: Data, n_thoughts: int, n_more: int = 0) -> None:
    """Raise UserError where a question, so many thoughts and n_more tokens exceed the model's positions."""
    longest = int(data.tokens.question_lengths.max()) + len(probe.curriculum.prompt(data.tokens[0], n_thoughts).ids)
    longest += n_more - len(data.tokens[0].question)
    n_positions = probe.model.transformer.config.n_positions
    if longest >= n_positions:
        raise UserError(
            f"{data.path}: its longest question with {n_thoughts} thoughts takes {longest} of {n_positions} positions; "
            "fewer thoughts are needed"
        )


def warn_if_unmixed(probe: Probe, path: str) -> None:
    """Warn where a model was trained without mixing stages: it has seen few numbers of thoughts."""
    if not probe.curriculum.config.uniform_prob:
        warn(f"{path} was trained with uniform_prob 0, so it has seen few numbers of thoughts")


def all_thoughts(probe: Probe, examples: list[TokenExample], n_thoughts: int) -> np.ndarray:
    """The first n_thoughts thoughts of each question, [B, K, D] float32."""
    starts = Progress(range(0, len(examples), BATCH), desc="Thoughts", unit=" batches", leave=False)
    return np.concatenate([thoughts(probe, examples[start : start + BATCH], n_thoughts) for start in starts])


def prompt_batch(probe: Probe, examples: list[TokenExample], n_thoughts: int) -> Batch:
    """The questions with exactly n_thoughts thoughts each."""
    prompts = [probe.curriculum.prompt(example, n_thoughts) for example in examples]
    return collate(prompts, probe.curriculum.tokenizer.eos_id).to_mlx()


def facts(probe: Probe, example: TokenExample) -> list[tuple[str, list[int]]]:
    """The facts of a question, each with the places of its tokens: sentences, or edges that end in a semicolon.

    A token belongs to the fact in which it begins. A question without any of these marks is one fact.
    """
    decode, ids = probe.curriculum.tokenizer.decode, example.question.tolist()
    texts = [text for text in FACT_END.split(decode(ids)) if text]
    ends = np.cumsum([len(text) for text in texts]).tolist()
    places: list[list[int]] = [[] for _ in texts]
    for place in range(len(ids)):
        places[bisect(ends, len(decode(ids[:place])))].append(place)
    return [(text, own) for text, own in zip(texts, places, strict=True) if own]


def thoughts(probe: Probe, examples: list[TokenExample], n_thoughts: int) -> np.ndarray:
    """The thoughts of one batch of questions, [B, K, D] float32.

    Thought k (from 0) is the hidden state in the column before latent k: the one that is fed back. For a model with
    pauses it is the state in that column, which is not.
    """
    batch = prompt_batch(probe, examples, n_thoughts)
    hidden, _ = probe.model.think(batch)  # [B, T, D]
    found = mx.take_along_axis(hidden, thought_columns(probe, batch, n_thoughts)[..., None], axis=1)
    return np.array(found.astype(mx.float32))


def thought_columns(probe: Probe, batch: Batch, n_thoughts: int) -> mx.array:
    """[B, K] the columns before the K = n_thoughts latents or pauses of prompts that all have as many.

    Rows with pauses are not shifted until these stand in one column.
    """
    behind = probe.curriculum.special_tokens  # the end marker
    return batch.last_column[:, None] - behind - n_thoughts + mx.arange(n_thoughts)


def logits(probe: Probe, states: np.ndarray) -> np.ndarray:
    """The inner product of states [..., D] with every token's embedding, [..., vocabulary]: the tied output layer."""
    return np.array(probe.model.transformer.logits(mx.array(states)).astype(mx.float32))


def tokenize_question(probe: Probe, question: str) -> TokenExample:
    """A question without steps and answer, in the layout that the model was trained with."""
    ids = encode_example(Example(question, [], ""), probe.curriculum.tokenizer, probe.curriculum.config.layout)[0]
    return TokenExample(np.array(ids, dtype=np.int32), [], np.array([], dtype=np.int32))


def likeliest(probe: Probe, row: np.ndarray, count: int) -> list[tuple[str, float]]:
    """The `count` likeliest tokens of a decoded thought with their probabilities; row [vocabulary] has its logits."""
    shares = np.exp(row - row.max())
    shares /= shares.sum()
    best = np.argsort(-row, kind="stable")[:count]
    return [(probe.curriculum.tokenizer.spell(int(i)), float(shares[i])) for i in best]
