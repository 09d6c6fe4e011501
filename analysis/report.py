"""One HTML page about a run: `python -m analysis.report RUN`

    python -m analysis.report runs/gsm-coconut
    python -m analysis.report runs/gsm-coconut --out gsm.html --figures runs/analysis

RUN is the directory of a run or of an evaluation (only_eval). The page holds what was trained, the curves, a table by
epoch, ten right and ten wrong predictions of the best epoch with their decoded thoughts, the pictures that analysis
commands have made of this run, and the configuration. It is a single file that needs no network. What the run does not
hold (a checkpoint that was removed, say) is said on the page.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    settings.own_pictures()

import argparse
import io
import random
import sys
from collections.abc import Iterable
from pathlib import Path

from startup import blas  # noqa: F401  before mlx

from analysis import page
from analysis.probing import Probe, likeliest, logits, open_checkpoint, thoughts, tokenize_question
from analysis.recorded import RecordedRun, read_predictions, read_run, read_settings
from config import FIELDS
from parallel.streams import use_streams
from training.curves import drawing, make_figure, read_curves
from training.evaluation import wilson
from utils import UserError, command_parser, exit_status, human_size, human_time, say, write_text

SHOWN = 10  # right predictions, and as many wrong ones
TOKENS, LEAST = 5, 0.005  # of a thought: how many at most, and the least probability of all but the first
FIGURES = (
    "frontier",
    "tree",
    "thoughts",
    "sweep",
    "controls",
    "attention",
    "edges",
)  # analysis commands, in the page's order
WIDE, NARROW = (8.6, 5.2), (3.7, 5.2)  # the curves on a screen and on a phone, in inches


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: report(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("analysis.report", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a run or of an evaluation")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default RUN/report.html)")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="pictures to include (default runs/analysis)")
    parser.add_argument("--seed", type=int, default=0, help="which predictions are shown (default 0)")
    parser.add_argument("--tokenizer", help="the vocabulary, where the one that the checkpoint names has moved")
    options = parser.parse_args(arguments)
    if options.figures and not options.figures.is_dir():
        raise UserError(f"--figures {options.figures}: no such folder; name the --out of the analysis commands")
    return options


def report(options: argparse.Namespace) -> None:
    """Read the run and write its page. Raises UserError for what cannot be read or written."""
    try:
        html = make_page(read_run(options.run), options)
    except OSError as error:
        raise UserError(f"{error.filename or options.run}: cannot read it ({error.strerror or error})") from error
    path = options.out or options.run / "report.html"
    try:
        write_text(path, html)
    except OSError as error:
        raise UserError(f"{path}: cannot write it ({error.strerror})") from error
    say(f"written: {path}")


def make_page(run: RecordedRun, options: argparse.Namespace) -> str:
    """The whole page as HTML."""
    return page.fill(
        name=page.text(run.folder.resolve().name),
        lead=page.text(lead(run)),
        training=page.facts(training_facts(run)),
        curves=curves_section(run),
        epochs=epochs_section(run),
        predictions=predictions_section(run, options),
        figures=figures_section(run, options.figures or Path("runs/analysis")),
        configuration=configuration_section(run),
    )


def lead(run: RecordedRun) -> str:
    """The result in one sentence."""
    if not run.best:
        return f"{run.title}: no epoch has been validated yet."
    n = run.n_items(run.best)
    interval, items = interval_of(run.best, n), f" on {n:,} items" if n else ""
    result = f"accuracy {run.best['eval/acc']:.3f}{f' ({interval})' if interval else ''}{items}"
    if run.was_trained:
        return f"{run.title}: {result} after epoch {run.best['epoch']}, the best of the last stage."
    return f"{run.title}, an evaluation of {run.best.get('checkpoint', 'a model')}: {result}."


def training_facts(run: RecordedRun) -> dict[str, object]:
    """What is known about the training, for the list at the top; None for what is not known."""
    config, best = run.config, run.best
    done = max((record["epoch"] for record in run.evaluations), default=0)
    seconds = sum(record.get("train/seconds", 0) for record in run.evaluations)
    return {
        "Directory": run.folder,
        "Method": run.title,
        "Started from": config and (config.load_model_path or config.model_id or "fresh random weights"),
        "Training data": config and config.train_path,
        "Validation data": (best or {}).get("data") or (config and config.val_path),
        "Epochs": f"{done} of {config.num_epochs}" if config and run.was_trained else None,
        "Best epoch": f"{best['epoch']} (stage {best['stage']})" if best and run.was_trained else None,
        "Training time": human_time(seconds) if seconds else None,
        "Checkpoints" if run.was_trained else "Checkpoint": checkpoints_left(run),
        "Seed": config and config.seed,
        "Processes": run.metadata.get("processes"),
        "Versions": versions(run),
    }


def checkpoints_left(run: RecordedRun) -> str:
    """The names of the checkpoints and their size."""
    if not run.was_trained:
        return str(run.checkpoint or "not found")
    size = sum(file.stat().st_size for folder in run.checkpoints.values() for file in folder.iterdir())
    names = ", ".join(folder.name for folder in run.checkpoints.values())
    return f"{names} ({human_size(size)})" if names else "none left"


def versions(run: RecordedRun) -> str:
    """The packages that the checkpoint was written with."""
    found = run.metadata.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in found.items()) or "not known without a checkpoint"


def curves_section(run: RecordedRun) -> str:
    """Losses and accuracies over epochs, drawn for two widths."""
    if not run.was_trained:
        return page.paragraph("Nothing was trained here, so there are no curves.")
    wide, narrow = (draw_curves(run.folder, size) for size in (WIDE, NARROW))
    return page.curves_picture(wide, narrow, WIDE[0])


def draw_curves(folder: Path, size: tuple[float, float]) -> bytes:
    """The run's curves as SVG, the same bytes each time."""
    file, curves = io.BytesIO(), read_curves(folder)
    with drawing(folder / "report.html"):
        figure = make_figure([curves], title=" ", size=size)  # the page shows the name
        from matplotlib import rc_context

        with rc_context({"svg.hashsalt": "report"}):
            figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def epochs_section(run: RecordedRun) -> str:
    """The table of evaluations, the best one marked."""
    if not run.evaluations:
        return page.paragraph("No epoch has been validated yet.")
    cells = [epoch_row(run, record) for record in run.evaluations]
    names = [name for name in cells[0] if any(row[name] for row in cells)]
    marked = run.evaluations.index(run.best) if run.was_trained else None
    gone = [path.name for path in map(run.predictions_of, run.evaluations) if not path.is_file()]
    notes = {
        "Bold: the best epoch of the last stage.": run.was_trained,
        f"The number of items is not known where predictions are gone: {', '.join(gone)}.": gone,
        f"Lines of metrics.jsonl that could not be read: {run.n_unreadable}.": run.n_unreadable,
    }
    table = page.table(names, [[row[name] for name in names] for row in cells], marked)
    return table + "".join(page.paragraph(note) for note, applies in notes.items() if applies)


