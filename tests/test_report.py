"""The HTML page about a run: what it holds, what it says is missing, its errors, and how a browser shows it."""

import json
import re
import shutil
from contextlib import ExitStack
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from analysis import page, report
from analysis.probing import likeliest, logits, open_checkpoint, thoughts, tokenize_question
from tests.browser import Browser, find_browser
from tests.conftest import Tiny
from training.evaluation import wilson

HOSTILE = "<script>alert({})</script> & \"{}'"
N_ITEMS, N_RIGHT = 30, 14
BROWSER = find_browser()
VOID = {"meta", "link", "img", "source", "br"}


class Page(HTMLParser):
    """A parsed page: its tags, its text, the cells of its tables, and the predictions."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.rows, self.cards, self.pictures = [], "", [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "article":
            self.cards.append("")
        elif tag == "img":
            self.pictures.append(dict(attributes)["alt"])

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        open_tags = {tag for tag in ("tr", "td", "th", "article", "style") if self._is_open(tag)}
        if "style" in open_tags:
            return
        self.text += data
        if {"td", "th"} & open_tags:
            self.rows[-1][-1] += data
        if "article" in open_tags:
            self.cards[-1] += f"{data}\n"

    def _is_open(self, tag: str) -> bool:
        return self.tags.count(tag) > self.tags.count(f"/{tag}")


def read(html: Path) -> Page:
    return Page(html.read_text(encoding="utf-8"))


def make(run: Path, *options) -> Page:
    """The page of a run, made by the command."""
    assert report.main([str(run), *map(str, options)]) == 0
    return read(run / "report.html")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def judge(run: Path) -> None:
    """Let the first N_RIGHT answers of every epoch be right, as a model that has learned something answers."""
    for path in run.glob("predictions_*.jsonl"):
        found = [p | {"correct": p["idx"] < N_RIGHT, "cot": "step " * 3 + "y" * 300} for p in lines(path)]
        write_lines(path, found)
    result = {"eval/acc": N_RIGHT / N_ITEMS, "acc_interval": wilson(N_RIGHT, N_ITEMS)}
    metrics = run / "metrics.jsonl"
    write_lines(metrics, [record | (result if "eval/acc" in record else {}) for record in lines(metrics)])


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory, call_main) -> Path:
    """A folder with a trained Coconut (`<b>&run`), a trained CoT (`cot`), and an evaluation of the first (`seen`)."""
    tiny = Tiny(tmp_path_factory.mktemp("report"))
    items = [{"question": HOSTILE.format(n, n), "steps": ["a", "b"], "answer": f"<{n}>"} for n in range(N_ITEMS)]
    tiny.valid = tiny.write("valid.json", items)
    own = {"name": "<b>&run", "num_epochs": 3, "batch_size_eval": N_ITEMS, "warmup_steps": 5, "initializer_range": 0.4}
    assert call_main(tiny.config(**own)).status == 0
    assert call_main(tiny.config(**own | {"name": "cot", "coconut": False, "cot": True, "num_epochs": 1})).status == 0
    evaluation = {"name": "seen", "only_eval": True, "load_model_path": tiny.runs / "<b>&run" / "checkpoint_3"}
    assert call_main(tiny.config(**own | evaluation)).status == 0
    for name in ("<b>&run", "cot", "seen"):
        judge(tiny.runs / name)
    return tiny.runs


@pytest.fixture
def runs(tiny_runs, tmp_path, monkeypatch) -> Path:
    """A copy of the folder to change, away from the pictures of other runs."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_runs, tmp_path / "copied"))


@pytest.fixture
def run(runs) -> Path:
    return runs / "<b>&run"


@pytest.fixture(scope="module")
def base(tiny_runs, tmp_path_factory) -> Path:
    """The page of the trained Coconut with a picture wider than a phone."""
    folder, run = tmp_path_factory.mktemp("base"), tiny_runs / "<b>&run"
    make_picture(folder / "pictures", "sweep", run)
    assert report.main([str(run), "--out", str(folder / "page.html"), "--figures", str(folder / "pictures")]) == 0
    return folder / "page.html"


