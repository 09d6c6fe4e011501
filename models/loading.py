"""Building a run's model and its tokenizer. A tensor that does not fit is an error that names it."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from config import Config
from models.fit import N_SPECIAL, check_fit, check_rows, needs_rows, with_rows
from models.gpt2 import GPT2, GPT2Config
from models.language import load_language_model
from models.mlx_lm import LanguageModel
from models.source import Source
from models.weights import canonical, check_vocabulary, holds_special_tokens, read_tensors
from text.byte_tokenizer import ByteTokenizer
from text.tokenizer import Tokenizer, load_tokenizer
from utils import UserError, human_size, memory_size, say

EMBEDDING = "transformer.wte.weight"
PREFIX = "transformer."  # of every parameter's name in Hugging Face's GPT2LMHeadModel files


def find_tokenizer(source: Source, config: Config) -> Tokenizer:
    """The vocabulary of a run: that of the key `tokenizer`, or the model's own."""
    if isinstance(source.shape, GPT2Config):
        return load_tokenizer(config.tokenizer, source.folder)
    return ByteTokenizer(Path(config.tokenizer) if config.tokenizer else source.folder)


def load_model(source: Source, config: Config, tokenizer: Tokenizer) -> GPT2 | LanguageModel:
    """Build the model of a config.json and fill it. Raises UserError that lists every tensor that does not fit."""
    load = load_gpt2 if isinstance(source.shape, GPT2Config) else load_language_model
    return load(source, config, tokenizer)


def load_gpt2(source: Source, config: Config, tokenizer: Tokenizer) -> GPT2:
    """Build the model and fill it. Special tokens that the weights lack start from `<<` where the method uses them.

    Raises UserError that lists every tensor that does not fit.
    """
    if config.lora_rank:
        raise UserError("lora_rank: GPT-2 trains all its weights; adapters are for models of mlx-lm (model_id)")
    if source.weights is None:
        return _fresh_gpt2(source.shape, config, tokenizer)
    tensors = read_tensors(source.weights)
    check_vocabulary(source.weights, tokenizer)
    trained = holds_special_tokens(tensors, source.weights)
    tensors = canonical(tensors, source.weights)
    n_rows = source.shape.vocab_size
    if EMBEDDING in tensors:
        if needs_rows(EMBEDDING, tensors[EMBEDDING], config, tokenizer, source, trained):
            tensors[EMBEDDING] = with_rows(tensors[EMBEDDING], tokenizer)
        n_rows = tensors[EMBEDDING].shape[0]
    shape = replace(source.shape, vocab_size=n_rows)
    _check_memory(shape, source)
    model = GPT2(shape)
    check_fit(tensors, dict(tree_flatten({"transformer": model.parameters()})), source.weights)
    model.load_weights([(name.removeprefix(PREFIX), tensor) for name, tensor in tensors.items()], strict=True)
    mx.eval(model.parameters())
    return model


def _fresh_gpt2(shape: GPT2Config, config: Config, tokenizer: Tokenizer) -> GPT2:
    std = shape.initializer_range if config.initializer_range is None else config.initializer_range
    if not std:
        raise UserError("initializer_range: 0 makes every weight 0, which never trains; GPT-2's is 0.02")
    _check_vocabulary_size(shape.vocab_size, config.model_config_path, tokenizer)
    shape = replace(shape, vocab_size=tokenizer.vocab_size, initializer_range=std)
    _check_memory(shape, "a fresh model")
    mx.random.seed(config.seed)
    model = GPT2(shape)
    if config.embedding_range is not None:
        model.wte.weight = mx.random.normal(model.wte.weight.shape) * config.embedding_range
    if config.sinusoidal_positions is not None:
        model.wpe.weight = config.sinusoidal_positions * sinusoids(*model.wpe.weight.shape)
    return model


def _check_vocabulary_size(wanted: int, path: str, tokenizer: Tokenizer) -> None:
    """Raise UserError where a config.json has fewer rows than the vocabulary, say that no more than needed are made.

    GPT-2's own number counts as none: it is that of files which do not name one, and of copies of GPT-2's.
    """
    needed = tokenizer.vocab_size - N_SPECIAL
    if wanted == GPT2Config.vocab_size:
        return
    check_rows(wanted, needed, tokenizer, path)
    if wanted not in (needed, tokenizer.vocab_size):
        say(
            f"note: {path}: vocab_size {wanted:,} is not used; the model gets {tokenizer.vocab_size:,} rows, one for "
            f"each token of {tokenizer.source}"
        )


def _check_memory(shape: GPT2Config, what: object) -> None:
    """Raise UserError for a model that cannot fit: AdamW needs three times as much, but an evaluation does not."""
    n_bytes = 4 * shape.n_parameters
    if n_bytes > memory_size():
        raise UserError(
            f"{what}: {shape.n_layer:,} layers, {shape.n_embd:,} wide, {shape.n_positions:,} positions: the weights "
            f"would take {human_size(n_bytes)}, this machine has {human_size(memory_size())} of memory"
        )


def sinusoids(n_positions: int, width: int) -> mx.array:
    """Sines of falling frequency in the even columns, cosines in the odd ones (arXiv 1706.03762, section 3.5).

    Returns [n_positions, width], values from -1 to 1.
    """
    frequencies = 10_000.0 ** (-mx.arange(0, width, 2) / width)
    angles = mx.arange(n_positions)[:, None] * frequencies  # [n_positions, ceil(width / 2)]
    return mx.stack([mx.sin(angles), mx.cos(angles)], axis=-1).reshape(n_positions, -1)[:, :width]