def epoch_row(run: RecordedRun, record: dict) -> dict[str, str]:
    """{column: cell} of one evaluation; empty cells for what is not known."""
    steps = [step for step in run.steps if step["train/epoch"] == record["epoch"]]
    rates = [step["train/lr"] for step in steps if "train/lr" in step]
    n, seconds = run.n_items(record), record.get("train/seconds")
    return {
        "checkpoint": str(record.get("checkpoint", "")),
        "data": str(record.get("data", "")),
        "epoch": str(record["epoch"]),
        "stage": str(record["stage"]),
        "accuracy": f"{record['eval/acc']:.3f}",
        "95 % interval": interval_of(record, n),
        "items": f"{n:,}" if n else "",
        "validation loss": f"{record['eval/loss']:.4f}",
        "training loss": f"{sum(step['train/loss'] for step in steps) / len(steps):.4f}" if steps else "",
        "learning rate": f"{rates[-1]:.3g}" if rates else "",
        "training time": human_time(seconds) if seconds else "",
    }


def interval_of(record: dict, n: int | None) -> str:
    """The 95 % interval as it was logged; for older logs computed, where the number of items is known."""
    ends = record.get("acc_interval") or (wilson(round(record["eval/acc"] * n), n) if n else None)
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ""


def predictions_section(run: RecordedRun, options: argparse.Namespace) -> str:
    """Right and wrong predictions side by side."""
    path = run.predictions_of(run.shown) if run.shown else None
    if not path or not path.is_file():
        return page.paragraph(f"{path.name} is gone." if path else "No epoch has been validated yet.")
    predictions = read_predictions(path, run.shown)
    found = {word: [p for p in predictions if p["correct"] is (word == "Right")] for word in ("Right", "Wrong")}
    chosen = {word: choose(group, options.seed) for word, group in found.items()}
    shown = [p for group in chosen.values() for p in group]
    missing = why_no_thoughts(run, shown)
    decoded = {} if missing else decode_thoughts(run, shown, options.tokenizer)
    columns = [
        page.predictions_column(
            f"{word}: {len(group)} of {len(found[word])}",
            [page.prediction(p, decoded.get(p["idx"], [])) for p in group],
        )
        for word, group in chosen.items()
    ]
    about = page.paragraph(about_predictions(run, path)) + page.paragraph(missing or about_thoughts(run))
    return f'{about}<div class="columns">{"".join(columns)}</div>'