def make_picture(folder: Path, name: str, checkpoint: Path) -> None:
    """What an analysis command leaves."""
    folder.mkdir(exist_ok=True)
    figure = Figure(figsize=(9, 3))
    figure.subplots().plot([0, 1], [0, 1])
    figure.savefig(folder / f"{name}.png", dpi=150)
    write_lines(folder / f"{name}.jsonl", [{"command": name, "checkpoint": str(checkpoint), "items": 7}, {"idx": 0}])


# Contents


def test_texts_of_the_run_are_shown_as_text(base):
    """Names, questions and answers with the signs of HTML."""
    found = read(base)
    assert "script" not in found.tags
    assert found.tags.count("article") == found.tags.count("/article") == 20
    assert found.text.count("<script>alert(") == 20 and found.text.count("<b>&run") >= 3
    number = re.search(r"Item (\d+): right", found.text)[1]
    [card] = [card for card in found.cards if f"Item {number}:" in card]
    assert HOSTILE.format(number, number) in card.splitlines() and f"<{number}>" in card.splitlines()


def test_every_tag_that_opens_is_closed(base):
    tags = read(base).tags
    for tag in {tag.strip("/") for tag in tags} - VOID:
        assert tags.count(tag) == tags.count(f"/{tag}"), tag


def test_half_a_character_does_not_stop_the_page(run):
    """JSON may hold one; a file in UTF-8 may not."""
    path = run / "predictions_3.jsonl"
    write_lines(path, [p | {"answer": "\ud83d"} for p in lines(path)])
    assert "Answered\n?" in make(run).cards[0]


def test_the_table_has_the_numbers_of_the_metrics(base, tiny_runs):
    found, metrics = read(base), lines(tiny_runs / "<b>&run" / "metrics.jsonl")
    head = next(row for row in found.rows if "validation loss" in row)
    rows = [dict(zip(head, row, strict=True)) for row in found.rows if len(row) == len(head) and row != head]
    evaluations = [record for record in metrics if "eval/acc" in record]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row, record in zip(rows, evaluations, strict=True):
        steps = [r for r in metrics if r.get("train/epoch") == record["epoch"]]
        low, high = record["acc_interval"]
        assert row["stage"] == str(record["stage"]) and row["items"] == str(N_ITEMS)
        assert row["accuracy"] == f"{record['eval/acc']:.3f}"
        assert row["95 % interval"] == f"{low:.3f} to {high:.3f}"
        assert row["validation loss"] == f"{record['eval/loss']:.4f}"
        assert row["training loss"] == f"{sum(r['train/loss'] for r in steps) / len(steps):.4f}"
        assert float(row["learning rate"]) == pytest.approx(steps[-1]["train/lr"], rel=1e-3)


def test_an_older_log_without_intervals_gets_them(run):
    path = run / "metrics.jsonl"
    write_lines(path, [{k: v for k, v in record.items() if k != "acc_interval"} for record in lines(path)])
    low, high = wilson(N_RIGHT, N_ITEMS)
    assert make(run).text.count(f"{low:.3f} to {high:.3f}") == 4  # three epochs, and the first sentence


def test_what_was_trained(base):
    text = read(base).text
    assert f"Coconut: accuracy {N_RIGHT / N_ITEMS:.3f}" in text and "on 30 items after epoch 3, the best" in text
    assert "Best epoch3 (stage 2)" in text and "Epochs3 of 3" in text
    assert "checkpoint_1, checkpoint_2, checkpoint_3 (" in text
    assert re.search(r"python [\d.]+, mlx [\d.]+, numpy [\d.]+, tiktoken [\d.]+", text)


def test_keys_that_differ_come_before_the_folded_ones(base):
    changed, folded = base.read_text().split("<details>")
    assert "<code>max_latent_stage</code>" in changed and "<code>weight_decay</code>" not in changed
    assert "<code>weight_decay</code>" in folded and "<code>max_latent_stage</code>" not in folded


def numbers(found: Page, verdict: str) -> list[int]:
    return [int(n) for n in re.findall(rf"Item (\d+): {verdict}", found.text)]


