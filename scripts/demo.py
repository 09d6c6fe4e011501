"""Train five methods on the same small task and compare them in a table and a picture: `python -m scripts.demo`

The task is to search a graph (preprocessing/graphs.py): which of two nodes can be reached from the root? The model is a
GPT-2 of 2 layers, 64 wide, trained from fresh weights by run.py with args/graph_*.yaml: first on chains, then on trees.
Coconut's three thoughts replace all written steps, and the picture shows which nodes they hold. Started again, the demo
resumes an interrupted run and does not repeat a finished one.
"""

from startup import settings, signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports
    # The products are too small to gain from more threads, and fixed numbers give the same sums on any machine.
    settings.default(OPENBLAS_NUM_THREADS="1", COCONUT_STREAMS="2")  # before startup.blas
    settings.own_pictures()

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from startup import blas  # noqa: F401  before mlx

import run
from analysis.frontier import Held, by_distance, frontiers, measure, table
from analysis.pictures import draw_accuracies, draw_heat_map, save_figure
from analysis.probing import open_checkpoint
from config import Config, load_config
from methods import METHODS
from training.setup import output_directory
from utils import RunError, UserError, command_parser, exit_status, markdown_table, read_records, say, warn, write_text

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "preprocessing"))
import graphs

# {args/graph_NAME.yaml of a compared method: the run whose first checkpoint it starts from}
STARTS = {"no_cot": "chains", "cot": "chains", "no_thoughts": "cot", "pause": "cot", "coconut": "cot"}
TITLES = {name: METHODS["pause_as_thought" if name == "pause" else name].title for name in STARTS}
DURATION = "about 9 minutes on two CPU cores"
QUICK_DURATION = "about a minute on two CPU cores"
# The quick version has a sixteenth of the data and one epoch for each stage; too few steps to learn the task.
QUICK_DATA = ["--prefix", "graph_quick", "--train", "2560", "--chains-train", "2560", "--valid", "200", "--test", "1"]
QUICK_EPOCHS = 4  # stages 0 to 3


@dataclass(frozen=True)
class Result:
    """The results of a finished run, from the evaluations in its metrics."""

    title: str
    accuracies: dict[int, float]  # epoch -> accuracy
    stages: dict[int, int]  # epoch -> stage; those past max_latent_stage are one
    interval: tuple[float, float]  # 95 % interval of the last accuracy
    n_tokens: float  # mean length of an answer, thoughts included
    seconds_per_example: float
    seconds: float  # of training, without the evaluations

    @property
    def accuracy(self) -> float:
        """The last epoch's."""
        return self.accuracies[max(self.accuracies)]


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: demonstrate(parse_args(arguments)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("scripts.demo", __doc__)
    parser.add_argument("--quick", action="store_true", help=f"show that all parts work, in {QUICK_DURATION}")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and shuffling (default 0)")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES), help="default: all five")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs (default runs/demo)")
    options = parser.parse_args(arguments)
    options.methods = [name for name in STARTS if name in options.methods]
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: expected 0 or more")
    if options.out != parser.get_default("out"):
        options.out = options.out.resolve()  # the demo changes to the repository's root
    return options


def demonstrate(options: argparse.Namespace) -> int:
    """Run the whole demo; returns the exit status, which is that of run.py if a run stops or fails."""
    os.chdir(ROOT)  # the configs name their files relative to it
    folder = options.out / f"{'quick' if options.quick else 'seed'}_{options.seed}"
    commands = {name: command_of(name, folder, options) for name in needed_runs(options.methods)}
    configs = {name: load_config(words[0], words[1:]) for name, words in commands.items()}
    for config in configs.values():
        output_directory(config)  # raises UserError for an unusable folder, before anything is printed
    missing = {name: words for name, words in commands.items() if not is_finished(configs[name])}
    print_summary(options, folder, list(missing))
    if missing:
        make_data(options)
    status = train(missing)
    if status == 0:
        print_results(options, folder, {name: configs[name] for name in options.methods})
    return status


def needed_runs(methods: list[str]) -> list[str]:
    """The methods and the runs that they start from, each after the one it needs."""
    wanted = {*methods, *(STARTS[name] for name in methods)}
    return ["chains", *(name for name in ("cot", "no_cot", "no_thoughts", "pause", "coconut") if name in wanted)]


