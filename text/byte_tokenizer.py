"""The tokenizer.json of Llama-like models, through the library `tokenizers`, with the three special tokens of Coconut.

It gives the ids of the official code, which uses transformers' AutoTokenizer: the beginning-of-text token stands before
the question where the file's post-processor puts one, and nowhere else (official dataset.py).
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from text.tokenizer import SPECIAL_TOKENS, Tokenizer
from utils import UserError, read_file, read_json

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # what a saved model takes with it
SAMPLE = "Ann has 3 caf\u00e9s.\n<<3+4=7>>\n### 1,207"  # what every byte-level tokenizer returns as it was


class ByteTokenizer(Tokenizer):
    """The interface of text.tokenizer.Tokenizer over a folder's tokenizer.json.

    The special tokens follow the file's own tokens in the order of the official run.py, unless the file holds them.
    Raises UserError for a file that is missing or damaged, and for a tokenizer whose pieces, joined, are not the text.
    """

    def __init__(self, folder: Path):
        self.source = str(folder)
        self._plain, content = _read(folder)
        end_of_text = _end_of_text(folder)
        self._fingerprint = hashlib.sha256(content + end_of_text.encode()).hexdigest()
        complete = type(self._plain).from_str(content.decode())
        complete.add_tokens(list(SPECIAL_TOKENS[1:]))
        ids = {name: complete.token_to_id(name) for name in (end_of_text, *SPECIAL_TOKENS[1:])}
        if ids[end_of_text] is None:
            raise UserError(f"{folder}: its end-of-text token {end_of_text!r:.60} is not in tokenizer.json")
        self.eos_id, self.start_id, self.end_id, self.latent_id = ids.values()
        self.vocab_size = complete.get_vocab_size()
        largest = max(complete.get_vocab().values())
        if largest >= self.vocab_size:
            raise UserError(
                f"{folder}: its tokens have ids up to {largest:,}, and there are {self.vocab_size:,} with the three "
                "special tokens of Coconut; ids without gaps are expected"
            )
        if [self.start_id, self.end_id, self.latent_id] != list(range(self.vocab_size - 3, self.vocab_size)):
            raise UserError(f"{folder}: the three special tokens of Coconut are not its last ids: {ids}")
        self._names = complete
        _check_pieces(self, folder)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.json and the name of the end-of-text token."""
        return self._fingerprint

    @property
    def prototype_id(self) -> int | None:
        """Id of `<<`, as in text.tokenizer.Tokenizer."""
        return self._plain.token_to_id("<<")

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Token ids of a text; first: it begins the sequence, so the beginning-of-text token goes before it."""
        return self._plain.encode(text, add_special_tokens=first).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._plain.decode([i for i in ids if i < self.start_id], skip_special_tokens=True)

    def spell(self, token_id: int) -> str:
        """One token as text, special tokens by name."""
        if token_id >= self.vocab_size:
            return f"<unused {token_id}>"
        return self._names.decode([token_id], skip_special_tokens=False)


def _read(folder: Path):
    """The tokenizer of a folder and the bytes of its file."""
    try:
        import tokenizers  # of requirements-llm.txt; GPT-2 does without
    except ImportError as error:
        raise UserError(f"{folder}: `pip install -r requirements-llm.txt` to read its tokenizer.json") from error
    path = folder / FILES[0]
    try:
        content = read_file(path)
        return tokenizers.Tokenizer.from_str(content.decode()), content
    except OSError as error:
        raise UserError(
            f"{path}: cannot read it ({error.strerror}); `tokenizer:` names the tokenizer's folder"
        ) from error
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path}: not a tokenizer.json that `tokenizers` reads ({error!s:.200})") from error


def _end_of_text(folder: Path) -> str:
    """The name of the token that ends an answer, of tokenizer_config.json or special_tokens_map.json."""
    for path in (folder / name for name in FILES[1:]):
        try:
            token = read_json(path).get("eos_token") if path.is_file() else None
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a tokenizer's settings ({error!s:.200})") from error
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str):
            return name
    raise UserError(f"{folder}: neither tokenizer_config.json nor special_tokens_map.json names an eos_token")


def _check_pieces(tokenizer: ByteTokenizer, folder: Path) -> None:
    """Raise UserError where joined pieces are not the joined text; the official dataset.py asserts the same."""
    if tokenizer.decode(tokenizer.encode("7") + tokenizer.encode("8")) != "78":
        raise UserError(
            f"{folder}: its tokenizer puts a space before every piece (SentencePiece, as of Llama 2 and Mistral 0.x). "
            "Question, steps and answer are tokenized one by one, so their sequence would not be that of the text; the "
            "official code stops here too. Choose a model with a byte-level tokenizer (Llama 3, Qwen, SmolLM)"
        )
    text = tokenizer.decode(tokenizer.encode(SAMPLE))
    if text != SAMPLE:
        raise UserError(f"{folder}: its tokenizer changes text: {SAMPLE!r} comes back as {text!r:.100}")
