"""gsm_icot.bash, prosqa.bash and prontoqa.bash, end to end against local servers, files and a substitute generator.

The repository does not contain official data, so the tests use tiny substitutes with a checksum file of their own,
which COCONUT_CHECKSUMS names. The tests need no network.
"""

import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

PREPROCESSING = Path(__file__).resolve().parents[1] / "preprocessing"
SPLITS = ("train", "valid", "test")
RAW = {split: f"{split} café?||<<1+1=2>> #### 2\nB?|| #### 3\n".encode() for split in SPLITS}
QUESTIONS = {"train": "train café?", "valid": "valid café?", "test": "test café?"}
PROSQA = {split: json.dumps([{"question": split, "answer": "a", "steps": ["s"]}]).encode() for split in SPLITS}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a39\nsize 87805358\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in to the network</title></head></html>\n"

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def gsm_json(split):
    """Return RAW[split], converted by the official rules."""
    return json.dumps([
        {"question": QUESTIONS[split], "steps": ["<<1+1=2>>"], "answer": "2"},
        {"question": "B?", "steps": [""], "answer": "3"},
    ]).encode()  # fmt: skip


def write_pins(path, **changes):
    """Write a checksum file for the substitutes; gsm_train_items="3" replaces the value of that name and kind."""
    pins = {("gsm", "commit"): "c0ffee", ("prosqa", "commit"): "c0ffee", ("gsm_train.json", "items"): "2"}
    for split in SPLITS:
        pins[f"gsm_{split}.txt", "sha256"] = sha256(RAW[split])
        if split != "train":
            pins[f"gsm_{split}.json", "sha256"] = sha256(gsm_json(split))
            pins[f"prosqa_{split}.json", "sha256"] = sha256(PROSQA[split])
    blob = b"blob %d\0" % len(PROSQA["train"]) + PROSQA["train"]
    pins["prosqa_train.json", "gitblob"] = hashlib.sha1(blob).hexdigest()
    pins["prosqa_train.json", "sha256-hint"] = sha256(PROSQA["train"])
    for (name, kind), value in pins.items():
        pins[name, kind] = changes.get(f"{name.split('.')[0]}_{kind.split('-')[0]}", value)
    path.write_text("# substitutes\n\n" + "".join(f"{name} {kind} {value}\n" for (name, kind), value in pins.items()))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve server.files. server.stall stops the transfer after half of a file, server.cut closes the connection."""

    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = content[: len(content) // 2]
        self.wfile.write(half if self.server.cut or self.server.stall else content)
        if self.server.stall:
            self.server.stalled.set()
            self.server.go_on.wait(20)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    served.files = {f"/{split}.txt": RAW[split] for split in SPLITS}
    served.files.update({f"/prosqa_{split}.json": PROSQA[split] for split in SPLITS})
    served.asked, served.cut, served.stall = [], False, False
    served.stalled, served.go_on = threading.Event(), threading.Event()
    served.url = f"http://127.0.0.1:{served.server_address[1]}"
    thread = threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield served
    served.go_on.set()
    served.shutdown()
    served.server_close()
    thread.join()


@pytest.fixture
def here(tmp_path):
    """Return a working folder, whose name contains a space. The checksum file of the substitutes is beside it."""
    write_pins(tmp_path / "pins.txt")
    folder = tmp_path / "a folder"
    folder.mkdir()
    return folder


def environment(here, **variables):
    clean = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    return {**clean, "PYTHON": sys.executable, "COCONUT_CHECKSUMS": str(here.parent / "pins.txt"), **variables}


# bash cannot trap a SIGINT that was ignored when it started, as it is where the tests run in the background.
LISTEN = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"


def start(here, script, **variables):
    """Start a script in its own process group, with SIGINT enabled as in a terminal."""
    return subprocess.Popen(
        [sys.executable, "-c", LISTEN, "bash", str(PREPROCESSING / script)], cwd=here, text=True,
        env=environment(here, **variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def run(here, script, **variables):
    return subprocess.run(
        ["bash", str(PREPROCESSING / script)], cwd=here, env=environment(here, **variables), text=True,
        stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
    )  # fmt: skip


def names(here):
    """List the files in data/, including hidden ones."""
    return sorted(path.name for path in (here / "data").iterdir())


def contents(here, name="gsm"):
    return {split: (here / "data" / f"{name}_{split}.json").read_bytes() for split in SPLITS}


def refused(done, status, *words):
    """The script exits with this status and one error, without a traceback; stderr contains these words."""
    assert done.returncode == status, done
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    return True


ALL_GSM = [f"gsm_{split}.json" for split in sorted(SPLITS)]
ALL_PROSQA = [f"prosqa_{split}.json" for split in sorted(SPLITS)]


# ---- GSM8K --------------------------------------------------------------------------------------------------------


def test_gsm_from_a_server(here, server):
    done = run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url + "/")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert names(here) == ALL_GSM  # no raw text and no temporary file is left
    assert contents(here) == {split: gsm_json(split) for split in SPLITS}
    assert server.asked == ["/train.txt", "/valid.txt", "/test.txt"]


def test_gsm_second_run_does_nothing(here, server):
    run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url)
    before = {name: (here / "data" / name).stat().st_mtime_ns for name in names(here)}
    server.asked.clear()
    done = run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url)
    assert done.returncode == 0 and done.stdout.count("is in place") == 3
    assert server.asked == []
    assert {name: (here / "data" / name).stat().st_mtime_ns for name in names(here)} == before


def test_gsm_from_files(here):
    folder = here.parent / "mirror"
    folder.mkdir()
    for split in SPLITS:
        (folder / f"{split}.txt").write_bytes(RAW[split])
    assert run(here, "gsm_icot.bash", COCONUT_GSM_URL=folder.as_uri()).returncode == 0
    assert names(here) == ALL_GSM


def test_gsm_raw_text_copied_by_hand_is_used(here, server):
    (here / "data").mkdir()
    (here / "data" / "gsm_train.txt").write_bytes(RAW["train"])
    assert run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url).returncode == 0
    assert server.asked == ["/valid.txt", "/test.txt"] and names(here) == ALL_GSM


def test_gsm_only_what_is_missing_is_fetched(here, server):
    run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url)
    (here / "data" / "gsm_valid.json").unlink()
    (here / "data" / "gsm_test.txt").write_bytes(RAW["test"])  # as if stopped between conversion and removal
    server.asked.clear()
    assert run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url).returncode == 0
    assert server.asked == ["/valid.txt"] and names(here) == ALL_GSM


@pytest.mark.parametrize(("content", "found"), [
    (POINTER, "a Git LFS pointer (73 bytes)"),
    (PAGE, f"a web page ({len(PAGE)} bytes)"),
    (b"", "an empty file"),
    (RAW["valid"][:-1], f"another file of {len(RAW['valid']) - 1} bytes"),
    (None, "returned error: 404"),
])  # fmt: skip
def test_gsm_wrong_answer_of_the_server(here, server, content, found):
    """A pointer, a page, an empty file, a wrong checksum or an error is reported and not kept."""
    server.files["/valid.txt"] = content
    done = run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url)
    assert refused(done, 1, found, "gsm_valid.txt", server.url + "/valid.txt", "what to do:", "COCONUT_GSM_URL")
    assert content is None or sha256(RAW["valid"]) in done.stderr  # what was expected
    assert names(here) == ["gsm_train.json"]  # correct files are kept
    server.files["/valid.txt"] = RAW["valid"]
    assert run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url).returncode == 0
    assert names(here) == ALL_GSM


def test_gsm_connection_cut(here, server):
    server.cut = True
    assert refused(run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url), 1, "curl: (18)", "could not download")
    assert names(here) == []


def test_gsm_no_network(here, server):
    server.shutdown()
    server.server_close()  # the port is closed
    assert refused(run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url), 1, "curl: (7)", "check the network")
    assert names(here) == []


def test_gsm_absent_file_address(here):
    done = run(here, "gsm_icot.bash", COCONUT_GSM_URL=(here / "absent").as_uri())
    assert refused(done, 1, "could not download file://", "No such file")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_gsm_stopped_in_the_middle_of_a_download(here, server, sent, status):
    server.stall = True
    process = start(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url)
    assert server.stalled.wait(20)
    started = time.monotonic()
    process.send_signal(sent)
    _, err = process.communicate(timeout=20)
    assert process.returncode == status and time.monotonic() - started < 15  # the download takes 20
    assert "interrupted" in err and "Traceback" not in err
    assert names(here) == []
    server.stall = False
    assert run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url).returncode == 0
    assert names(here) == ALL_GSM


def test_gsm_killed_in_the_middle_of_a_download(here, server):
    """SIGKILL leaves a partial file: the next run downloads the file again and removes it."""
    server.stall = True
    process = start(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url)
    assert server.stalled.wait(20)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    assert names(here) == [".gsm_train.txt.part"]  # no program reads this name
    server.stall = False
    assert run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url).returncode == 0
    assert names(here) == ALL_GSM


@pytest.mark.parametrize("name", ["gsm_train.json", "gsm_valid.json", "gsm_train.txt"])
def test_gsm_never_overwrites_another_file(here, server, name):
    (here / "data").mkdir()
    (here / "data" / name).write_bytes(b'[{"question": "mine"')
    done = run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url)
    assert refused(done, 2, f"data/{name} is not the expected file", "move")
    assert (here / "data" / name).read_bytes() == b'[{"question": "mine"'


def test_gsm_wrong_conversion_is_not_kept(here, server):
    write_pins(here.parent / "pins.txt", gsm_train_items="3")
    done = run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url)
    assert refused(done, 1, "items 3", "items 2") and "gsm_train.json" not in names(here)


def tools(here, *extra):
    """Make a PATH with the commands that the scripts use; `extra` adds the downloaders."""
    folder = here.parent / "bin"
    folder.mkdir()
    for tool in ("bash", "dirname", "basename", "mkdir", "mv", "rm", "cat", "cp", "sed", *extra):
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


@pytest.mark.skipif(not shutil.which("wget"), reason="wget is not installed")
def test_gsm_with_wget_alone(here, server):
    path = tools(here, "wget")
    assert run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url, PATH=path).returncode == 0
    assert names(here) == ALL_GSM
    (here / "data" / "gsm_test.json").unlink()
    del server.files["/test.txt"]
    assert refused(run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url, PATH=path), 1, "ERROR 404")


def test_gsm_without_curl_and_wget(here, server):
    done = run(here, "gsm_icot.bash", COCONUT_GSM_URL=server.url, PATH=tools(here))
    assert refused(done, 1, "neither curl nor wget") and names(here) == []


def test_a_missing_python_is_an_error(here, server):
    assert refused(run(here, "gsm_icot.bash", PYTHON="no-such-python"), 1, "'no-such-python' not found")


@pytest.mark.parametrize("script", ["gsm_icot.bash", "prosqa.bash", "prontoqa.bash"])
def test_help_and_unknown_arguments(here, script):
    shown = subprocess.run(["bash", PREPROCESSING / script, "--help"], capture_output=True, text=True, cwd=here)
    assert shown.returncode == 0 and f"bash preprocessing/{script}" in shown.stdout and "COCONUT_" in shown.stdout
    wrong = subprocess.run(["bash", PREPROCESSING / script, "train"], capture_output=True, text=True, cwd=here)
    assert refused(wrong, 2, "unknown argument 'train'")
    assert list(here.iterdir()) == []


def test_shipped_checksums_are_the_known_ones():
    """The figures of the official files, entered here independently."""
    text = (PREPROCESSING / "checksums.txt").read_text()
    pins = {tuple(line.split()[:2]): line.split()[2] for line in text.splitlines() if line and line[0] != "#"}
    assert len(pins) == 17
    assert pins["gsm_train.txt", "sha256"] == "0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c"
    assert pins["gsm_train.json", "items"] == "385620"
    assert pins["gsm_valid.json", "sha256"] == "1833a3479186e4e6c0183aad32fb7ee343479c958f2a1b57631ec22f5ee3aa7f"
    assert pins["gsm_test.json", "sha256"] == "46ce5b0c44fde0bfc8cf1e7492aa640b96111d9dcb80a54340d9911141a9caa9"
    assert pins["prosqa_train.json", "gitblob"] == "cf26632b9d3f4e812966563eed769b1cfe40c624"
    assert pins["prosqa_valid.json", "sha256"] == "c74e0de24f1e90ec48b1a993e6458a7be4caeef3928f5104e3c2e45d689a5249"
    assert pins["5hop_0shot_random.json", "sha256"].startswith("b8d969259bceb085")
    assert {name: pins[name, "commit"][:7] for name in ("gsm", "prosqa", "prontoqa")} == {
        "gsm": "e06a32e", "prosqa": "27273cb", "prontoqa": "f0145b8",
    }  # fmt: skip


def test_default_addresses(here):
    """The scripts ask for the pinned commit, and for GSM8K's train.txt on the LFS host."""
    folder = here.parent / "bin"
    folder.mkdir()
    (folder / "curl").write_text('#!/bin/sh\nfor last; do :; done\necho "$last" >>"$ASKED"\nprintf 000\nexit 6\n')
    (folder / "curl").chmod(0o755)
    asked = here.parent / "asked"
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "ASKED": str(asked)}
    shipped = {"COCONUT_CHECKSUMS": str(PREPROCESSING / "checksums.txt")}
    assert refused(run(here, "gsm_icot.bash", **variables, **shipped), 1, "could not download", "check the network")
    assert refused(run(here, "prosqa.bash", **variables, **shipped), 1, "could not download", "check the network")
    gsm, prosqa = asked.read_text().splitlines()
    path = "da03/Internalize_CoT_Step_by_Step/e06a32ee5e4cd117171daeb4755d2a97ece62761/data/gsm8k"
    assert gsm == f"https://media.githubusercontent.com/media/{path}/train.txt"
    commit = "27273cb8cca4bb763c041a63b036d0c3b7cbbb48"
    assert prosqa == f"https://raw.githubusercontent.com/facebookresearch/coconut/{commit}/data/prosqa_train.json"