def command_of(name: str, folder: Path, options: argparse.Namespace) -> list[str]:
    """Return the arguments of run.py that train a run."""
    keys = [f"save_path={folder}", f"seed={options.seed}"]
    if name in STARTS:
        keys.append(f"load_model_path={folder}/graph-{STARTS[name]}/checkpoint_1")
    if options.quick:
        prefix = "data/graph_quick_chains" if name == "chains" else "data/graph_quick"
        keys += [f"train_path={prefix}_train.json", f"val_path={prefix}_valid.json"]
        keys += ["tokenizer=data/graph_quick_vocabulary.json", f"num_epochs={1 if name == 'chains' else QUICK_EPOCHS}"]
        keys.append("warmup_steps=20")  # of the 40 of an epoch
    return [f"args/graph_{name}.yaml", *keys]


def make_data(options: argparse.Namespace) -> None:
    """Generate the data; the same seed of the generator gives every run the same data."""
    try:
        graphs.main(QUICK_DATA if options.quick else [])
    except graphs.DataError as error:
        raise UserError(str(error)) from error


def is_finished(config: Config) -> bool:
    """Whether the run directory holds a finished run with this configuration.

    Raises UserError if it holds a run with another one: comparing that with new runs would be misleading.
    """
    saved = config.run_dir / "config.yaml"
    if not saved.is_file():
        return False
    if load_config(str(saved), []) != config:
        raise UserError(
            f"{config.run_dir} holds a run with other settings; move it away, or name another folder with --out"
        )
    evaluations = read_evaluations(config.run_dir)
    return bool(evaluations) and evaluations[-1]["epoch"] == config.num_epochs


def read_evaluations(directory: Path) -> list[dict]:
    """Return the evaluations in a run's metrics.jsonl, oldest first; [] if there are none."""
    path = directory / "metrics.jsonl"
    return [record for record in read_records(path) if "eval/acc" in record] if path.is_file() else []


def print_summary(options: argparse.Namespace, folder: Path, missing: list[str]) -> None:
    """Print what the demo will do, how long it takes, and where it writes."""
    if not missing:
        say(f"All methods are already trained, in {folder}.")
        return
    n_done = len(needed_runs(options.methods)) - len(missing)
    say(
        "A small GPT-2 learns which of two nodes can be reached from the root of a tree, three edges away; chance: 0.5."
    )
    say(f"with:  {', '.join(TITLES[name] for name in options.methods)}, one after another")
    say(f"time:  {QUICK_DURATION if options.quick else DURATION}" + (f"; {n_done} trained already" if n_done else ""))
    say("stop:  Ctrl-C at any time; the same command resumes")
    say(f"files: {folder} (the runs, table.txt, demo.png), data/graph_*.json\n")


def train(commands: dict[str, list[str]]) -> int:
    """Train one run after another; returns the exit status of the first run that stops or fails, else 0."""
    for name, words in commands.items():
        title = TITLES.get(name, "chains first, in words: where the other runs start")
        say(f"\n==== {title}: python run.py {' '.join(words)}")
        if status := run.main(words):
            if status > 128:  # stopped by a signal; run.py has printed how to resume this run
                print("The demo's command resumes from here too, and then trains the other methods.", file=sys.stderr)
            return status
    return 0


def print_results(options: argparse.Namespace, folder: Path, configs: dict[str, Config]) -> None:
    """Print the tables, draw the picture, and write both into the folder."""
    results = {name: read_result(name, config.run_dir) for name, config in configs.items()}
    held = measure_thoughts(configs)
    text = "\n".join([*results_table(list(results.values())), "", *notes(options), *thoughts_table(held)])
    say(f"\n{text}\n")
    write_text(folder / "table.txt", text + "\n")
    say(f"table:   {folder / 'table.txt'}")
    picture = folder / "demo.png"
    try:
        draw(results, held, folder)
        say(f"picture: {picture}")
    except (UserError, RunError, OSError) as error:
        warn(f"{picture} is not drawn: {error}")
    say("\n" + "\n".join(next_steps(options, folder)))