def test_predictions_are_a_seeded_choice(base, run):
    first, again, other = read(base), make(run), make(run, "--seed", 1)
    for verdict, possible in (("right", range(N_RIGHT)), ("wrong", range(N_RIGHT, N_ITEMS))):
        own = numbers(first, verdict)
        assert own == sorted(set(own)) and len(own) == 10 and set(own) <= set(possible)
        assert own == numbers(again, verdict) != numbers(other, verdict)
    assert "Right: 10 of 14" in first.text and "Wrong: 10 of 16" in first.text


def test_all_predictions_of_a_kind_are_shown_where_there_are_few(run):
    path = run / "predictions_3.jsonl"
    write_lines(path, [p | {"correct": p["idx"] == 5} for p in lines(path)])
    metrics = run / "metrics.jsonl"
    write_lines(metrics, [r | ({"eval/acc": 1 / N_ITEMS} if "eval/acc" in r else {}) for r in lines(metrics)])
    found = make(run)
    assert numbers(found, "right") == [5] and "Right: 1 of 1" in found.text and "Wrong: 10 of 29" in found.text


def test_a_run_gives_the_same_page_each_time(tiny_runs, base, tmp_path):
    pictures = str(base.with_name("pictures"))
    assert report.main([str(tiny_runs / "<b>&run"), "--out", str(tmp_path / "page"), "--figures", pictures]) == 0
    assert (tmp_path / "page").read_bytes() == base.read_bytes()


def test_each_thought_is_decoded(base, tiny_runs):
    """As many thoughts as the answer was given after, with the tokens that the model's output layer gives them."""
    found, probe = read(base), open_checkpoint(str(tiny_runs / "<b>&run" / "checkpoint_3"))
    number = numbers(found, "right")[0]
    [states] = thoughts(probe, [tokenize_question(probe, HOSTILE.format(number, number))], 2)
    tokens = [likeliest(probe, row, 5) for row in logits(probe, states)]
    expected = [" ".join(f"{t!r} {share:.2f}" for t, share in row if share >= report.LEAST) for row in tokens]
    assert expected[0] != expected[1] and min(map(len, expected)) > 9
    assert [card.count("thought ") for card in found.cards] == [2] * 20
    rows = [row for row in found.rows if row[0].startswith("thought ")]
    assert rows[:2] == [["thought 1", expected[0]], ["thought 2", expected[1]]]


def test_an_earlier_stage_is_shown_with_its_own_thoughts(run):
    """The best epoch whose checkpoint is left; at stage 0 there are no thoughts."""
    shutil.rmtree(run / "checkpoint_3")
    found = make(run)
    assert "predictions_2.jsonl (epoch 2, stage 1). Epoch 3 was better, but its checkpoint is gone." in found.text
    assert [card.count("thought ") for card in found.cards] == [1] * 20
    shutil.rmtree(run / "checkpoint_2")
    found = make(run)
    assert "At stage 0 there are no thoughts." in found.text and len(found.cards) == 20


def test_a_method_without_thoughts(runs):
    found = make(runs / "cot")
    assert "CoT feeds back no thoughts." in found.text
    assert len(found.cards) == 20 and "thought 1" not in found.text


def test_an_evaluation(runs):
    found = make(runs / "seen")
    assert "Coconut, an evaluation of" in found.text and "Nothing was trained here" in found.text
    assert [card.count("thought ") for card in found.cards] == [2] * 20
    assert "this folder has no config.yaml" not in found.text


def test_an_evaluation_without_its_configuration(runs, tmp_path):
    """As older ones are: the keys are those of the checkpoint."""
    shutil.copytree(runs / "seen", tmp_path / "old")
    (tmp_path / "old" / "config.yaml").unlink()
    assert "this folder has no config.yaml" in make(tmp_path / "old").text


# What is missing is said


def remove(run: Path, *patterns: str) -> None:
    for path in (path for pattern in patterns for path in run.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("patterns", "sentences"), [
    (["checkpoint_*"], ["checkpoint_3 is gone, so its thoughts cannot be decoded.", "not known without a checkpoint"]),
    (["predictions_*"], ["predictions_3.jsonl is gone.", "not known where predictions are gone: predictions_1"]),
    (["config.yaml"], ["Coconut: accuracy", "thought 1"]),
    (["config.yaml", "checkpoint_*"], ["Unknown method: accuracy", "no config.yaml, and no checkpoint is left"]),
])  # fmt: skip
def test_what_is_gone_is_said(run, patterns, sentences):
    remove(run, *patterns)
    text = make(run).text
    for sentence in sentences:
        assert sentence in text


