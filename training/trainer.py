"""The training loop: for each epoch train, save the state, validation loss, save a checkpoint, validation accuracy.

The official run.py saves its checkpoint before the loss. Here weights whose loss is not finite are in no checkpoint.
"""

import itertools
import math
import time
from pathlib import Path

import mlx.core as mx

from dataset import describe_batch, loss_batches, training_steps
from models.precision import compute_dtype, computing_in
from parallel.distributed import parameter_digest
from training import checkpoint, resume
from training.checkpoint import TrainState
from training.curves import keep_curves
from training.evaluation import Evaluation, Evaluator
from training.metrics import MetricLog, NoMetrics, start_wandb
from training.setup import Run, about_evaluation, evaluated_epochs, evaluation_line, warn_of_other_thoughts
from training.step import StepResult, TrainStep, diverged, is_finite, new_optimizer
from utils import (
    Progress,
    RunError,
    Stopped,
    StopSignals,
    human_size,
    human_time,
    read_records,
    say,
    warn,
    write_json_lines,
    write_text,
)

REDRAW_SECONDS = 30  # between two drawings of curves.png; the last one is always drawn


class Trainer:
    """A run in progress: its optimizer, its place, its metrics, and the signals that stop it."""

    def __init__(self, run: Run, metrics: MetricLog | NoMetrics, stop: StopSignals):
        self.run, self.metrics, self.stop = run, metrics, stop
        self.config, self.curriculum, self.group = run.config, run.curriculum, run.group
        self.state = run.saved.state if run.saved else TrainState(epoch=run.config.resume)
        self.optimizer = new_optimizer(run.model, run.config)
        self.take_step = TrainStep(run.model, self.optimizer, run.config, run.group)  # keeps what it has compiled
        self.last_save = self.last_drawing = time.monotonic()
        self.state_folder: Path | None = None  # the newest state on disk
        self._resume()

    @property
    def stage(self) -> int:
        """The scheduled stage of the epoch in progress."""
        return self.curriculum.stage(self.state.epoch)

    @property
    def writes(self) -> bool:
        """Whether this process keeps checkpoints and states: rank 0, unless `debug`."""
        return self.group.is_main and not self.config.debug

    def train(self) -> None:
        """Train from the state's place to the last epoch. Raises Stopped, after saving, where a signal asks for it."""
        while self.state.epoch < self.config.num_epochs:
            self.train_epoch()
            trained = time.monotonic()
            self._check_parameters()
            loss = self._validation_loss()
            self._save_checkpoint()
            self._stop_if_asked()
            result = answers(self.run, self.state.epoch, self.stop)
            log_evaluation(self.run, self.metrics, self.state, self.state.epoch + 1, loss, result)
            seconds = self.state.train_seconds + time.monotonic() - trained  # of which some may be before a restart
            self._finish_epoch(result.accuracy)
            self._say_outlook(seconds)
            self._draw_now_and_then()
            self._stop_if_asked()
        if self.group.is_main:
            keep_curves(self.run.directory)
        say(f"done: {self.run.directory}")

    def train_epoch(self) -> None:
        """Train from state.step to the end of the epoch; save the state there and whenever it is due before."""
        run, state, n_steps = self.run, self.state, self.run.steps_per_epoch
        if state.step >= n_steps:
            return  # resumed between training and validation
        if state.step == 0 and self.group.is_main:
            self._show_first_batch()
        steps = training_steps(run.train.tokens, self.curriculum, state.epoch, self.group, state.step, run.n_rows)
        n_tokens, started, earlier = 0, time.monotonic(), state.train_seconds
        title = f"Epoch {state.epoch + 1}/{self.config.num_epochs}, stage {self.stage}"
        with Progress(total=n_steps, initial=state.step, desc=title, unit=" steps") as bar:
            for micro_batches in steps:
                if self._resets_optimizer():
                    self.optimizer = self.take_step.optimizer = new_optimizer(run.model, self.config)
                result = self.take_step(micro_batches, state.epoch, state.step, self._learning_rate())
                self._log_step(result)
                state.step += 1
                n_tokens += result.n_tokens
                seconds = time.monotonic() - started
                state.train_seconds = earlier + seconds
                speed, memory = f"{n_tokens / seconds:,.0f} tok/s", human_size(mx.get_peak_memory())
                bar.set_postfix_str(f"loss={result.loss:.4f}, {speed}, {memory}", refresh=False)
                bar.update()
                self._save_if_due()

    def _resume(self) -> None:
        """Restore the optimizer and the metrics as they were at the state's place."""
        saved, state = self.run.saved, self.state
        if saved:
            place = f"epoch {state.epoch + 1}, step {state.step}"
            say(f"resuming: going on from {saved.path}: {place} (the key `resume` is ignored)")
            if saved.is_state:
                checkpoint.load_optimizer(saved.path, self.optimizer)
                self.state_folder = saved.path
            elif not self._resets_optimizer():
                warn(f"{saved.path} holds no optimizer state: AdamW starts anew, so the numbers will differ a little")
            if state.epoch >= self.config.num_epochs:
                say(f"all {self.config.num_epochs} epochs are done; raise num_epochs to train on")
        self.group.barrier()  # no rank may still be reading what rank 0 removes now
        if self.state_folder and self.group.is_main:
            self._drop_older_states()
        if state.metrics_bytes:
            self.metrics.check(state.metrics_bytes, state.metrics_crc32)
        self.metrics.rewind(state.epoch * self.run.steps_per_epoch + state.step, state.epoch)
        if self.group.is_main:
            drop_later_predictions(self.run.directory, state.epoch)

    def _resets_optimizer(self) -> bool:
        """Whether a new optimizer is made before the next step.

        The official README says "when switching training stages", its code (run.py) does it every epoch; True does
        what the code does, `stage` what the README says.
        """
        epoch, step, per_epoch = self.state.epoch, self.state.step, self.run.steps_per_epoch
        if self.config.reset_optimizer == "stage":
            earlier = (epoch, step - 1) if step else (epoch - 1, per_epoch - 1)
            stages = [self.curriculum.step_stage(*place, per_epoch) for place in (earlier, (epoch, step))]
            return epoch + step > 0 and stages[0] != stages[1]
        return self.config.reset_optimizer is True and step == 0

    def _learning_rate(self) -> float:
        """lr, or less during the first warmup_steps steps of the run."""
        config = self.config
        if not config.warmup_steps:
            return config.lr
        own_epochs = max(0, self.state.epoch - config.resume)  # those that `resume` skips were another run's
        n_taken = own_epochs * self.run.steps_per_epoch + self.state.step
        return config.lr * min(1.0, (n_taken + 1) / config.warmup_steps)

    def _log_step(self, result: StepResult) -> None:
        epoch, step, per_epoch = self.state.epoch, self.state.step, self.run.steps_per_epoch
        if not math.isfinite(result.gradient_norm):  # on all ranks
            self.group.agree(diverged(f"the gradient is {result.gradient_norm} in epoch {epoch + 1}, step {step}"))
        self.metrics.log({
            "train/epoch": epoch + 1, "train/step": epoch * per_epoch + step, "train/loss": result.loss,
            "train/lr": self._learning_rate(), "train/grad_norm": result.gradient_norm,
            "epoch": epoch + 1, "stage": self.curriculum.step_stage(epoch, step, per_epoch),
        })  # fmt: skip

    def _save_if_due(self) -> None:
        """Save the state at the epoch's end, every save_interval_minutes, and before a stop."""
        is_last = self.state.step == self.run.steps_per_epoch
        is_due = is_last or time.monotonic() - self.last_save >= 60 * self.config.save_interval_minutes
        signal, is_due = self.group.largest(self.stop.requested or 0, is_due)  # the ranks' clocks differ
        if is_due or signal:
            self.group.agree(self._spoiled() if self.writes else None)
            if self.writes:
                self._save(is_last)
            self.last_save = time.monotonic()
        if signal:
            self.group.barrier()  # the first rank to exit ends the others
            raise Stopped(signal)

    def _save(self, is_last: bool) -> None:
        """Write the state; it replaces the one before. is_last: behind the epoch's last step."""
        self.state.metrics_bytes, self.state.metrics_crc32 = self.metrics.sync()
        metadata = self.run.metadata(self.state.epoch + is_last, self.stage)
        self.state_folder = checkpoint.save_state(self.run.model, self.optimizer, self.state, metadata)
        self._drop_older_states()

    def _drop_older_states(self) -> None:
        """Remove the states before the newest one; at an epoch's end only behind its validation loss."""
        if self.state.step < self.run.steps_per_epoch:
            resume.keep_only_state(self.state_folder)

    def _validation_loss(self) -> float:
        """The loss of the trained epoch. Raises RunError where it is not finite; the state before is the newest then.

        A stop or a kill in here leaves both states: the newer one is resumed, without a step taken again.
        """
        loss = validation_loss(self.run, self.state.epoch, self.stop)
        if not math.isfinite(loss):  # on all ranks
            if self.writes:
                checkpoint.remove_folder(self.state_folder)
            place = f"after epoch {self.state.epoch + 1}"
            problem = diverged(f"the validation loss of {self.run.valid.path} is {loss} {place}")
            self.group.agree(RunError(f"{problem}{self._doubt()}"))
        if self.writes:
            resume.keep_only_state(self.state_folder)
        return loss

    def _doubt(self) -> str:
        """What to do where the state that is left, of the same epoch, was spoiled before it was saved.

        The whole validation set is not computed for a state in the middle of an epoch, so nothing tells.
        """
        of_this_epoch = f"state_{self.state.epoch}_"
        found = [p.name for p in resume.find_states(self.run.directory) if p.name.startswith(of_this_epoch)]
        return f". If it stops here again, remove {found[0]}, from the middle of this epoch" if found else ""

    def _spoiled(self) -> RunError | None:
        """What is wrong with weights that are of no use, found before they replace the last good state.

        The loss of a step is that before its update, so what the last update did shows only here. Finite weights can
        be so large that the loss is not: it is computed on the first validation batch.
        """
        place = f"after epoch {self.state.epoch + 1}, step {self.state.step - 1}"
        if not is_finite([self.run.model.parameters(), self.optimizer.state]):
            return diverged(f"the weights or the optimizer's moments are not finite {place}")
        batch = next(loss_batches(self.run.valid.tokens, self.curriculum, self.state.epoch))
        self.run.model.eval()
        with computing_in(self.run.model, compute_dtype(self.config.bf16)):
            loss = self.run.model(batch.to_mlx()).item()
        return None if math.isfinite(loss) else diverged(f"the validation loss is {loss} {place}")

    def _stop_if_asked(self) -> None:
        if signal := self.group.any_signal(self.stop.requested):
            raise Stopped(signal)

    def _show_first_batch(self) -> None:
        """Write the epoch's first micro-batch, token by token with its labels, to first_batch.txt and wandb."""
        [chunks, *_] = next(training_steps(self.run.train.tokens, self.curriculum, self.state.epoch))
        text = describe_batch([chunk.batch for chunk in chunks], self.curriculum.tokenizer)
        write_text(self.run.directory / "first_batch.txt", text)
        self.metrics.log_text("data_table", self.state.epoch * self.run.steps_per_epoch, text)

    def _check_parameters(self) -> None:
        if self.group.world_size > 1:
            when = f"after epoch {self.state.epoch + 1}"
            self.group.check_equal({"parameters": parameter_digest(self.run.model.parameters())}, when)
            say(f"{when} the parameters are the same bits in all {self.group.world_size} ranks")

    def _checkpoint_metadata(self, epochs_done: int, stage: int) -> dict:
        """With the accuracies so far, which a state has in its place: they tell which checkpoint is the best."""
        return self.run.metadata(epochs_done, stage) | {"accuracies": self.state.accuracies}

    def _save_checkpoint(self) -> None:
        """checkpoint_{epoch + 1} of a trained epoch."""
        if self.writes and not self.config.save_only_improve:
            metadata = self._checkpoint_metadata(self.state.epoch + 1, self.stage)
            say(f"saved {checkpoint.save_checkpoint(self.run.model, metadata)}")

    def _finish_epoch(self, accuracy: float) -> None:
        """Keep the best, move on to the next epoch, and record that in the saved state."""
        state, stage, epochs_done = self.state, self.stage, self.state.epoch + 1
        state.accuracies[str(epochs_done)] = accuracy
        removed = self.config.method.drops_steps != "by token" or stage == self.curriculum.last_removal
        if removed and accuracy > state.best_accuracy:  # iCoT's best is one without a written chain (arXiv 2405.14838)
            state.best_accuracy, state.best_epoch = accuracy, epochs_done
            if self.writes and self.config.save_only_improve:
                path = checkpoint.save_checkpoint(self.run.model, self._checkpoint_metadata(epochs_done, stage))
                say(f"saved {path}, the best so far")
        state.epoch, state.step, state.train_seconds = epochs_done, 0, 0.0
        if self.writes:
            state.metrics_bytes, state.metrics_crc32 = self.metrics.sync()
            checkpoint.update_state(self.state_folder, state)
            resume.prune(self.config, state.best_epoch)

    def _say_outlook(self, seconds: float) -> None:
        """The best epoch so far, and the time left if the others take as long as the last one did."""
        left, state = self.config.num_epochs - self.state.epoch, self.state
        best = f"best so far: epoch {state.best_epoch} with {state.best_accuracy:.3f}; " if state.best_epoch else ""
        if left:
            say(f"{best}{left} epoch{'s' * (left > 1)} left, about {human_time(left * seconds)} at this one's speed")

    def _draw_now_and_then(self) -> None:
        if self.group.is_main and time.monotonic() - self.last_drawing > REDRAW_SECONDS:
            keep_curves(self.run.directory)
            self.last_drawing = time.monotonic()


