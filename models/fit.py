"""Whether weights fit a model and a vocabulary, and the rows that special tokens start from."""

from pathlib import Path

import mlx.core as mx

from config import Config
from models.source import Source
from models.weights import Tensors
from text.reader import raise_if_any
from text.tokenizer import Tokenizer
from utils import UserError, say

N_SPECIAL = 3  # start and end of thoughts, latent; the last ids of every vocabulary


def needs_rows(
    name: str, table: mx.array, config: Config, tokenizer: Tokenizer, source: Source, trained: bool | None
) -> bool:
    """Whether a table of token embeddings [rows, D] of this name is to get rows for the special tokens.

    As the official run.py decides it. trained: what holds_special_tokens says. Where nothing says it, rows for exactly
    our tokens count as trained, and any other number of rows as padding, which the official code cuts off
    (resize_token_embeddings) before it fills the rows of the special tokens. In a vocabulary without `<<`, rows for
    exactly our tokens stay as they are.
    """
    if table.ndim != 2:
        raise UserError(f"{source}: {name} has shape {table.shape}, expected [vocabulary, n_embd]")
    rows, complete = table.shape[0], tokenizer.vocab_size
    without = complete - N_SPECIAL
    check_rows(rows, without, tokenizer, source)
    has_prototype = tokenizer.prototype_id is not None
    exact = rows == complete and (trained is None or not has_prototype)
    if not config.method.special_tokens or (trained and rows >= complete) or exact:
        return False
    if not has_prototype:
        raise UserError(
            f"{source}: has no rows for the three special tokens, and the vocabulary has no `<<` to start them from"
        )
    ignored = f"; the other {rows - without:,} rows of {rows:,} are left out, as padding" if rows > without else ""
    say(f"the three special tokens start from the embedding of `<<`{ignored}")
    return True


def check_rows(rows: int, needed: int, tokenizer: Tokenizer, source: Source | str) -> None:
    """Raise UserError for a table of fewer rows than tokens: MLX would read past its end, or crash there."""
    if rows < needed:
        complete = tokenizer.vocab_size
        raise UserError(
            f"{source}: its vocabulary has {rows:,} rows; the tokenizer ({tokenizer.source}) needs "
            f"{complete - N_SPECIAL:,}, or {complete:,} with the three special tokens. Is it another tokenizer's model?"
        )


def with_rows(table: mx.array, tokenizer: Tokenizer) -> mx.array:
    """The table [tokens + 3, D] whose last rows, of the special tokens, are that of `<<`."""
    row = table[tokenizer.prototype_id][None]
    return mx.concatenate([table[: tokenizer.vocab_size - N_SPECIAL], row, row, row], axis=0)


def check_fit(tensors: Tensors, expected: Tensors, path: Path) -> None:
    """Raise UserError that lists the tensors that are missing, left over, of another shape, or not finite."""
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not a parameter of the model" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        if tensor.shape != expected[name].shape:
            problems.append(f"{name} has shape {tensor.shape}, expected {expected[name].shape}")
        elif not mx.isfinite(tensor).all().item():
            problems.append(f"{name} holds values that are not finite")
    raise_if_any(problems, f"{path}: the weights do not fit the model, ")
