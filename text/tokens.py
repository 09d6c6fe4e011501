"""Examples as token ids in flat arrays, and the cache that keeps these arrays between runs."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np

from text.reader import Example, Source
from text.tokenizer import Tokenizer
from utils import Progress, cache_folder, owner_problem, replacing, warn

CHUNK = 2048  # examples tokenized between two updates of the progress bar
# Part of every cache key. Increase it when `tokenize`, TokenDataset, the tokenizer's pattern or the checks in reader.py
# change, so that files of older versions are not used.
FORMAT = 3
MIN_CACHED_BYTES = 1 << 20  # smaller data sets (2,500 items of GSM8K) are tokenized in 0.2 s and not worth a file
STALE_SECONDS = 24 * 3600  # a temporary file older than this was left by a process that was killed


class Layout(NamedTuple):
    """How an example's pieces are joined to one text."""

    separator: str  # ends the question and every step
    answer_mark: str  # begins the answer; answers are read from behind its `#`
    special_tokens: bool  # whether thoughts may stand between special tokens


LAYOUTS = {
    "lines": Layout("\n", "### ", special_tokens=True),  # official dataset.py
    "compact": Layout("", "###", special_tokens=False),
}


class TokenExample(NamedTuple):
    """One example as token ids [n] int32, views into the arrays of its TokenDataset."""

    question: np.ndarray
    steps: list[np.ndarray]
    answer: np.ndarray


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """n examples as one flat array of token ids. An example's pieces are its question, each step, and its answer."""

    starts: np.ndarray  # [n_pieces + 1] int64, where each piece begins in `tokens`
    questions: np.ndarray  # [n] int64, index of each example's first piece
    answers: np.ndarray  # [n] int64, index of each example's last piece
    tokens: np.ndarray  # [n_tokens] int32

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> TokenExample:
        bounds = self.starts[self.questions[index] : self.answers[index] + 2].tolist()
        pieces = [self.tokens[start:end] for start, end in pairwise(bounds)]
        return TokenExample(pieces[0], pieces[1:-1], pieces[-1])

    def select(self, indices: np.ndarray) -> "TokenDataset":
        """Return a data set of the examples at `indices`, without copying tokens."""
        return TokenDataset(self.starts, self.questions[indices], self.answers[indices], self.tokens)

    @property
    def n_steps(self) -> np.ndarray:
        """Number of steps of every example [n]."""
        return self.answers - self.questions - 1

    def step_counts(self) -> list[int]:
        """The different numbers of steps, ascending."""
        return np.unique(self.n_steps).tolist()

    @property
    def question_lengths(self) -> np.ndarray:
        """Tokens of every question [n]."""
        return self.starts[self.questions + 1] - self.starts[self.questions]

    def lengths_from(self, step: int | np.ndarray) -> np.ndarray:
        """Tokens of every example [n] without its question and its first `step` steps (one number, or [n])."""
        first_piece = np.minimum(self.questions + 1 + step, self.answers)
        return self.starts[self.answers + 1] - self.starts[first_piece]

    @property
    def chain_lengths(self) -> np.ndarray:
        """Tokens of all steps of every example [n]."""
        return self.lengths_from(0) - self.lengths_from(self.n_steps)

    def shared_questions(self, other: "TokenDataset") -> np.ndarray:
        """Indices of the examples whose question is also in `other`: equal tokens mean equal texts."""
        others = set(other._question_bytes())
        return np.flatnonzero([question in others for question in self._question_bytes()])

    def _question_bytes(self) -> list[bytes]:
        starts, ends = self.starts[self.questions].tolist(), self.starts[self.questions + 1].tolist()
        return [self.tokens[start:end].tobytes() for start, end in zip(starts, ends, strict=True)]