# ---- ProsQA -------------------------------------------------------------------------------------------------------


def test_prosqa_from_a_server_and_again(here, server):
    done = run(here, "prosqa.bash", COCONUT_PROSQA_URL=server.url)
    assert done.returncode == 0 and done.stderr == ""
    assert names(here) == ALL_PROSQA and contents(here, "prosqa") == PROSQA
    server.asked.clear()
    again = run(here, "prosqa.bash", COCONUT_PROSQA_URL=server.url)
    assert again.returncode == 0 and again.stdout.count("is in place") == 3 and server.asked == []


@pytest.mark.parametrize("split", SPLITS)
def test_prosqa_wrong_file(here, server, split):
    server.files[f"/prosqa_{split}.json"] = PROSQA[split].replace(b'"a"', b'"b"')
    done = run(here, "prosqa.bash", COCONUT_PROSQA_URL=server.url)
    kind = "gitblob" if split == "train" else "sha256"  # train: the git blob id decides
    assert refused(done, 1, f"prosqa_{split}.json with {kind} ", "COCONUT_PROSQA_URL")
    assert f"prosqa_{split}.json" not in names(here)


def test_prosqa_second_hand_sum_is_a_note(here, server):
    write_pins(here.parent / "pins.txt", prosqa_train_sha256="0" * 64)
    done = run(here, "prosqa.bash", COCONUT_PROSQA_URL=server.url)
    assert done.returncode == 0 and "second-hand sum 000" in done.stdout and names(here) == ALL_PROSQA


