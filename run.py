"""The experiment, top to bottom: `python run.py CONFIG [key=value ...]` trains and evaluates Coconut or a baseline."""

import stopping

if __name__ == "__main__":
    stopping.at_once()  # before the slow imports

import errno
import os
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

try:
    import cpu_blas  # before mlx
except OSError as problem:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
import mlx.core as mx
from mlx.utils import tree_flatten

import checkpoint as ckpt
import dataset
import plan
from checkpoint import Position, Saved
from coconut import Coconut, compute_dtype, computing_in
from config import Config, load_config, usage
from dataset import Data
from evaluation import Evaluation, evaluate, validation_loss
from metrics import MetricLog, NoMetrics, start_wandb
from plot import keep_curves
from processes import ALONE, Processes, join
from streams import streams, use_one
from tokenizer import Tokenizer, load_tokenizer
from train import new_optimizer, training_steps
from utils import (
    Progress,
    RunError,
    Stopped,
    StopSignals,
    UserError,
    human_size,
    say,
    warn,
    write_json_lines,
    write_text,
)
from weights import Source, find_source, load_model


REDRAW = 30  # seconds between two drawings of curves.png; the last one is always drawn


@dataclass(frozen=True)
class Run:
    """Everything a run is made of, loaded and checked before anything is written."""

    config: Config
    source: Source
    tokenizer: Tokenizer
    model: Coconut
    train: Data | None
    valid: Data
    saved: Saved | None  # what the run directory holds already
    processes: Processes = ALONE

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.processes.is_main

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch; an incomplete last group of micro-batches is a step too."""
        n_batches = dataset.count_batches(len(self.train), self.config, self.processes.size)
        return -(-n_batches // self.config.gradient_accumulation_steps)

    def record(self, epochs_done: int, stage: int) -> dict:
        """What a checkpoint written now says of itself."""
        return ckpt.describe_run(self.config, self.tokenizer, epochs_done, stage, self.processes.size)


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status: 0 success, 1 failure, 2 a mistake of the user's, 128 + signal."""
    processes = ALONE
    try:
        processes = join()
        processes.start()
        command(arguments, processes)
        sys.stdout.flush()
        status, message = 0, ""
    except UserError as error:
        status, message = 2, f"error: {error}"
    except BrokenPipeError:  # `python run.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, message = 1, ""
    except OSError as error:
        full = error.errno == errno.ENOSPC
        hint = "; make room and run the same command again, what was saved before is intact" if full else ""
        status, message = 1, f"error: {error}{hint}"
    except RunError as error:
        status, message = 1, f"error: {error}"
    except Stopped as stopped:
        launcher = "the same mlx.launch with " if processes.size > 1 else ""
        status, message = 128 + stopped.signal, f"stopped. To go on: {launcher}python run.py {shlex.join(arguments)}"
    processes.leave(status, message)
    return status


def command(arguments: list[str], processes: Processes) -> None:
    """Do what the command line says."""
    words = [argument for argument in arguments if argument != "--dry-run"]
    if {"-h", "--help"} & set(words):
        say(usage())
        return
    if not words:
        raise UserError(f"which configuration?\n\n{usage()}")
    config = processes.from_main(lambda: load_config(words[0], words[1:]))
    if config.grad_checkpoint:
        use_one()
    if words == arguments:
        execute(config, processes)
    else:
        show_plan(config, processes)


def execute(config: Config, processes: Processes) -> None:
    """One run from configuration to result: load everything, then evaluate once or train."""
    with ExitStack() as stack:
        run, directory = processes.from_main(lambda: prepare(config, processes.size, stack))
        run = replace(run, processes=processes)
        processes.check_same(run.model.parameters(), "at the start")
        if config.only_eval:
            evaluate_only(run, directory)
        else:
            train_through(run)


def prepare(config: Config, n_processes: int, stack: ExitStack) -> tuple[Run, Path]:
    """Load everything, then make the directory to write into and hold it for as long as the stack is open."""
    directory = output_directory(config)
    if directory.is_dir():
        stack.enter_context(ckpt.locked(directory))
    run = load(config, n_processes)
    introduce(run, directory)
    if not directory.is_dir():
        directory.mkdir(parents=True)
        stack.enter_context(ckpt.locked(directory))
    ckpt.clean(directory)
    if not config.only_eval:
        write_text(directory / "config.yaml", config.to_yaml())
    return run, directory