def read_result(name: str, directory: Path) -> Result:
    """Read the results of a finished run."""
    evaluations = read_evaluations(directory)
    last, hops = evaluations[-1], 3
    return Result(
        title=TITLES[name],
        accuracies={record["epoch"]: record["eval/acc"] for record in evaluations},
        stages={record["epoch"]: min(record["stage"], hops) for record in evaluations},
        interval=tuple(last["acc_interval"]),
        n_tokens=last["eval/n_tokens"],
        seconds_per_example=last["eval/seconds_per_example"],
        seconds=sum(record["train/seconds"] for record in evaluations),
    )


def measure_thoughts(configs: dict[str, Config]) -> list[Held]:
    """What the thoughts of the trained Coconut hold, on its validation items; nothing where it was not trained."""
    if "coconut" not in configs:
        return []
    config = configs["coconut"]
    probe = open_checkpoint(str(config.run_dir / f"checkpoint_{config.num_epochs}"))
    data = probe.data(config.val_path)
    return measure(probe, data, len(data))


def results_table(results: list[Result]) -> list[str]:
    """Return the lines of the comparison."""
    head = ["method", "accuracy (95 % interval)", "tokens per answer", "seconds per example", "epochs", "training"]
    rows = [
        [
            r.title,
            f"{r.accuracy:.3f} ({r.interval[0]:.3f} to {r.interval[1]:.3f})",
            f"{r.n_tokens:.1f}",
            f"{r.seconds_per_example:.4f}",
            str(len(r.accuracies)),
            f"{r.seconds:.0f} s",
        ]
        for r in results
    ]
    return markdown_table(head, rows)


def notes(options: argparse.Namespace) -> list[str]:
    """Return the explanations below the table."""
    config = load_config("args/graph_coconut.yaml")
    meaning = [
        "CoT writes one path and cannot look ahead. Coconut writes nothing but the answer: its three thoughts can hold",
        "several nodes at once. Without thoughts, or with pauses in their place, the same training ends in a guess.",
    ]
    quick = [
        "This is the quick version: it trains far too little to learn the task, and shows only that all parts work."
    ]
    return [
        *(quick if options.quick else meaning),
        "A guess is right 0.500 of the time: the trees are alike, and only the edges lead from the root to the answer.",
        "All start from one run on chains. The three with a curriculum start from CoT's first epoch, their stage 0.",
        f"Tokens include thoughts. Seconds per example: in batches of {config.batch_size_eval}, on this machine.",
    ]


def thoughts_table(held: list[Held]) -> list[str]:
    """Return the table of what the thoughts hold, with its explanation."""
    if not held:
        return []
    return [
        "",
        "Mean inner product of each thought with the embeddings of the graph's nodes (number of nodes). The frontier",
        "of thought k is k edges away from the root. Last column: its share among the nodes with the largest products.",
        *table(held),
    ]


def draw(results: dict[str, Result], held: list[Held], folder: Path) -> None:
    """Write demo.png: accuracies by epoch, and beside them the heat map of the thoughts."""
    staged = [result for name, result in results.items() if STARTS[name] == "cot"]
    first = {record["epoch"]: record["eval/acc"] for record in read_evaluations(folder / "graph-cot")[:1]}
    lines = {r.title: (first if r in staged else {}) | r.accuracies for r in results.values()}
    with save_figure(folder / "demo.png", figsize=(12, 4.4) if held else (6, 4.4)) as figure:
        panels = figure.subplots(1, 2 if held else 1, squeeze=False)[0]
        stages = {1: 0} | staged[0].stages if staged else {}
        draw_accuracies(panels[0], lines, stages, chance=0.5)
        if held:
            draw_heat_map(panels[1], by_distance(held), frontiers(held))


def next_steps(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return suggestions for what to run next."""
    python, start = Path(sys.executable), f"{folder}/graph-cot/checkpoint_1"
    python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else "python"
    if options.quick:
        return [
            "Next, the whole demo, which trains long enough for Coconut to learn the task:",
            f"  {python} -m scripts.demo",
        ]
    return [
        "Next, the thoughts on the graph of one item, and a run of your own (`run.py --help` lists every key):",
        f"  {python} -m analysis.frontier {folder}/graph-coconut data/graph_valid.json --item 3",
        f"  {python} run.py args/graph_coconut.yaml name=mine c_thought=2 load_model_path={start}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
