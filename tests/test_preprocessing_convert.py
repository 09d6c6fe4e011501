"""gsm_icot.py and prontoqa.py: the bytes of the official conversions, and one message per unusable file."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = os.environ.get("COCONUT_DATA_DIR")
needs_data = pytest.mark.skipif(
    not DATA, reason="COCONUT_DATA_DIR names no folder with gsm_valid.txt and prontoqa_raw_first50.json"
)


@pytest.fixture
def here(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path


def convert(here, script, *arguments):
    command = [sys.executable, str(ROOT / "preprocessing" / script), *arguments]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60)


def names(here):
    return sorted(path.name for path in (here / "data").iterdir())


# ---- GSM8K --------------------------------------------------------------------------------------------------------


def gsm(here, text, split="valid"):
    """Convert a text; return the bytes of the JSON file and the finished process."""
    (here / "data" / f"gsm_{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = convert(here, "gsm_icot.py", split)
    assert done.returncode == 0, done.stderr
    return (here / "data" / f"gsm_{split}.json").read_bytes(), done


@pytest.mark.parametrize(("line", "item"), [
    ("One and two?||<<1+2=3>> <<3*4=12>> #### 12", ("One and two?", ["<<1+2=3>>", "<<3*4=12>>"], "12")),
    ("No steps?|| #### 5", ("No steps?", [""], "5")),
    ("A  double space?||<<1+1=2>> #### 1,000", ("A  double space?", ["<<1+1=2>>"], "1,000")),
    ("Two  spaces?||<<1+1=2>>  <<2+2=4>> #### 4", ("Two  spaces?", ["<<1+1=2>>", "", "<<2+2=4>>"], "4")),
    ("Café €5?||<<5*1=5>> ####   -5.50  ", ("Café €5?", ["<<5*1=5>>"], "-5.50")),
    ("A # here?||<<1+1=2>> #### 2", ("A # here?", ["<<1+1=2>>"], "2")),
    ("Two||bars||<<1+1=2>> #### 2", ("Two", ["bars"], "2")),
    ("A line\u2028separator?||<<1+1=2>> #### 2", ("A line\u2028separator?", ["<<1+1=2>>"], "2")),
])  # fmt: skip
def test_gsm_line(here, line, item):
    """Each special case is converted as json.dump writes it: keys in the official order, non-ASCII escaped."""
    expected = [dict(zip(("question", "steps", "answer"), item, strict=True))]
    assert gsm(here, line + "\n")[0] == json.dumps(expected).encode()


def test_gsm_many_lines_equal_one_json_dump(here):
    lines = [f"How many is {i}?||<<{i}+1={i + 1}>> #### {i + 1}" for i in range(50)]
    converted, done = gsm(here, "\r\n".join(lines))  # Windows line ends, and no newline after the last line
    expected = [
        {"question": f"How many is {i}?", "steps": [f"<<{i}+1={i + 1}>>"], "answer": f"{i + 1}"} for i in range(50)
    ]
    assert converted == json.dumps(expected).encode()
    assert "50 items" in done.stdout and names(here) == ["gsm_valid.json", "gsm_valid.txt"]


def test_gsm_line_without_answer_is_converted_with_a_warning(here):
    converted, done = gsm(here, "A?||<<1+1=2>> #### 2\nB?||<<1+1=2>> 2\n")
    assert json.loads(converted)[1]["answer"] == "B?||<<1+1=2>> 2"
    assert "1 lines have no '##'" in done.stderr and "line 2" in done.stderr


@pytest.mark.parametrize(
    "line",
    ["Is |a||b| 6?||<<2*3=6>>", "Is a||b?||<<2*3=6>>", "B?||<<1 + 1 = 2>>", "B?||<<1=1>>  <<1=1>>", "B?||add them"],
)
def test_gsm_line_that_the_official_rules_cut_apart_is_told(line, here):
    """`||` in a question, spaces in a step or beside it: the conversion stays official, and the line is named."""
    assert gsm(here, "A?||<<1+1=2>> #### 2\nA?|| #### 2\n")[1].stderr == ""
    converted, done = gsm(here, f"A?||<<1+1=2>> <<1+1=2>> #### 2\n{line} #### 6\n")
    assert "1 lines hold '||' twice, or spaces in or beside a step" in done.stderr and "line 2: " in done.stderr
    assert len(json.loads(converted)) == 2


@pytest.mark.parametrize("steps", ["<<1+1=2>>\t<<2+2=4>>", "<<1+1=2>><<2+2=4>>", "<<1+1=2>>\u00a0<<2+2=4>>"])
def test_gsm_steps_that_the_official_rules_join_are_told(steps, here):
    """Another character than a space is between them, or nothing."""
    converted, done = gsm(here, f"A?||<<1+1=2>> #### 2\nB?||{steps} #### 4\n")
    assert "1 lines hold two steps without a space between them" in done.stderr and "line 2: " in done.stderr
    assert json.loads(converted)[1]["steps"] == [steps]


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("Seat ##5?||<<2+2=4>> 4", "5?||<<2+2=4>> 4"), ("B?||<<2+2=4>> #### 4 #### 5", "5"),
        ("B?||<<2+2=4>> #### ", ""), ("B?||<<2+2=4>> ## ## 4", "4"),
    ],
)  # fmt: skip
def test_gsm_answer_that_the_official_rules_take_from_elsewhere_is_told(line, answer, here):
    converted, done = gsm(here, f"Seat ##5?||<<1+1=2>> #### 2\n{line}\n")
    assert "1 lines have '##' in the question alone, twice, or with nothing" in done.stderr
    assert "line 2: " in done.stderr and "line 1: " not in done.stderr
    assert json.loads(converted)[1]["answer"] == answer


def test_gsm_byte_order_mark_is_left_out(here):
    """It would become the first character of the first question."""
    assert json.loads(gsm(here, "\ufeffA?||<<1+1=2>> #### 2\n")[0])[0]["question"] == "A?"


@pytest.mark.parametrize(("content", "message"), [
    (None, "not found. Run 'bash preprocessing/gsm_icot.bash'"),
    (b"", "an empty file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0a39\nsize 87805358\n", "a Git LFS pointer (73 bytes)"),
    (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>\n", "a web page (52 bytes)"),
    (b"fine?||<<1+1=2>> #### 2\n" + b"no bars\n" * 12, "12 have no '||'"),
    (b"Caf\xe9?||<<1+1=2>> #### 2\n", "not UTF-8"),
])  # fmt: skip
def test_gsm_unusable_file(here, content, message):
    if content is not None:
        (here / "data" / "gsm_train.txt").write_bytes(content)
    done = convert(here, "gsm_icot.py", "train")
    assert done.returncode == 2
    assert message in done.stderr and "data/gsm_train.txt" in done.stderr and "Traceback" not in done.stderr
    assert names(here) == ([] if content is None else ["gsm_train.txt"])


def test_gsm_lists_ten_lines_and_counts_the_others(here):
    (here / "data" / "gsm_valid.txt").write_text("no bars\n" * 12)
    message = convert(here, "gsm_icot.py", "valid").stderr
    assert message.count("'no bars'") == 10 and "... and 2 more" in message and "line 10" in message


def test_gsm_earlier_conversion_survives_a_failure(here):
    good, _ = gsm(here, "A?||<<1+1=2>> #### 2\n")
    (here / "data" / "gsm_valid.txt").write_text("no bars\n")
    assert convert(here, "gsm_icot.py", "valid").returncode == 2
    assert (here / "data" / "gsm_valid.json").read_bytes() == good


@needs_data
def test_gsm_official_validation_file(here):
    converted, _ = gsm(here, (Path(DATA) / "gsm_valid.txt").read_bytes())
    assert hashlib.sha256(converted).hexdigest() == "1833a3479186e4e6c0183aad32fb7ee343479c958f2a1b57631ec22f5ee3aa7f"
    assert sum(item["steps"] == [""] for item in json.loads(converted)) == 6


# ---- ProntoQA -----------------------------------------------------------------------------------------------------


def raw_example(number, sentences=11):
    return {"test_example": {
        "question": f"Every a{number} is a b.", "query": "True or false: Max is b.",
        "chain_of_thought": [f"s{i}." for i in range(sentences)], "answer": "True" if number % 2 else "False",
    }}  # fmt: skip


def prontoqa(here, raw):
    text = raw if isinstance(raw, bytes) else json.dumps(raw, indent=1).encode()
    (here / "data" / "5hop_0shot_random.json").write_bytes(text)
    return convert(here, "prontoqa.py")


def splits(here):
    return {name: (here / "data" / f"prontoqa_{name}.json").read_bytes() for name in ("train", "valid", "test")}


def test_prontoqa_steps_are_pairs_of_sentences_and_splits_keep_the_order(here):
    done = prontoqa(here, {f"example{i}": raw_example(i) for i in range(1, 10_001)})
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == ["9,000 items", "200 items", "800 items"]
    items = {name: json.loads(content) for name, content in splits(here).items()}
    assert {name: len(list_) for name, list_ in items.items()} == {"train": 9000, "valid": 200, "test": 800}
    first = {"train": 1, "valid": 9001, "test": 9201}
    for name, list_ in items.items():
        assert list_[0]["question"] == f"Every a{first[name]} is a b. True or false: Max is b."
    assert items["train"][0]["steps"] == ["s0. s1.", "s2. s3.", "s4. s5.", "s6. s7.", "s8. s9.", "s10."]
    assert list(items["train"][0]) == ["question", "steps", "answer"]
    assert splits(here)["test"] == json.dumps(items["test"]).encode()


def test_prontoqa_other_number_of_examples_gives_a_warning(here):
    done = prontoqa(here, {"example1": raw_example(1, sentences=4)})
    assert done.returncode == 0
    assert "holds 1 examples" in done.stderr and "train 1, valid 0, test 0" in done.stderr
    assert json.loads(splits(here)["train"])[0]["steps"] == ["s0. s1.", "s2. s3."]


def without_key(key):
    example = raw_example(1)
    del example["test_example"][key]
    return {"example1": raw_example(2), "example2": example}


@pytest.mark.parametrize(("raw", "message"), [
    (None, "not found. Run 'bash preprocessing/prontoqa.bash'"),
    (b"", "an empty file"),
    (b'{"example1": {"test_ex', "not JSON"),
    (b"<html></html>", "a web page (13 bytes)"),
    ([raw_example(1)], "found list"),
    ({}, "found dict {}"),
    ({"example1": {"in_context_example0": {}}}, "example1: no object 'test_example'"),
    (without_key("query"), "example2: 'query' is not a text"),
    (without_key("chain_of_thought"), "example2: 'chain_of_thought' is not a list of sentences"),
    ({f"example{i}": {} for i in range(15)}, "15 of 15 examples cannot be used"),
])  # fmt: skip
def test_prontoqa_unusable_file(here, raw, message):
    done = convert(here, "prontoqa.py") if raw is None else prontoqa(here, raw)
    assert done.returncode == 2
    assert message in done.stderr and "5hop_0shot_random.json" in done.stderr and "Traceback" not in done.stderr
    assert not [name for name in names(here) if "prontoqa" in name]


@needs_data
def test_prontoqa_first_fifty_raw_items(here):
    """The sum was computed by a separate implementation of the three official rules."""
    shutil.copyfile(Path(DATA) / "prontoqa_raw_first50.json", here / "data" / "5hop_0shot_random.json")
    assert convert(here, "prontoqa.py").returncode == 0
    digest = hashlib.sha256(splits(here)["train"]).hexdigest()
    assert digest == "9f415ec5562e508ad9c31e55cce1a0ec10ca21eb9df983187e9c547869939a46"


@needs_data
def test_prontoqa_official_validation_file_from_its_raw_form(here):
    """The official split, turned back into raw examples, is converted to the same bytes."""
    official = (Path(DATA) / "prontoqa_valid.json").read_bytes()
    raw = {}
    for number, item in enumerate(json.loads(official), 1):
        question, query = item["question"].split(" True or false: ")
        chain = [sentence.strip() + "." for step in item["steps"] for sentence in step.split(".") if sentence.strip()]
        raw[f"example{number}"] = {"test_example": {
            "question": question, "query": f"True or false: {query}", "chain_of_thought": chain,
            "answer": item["answer"],
        }}  # fmt: skip
    assert prontoqa(here, raw).returncode == 0
    assert splits(here)["train"] == official
    assert hashlib.sha256(official).hexdigest() == "a37e616669d054c16a09fa0d063c7723ea732ef635bf6bf9847fe701e485c9aa"


# ---- writing ------------------------------------------------------------------------------------------------------


def interrupted():
    yield {"question": "first"}
    raise KeyboardInterrupt


def test_interrupted_writing_leaves_the_earlier_file(here, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "preprocessing"))
    from datafiles import write_json

    path = here / "data" / "some.json"
    assert write_json([{"a": 1}, {"b": 2}], path) == 2
    with pytest.raises(KeyboardInterrupt):
        write_json(interrupted(), path)
    assert path.read_text() == '[{"a": 1}, {"b": 2}]' and names(here) == ["some.json"]


def test_nothing_to_write_is_an_empty_list(here, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "preprocessing"))
    from datafiles import write_json

    assert write_json(iter([]), here / "new folder" / "some.json") == 0
    assert (here / "new folder" / "some.json").read_text() == "[]"


@pytest.mark.parametrize("safe_path", ["", "1"])
@pytest.mark.parametrize("script", ["gsm_icot.py", "prontoqa.py", "datafiles.py", "prosqa.py", "graphs.py"])
def test_help_from_another_folder(here, script, safe_path, monkeypatch):
    """With PYTHONSAFEPATH=1 Python does not put the script's folder on sys.path."""
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)
    done = convert(here, script, "--help")
    assert done.returncode == 0 and "usage" in done.stdout and names(here) == []
