"""Reading data sets: every format gives the same examples, and errors name the file, the index and the key."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from text import reader
from text.reader import Example, open_source, read_examples, warn_of_marked_steps
from utils import UserError

ROOT = Path(__file__).parents[1]
PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=60)
ITEM = {"question": "What is 1 + 2?", "steps": ["<<1+2=3>>"], "answer": "3"}
EXAMPLE = Example("What is 1 + 2?", ["<<1+2=3>>"], "3")


def as_list(items: list[dict]) -> bytes:
    return json.dumps(items).encode()


def as_lines(items: list[dict]) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()


FORMATS = {
    "list": as_list,
    "indented": lambda items: json.dumps(items, indent=4, ensure_ascii=False).encode(),
    "lines": as_lines,
    "lines, CRLF, blank lines, no newline at the end": lambda items: (
        b"\n" + as_lines(items).replace(b"\n", b"\r\n\r\n")[:-4]
    ),
    "byte-order mark": lambda items: b"\xef\xbb\xbf" + as_list(items),
    "lines with byte-order mark": lambda items: b"\xef\xbb\xbf" + as_lines(items),
    "gzipped list": lambda items: gzip.compress(as_list(items)),
    "gzipped lines in two parts": lambda items: gzip.compress(as_lines(items[:1])) + gzip.compress(as_lines(items[1:])),
}


@pytest.fixture
def write(tmp_path):
    """Write bytes or items to a file: write(content, name) -> path as text."""

    def put(content, name: str = "data.json") -> str:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else as_list(content))
        return str(tmp_path / name)

    return put


def message(path: str) -> str:
    """The UserError that reading `path` raises, without the path that it begins with."""
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)[len(f"{path}: ") :]


# Formats


@pytest.mark.parametrize("encode", FORMATS.values(), ids=FORMATS.keys())
def test_every_format_gives_the_same_examples(encode, write):
    items = [
        ITEM,
        {"idx": 7, **ITEM, "question": "naïve – \u2028 no line end", "edges": [[0, 1]]},
        ITEM | {"steps": []},
    ]
    expected = [EXAMPLE, Example("naïve – \u2028 no line end", ["<<1+2=3>>"], "3"), EXAMPLE._replace(steps=[])]
    for name in ("data.json", "data.jsonl.gz", "no_ending"):  # the content decides
        assert read_examples(write(encode(items), name)) == expected


visible = st.text(min_size=1).filter(lambda text: text.strip())
answers = st.text(min_size=1).filter(lambda text: text.replace(",", "").strip() and "#" not in text)
items = st.fixed_dictionaries({"question": visible, "steps": st.lists(st.text(), max_size=4), "answer": answers})


@PROPERTY
@given(st.lists(items, min_size=1, max_size=4), st.sampled_from(sorted(FORMATS)))
def test_any_texts_come_back_unchanged(tmp_path_factory, given_items, form):
    path = tmp_path_factory.getbasetemp() / "property.json"
    path.write_bytes(FORMATS[form](given_items))
    found = read_examples(str(path))
    assert found == [Example(item["question"], item["steps"], item["answer"]) for item in given_items]


def test_limit_takes_the_first(write):
    path = write([ITEM | {"answer": str(i)} for i in range(5)])
    assert [e.answer for e in read_examples(path, limit=2)] == ["0", "1"]


@pytest.mark.parametrize("steps", [[], [""], ["", " "]])
def test_empty_steps_are_legal(steps, write):
    assert read_examples(write([ITEM | {"steps": steps}]))[0].steps == steps


def test_the_digest_depends_on_the_content_only(write):
    same = {open_source(write([ITEM], name)).digest() for name in ("a.json", "b.json")}
    assert len(same) == 1
    assert open_source(write([ITEM | {"answer": "4"}])).digest() not in same


# Files that cannot be read

NOT_DATA = {
    "nothing": (b"", "the file is empty"),
    "blank": (b" \n\t\n", "the file is empty"),
    "empty list": (b"[]", "the list is empty; at least one item is needed"),
    "words": (b"question,steps,answer\n", "not JSON (Expecting value: line 1 column 1"),
    "web page": (b"<!DOCTYPE html><html>", "this is a web page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "cut off": (as_list([ITEM, ITEM])[:-9], "not JSON ("),
    "nested": (b"[" * 100_000, "not JSON ("),
    "long number": (b"[" + b"1" * 5000 + b"]", "not JSON ("),
    "object": (
        json.dumps({"data": [ITEM]}, indent=1).encode(),
        "expected a JSON list of items (or one object per line)",
    ),
    "number": (b"42", "expected a JSON list of items, found a number (42)"),
    "Latin-1": ('[{"question": "naïve"}]'.encode("latin-1"), "byte 17 is not UTF-8"),
    "UTF-16": ("[1]".encode("utf-16"), "byte 0 is not UTF-8"),
    "gzip cut off": (gzip.compress(as_list([ITEM]))[:-10], "damaged gzip file"),
    "gzip damaged": (b"\x1f\x8b" + b"x" * 50, "damaged gzip file"),
    "Parquet": (b"PAR1" + b"x" * 50, "a Parquet file; expected JSON. To use it, put it into a folder of its own"),
    "Arrow": (
        b"\xff\xff\xff\xff\x10\x00",
        "an Arrow file; expected JSON. To use it, name the folder that save_to_disk",
    ),
    "zstd": (b"\x28\xb5\x2f\xfd" + b"x" * 50, "a zstd file; expected JSON. To use it, unpack it with `unzstd FILE`"),
    "xz": (lzma.compress(as_list([ITEM])), "an xz file; expected JSON. To use it, unpack it with `unxz FILE`"),
    "bzip2": (bz2.compress(as_list([ITEM])), "a bzip2 file; expected JSON. To use it, unpack it with `bunzip2 FILE`"),
    "zip": (b"PK\x03\x04" + b"x" * 50, "a zip archive; expected JSON. To use it, unpack it with `unzip FILE`"),
    "tar, gzipped": (gzip.compress(b"\0" * 257 + b"ustar"), "a tar archive; expected JSON. To use it, unpack it"),
    "gzip, bits flipped": (gzip.compress(as_list([ITEM]))[:10] + b"\xff" * 40, "damaged gzip file"),
}


@pytest.mark.parametrize(("content", "expected"), NOT_DATA.values(), ids=NOT_DATA.keys())
def test_a_file_that_is_not_data_gives_a_clear_error(content, expected, write):
    assert expected in message(write(content))


@PROPERTY
@given(st.binary(max_size=60))
def test_any_bytes_give_examples_or_a_user_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    for opening in (b"", b"[", b"{", b"\x1f\x8b", b"\xef\xbb\xbf"):
        path.write_bytes(opening + content)
        with pytest.raises(UserError):
            read_examples(str(path))


def test_bad_lines_are_listed_by_number(write):
    lines = [json.dumps(ITEM).encode()] + [b'{"question": '] * 12 + [b"[]"]
    text = message(write(b"\n".join(lines)))
    assert text.startswith("not JSON Lines, 12 problems\n  - line 2: Expecting value")
    assert text.count("  - line") == 10
    assert text.endswith("... and 2 more")


@pytest.mark.parametrize("path", ["missing.json", "missing/deeper.json", ":train", "null\0character"])
def test_a_missing_file_is_named(path):
    assert message(path).startswith("cannot read the data (")


def test_a_path_with_braces_is_named(write):
    """Messages are not built with str.format, which would interpret braces of the path."""
    assert message(write([{}], "a{0}{b}{}.json")).startswith("3 problems in 1 items\n  - item 0: question is missing")
    assert message(write(b'{"question": \n', "a{b}.jsonl")).startswith("not JSON Lines, 1 problem\n  - line 1: ")


def test_a_gzip_file_that_would_fill_the_memory_is_refused(write, monkeypatch):
    """A few megabytes can unpack to terabytes: reading stops as soon as that shows."""
    monkeypatch.setattr(reader, "BOMB_BYTES", 1 << 20)
    assert "unpack to over" in message(write(gzip.compress(b" " * (1 << 23))))


def test_devices_and_pipes_are_refused_at_once(tmp_path):
    """Reading them may never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        assert message(path).startswith("cannot read the data (not a regular file)")