def about_predictions(run: RecordedRun, path: Path) -> str:
    """Where the predictions come from."""
    other = f" Epoch {run.best['epoch']} was better, but its checkpoint is gone." if run.shown != run.best else ""
    return f"Chosen at random from {path.name} (epoch {run.shown['epoch']}, stage {run.shown['stage']}).{other}"


def choose(predictions: list[dict], seed: int) -> list[dict]:
    """SHOWN of the predictions at random, in their order in the file; all if there are fewer."""
    numbers = random.Random(seed).sample(range(len(predictions)), min(SHOWN, len(predictions)))
    return [predictions[number] for number in sorted(numbers)]


def why_no_thoughts(run: RecordedRun, predictions: list[dict]) -> str:
    """Why no thoughts can be shown; empty where they can."""
    if run.config and not (run.config.method.thinks and run.config.method.thought == "hidden"):
        return f"{run.title} feeds back no thoughts."
    if not any(map(n_thoughts, predictions)):
        return f"At stage {run.shown['stage']} there are no thoughts."
    if run.checkpoint:
        return ""
    if run.was_trained:
        return f"checkpoint_{run.shown['epoch']} is gone, so its thoughts cannot be decoded."
    return f"{run.shown.get('checkpoint', 'The model')} is no checkpoint of this code, so no thoughts are decoded."


def about_thoughts(run: RecordedRun) -> str:
    return (
        f"Below each: its thoughts, decoded by the output layer of {run.checkpoint} to the {TOKENS} likeliest tokens "
        f"with their probabilities; less than {LEAST} is left out."
    )


def n_thoughts(prediction: dict) -> int:
    """The thoughts that an answer was given after: its tokens that were not written."""
    return prediction["n_tokens"] - len(prediction["output_ids"])


def decode_thoughts(run: RecordedRun, predictions: Iterable[dict], tokenizer: str | None) -> dict[int, list]:
    """{idx: for each thought its likeliest tokens}, with as many thoughts as the prediction was made with."""
    use_streams("1")
    try:
        probe = open_checkpoint(str(run.checkpoint), tokenizer)
    except UserError as error:
        raise UserError(f"{error}\nMove {run.checkpoint} away to make the page without thoughts") from error
    return {p["idx"]: decode(probe, p["question"], n_thoughts(p)) for p in predictions}


def decode(probe: Probe, question: str, count: int) -> list[list[tuple[str, float]]]:
    """The likeliest tokens of each of a question's first `count` thoughts."""
    if not count:
        return []
    [states] = thoughts(probe, [tokenize_question(probe, question)], count)  # [K, D]
    found = (likeliest(probe, row, TOKENS) for row in logits(probe, states))
    return [[first, *(other for other in others if other[1] >= LEAST)] for first, *others in found]


def figures_section(run: RecordedRun, folder: Path) -> str:
    """The pictures that analysis commands have made of this run."""
    made = [html for name in FIGURES if (html := figure_of(run, folder / f"{name}.png"))]
    command = f"python -m analysis.sweep {run.checkpoint or run.folder} DATA"
    return "".join(made) or page.paragraph(
        f"{folder} holds no picture of this run. For example, `{command}` makes one."
    )


def figure_of(run: RecordedRun, path: Path) -> str:
    """One picture with the settings of its command; empty where it is missing or shows another model."""
    records = path.with_suffix(".jsonl")
    if not (path.is_file() and records.is_file()):
        return ""
    made_with = read_settings(records)
    if not shows(run, made_with.get("checkpoint")):
        return ""
    told = [f"{name}: {value}" for name, value in made_with.items() if name != "command" and value is not None]
    return page.figure(path, path.stem.capitalize(), f"python -m analysis.{path.stem}, {', '.join(told)}")


def shows(run: RecordedRun, checkpoint: str | None) -> bool:
    """Whether a picture's checkpoint is this run, one of its checkpoints, or the model that was evaluated."""
    if not checkpoint:
        return False
    named, own = Path(str(checkpoint)).resolve(), run.folder.resolve()
    evaluated = [run.checkpoint.resolve(), run.checkpoint.resolve().parent] if run.checkpoint else []
    return named == own or named.parent == own or named in evaluated


def configuration_section(run: RecordedRun) -> str:
    """The keys that differ from the defaults, and all others folded."""
    if not run.config:
        return page.paragraph("Not known: there is no config.yaml, and no checkpoint is left that records it.")
    keys, changed, others = run.config.to_dict(), [], []
    for name, value in keys.items():
        default = FIELDS[name].default
        row = (name, FIELDS[name].metadata["meaning"], value, default)
        (others if value == default else changed).append(row)
    source = "" if run.own_config else page.paragraph(f"That of {run.checkpoint}; this folder has no config.yaml.")
    folded = page.folded(f"The other {len(others)} keys, which have their defaults", page.keys_table(others))
    return source + page.keys_table(changed) + folded


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