def train(run: Run) -> None:
    """Train a run to its end, with metrics and signals."""
    metrics = NoMetrics()
    if run.group.is_main:
        metrics = MetricLog(run.directory / "metrics.jsonl", start_wandb(run.config))
    with metrics, StopSignals() as stop:
        Trainer(run, metrics, stop).train()


def evaluate_once(run: Run) -> None:
    """Evaluate at the stage that `resume` gives, else the checkpoint's; write metrics.jsonl, predictions_N.jsonl and
    config.yaml.

    N is `resume`, as in the official code, or the number of epochs that the checkpoint was trained for.
    """
    config = run.config
    warn_of_other_thoughts(run, run.curriculum.stage(config.resume))
    say(evaluation_line(run))
    with StopSignals() as stop:
        loss = validation_loss(run, config.resume, stop)
        if not math.isfinite(loss):  # on all ranks
            run.group.agree(RunError(f"the validation loss of {run.valid.path} is {loss}; nothing was logged"))
        result = answers(run, config.resume, stop)
    with MetricLog(run.directory / "metrics.jsonl", None) if run.group.is_main else NoMetrics() as metrics:
        log_evaluation(run, metrics, TrainState(epoch=config.resume), evaluated_epochs(run), loss, result)
    if run.group.is_main:  # now it is about the newest record
        write_text(run.directory / "config.yaml", config.to_yaml())