def test_a_file_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "memory_size", lambda: 1000)
    (tmp_path / "large.json").write_bytes(b" " * 1001)
    assert message(str(tmp_path / "large.json")).startswith("cannot read the data (larger than 1 kB)")


def test_a_mark_inside_a_step_is_told(capsys):
    """A generated chain of thought ends before its first `#`, so it can never equal such steps."""
    examples = [EXAMPLE, EXAMPLE._replace(steps=["a", "No. #1"])]
    warn_of_marked_steps("valid.json", examples)
    assert "valid.json: 1 of 2 items have `#` in a step (items 1)" in capsys.readouterr().err
    warn_of_marked_steps("valid.json", examples[:1])
    assert not capsys.readouterr().err


def test_a_file_has_no_splits(write, tmp_path, monkeypatch):
    write([ITEM])
    monkeypatch.chdir(tmp_path.parent)
    assert "is a file and has no splits" in message(f"{tmp_path.name}/data.json:train")


# Items with errors

WRONG = {
    "no object": ("text", "expected an object, found text ('text')"),
    "null": (None, "expected an object, found null"),
    "no question": ({"steps": [], "answer": "1"}, "question is missing"),
    "no answer": ({"question": "q", "steps": []}, "answer is missing"),
    "no steps": ({"question": "q", "answer": "1"}, "steps is missing"),
    "number as answer": (ITEM | {"answer": 42}, 'answer should be text, found a number (42); write it as text, "42"'),
    "true as answer": (ITEM | {"answer": True}, "answer should be text, found true/false (True)"),
    "null as question": (ITEM | {"question": None}, "question should be text, found null"),
    "list as answer": (ITEM | {"answer": ["1"]}, "answer should be text, found a list"),
    "steps as text": (ITEM | {"steps": "a\nb"}, "steps should be a list of text, found text ('a\\nb'); make it a list"),
    "steps null": (ITEM | {"steps": None}, "steps should be a list of text, found null"),
    "number as step": (ITEM | {"steps": ["a", 5]}, "steps[1] should be text, found a number (5)"),
    "empty question": (ITEM | {"question": " \n"}, "question is empty"),
    "empty answer": (ITEM | {"answer": ""}, "answer is empty"),
    "commas": (ITEM | {"answer": " ,, "}, "answer is empty but for commas"),
    "# in answer": (ITEM | {"answer": "C#"}, "answer contains `#` ('C#')"),
    "end of text": (ITEM | {"question": "a<|endoftext|>b"}, "question contains <|endoftext|>, reserved"),
    "special tokens": (
        ITEM | {"steps": ["a", "<|latent|><|end-latent|><|start-latent|>"]},
        "steps[1] contains <|start-latent|> and <|end-latent|> and <|latent|>, reserved",
    ),
    "surrogate": (
        ITEM | {"answer": "é\ud83d"},
        "answer contains a lone surrogate (half a character), U+D83D at position 1",
    ),
}