def show_plan(config: Config, processes: Processes) -> None:
    """Check everything and say what would happen; writes nothing."""
    run = replace(processes.from_main(lambda: look(config, processes.size)), processes=processes)
    if config.only_eval:
        say(f"plan:  evaluate {len(run.valid):,} items once, at stage {config.stage(config.resume)}")
        return
    first_epoch = run.saved.position.epoch if run.saved else config.resume
    n_steps = run.steps_per_epoch
    items = config.batch_size_training * config.gradient_accumulation_steps * processes.size
    say(f"plan:  {n_steps:,} optimiser steps an epoch, of {items} items each")
    for line in plan.stage_lines(config, run.train, first_epoch, n_steps):
        say(line)
    if first_epoch < config.num_epochs:
        say(plan.measured_step(config, run.model, run.tokenizer, run.train, first_epoch, n_steps, processes))
    say("nothing was written")


def look(config: Config, n_processes: int) -> Run:
    """Load everything and introduce it."""
    run = load(config, n_processes)
    introduce(run, output_directory(config))
    return run


def output_directory(config: Config) -> Path:
    """save_path/name; an evaluation under the name of a training run writes into only_eval/ inside it."""
    for folder in (config.run_dir, *config.run_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"save_path, name: {folder} is a file; a directory is needed there to write into")
    if config.only_eval and config.run_dir.is_dir() and ckpt.holds_training(config.run_dir):
        return config.run_dir / "only_eval"
    return config.run_dir


def load(config: Config, n_processes: int) -> Run:
    """Read data and weights: latest checkpoint of the run directory > load_model_path > model_id > fresh weights."""
    saved = ckpt.find_saved(config.run_dir) if config.run_dir.is_dir() and not config.only_eval else None
    source = find_source(config, saved.path if saved else named_run(config))
    tokenizer = load_tokenizer(config.tokenizer, source.folder)
    if saved:
        for note in ckpt.check_same_run(saved, config, n_processes):
            say(f"note: changed since the last start: {note}")
    if source.weights and source.weights.is_dir():
        if not saved:
            ckpt.check_intact(source.weights)
        ckpt.check_tokenizer(source.weights, tokenizer)
    n_positions = source.gpt2.n_positions
    valid = Data(config.val_path, config, tokenizer, n_positions, debug_limit=32)
    train = None
    if not config.only_eval:
        train = Data(config.train_path, config, tokenizer, n_positions, debug_limit=5000, keep_texts=False)
        dataset.warn_of_shared_questions(train, valid)
    model = load_model(source, config, tokenizer)
    model.transformer.grad_checkpoint = config.grad_checkpoint
    return Run(config, source, tokenizer, model, train, valid, saved)


def named_run(config: Config) -> Path | None:
    """The best checkpoint, where load_model_path names the directory of a whole run."""
    path = Path(config.load_model_path or "")
    if not config.load_model_path or not path.is_dir() or not ckpt.holds_training(path):
        return None
    best = ckpt.best_checkpoint(path)
    say(f"{path} is a run: taking {best.name}, the best of its last stage")
    return best


def introduce(run: Run, directory: Path) -> None:
    """The run's first lines: what it is, on what, with what, and where it writes."""
    config, shape = run.config, run.model.transformer.config
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    n_streams = len(streams())
    device = "GPU" if on_gpu else f"CPU ({cpu_blas.describe()}, {n_streams} stream{'s' * (n_streams != 1)})"
    length = "evaluation only" if config.only_eval else f"{config.num_epochs} epochs"
    n_parameters = sum(array.size for _, array in tree_flatten(run.model.parameters()))
    sizes = f"{len(run.valid):,} items of {config.val_path}"
    if run.train:
        sizes = f"{len(run.train):,} training items of {config.train_path}, {sizes}"
    say(f"run:   {config.name}, {config.method}, {length}, on {device}")
    say(f"model: {n_parameters:,} parameters ({shape.n_layer} layers, {shape.n_embd} wide) from {run.source}")
    say(f"data:  {sizes}; vocabulary from {run.tokenizer.source}")
    say(f"files: {directory}")
    epochs_done = run.saved.position.epoch if run.saved else config.resume
    if disk := ckpt.check_disk(config, 4 * n_parameters, epochs_done):
        say(disk)
    if config.bf16 and not on_gpu:
        warn("bf16 is many times slower on CPU; float32 is used")