def test_prosqa_stopped(here, server):
    server.stall = True
    process = start(here, "prosqa.bash", COCONUT_PROSQA_URL=server.url)
    assert server.stalled.wait(20)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 143 and names(here) == []


# ---- ProntoQA -----------------------------------------------------------------------------------------------------

# Like the official generator: options by argparse, many warnings, a file that is opened first and written at the end.
GENERATOR = """
import argparse, json, sys, time
import numpy, scipy, helper

def run_experiment(args, path):
    trial, examples = 0, {}
    log = open(path, "w")
    while trial < 20:
        trial += 1
        print("WARNING: Could not extend ontology due to insufficient concept names.")
        print("WARNING: the same on the other stream", file=sys.stderr)
        helper.pause(trial)
        examples["example%d" % trial] = {"test_example": {"question": "Q%d." % trial, "query": "True or false: x.",
            "chain_of_thought": ["a.", "b.", "c."], "answer": "True"}}
    json.dump(examples, log, indent=1)
    log.close()

parser = argparse.ArgumentParser()
for name, kind in dict(model_name=str, model_size=str, ordering=str, num_trials=int, few_shot_examples=int,
                       ontology=str, min_hops=int, max_hops=int, hops_skip=int).items():
    parser.add_argument("--" + name.replace("_", "-"), type=kind, required=True)
args = parser.parse_args()
assert vars(args) == dict(model_name="json", model_size="dummy", ordering="random", num_trials=10000,
    few_shot_examples=0, ontology="fictional", min_hops=5, max_hops=5, hops_skip=1), args
if __name__ == "__main__":
    run_experiment(args, "5hop_0shot_random.json")
"""
HELPER = "import time\ndef pause(trial):\n    time.sleep(0.02)\n"


