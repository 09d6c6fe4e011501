"""Examples as token ids: one flat array, made once and kept in the token cache."""

from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples import Example, Source
from token_cache import cached
from tokenizer import Tokenizer
from utils import Progress

CHUNK = 2048  # examples tokenised between two looks at the progress bar
# Part of every cache key: raise it when `tokenise`, TokenDataset, the tokenizer's pattern or the checks of examples.py
# change, so that what was made before is not used.
FORMAT = 1


class TokenExample(NamedTuple):
    """One example as token ids: views into the data set's one array."""

    question: np.ndarray
    steps: list[np.ndarray]
    answer: np.ndarray


class TokenDataset:
    """All examples as one flat array of token ids. An example's pieces are its question, its steps and its answer.

    tokens [n_tokens] int32; starts [n_pieces + 1] int64, where each piece begins; questions, answers [n] int64, the
    index of each example's first and last piece.
    """

    def __init__(self, starts: np.ndarray, questions: np.ndarray, answers: np.ndarray, tokens: np.ndarray):
        self.starts, self.questions, self.answers, self.tokens = starts, questions, answers, tokens

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> TokenExample:
        bounds = self.starts[self.questions[index] : self.answers[index] + 2].tolist()
        pieces = [self.tokens[a:b] for a, b in pairwise(bounds)]
        return TokenExample(pieces[0], pieces[1:-1], pieces[-1])

    def select(self, indices: np.ndarray) -> "TokenDataset":
        """The data set of these examples alone, on the same tokens."""
        return TokenDataset(self.starts, self.questions[indices], self.answers[indices], self.tokens)

    @property
    def n_steps(self) -> np.ndarray:
        """Number of steps of every example [n]."""
        return self.answers - self.questions - 1

    @property
    def question_lengths(self) -> np.ndarray:
        """Tokens of every question [n]."""
        return self.starts[self.questions + 1] - self.starts[self.questions]

    def lengths_from(self, step: int | np.ndarray) -> np.ndarray:
        """Tokens of every example [n] behind its question and its first `step` steps, answer included."""
        kept_from = np.minimum(self.questions + 1 + step, self.answers)
        return self.starts[self.answers + 1] - self.starts[kept_from]

    def same_questions(self, other: "TokenDataset") -> np.ndarray:
        """Indices of the examples whose question `other` has too: equal tokens are equal texts."""
        theirs = set(other._questions())
        return np.flatnonzero([question in theirs for question in self._questions()])

    def _questions(self) -> list[bytes]:
        begins, ends = self.starts[self.questions].tolist(), self.starts[self.questions + 1].tolist()
        return [self.tokens[a:b].tobytes() for a, b in zip(begins, ends, strict=True)]


def tokenise(examples: list[Example], tokenizer: Tokenizer, name: str) -> TokenDataset:
    """Token ids of every example, by the official get_dataset: a newline ends question and steps, `### ` opens the
    answer, end of text closes it."""
    tokens, lengths = [], []
    with Progress(total=len(examples), desc=f"Tokenising {name}", unit=" items", leave=False) as bar:
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            pieces = [piece for example in chunk for piece in pieces_of(example, tokenizer)]
            lengths.append(np.fromiter(map(len, pieces), np.int64, len(pieces)))
            tokens.append(np.fromiter(chain.from_iterable(pieces), np.int32, lengths[-1].sum()))
            bar.update(len(chunk))
    starts = np.cumsum(np.concatenate([[0], *lengths]))
    n_pieces = np.array([len(example.steps) + 2 for example in examples], dtype=np.int64)
    ends = np.cumsum(n_pieces)
    return TokenDataset(starts, ends - n_pieces, ends - 1, np.concatenate(tokens))


def pieces_of(example: Example, tokenizer: Tokenizer) -> list[list[int]]:
    """The example's pieces as lists of ids, one text at a time: tiktoken's thread pool takes ten times as long over
    texts this short (benchmarks/tokenise.py)."""
    texts = (example.question + "\n", *(step + "\n" for step in example.steps), "### " + example.answer)
    pieces = [tokenizer.encode(text) for text in texts]
    pieces[-1].append(tokenizer.eos_id)
    return pieces


def tokenise_cached(source: Source, tokenizer: Tokenizer, folder: str | None) -> TokenDataset:
    """`tokenise` with the source's examples, read from the token cache (see token_cache.cached) where it has them.

    The key is the content's hash, so that a file may be moved, renamed or edited. A hit skips reading and checking too:
    the same content has passed before.
    """

    def make() -> dict[str, np.ndarray]:
        return vars(tokenise(source.examples(), tokenizer, Path(source.path).name))

    key = f"{FORMAT}-{source.digest()[:32]}-{tokenizer.fingerprint[:32]}"
    return TokenDataset(**cached(folder, key, make))
