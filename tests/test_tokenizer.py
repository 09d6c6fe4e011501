"""GPT-2's tokenizer: where it is found, how it encodes text, and its errors for damaged files."""

import json
import os
import types
from itertools import pairwise

import pytest
import tiktoken

from text import tokenizer as tokenizer_module
from text.tokenizer import GPT2_PATTERN, Tokenizer, dump_tiktoken, load_tokenizer
from utils import UserError

TEXTS = [
    "",
    "Tomás has 21 stickers.  After that, 7 of them are given away.\n",
    "### 1,234",
    "<<35+9=44>> <<5*2=10>>\n",
    "  leading,   inner and trailing spaces   \n\n\t",
    "It’s 日本語, €7, 👍🏽, e\u0301, \u2028 and \x00.",
    "don't I'll WE'VE isn’t",
]
BYTE_CHARACTERS = {byte: character for character, byte in tokenizer_module._bytes_of_characters().items()}


def spelled(token: bytes) -> str:
    """A token in Hugging Face's spelling, one printable character per byte."""
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


def split_of(token: bytes, ranks: dict) -> tuple[bytes, bytes]:
    """The two tokens that merge into this one: byte-pair encoding with the earlier merges only leaves these two."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in pairwise(parts)]
        rank, index = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairs))
        assert rank < ranks[token]
        parts[index : index + 2] = [pairs[index]]
    return parts[0], parts[1]


@pytest.fixture(scope="session")
def hugging_face_files(tokenizer):
    """The contents of GPT-2's vocab.json, merges.txt and tokenizer.json as Hugging Face writes them."""
    ranks = tokenizer.ranks
    vocab = {spelled(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": 50256}
    tokens = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    merges = [" ".join(map(spelled, split_of(token, ranks))) for token in tokens]
    combined = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    combined["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return json.dumps(vocab), "#version: 0.2\n" + "\n".join(merges) + "\n", json.dumps(combined)


@pytest.fixture
def small_ranks():
    return {bytes([i]): i for i in range(256)} | {b"##": 256, b"###": 257, b"<<": 258}


def write_small(path, ranks):
    path.write_bytes(dump_tiktoken(ranks))
    return path


def refuse(name):
    """tiktoken.get_encoding without a network."""
    raise OSError("no network")


# Ids and text


def test_ids_are_gpt2s_and_special_tokens_follow(tokenizer):
    assert (len(tokenizer.ranks), tokenizer.eos_id) == (50256, 50256)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.latent_id) == (50257, 50258, 50259)
    assert (tokenizer.vocab_size, tokenizer.prototype_id) == (50260, 16791)
    assert tokenizer.encode("Hello world\n### 42") == [15496, 995, 198, 21017, 5433]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|start-latent|>", "<|end-latent|>", "<|latent|>"])
def test_names_of_special_tokens_in_text_are_plain_text(tokenizer, name):
    ids = tokenizer.encode(f"a {name} b")
    assert max(ids) < tokenizer.eos_id
    assert tokenizer.decode(ids) == f"a {name} b"


def test_decoding_leaves_out_special_tokens_and_unused_ids(tokenizer):
    assert tokenizer.decode([15496, 50257, 50259, 50258, 50256, 60000, 995]) == "Hello world"


def test_half_a_character_becomes_the_replacement_character(tokenizer):
    half = tokenizer.encode("👍")[:1]
    assert tokenizer.decode(half) == "\ufffd"


def test_spelling_of_single_tokens(tokenizer):
    assert [tokenizer.spell(i) for i in (995, 50256, 50259, 60000)] == [
        " world",
        "<|endoftext|>",
        "<|latent|>",
        "<unused 60000>",
    ]


# Sources


def test_word_list(tmp_path):
    """Bytes first, then the words; a word inside a sentence includes its space; other words are one token per byte."""
    path = tmp_path / "words.json"
    path.write_text(json.dumps(["What", " is", "###", "é", "###"]), encoding="utf-8")
    words = load_tokenizer(str(path))
    assert (len(words.ranks), words.vocab_size, words.source) == (260, 264, str(path))
    assert words.encode("What is is") == [256, 257, 257]
    assert words.encode("is") == [ord("i"), ord("s")]
    assert words.encode("é") == [259]
    assert words.prototype_id is None
    for text in TEXTS:
        assert words.decode(words.encode(text)) == text


def test_tiktoken_file(tmp_path, small_ranks):
    small = load_tokenizer(str(write_small(tmp_path / "small.tiktoken", small_ranks)))
    assert (small.vocab_size, small.eos_id, small.prototype_id) == (263, 259, 258)
    assert small.encode("### a") == [257, 32, 97]


def test_a_changed_vocabulary_file_is_read_again(tmp_path, small_ranks):
    """tiktoken's own loader would return its cached copy of the old file."""
    path = write_small(tmp_path / "small.tiktoken", small_ranks)
    assert load_tokenizer(str(path)).vocab_size == 263
    write_small(path, small_ranks | {b">>": 259})
    assert load_tokenizer(str(path)).vocab_size == 264


@pytest.mark.parametrize("files", ["vocab.json with merges.txt", "tokenizer.json", "tokenizer.json with pairs"])
def test_hugging_face_folder_gives_gpt2s_ids(files, hugging_face_files, tokenizer, tmp_path):
    vocab, merges, combined = hugging_face_files
    if files == "vocab.json with merges.txt":
        (tmp_path / "vocab.json").write_text(vocab, encoding="utf-8")
        (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    else:
        content = json.loads(combined)
        if files == "tokenizer.json with pairs":  # as newer versions of tokenizers write them
            content["model"]["merges"] = [merge.split() for merge in content["model"]["merges"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    found = load_tokenizer(None, tmp_path)
    assert found.ranks == tokenizer.ranks
    assert found.fingerprint == tokenizer.fingerprint
    assert found.source == str(tmp_path)
    assert load_tokenizer(str(tmp_path)).ranks == tokenizer.ranks


def test_order_of_sources(tmp_path, small_ranks, monkeypatch):
    """The key, the model's folder, tiktoken, mlx-whisper's copy; without any of these, an error that lists them."""
    folder, package = tmp_path / "model", tmp_path / "mlx_whisper"
    folder.mkdir()
    (package / "assets").mkdir(parents=True)
    named = write_small(tmp_path / "named.tiktoken", small_ranks)
    write_small(package / "assets" / "gpt2.tiktoken", small_ranks | {b"whisper": 259})
    vocab = {spelled(token): rank for token, rank in small_ranks.items()}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("# #\n## #\n< <\n", encoding="utf-8")
    installed = types.SimpleNamespace(submodule_search_locations=[str(package)])
    downloaded = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=small_ranks, special_tokens={})
    monkeypatch.setattr(tokenizer_module, "GPT2_TOKENS", 260)
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: installed)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: downloaded)

    assert load_tokenizer(str(named), folder).source == str(named)
    assert load_tokenizer(None, folder).source == str(folder)
    assert load_tokenizer(None, tmp_path).source == "tiktoken"
    assert load_tokenizer(None).source == "tiktoken"
    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    assert load_tokenizer(None).source == "mlx-whisper"
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tokenizer:.*pip install.*mlx-whisper"):
        load_tokenizer(None)


def test_a_download_that_is_not_the_vocabulary_is_ignored(monkeypatch):
    """A network's login page instead of the file: tiktoken finds a wrong hash and raises ValueError."""

    def mismatch(name):
        raise ValueError("Hash mismatch for data downloaded from ...")

    monkeypatch.setattr(tiktoken, "get_encoding", mismatch)
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="GPT-2's vocabulary was not found"):
        load_tokenizer(None)


def test_fingerprint_tells_vocabularies_apart(small_ranks):
    one, other = Tokenizer(small_ranks, "a"), Tokenizer(small_ranks | {b">>": 259}, "a")
    assert one.fingerprint == Tokenizer(dict(reversed(small_ranks.items())), "b").fingerprint
    assert one.fingerprint != other.fingerprint


# Damaged files


BYTES = {bytes([i]): i for i in range(256)}
DAMAGED = {
    "a gap in the ids.tiktoken": dump_tiktoken(BYTES | {b"ab": 300}),
    "an id twice.tiktoken": dump_tiktoken(BYTES | {b"ab": 255}),
    "too short.tiktoken": dump_tiktoken(dict(list(BYTES.items())[:200])),
    "a byte is missing.tiktoken": dump_tiktoken({bytes([i // 16, i % 16, 7]): i for i in range(256)} | {b"a": 256}),
    "no base64.tiktoken": b"%%% 1\n" * 300,
    "no rank.tiktoken": b"IQ==\n" * 300,
    "binary.tiktoken": bytes(range(256)),
    "empty.tiktoken": b"",
    "not JSON.json": b"[1,",
    "not a list.json": b'{"a": 1}',
    "numbers.json": b"[1, 2]",
    "an empty word.json": b'["a", ""]',
    "latin-1.json": '["é"]'.encode("latin-1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_vocabulary_file_is_one_error_that_names_it(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)


SMALL_VOCAB = json.dumps({spelled(token): rank for token, rank in (BYTES | {b"##": 256}).items()})
SWAPPED_VOCAB = json.dumps(json.loads(SMALL_VOCAB) | {"!!": 257})
DAMAGED_FOLDERS = {
    "vocab is a list": {"vocab.json": "[]", "merges.txt": "# #\n"},
    "vocab is not JSON": {"vocab.json": "{", "merges.txt": "# #\n"},
    "vocab lacks a byte": {"vocab.json": json.dumps({"!": 0}), "merges.txt": "# #\n"},
    "vocab holds text": {"vocab.json": json.dumps(dict.fromkeys(json.loads(SMALL_VOCAB), "x")), "merges.txt": "# #\n"},
    "merge of an unknown token": {"vocab.json": SMALL_VOCAB, "merges.txt": "# #\n## #\n"},
    "merge of three": {"vocab.json": SMALL_VOCAB, "merges.txt": "# # #\n"},
    "merges in another order": {"vocab.json": SWAPPED_VOCAB, "merges.txt": "! !\n# #\n"},
    "no model": {"tokenizer.json": "{}"},
    "another kind of model": {"tokenizer.json": json.dumps({"model": {"type": "WordLevel", "vocab": {}}})},
    "not an object": {"tokenizer.json": "[]"},
    "nested deeply": {"tokenizer.json": "[" * 200_000},
    "settings are a list": {"vocab.json": SMALL_VOCAB, "merges.txt": "# #\n", "tokenizer_config.json": "[]"},
}


@pytest.mark.parametrize("name", DAMAGED_FOLDERS)
def test_damaged_folder_is_one_error_that_names_it(name, tmp_path):
    for file, content in DAMAGED_FOLDERS[name].items():
        (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_tokenizer(None, tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE that the package `tokenizers` has trained, as its JSON text."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers as the reference")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    model.train_from_iterator([text * 9 for text in TEXTS], trainer)
    return model.to_str()


CHANGES = {
    "nothing": {},
    "trim_offsets": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}},
    "end of text and a padding token": {
        "added_tokens": [
            {"id": 300, "content": "<|endoftext|>", "special": True},
            {"id": 301, "content": "<|start-latent|>", "special": False},
            {"id": 304, "content": "[PAD]", "special": True},
        ]
    },
    "add_prefix_space": {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}},
    "use_regex": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    },
    "no pre_tokenizer": {"pre_tokenizer": None},
    "another pre_tokenizer": {"pre_tokenizer": {"type": "Whitespace"}},
    "a sequence of pre_tokenizers": {
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            ],
        }
    },
    "a normalizer": {"normalizer": {"type": "Lowercase"}},
    "an added token of a text": {"added_tokens": [{"id": 300, "content": "stickers", "special": False}]},
    "an added token of the vocabulary": {"added_tokens": [{"id": 0, "content": "ead", "special": True}]},
    "end of text elsewhere": {"added_tokens": [{"id": 305, "content": "<|endoftext|>", "special": True}]},
    "a token before every text": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"!": {"id": "!", "ids": [0], "tokens": ["!"]}},
        }
    },
    "dropout": {"model": {"dropout": 0.9}},
}
EQUAL = ("nothing", "trim_offsets", "end of text and a padding token")
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tokenizer_json_gives_the_ids_of_the_package_tokenizers_or_is_refused(name, trained, tmp_path):
    """Refused are settings with which the package returns other ids."""
    tokenizers = pytest.importorskip("tokenizers")
    content, changes = json.loads(trained), dict(CHANGES[name])
    content["model"].update(changes.pop("model", {}))
    content.update(changes)
    content["added_tokens"] = [ADDED | token for token in content["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain = tokenizers.Tokenizer.from_str(trained)
    if name in EQUAL:
        ours = load_tokenizer(str(tmp_path))
        assert all(ours.encode(text) == theirs.encode(text).ids for text in TEXTS)
        return
    if name != "end of text elsewhere":  # only there the ids of texts are the same
        assert any(plain.encode(text).ids != theirs.encode(text).ids for text in TEXTS)
    with pytest.raises(UserError, match="splits text in another way than GPT-2's") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("setting", ["add_prefix_space", "add_bos_token"])
def test_settings_beside_the_vocabulary_count_too(setting, hugging_face_files, tmp_path):
    """transformers reads tokenizer_config.json and tokenizer.json also where vocab.json is there."""
    for name, content in zip(("vocab.json", "merges.txt", "tokenizer.json"), hugging_face_files, strict=True):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({setting: False}))
    assert load_tokenizer(None, tmp_path).eos_id == 50256
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({setting: True}))
    with pytest.raises(UserError, match=f"tokenizer_config.json has {setting}"):
        load_tokenizer(None, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    content = json.loads(hugging_face_files[2]) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="a normalizer, NFC"):
        load_tokenizer(None, tmp_path)


@pytest.mark.parametrize("error", [ImportError("socksio"), AssertionError("unknown scheme"), OSError("no network")])
def test_whatever_the_download_raises_the_next_source_is_asked(error, monkeypatch):
    """A wrong proxy raises what its library likes."""

    def fail(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    monkeypatch.setattr(tokenizer_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"vocabulary was not found.*{error}"):
        load_tokenizer(None)


def test_a_tokenizer_json_named_as_a_word_list(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is named by its folder"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("name", ["pipe.json", "pipe.tiktoken"])
def test_a_pipe_is_refused_at_once(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        load_tokenizer(str(tmp_path / name))


def test_named_file_or_folder_without_a_vocabulary(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.tiktoken does not exist"):
        load_tokenizer(str(tmp_path / "nowhere.tiktoken"))
    with pytest.raises(UserError, match=r"contains neither vocab\.json"):
        load_tokenizer(str(tmp_path))