def test_a_run_before_its_first_validation(run):
    path = run / "metrics.jsonl"
    write_lines(path, [record for record in lines(path) if record["epoch"] == 1 and "train/step" in record])
    remove(run, "checkpoint_*", "predictions_*")
    found = make(run)
    assert found.text.count("o epoch has been validated yet.") == 3
    assert found.pictures == ["Accuracy and losses over the epochs"]


def test_lines_that_cannot_be_read_are_counted(run):
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'\n{"train/lo\xff\n')
    assert "Lines of metrics.jsonl that could not be read: 1." in make(run).text


def test_pictures_of_this_run_are_included(run, runs):
    folder = runs / "pictures"
    for name, checkpoint in {"sweep": run, "tree": run / "checkpoint_2", "controls": runs / "cot"}.items():
        make_picture(folder, name, checkpoint)
    (folder / "thoughts.png").write_bytes(b"a picture without records is nobody's")
    found = make(run, "--figures", folder)
    assert found.pictures == ["Accuracy and losses over the epochs", "Tree", "Sweep"]
    assert f"python -m analysis.sweep, checkpoint: {run}, items: 7" in found.text
    assert "holds no picture of this run" in make(runs / "seen", "--figures", folder).text


def test_the_page_can_go_elsewhere(run, tmp_path):
    assert report.main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert not (run / "report.html").exists() and len(read(tmp_path / "page.html").cards) == 20


# Errors


def replaced(name: str, old: str, new: str):
    """A change to the first place of a text in one of the run's files."""

    def spoil(run: Path) -> None:
        before = (run / name).read_text()
        assert old in before
        (run / name).write_text(before.replace(old, new, 1))

    return spoil


def overwritten(name: str, content: bytes = b"x"):
    return lambda run: (run / name).write_bytes(content)


def shortened(run: Path) -> None:
    write_lines(run / "predictions_3.jsonl", lines(run / "predictions_3.jsonl")[:20])