def raw_examples():
    example = {"query": "True or false: x.", "chain_of_thought": ["a.", "b.", "c."], "answer": "True"}
    return json.dumps(
        {f"example{i}": {"test_example": {"question": f"Q{i}.", **example}} for i in range(1, 21)}, indent=1
    ).encode()


def prontoqa_json():
    items = [{"question": f"Q{i}. True or false: x.", "steps": ["a. b.", "c."], "answer": "True"} for i in range(1, 21)]
    return {"train": json.dumps(items).encode(), "valid": b"[]", "test": b"[]"}


def git(folder, *arguments):
    identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def repository(here, generator=GENERATOR, helper=HELPER, raw=None):
    """Make a local repository, whose pinned commit is not the newest, and its checksum file."""
    repo = here.parent / "prontoqa"
    repo.mkdir()
    git(repo, "init", "-q")
    (repo / "run_experiment.py").write_text(generator)
    (repo / "helper.py").write_text(helper)
    git(repo, "add", ".")
    git(repo, "commit", "-qm", "pinned")
    commit = git(repo, "rev-parse", "HEAD")
    (repo / "run_experiment.py").write_text("raise SystemExit('not the pinned commit')")
    git(repo, "commit", "-qam", "newer")
    pins = [f"prontoqa commit {commit}", f"5hop_0shot_random.json sha256 {sha256(raw or raw_examples())}"]
    pins += [f"prontoqa_{split}.json sha256 {sha256(content)}" for split, content in prontoqa_json().items()]
    (here.parent / "pins.txt").write_text("\n".join(pins))
    return repo