def evaluator(run: Run, stop: StopSignals) -> Evaluator:
    """For the run's validation set. Several ranks stop only behind it: one that left would leave the others waiting."""
    checked = stop.checked if run.group.world_size == 1 else iter
    return Evaluator(run.model, run.valid, run.curriculum, run.group, checked)


def validation_loss(run: Run, epoch: int, stop: StopSignals) -> float:
    """Loss per labeled token of the validation set at the epoch's stage; same on all ranks."""
    with computing_in(run.model, compute_dtype(run.config.bf16)):
        return evaluator(run, stop).loss(epoch)


def answers(run: Run, epoch: int, stop: StopSignals) -> Evaluation:
    """Greedy answers to the validation set at the epoch's stage; same on all ranks."""
    with computing_in(run.model, compute_dtype(run.config.bf16)):
        return evaluator(run, stop).answers(run.curriculum.stage(epoch))


def log_evaluation(
    run: Run, metrics: MetricLog | NoMetrics, state: TrainState, epochs_done: int, loss: float, result: Evaluation
) -> None:
    """Print and log validation loss and answers at the stage of the state's epoch, and write the predictions."""
    stage = run.curriculum.stage(state.epoch)
    about = about_evaluation(run) if run.config.only_eval else {}
    say(f"epoch {epochs_done}, stage {stage}: loss {loss:.4f}, {result.summary()}")
    say("\n".join(result.samples()))
    if run.group.is_main:
        path = predictions_path(run.directory, epochs_done, about)
        write_json_lines(path, [about | prediction for prediction in result.predictions])
    metrics.log({
        "eval/loss": loss, "eval/acc": result.accuracy, "eval/cot_em": result.cot_match,
        "eval/n_tokens": result.mean_tokens, "eval/seconds_per_example": result.seconds_per_example,
        "train/seconds": state.train_seconds, "acc_interval": result.interval(),
        "epoch": epochs_done, "stage": stage, **about,
    })  # fmt: skip


def predictions_path(directory: Path, epochs_done: int, about: dict) -> Path:
    """predictions_{epochs_done}.jsonl; another name where that file is about other data or another checkpoint."""
    names = (f"predictions_{epochs_done}{f'_{n}' if n > 1 else ''}.jsonl" for n in itertools.count(1))
    return next(directory / name for name in names if _is_free(directory / name, about))


def drop_later_predictions(directory: Path, epochs_done: int) -> None:
    """Remove predictions of epochs behind a start's place, as MetricLog.rewind does: of a debug run, for example."""
    for path in directory.glob("predictions_*.jsonl"):
        epoch = path.stem.removeprefix("predictions_")
        if epoch.isdecimal() and int(epoch) > epochs_done:
            path.unlink()


def _is_free(path: Path, about: dict) -> bool:
    """Whether a file of predictions is not there yet, or is about the same evaluation."""
    first = next(iter(read_records(path)), {}) if path.is_file() else about
    return about == {name: first.get(name) for name in about}