SPOILED = {
    "no directory": (lambda run: run.rename(run.with_name("moved")), "no such directory"),
    "a file": (lambda run: (shutil.rmtree(run), run.write_text("")), "no such directory"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "holds no metrics.jsonl"),
    "empty metrics": (overwritten("metrics.jsonl", b""), "metrics.jsonl: holds no losses yet"),
    "other metrics": (overwritten("metrics.jsonl", b"\xff\x00\n[1]\n"), "metrics.jsonl: holds no losses yet"),
    "a word": (replaced("metrics.jsonl", '"stage": ', '"stage": "x", "_": '), "stage: expected a number, found 'x'"),
    "interval": (replaced("metrics.jsonl", '"acc_interval": [', '"acc_interval": ["x", '), "acc_interval: expected"),
    "infinite": (replaced("metrics.jsonl", '"eval/loss": ', '"eval/loss": NaN, "_": '), "eval/loss: expected a number"),
    "config": (overwritten("config.yaml", b"[1"), "config.yaml: not valid YAML"),
    "half a line": (replaced("predictions_3.jsonl", '"idx": 29', '"id'), "predictions_3.jsonl, line 30: damaged"),
    "a number": (replaced("predictions_3.jsonl", '"question": ', '"question": 1, "_": '), "line 1: damaged.*question"),
    "another line": (replaced("predictions_3.jsonl", "{", "[]\n{"), "predictions_3.jsonl, line 1: damaged"),
    "lost lines": (shortened, "14 of 20 answers are right, metrics.jsonl has the accuracy 0.466"),
    "weights": (overwritten("checkpoint_3/model.safetensors"), "has 1 bytes.*\nMove .*checkpoint_3 away to make"),
    "metadata": (overwritten("checkpoint_3/coconut.json"), "coconut.json is damaged"),
    "settings": (overwritten("../pictures/sweep.jsonl"), "sweep.jsonl: damaged; expected the command's settings"),
    "picture": (overwritten("../pictures/sweep.png"), "sweep.png: damaged"),
    "no pictures": (lambda run: shutil.rmtree(run.parent / "pictures"), "--figures .*: no such folder"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_errors_are_one_message_and_leave_the_page_of_before(name, run, capsys):
    spoiled, message = SPOILED[name]
    make_picture(run.parent / "pictures", "sweep", run)
    out = run.parent / "page.html"
    out.write_text("of before")
    spoiled(run)
    assert report.main([str(run), "--out", str(out), "--figures", str(run.parent / "pictures")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("error:") == 1 and "Traceback" not in error
    assert re.search(message, error)
    assert out.read_text() == "of before" and not list(run.parent.glob(".*.tmp"))


@pytest.mark.parametrize("place", ["nowhere/page.html", "cot"])
def test_a_place_that_cannot_be_written_is_named(place, run, capsys):
    assert report.main([str(run), "--out", str(run.parent / place)]) == 2
    assert f"{run.parent / place}: cannot write it (" in capsys.readouterr().err


# In a browser


WITHOUT_SCROLLING = """[...document.querySelectorAll("body *")].filter(element => !element.closest(".scroll"))"""
SHRUNK = "[...document.images].filter(image => !(image.complete && image.naturalWidth > 0)).map(image => image.alt)"
CUT_OFF = f"""{WITHOUT_SCROLLING}.filter(element =>
    element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5 ||
    element.scrollWidth > Math.max(element.clientWidth, document.documentElement.clientWidth)
).map(element => element.outerHTML.slice(0, 80))"""
# The contrast of each text with the nearest ground behind it, as WCAG defines it.
FAINT = """(() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => channels(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    const color = getComputedStyle(element).backgroundColor;
    return channels(color)[3] === 0 ? ground(element.parentElement) : color;
  };
  return [...document.querySelectorAll("body *")].filter(element => element.innerText && !element.children.length)
    .filter(element => {
      const [low, high] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05) < 4.5;
    }).map(element => element.outerHTML.slice(0, 80));
})()"""


@pytest.fixture(scope="module")
def browser():
    if not BROWSER:
        pytest.skip("no Chromium in PATH or in playwright's cache (on Debian: apt-get install chromium)")
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(Browser(BROWSER))
        except (RuntimeError, BrokenPipeError) as error:  # Ubuntu's chromium-browser only says where a snap is
            pytest.skip(f"{BROWSER} does not start: {error}")
        yield opened


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "media"), [(1280, "screen"), (390, "screen"), (720, "print")])
def test_a_browser_shows_all_of_it(browser, base, width, theme, media):
    """Pictures have loaded, nothing is cut off (tables and pictures may scroll), and every text can be read."""
    browser.open(base, width, theme, media)
    browser.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert browser.evaluate("document.images.length") == 2
    assert browser.evaluate(SHRUNK) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(CUT_OFF) == []
    assert browser.evaluate(FAINT) == []
    is_dark = theme == "dark" and media == "screen"
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is not is_dark


def test_the_page_asks_the_network_for_nothing(browser, base):
    browser.open(base, 1280)
    others = [url for url in browser.requests() if not url.startswith("data:")]
    assert others == [base.as_uri()]
    assert browser.messages() == []
    browser.evaluate("fetch('https://example.org').catch(() => {})")
    assert any("Content Security Policy" in json.dumps(message) for message in browser.messages())


def test_a_title_leads_to_its_part(browser, base):
    browser.open(base, 1280)
    links = browser.evaluate("[...document.querySelectorAll('nav a')].map(link => link.getAttribute('href').slice(1))")
    assert len(links) == 6 and all(browser.evaluate(f"!!document.getElementById('{link}')") for link in links)


def test_the_page_has_one_frame():
    """Every place of the template is filled, and it takes nothing else."""
    names = set(re.findall(r"\$(\w+)", page.TEMPLATE.read_text()))
    assert names == {"name", "lead", "training", "curves", "epochs", "predictions", "figures", "configuration"}