@pytest.fixture
def stub_python(here):
    """Return variables that give this Python an empty numpy and an empty scipy."""
    for name in ("numpy", "scipy"):
        (here.parent / "stubs").mkdir(exist_ok=True)
        (here.parent / "stubs" / f"{name}.py").write_text("")
    return {"COCONUT_PRONTOQA_PYTHON": sys.executable, "PYTHONPATH": str(here.parent / "stubs")}


@pytest.fixture
def prontoqa(here, stub_python):
    """Return variables for prontoqa.bash. Their temporary folder must be empty after the test."""
    scratch = here.parent / "tmp"
    scratch.mkdir()
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    yield {**stub_python, "COCONUT_PRONTOQA_REPO": str(here.parent / "prontoqa"), "TMPDIR": str(scratch)}
    assert list(scratch.iterdir()) == []


ALL_PRONTOQA = ["5hop_0shot_random.json", "prontoqa_generator.log.gz", "prontoqa_test.json", "prontoqa_train.json",
                "prontoqa_valid.json"]  # fmt: skip


def test_prontoqa_end_to_end(here, prontoqa):
    repository(here)
    done = run(here, "prontoqa.bash", **prontoqa, PYTHONSAFEPATH="1")  # still, the generator imports its own files
    assert done.returncode == 0, done.stderr
    assert "about 40 minutes" in done.stdout.splitlines()[0]
    assert "could not extend" not in (done.stdout + done.stderr).lower()  # the warnings are in the log
    assert names(here) == ALL_PRONTOQA and contents(here, "prontoqa") == prontoqa_json()
    log = subprocess.run(
        ["gzip", "-dc", here / "data" / "prontoqa_generator.log.gz"], check=True, capture_output=True, text=True
    ).stdout
    assert log.count("insufficient concept names") == 20 and log.count("other stream") == 20
    again = run(here, "prontoqa.bash", **{**prontoqa, "COCONUT_PRONTOQA_REPO": "/nowhere"})
    assert again.returncode == 0 and again.stdout.count("is in place") == 3


