"""What a run would do, without doing it: `python run.py CONFIG --dry-run`."""

import time
from itertools import islice

import mlx.core as mx
import numpy as np

from dataset import count_batches, loss_batches, prompt_batches, training_steps
from models.precision import compute_dtype, computing_in
from training.setup import Run, evaluation_line, load, print_summary, warn_of_other_thoughts
from training.step import TrainStep, new_optimizer
from utils import UserError, human_size, human_time, say


def show_plan(config, blas: str, group) -> None:
    """Check everything and print what would happen; writes nothing into the run directory."""
    run, problem = None, None
    try:
        run = load(config, group, keep_texts=True)  # the token cache is not written
        print_summary(run, blas)
    except UserError as error:
        problem = error
    group.agree(problem)
    if config.only_eval:
        warn_of_other_thoughts(run, run.curriculum.stage(run.config.resume))
        say(f"plan:  evaluate {len(run.valid):,} items once")
        say(evaluation_line(run))
        seconds = measured_evaluation(run, run.config.resume)
        say(f"time:  up to {human_time(seconds)}, where all answers are as long as they may be")
        say("nothing was written")
        return
    n_items = config.batch_size_training * config.gradient_accumulation_steps * group.world_size
    say(f"plan:  {run.steps_per_epoch:,} optimizer steps an epoch, of {n_items} items each")
    for line in stage_lines(run):
        say(line)
    if run.first_epoch < config.num_epochs:
        for line in estimate_lines(run):
            say(line)
    say("nothing was written")


def stage_lines(run: Run) -> list[str]:
    """One line for each stage of the curriculum: its epochs, what the model sees, and optimizer steps."""
    describe, lines = _removal if run.curriculum.method.drops_steps == "by token" else _latents, []
    for epochs in run.spans:
        span = f"epoch {epochs[0] + 1}" if len(epochs) == 1 else f"epochs {epochs[0] + 1} to {epochs[-1] + 1}"
        lines.append(f"  {span}: {describe(run, epochs)}, {run.steps_per_epoch * len(epochs):,} steps")
    return lines


def _latents(run: Run, epochs: range) -> str:
    """The latents of a stage."""
    curriculum, stage, last = run.curriculum, run.curriculum.stage(epochs[0]), run.curriculum.stage(epochs[-1])
    step_counts = run.train.tokens.step_counts()
    trained = _range({curriculum.training_counts(stage, n)[1] for n in step_counts})
    prompted = _range({curriculum.n_prompt_latents(stage, n) for n in step_counts})
    name = f"stage {stage}" if stage == last else f"stages {stage} to {last}"
    return f"{name}, {trained} {curriculum.method.latents} in training and {prompted} in evaluation"


def _removal(run: Run, epochs: range) -> str:
    """How much of the written chain is gone in some epochs of an iCoT run."""
    first, last = run.curriculum.step_stage(epochs[0], 0, 1), run.curriculum.stage(epochs[-1])
    if first == run.curriculum.last_removal:
        return "the whole chain removed"
    return f"{_range({first, last})} tokens of each chain removed"


def estimate_lines(run: Run) -> list[str]:
    """Time and memory of the run, measured at its first stage and at that with the most thoughts, the most expensive.

    Between the two a step's time is taken to grow with the thoughts.
    """
    latents = [most_latents(run, epochs[0]) for epochs in run.spans]
    first, most = run.spans[0][0], run.spans[latents.index(max(latents))][0]
    timed = list(dict.fromkeys((first, most)))  # epochs
    mx.reset_peak_memory()
    seconds = {most_latents(run, epoch): measured_step(run, epoch) for epoch in timed}
    counts = sorted(seconds)
    step_seconds = np.interp(latents, counts, [seconds[n] for n in counts])  # [spans]
    n_epochs = [len(epochs) for epochs in run.spans]
    training = float(np.dot(step_seconds, n_epochs)) * run.steps_per_epoch
    shown = " and ".join(
        f"{seconds[most_latents(run, epoch)]:.2f} s a step at stage {run.curriculum.stage(epoch)}" for epoch in timed
    )
    evaluation = measured_evaluation(run, most)
    evaluations = human_time(evaluation * sum(n_epochs))
    return [
        f"time:  {shown}, so about {human_time(training)} of training",
        f"       and up to {evaluations} of evaluation ({human_time(evaluation)} each, where "
        "all answers are as long as they may be)",
        f"memory: {human_size(mx.get_peak_memory())} at its peak",
    ]


def measured_step(run: Run, epoch: int) -> float:
    """Seconds of an optimizer step in an epoch (the second of two: the first warms up)."""
    config = run.config
    step = TrainStep(run.model, new_optimizer(run.model, config), config, run.group)
    steps = training_steps(run.train.tokens, run.curriculum, epoch, run.group, n_rows=run.n_rows)
    seconds = 0.0
    for number, micro_batches in enumerate(islice(steps, 2)):
        started = time.perf_counter()
        step(micro_batches, epoch, number, 0.0)  # a learning rate of 0 leaves the weights as they are
        seconds = time.perf_counter() - started
    return seconds


def measured_evaluation(run: Run, epoch: int) -> float:
    """Seconds that an evaluation at an epoch's stage takes, from one batch of the loss and one of answers."""
    config, data, curriculum = run.config, run.valid.tokens, run.curriculum
    run.model.eval()
    started = time.perf_counter()
    with computing_in(run.model, compute_dtype(config.bf16)):
        mx.eval(run.model(next(loss_batches(data, curriculum, epoch)).to_mlx()))
        middle = time.perf_counter()
        _, prompts = next(prompt_batches(data, curriculum, curriculum.stage(epoch)))
        run.model.generate(prompts.to_mlx(), config.answer_limit, eos_id=-1)
    answers = (time.perf_counter() - middle) * -(-len(data) // config.batch_size_eval)
    return (answers + (middle - started) * count_batches(len(data), config)) / run.group.world_size


def most_latents(run: Run, epoch: int) -> int:
    """The most thoughts of a training item in an epoch, without those that uniform_prob draws."""
    stage, counts = run.curriculum.stage(epoch), run.train.tokens.step_counts()
    return max(run.curriculum.training_counts(stage, n)[1] for n in counts)


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