def train_through(run: Run) -> None:
    """The curriculum: for each epoch train, save, validation loss, validation accuracy (official run.py)."""
    config = run.config
    optimizer = new_optimizer(run.model, config)
    position = share_position(run, optimizer)
    drawn, opened = 0.0, NoMetrics()
    if run.is_main:
        opened = MetricLog(config.run_dir / "metrics.jsonl", start_wandb(config))
    with opened as metrics, StopSignals() as stop:
        if position.metrics_bytes and run.is_main:
            metrics.check(position.metrics_bytes, position.metrics_crc32)
        metrics.rewind(position.epoch * run.steps_per_epoch + position.step, position.epoch)
        for epoch in range(position.epoch, config.num_epochs):
            stage = config.stage(epoch)
            if position.step == 0 and config.resets_optimizer_at(epoch):
                optimizer = new_optimizer(run.model, config)
            train_epoch(run, optimizer, position, metrics, stop)
            run.processes.check_same(run.model.parameters(), f"after epoch {epoch + 1}")
            save_trained(run, position)
            if asked := asked_to_stop(stop, run.processes):
                raise Stopped(asked)
            result = judge(run, metrics, config.run_dir, epoch, stage, position.train_seconds, stop)
            finish_epoch(run, position, result.accuracy, metrics)
            if run.is_main and time.monotonic() - drawn > REDRAW and position.epoch < config.num_epochs:
                keep_curves(config.run_dir)
                drawn = time.monotonic()
            if asked := asked_to_stop(stop, run.processes):
                raise Stopped(asked)
        if run.is_main:
            keep_curves(config.run_dir)
    say(f"done: {config.run_dir}")


def share_position(run: Run, optimizer) -> Position:
    """The place to start from, and the optimiser as it was there, in all processes."""
    position, state = run.processes.from_main(lambda: (take_up(run, optimizer), optimizer.state if run.saved else None))
    if state:
        optimizer.state = state
    return position


def take_up(run: Run, optimizer) -> Position:
    """The place to start from, the optimiser restored; `resume` counts only in a fresh directory (official run.py)."""
    saved, config = run.saved, run.config
    if saved is None:
        return Position(epoch=config.resume)
    position = saved.position
    say(f"going on from {saved.path}: epoch {position.epoch + 1}, step {position.step} (the key `resume` is ignored)")
    if ckpt.load_optimizer(saved, optimizer):
        ckpt.keep_only_state(saved.path)
    elif not config.resets_optimizer_at(position.epoch):
        warn(f"{saved.path} holds no optimiser state: AdamW starts anew, so the numbers will differ a little")
    if position.epoch >= config.num_epochs:
        say(f"all {config.num_epochs} epochs are done; raise num_epochs to train on")
    return position


def train_epoch(run: Run, optimizer, position: Position, metrics: MetricLog, stop: StopSignals) -> None:
    """Train from position.step to the end of the epoch and save the state there, and on the way where it is due."""
    config, epoch, n_steps, processes = run.config, position.epoch, run.steps_per_epoch, run.processes
    if position.step >= n_steps:
        return  # taken up between training and validation
    stage = config.stage(epoch)
    if position.step == 0 and run.is_main:
        show_first_batch(run, metrics, epoch)
    skip = position.step * config.gradient_accumulation_steps
    batches = dataset.training_batches(run.train.tokens, config, run.tokenizer, epoch, skip, len(streams()), processes)
    n_tokens, started, last_save, earlier = 0, time.monotonic(), time.monotonic(), position.train_seconds
    title = f"Epoch {epoch + 1}/{config.num_epochs}, stage {stage}"
    with Progress(total=n_steps, initial=position.step, desc=title, unit=" steps") as bar:
        for step in training_steps(run.model, optimizer, batches, config, epoch, n_steps, position.step, processes):
            position.step = step.number + 1
            n_tokens += step.n_tokens
            metrics.log({
                "train/epoch": epoch + 1, "train/step": epoch * n_steps + step.number, "train/loss": step.loss,
                "epoch": epoch + 1, "stage": stage,
            })  # fmt: skip
            seconds = time.monotonic() - started
            position.train_seconds = earlier + seconds
            bar.set_postfix(
                loss=f"{step.loss:.4f}",
                tokens_per_s=f"{n_tokens / seconds:,.0f}",
                peak_memory=human_size(mx.get_peak_memory()),
                refresh=False,
            )
            bar.update()
            is_last = position.step == n_steps
            is_due = time.monotonic() - last_save >= 60 * config.save_interval_minutes
            asked = asked_to_stop(stop, processes)
            if (is_last or is_due or asked) and run.is_main and not config.debug:
                position.metrics_bytes, position.metrics_crc32 = metrics.sync()
                ckpt.save_state(run.model, optimizer, position, run.record(epoch + is_last, stage))
                last_save = time.monotonic()
            if asked:
                processes.gather("saved")  # the first to leave ends the others
                raise Stopped(asked)