@pytest.mark.parametrize(("item", "expected"), WRONG.values(), ids=WRONG.keys())
def test_an_error_names_the_items_index_and_key(item, expected, write):
    text = message(write([ITEM, item, ITEM]))
    assert text.startswith(f"1 problem in 3 items\n  - item 1: {expected}")
    assert text.count("\n") == 1


@pytest.mark.parametrize("text", ["<|", "a <|b|> c", "<|endoftext", "😀 né", "No. #1 and ## and ###"])
def test_text_that_resembles_an_error_is_accepted(text, write):
    item = ITEM | {"question": text, "steps": [text]}
    assert read_examples(write([item])) == [Example(text, [text], "3")]


def test_ten_problems_are_shown_and_all_counted(write):
    text = message(write([{}] * 1234))
    assert text.startswith("3,702 problems in 1,234 items\n  - item 0: question is missing")
    assert text.count("  - item") == 10
    assert text.endswith("... and 3,692 more")


def test_items_after_the_limit_are_not_checked(write):
    assert read_examples(write([ITEM, {}]), limit=1) == [EXAMPLE]


# The package `datasets`


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The package `datasets`, with its cache in a temporary folder."""
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    previous, found.config.HF_DATASETS_CACHE = found.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("hf")
    yield found
    found.config.HF_DATASETS_CACHE = previous


def rows(datasets, answer: str = "3"):
    return datasets.Dataset.from_list([ITEM | {"answer": answer, "idx": 5}, ITEM | {"answer": answer, "idx": 6}])


def test_a_saved_data_set_is_read(datasets, tmp_path):
    rows(datasets).save_to_disk(tmp_path / "saved")
    assert read_examples(str(tmp_path / "saved")) == [EXAMPLE, EXAMPLE]
    assert "it has no splits; leave out `:train`" in failure(f"{tmp_path}/saved:train")


def test_a_saved_data_set_with_splits_is_read(datasets, tmp_path):
    datasets.DatasetDict(train=rows(datasets), test=rows(datasets, "4")).save_to_disk(tmp_path / "saved")
    assert read_examples(f"{tmp_path}/saved:test")[0].answer == "4"
    assert "name one of its splits" in failure(f"{tmp_path}/saved")
    assert "there is no split valid; it has train, test" in failure(f"{tmp_path}/saved:valid")


def test_a_folder_of_files_is_read(datasets, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(as_lines([ITEM]))
    assert read_examples(f"{tmp_path}:train") == [EXAMPLE]
    assert read_examples(str(tmp_path)) == [EXAMPLE]  # the only split
    assert "cannot open it" in failure(f"{tmp_path}:valid")
    (tmp_path / "empty").mkdir()
    assert "cannot open it" in failure(f"{tmp_path}/empty")


def test_rows_are_checked_and_hashed_like_items(datasets, tmp_path):
    datasets.Dataset.from_list([{"question": "q", "answer": None}]).save_to_disk(tmp_path / "bad")
    assert "item 0: steps is missing\n  - item 0: answer should be text, found null" in failure(f"{tmp_path}/bad")
    digests = set()
    for name, answer in (("a", "3"), ("b", "3"), ("c", "4")):
        rows(datasets, answer).save_to_disk(tmp_path / name)
        digests.add(open_source(str(tmp_path / name)).digest())
    assert len(digests) == 2


def test_a_data_set_of_the_hub_that_cannot_be_opened_is_named(datasets):
    assert "nobody/nothing: the package datasets cannot open it" in failure("nobody/nothing:train")


@pytest.fixture
def cached_set(datasets):
    """A data set of the Hub, as it lies in the cache of `datasets` after a first use: its name."""
    folder = Path(datasets.config.HF_DATASETS_CACHE, "someone___sums", "default", "0.0.0", "0123456789abcdef")
    folder.mkdir(parents=True, exist_ok=True)
    table = rows(datasets)
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "sums-train.arrow"), features=table.features) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    split = {"name": "train", "num_bytes": 1, "num_examples": 2, "dataset_name": "sums"}
    info = {"builder_name": "json", "dataset_name": "sums", "config_name": "default", "splits": {"train": split}}
    info |= {"version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}}
    (folder / "dataset_info.json").write_text(json.dumps(info | {"features": table.features.to_dict()}))
    return "someone/sums"


BROKEN_SETTINGS = {
    "ALL_PROXY": "socks5://127.0.0.1:9",
    "all_proxy": "socks://127.0.0.1:9",
    "HF_ENDPOINT": "hf-mirror.example",
    "HF_TOKEN": "hf_ä",
}


@pytest.mark.parametrize("name", BROKEN_SETTINGS)
def test_a_cached_data_set_needs_no_network_and_any_other_is_one_message(name, datasets, cached_set):
    """Proxies, addresses and tokens that are wrong raise errors of libraries far below `datasets`."""
    code = (
        "import sys, datasets; from pathlib import Path; from text.reader import *; from utils import UserError\n"
        "datasets.config.HF_DATASETS_CACHE = Path(sys.argv[1])\n"
        "print(len(read_examples(sys.argv[2] + ':train')))\n"
        "try: read_examples('nobody/nothing:train')\n"
        "except UserError as error: print(error)"
    )
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    command = [sys.executable, "-c", code, str(datasets.config.HF_DATASETS_CACHE), cached_set]
    environment |= {name: BROKEN_SETTINGS[name], "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, message = done.stdout.splitlines()
    assert count == "2"
    assert message.startswith("nobody/nothing: the package datasets cannot open it (")


def test_a_number_in_the_environment_that_is_none_is_one_message(datasets):
    """huggingface_hub, which `datasets` uses, raises while it is imported."""
    code = (
        "from text.reader import *; from utils import UserError\n"
        "try: read_examples('nobody/nothing:train')\n"
        "except UserError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_ETAG_TIMEOUT": "ten"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    *_, message = done.stdout.splitlines()  # the package logs a line of its own before it
    assert message.startswith("nobody/nothing: the package datasets cannot be loaded (ValueError: ")
    assert "'ten'" in message and "begin with HF_" in message


def failure(path: str) -> str:
    """The UserError that reading `path` raises."""
    with pytest.raises(UserError) as caught:
        read_examples(path)
    return str(caught.value)


def test_without_the_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for path in (str(tmp_path), f"{tmp_path}:train", "openai/gsm8k:train"):
        assert "pip install datasets" in failure(path)


def test_the_package_is_imported_only_when_needed(write):
    code = (
        f"import sys; from text.reader import *; read_examples({write([ITEM])!r}); assert 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_a_folder_named_datasets_is_not_the_package(tmp_path, monkeypatch):
    """Where the real one is not installed, Python makes a package without files of it."""
    (tmp_path / "mine").mkdir()
    module = types.ModuleType("datasets")
    module.__file__ = None
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match="a folder named datasets is taken for the package"):
        open_source(str(tmp_path / "mine"))


def test_a_file_named_datasets_is_not_the_package(tmp_path, monkeypatch):
    """Beside a notebook, for example."""
    (tmp_path / "mine").mkdir()
    module = types.ModuleType("datasets")
    module.__file__ = "here/datasets.py"
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match=r"here/datasets\.py is taken for the package"):
        open_source(str(tmp_path / "mine"))