def tokenize(examples: list[Example], tokenizer: Tokenizer, name: str, layout: str = "lines") -> TokenDataset:
    """Tokenize all examples in a layout of LAYOUTS; `name` is shown beside the progress bar."""
    tokens, lengths = [], []
    with Progress(total=len(examples), desc=f"Tokenizing {name}", unit=" items", leave=False) as bar:
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            pieces = [piece for example in chunk for piece in encode_example(example, tokenizer, layout)]
            lengths.append(np.fromiter(map(len, pieces), np.int64, len(pieces)))
            tokens.append(np.fromiter(chain.from_iterable(pieces), np.int32, lengths[-1].sum()))
            bar.update(len(chunk))
    starts = np.cumsum(np.concatenate([[0], *lengths]))
    n_pieces = np.array([len(example.steps) + 2 for example in examples], dtype=np.int64)
    ends = np.cumsum(n_pieces)
    return TokenDataset(starts, ends - n_pieces, ends - 1, np.concatenate(tokens))


def encode_example(example: Example, tokenizer: Tokenizer, layout: str = "lines") -> list[list[int]]:
    """Return the token ids of question, steps and answer (official dataset.py, get_dataset).

    In the layout `lines` the question and each step end with a newline and the answer starts with `### `. In every
    layout the answer ends with end of text.
    """
    separator, mark, _ = LAYOUTS[layout]
    texts = (example.question + separator, *(step + separator for step in example.steps), mark + example.answer)
    # One text at a time: on texts this short tiktoken's threads take ten times as long (benchmarks/tokenize_data.py).
    pieces = [tokenizer.encode(text, first=i == 0) for i, text in enumerate(texts)]
    pieces[-1].append(tokenizer.eos_id)
    return pieces


def tokenize_cached(source: Source, tokenizer: Tokenizer, folder: str | None, layout: str = "lines") -> TokenDataset:
    """Tokenize all examples of a data set, or read their tokens from the cache in `folder` (see `cached`).

    The key is made of the layout and hashes of content and vocabulary, so a file may be moved, renamed or edited.
    Cached content is not checked again: it passed the checks when it was tokenized. Raises UserError for data that
    fails them.
    """
    key = f"{FORMAT}-{layout}-{source.digest()[:32]}-{tokenizer.fingerprint[:32]}"
    return cached(folder, key, lambda: tokenize(source.examples(), tokenizer, Path(source.path).name, layout))


def cached(folder: str | None, key: str, make: Callable[[], TokenDataset]) -> TokenDataset:
    """Return the data set stored under `key`, or else the one that `make` returns, and store it for the next run.

    folder: where the files are; None means coconut-mlx/tokens in $XDG_CACHE_HOME or ~/.cache. What others can write to
    is not read. A cache file can be made again at any time, so a problem with the cache is one warning; exceptions of
    `make` are raised.
    """
    problems = []
    path = None
    try:
        path = _cache_folder(folder) / f"{key}.npz"
        if path.exists() and not path.is_fifo() and not (owner_problem(path.parent) or owner_problem(path)):
            return load(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        problems.append(str(error))
    data = make()
    try:
        if path and sum(array.nbytes for array in vars(data).values()) >= MIN_CACHED_BYTES:
            store(path, data)
    except OSError as error:
        problems.append(f"not kept for the next run: {error}")
    if problems:
        warn(f"token cache: {'; '.join(problems)}")
    return data


def store(path: Path, data: TokenDataset) -> None:
    """Write a data set to `path`, atomically. Raises OSError, also for a folder in others' hands; then `path` is
    unchanged.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if problem := owner_problem(path.parent):
        raise OSError(problem)
    _remove_stale(path.parent)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **vars(data))
        temporary.chmod(0o644)  # also under a umask that would let others write


def load(path: Path) -> TokenDataset:
    """Read a data set that `store` wrote. Raises OSError if the file is damaged or unreadable."""
    try:
        # np.load checks a member's CRC-32 only if it reads the member to its end, which depends on the stored shape.
        with ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"bad CRC-32 of {damaged}")
        with np.load(path, allow_pickle=False) as arrays:
            return TokenDataset(**arrays)
    except Exception as error:  # on damaged files zipfile, its decompressors and numpy raise a dozen types
        raise OSError(f"{path} is damaged or unreadable ({error})") from error


def _cache_folder(folder: str | None) -> Path:
    return Path(folder).expanduser() if folder else cache_folder() / "tokens"


def _remove_stale(folder: Path) -> None:
    for leftover in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process renamed or removed it
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                leftover.unlink()