def test_prontoqa_reports_the_elapsed_time_each_minute(here, prontoqa):
    """A minute passes quickly here: the script counts 60 calls of a `sleep` that takes 10 ms."""
    repository(here, helper=HELPER.replace("0.02", "0.1"))
    (here.parent / "bin").mkdir()
    (here.parent / "bin" / "sleep").write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 0.01\n")
    (here.parent / "bin" / "sleep").chmod(0o755)
    done = run(here, "prontoqa.bash", **prontoqa, PATH=f"{here.parent / 'bin'}:{os.environ['PATH']}")
    assert done.returncode == 0
    lines = re.findall(r"^(\d+) min so far, about 40 min in all$", done.stderr, re.MULTILINE)
    assert lines and lines == [str(minutes) for minutes in range(1, len(lines) + 1)]


def wheel(folder, name):
    """Write an empty package as a wheel, which pip can install without an index."""
    info = f"{name}-9.9.dist-info"
    with zipfile.ZipFile(folder / f"{name}-9.9-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_prontoqa_temporary_environment(here, prontoqa):
    """numpy and scipy are installed in an environment of their own, which is removed afterwards."""
    del prontoqa["COCONUT_PRONTOQA_PYTHON"], prontoqa["PYTHONPATH"]
    repository(here, generator=GENERATOR.replace("import numpy", "import numpy; print('base', sys.base_prefix != "
                                                 "sys.prefix, numpy.__file__)\nimport numpy"))  # fmt: skip
    for name in ("numpy", "scipy"):
        wheel(here.parent, name)
    done = run(here, "prontoqa.bash", **prontoqa, PIP_CONFIG_FILE=os.devnull, PIP_NO_INDEX="1",
               PIP_FIND_LINKS=str(here.parent))  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = subprocess.run(
        ["gzip", "-dc", here / "data" / "prontoqa_generator.log.gz"], check=True, capture_output=True, text=True
    ).stdout
    assert f"base True {prontoqa['TMPDIR']}" in log


# One Python whose pip finds no package, and one that cannot create environments (Debian without python3-venv).
NO_PIP = """mkdir -p "$3/bin"
  printf '#!/bin/sh\\necho No matching distribution found for numpy >&2; exit 1\\n' >"$3/bin/python"
  chmod +x "$3/bin/python" """
NO_VENV = "echo ensurepip is not available; exit 1"


@pytest.mark.parametrize(("venv", "found"), [(NO_PIP, "No matching distribution"), (NO_VENV, "ensurepip is not")])
def test_prontoqa_requirements_cannot_be_installed(here, prontoqa, venv, found):
    del prontoqa["COCONUT_PRONTOQA_PYTHON"], prontoqa["PYTHONPATH"]
    repository(here)
    python = here.parent / "python"
    python.write_text(f'#!/bin/sh\nif [ "$2" = venv ]; then {venv}\nelse exec "{sys.executable}" "$@"; fi\n')
    python.chmod(0o755)
    done = run(here, "prontoqa.bash", **prontoqa, PYTHON=str(python))
    assert refused(done, 1, "could not install numpy and scipy", found, "COCONUT_PRONTOQA_PYTHON")
    assert names(here) == []


def test_prontoqa_python_without_requirements(here, prontoqa):
    repository(here)
    (here.parent / "stubs" / "scipy.py").write_text("raise ImportError")
    assert refused(run(here, "prontoqa.bash", **prontoqa), 2, "cannot import numpy and scipy")


def test_prontoqa_stopped_in_the_middle(here, prontoqa):
    repository(here, helper="import time\ndef pause(trial):\n    time.sleep(30)\n")
    for sent, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = start(here, "prontoqa.bash", **prontoqa)
        deadline = time.monotonic() + 20
        while not (here / "data" / "prontoqa_generator.log").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(sent)
        _, err = process.communicate(timeout=20)
        assert process.returncode == status and "interrupted" in err and "Traceback" not in err
        assert names(here) == []
        assert list(Path(prontoqa["TMPDIR"]).iterdir()) == []


def test_prontoqa_unexpected_result_is_kept_apart(here, prontoqa):
    repository(here, raw=b"other")
    done = run(here, "prontoqa.bash", **prontoqa)
    assert refused(done, 1, "5hop_0shot_random.json with sha256 " + sha256(b"other"), sha256(raw_examples()), "kept as")
    kept = [name for name in names(here) if "log" not in name]
    assert kept == ["5hop_0shot_random.json.unexpected"]


def test_prontoqa_generator_fails(here, prontoqa):
    repository(here, helper="def pause(trial):\n    raise ValueError('no more names')\n")
    done = run(here, "prontoqa.bash", **prontoqa)
    assert done.returncode == 1 and "ValueError: no more names" in done.stderr and "status 1" in done.stderr
    assert names(here) == ["prontoqa_generator.log.failed"]


def test_prontoqa_no_such_repository_or_commit(here, prontoqa):
    repo = repository(here)
    absent = run(here, "prontoqa.bash", **{**prontoqa, "COCONUT_PRONTOQA_REPO": str(repo / "absent")})
    assert refused(absent, 1, "could not clone", "COCONUT_PRONTOQA_REPO")
    pins = here.parent / "pins.txt"
    pins.write_text(re.sub(r"commit \w+", "commit " + "0" * 40, pins.read_text()))
    assert refused(run(here, "prontoqa.bash", **prontoqa), 1, "has no commit 000")
    assert names(here) == []


def test_prontoqa_raw_file_copied_by_hand_is_used(here, prontoqa):
    repository(here)
    (here / "data").mkdir()
    (here / "data" / "5hop_0shot_random.json").write_bytes(raw_examples())
    done = run(here, "prontoqa.bash", **{**prontoqa, "COCONUT_PRONTOQA_REPO": "/nowhere"})
    assert done.returncode == 0 and contents(here, "prontoqa") == prontoqa_json()


@pytest.mark.parametrize("name", ["5hop_0shot_random.json", "prontoqa_valid.json"])
def test_prontoqa_reports_another_file_before_it_generates(here, prontoqa, name):
    repository(here)
    (here / "data").mkdir()
    (here / "data" / name).write_bytes(b"mine")
    assert refused(run(here, "prontoqa.bash", **prontoqa), 2, f"data/{name} is not the expected file")
    assert names(here) == [name] and (here / "data" / name).read_bytes() == b"mine"