def asked_to_stop(stop: StopSignals, processes: Processes) -> int | None:
    """The signal that any process has received: the same answer in all, so that they stop at the same place.

    One that comes while this process waits for the others' answers counts the next time.
    """
    return next(filter(None, processes.gather(stop.requested)), None)


def show_first_batch(run: Run, metrics: MetricLog, epoch: int) -> None:
    """Write the epoch's first batch, token by token with its labels, to first_batch.txt and wandb."""
    parts = next(dataset.training_batches(run.train.tokens, run.config, run.tokenizer, epoch))
    text = dataset.describe_batch(parts, run.tokenizer)
    write_text(run.config.run_dir / "first_batch.txt", text)
    metrics.log_text("data_table", epoch * run.steps_per_epoch, text)


def save_trained(run: Run, position: Position) -> None:
    """checkpoint_{epoch + 1} of a trained epoch, before it is validated (official run.py)."""
    if run.is_main and not run.config.save_only_improve and not run.config.debug:
        record = run.record(position.epoch + 1, run.config.stage(position.epoch))
        say(f"saved {ckpt.save_checkpoint(run.model, record)}")


def finish_epoch(run: Run, position: Position, accuracy: float, metrics: MetricLog) -> None:
    """Keep the best, move on to the next epoch, and record that in the saved state."""
    config, epochs_done = run.config, position.epoch + 1
    if accuracy > position.best_accuracy:
        position.best_accuracy, position.best_epoch = accuracy, epochs_done
        if run.is_main and config.save_only_improve and not config.debug:
            record = run.record(epochs_done, config.stage(position.epoch))
            say(f"saved {ckpt.save_checkpoint(run.model, record)}, the best so far")
    position.epoch, position.step, position.train_seconds = epochs_done, 0, 0.0
    if run.is_main and not config.debug:
        position.metrics_bytes, position.metrics_crc32 = metrics.sync()
        ckpt.move_state(config.run_dir, position)
        ckpt.prune(config, position)


def evaluate_only(run: Run, directory: Path) -> None:
    """Evaluate once, at the stage that `resume` gives, and write metrics.jsonl and predictions_{resume}.jsonl."""
    config, weights = run.config, run.source.weights
    stage = config.stage(config.resume)
    trained_at = run.processes.from_main(lambda: ckpt.read_record(weights).get("stage", stage))
    if min(trained_at, config.max_latent_stage) != min(stage, config.max_latent_stage):
        warn(f"{weights} was trained at stage {trained_at}; `resume: {config.resume}` evaluates it at stage {stage}")
    opened = MetricLog(directory / "metrics.jsonl", None) if run.is_main else NoMetrics()
    with opened as metrics, StopSignals() as stop:
        judge(run, metrics, directory, config.resume, stage, 0.0, stop)


def judge(
    run: Run, metrics: MetricLog, directory: Path, epoch: int, stage: int, train_seconds: float, stop: StopSignals
) -> Evaluation:
    """Validation loss and greedy accuracy at a stage: printed, logged, and written as predictions.

    train_seconds: what the epoch's training took, to be logged with them.
    """
    config, valid, processes = run.config, run.valid, run.processes
    epochs_done = epoch if config.only_eval else epoch + 1
    n_batches = dataset.count_batches(len(valid), config)
    loss_data = dataset.loss_batches(valid.tokens, config, run.tokenizer, epoch, processes)
    prompts = dataset.prompt_batches(valid.tokens, config, run.tokenizer, stage, processes)
    with computing_in(run.model, compute_dtype(config.bf16)):
        loss = validation_loss(run.model, stop.checked(loss_data), n_batches, processes)
        result = evaluate(
            run.model, valid.examples, valid.indices, stop.checked(prompts), config, run.tokenizer, processes
        )
    say(f"epoch {epochs_done}, stage {stage}: loss {loss:.4f}, {result.summary()}")
    if run.is_main:
        write_json_lines(directory / f"predictions_{epochs_done}.jsonl", result.predictions)
    metrics.log({
        "eval/loss": loss, "eval/acc": result.accuracy, "eval/cot_em": result.cot_match,
        "eval/n_tokens": result.mean_tokens, "eval/seconds_per_example": result.seconds_per_example,
        "train/seconds": train_seconds, "acc_interval": result.interval(),
        "epoch": epochs_done, "stage": stage,
    })  # fmt: skip
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
