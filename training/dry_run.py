"""What a run would do, without doing it: `python run.py CONFIG --dry-run`."""

import time
from itertools import groupby, islice

import mlx.core as mx

from dataset import training_batches
from training.setup import Run, evaluation_line, load, print_summary, warn_of_other_thoughts
from training.step import TrainStep, group_batches, new_optimizer
from utils import UserError, human_size, human_time, say


def show_plan(config, blas: str, group) -> None:
    """Check everything and print what would happen; writes nothing into the run directory."""
    run, problem = None, None
    try:
        run = load(config, group)
        print_summary(run, run.directory, blas)
    except UserError as error:
        problem = error
    group.agree(problem)
    if config.only_eval:
        warn_of_other_thoughts(run, run.curriculum.stage(run.config.resume))
        say(f"plan:  evaluate {len(run.valid):,} items once")
        say(evaluation_line(run))
        return
    n_items = config.batch_size_training * config.gradient_accumulation_steps * group.world_size
    say(f"plan:  {run.steps_per_epoch:,} optimizer steps an epoch, of {n_items} items each")
    for line in stage_lines(run):
        say(line)
    if run.first_epoch < config.num_epochs:
        say(measured_step(run))
    say("nothing was written")


def stage_lines(run: Run) -> list[str]:
    """One line for each stage of the curriculum: its epochs, what the model sees, and optimizer steps."""
    curriculum, lines = run.curriculum, []
    by_token = curriculum.method.drops_steps == "by token"
    describe = _removal if by_token else _latents
    key = (
        (lambda epoch: curriculum.step_stage(epoch, 0, 1) == curriculum.last_removal) if by_token else curriculum.stage
    )
    for _, group in groupby(range(run.first_epoch, run.config.num_epochs), key=key):
        epochs = list(group)
        span = f"epoch {epochs[0] + 1}" if len(epochs) == 1 else f"epochs {epochs[0] + 1} to {epochs[-1] + 1}"
        lines.append(f"  {span}: {describe(run, epochs)}, {run.steps_per_epoch * len(epochs):,} steps")
    return lines


def _latents(run: Run, epochs: list[int]) -> str:
    """The latents of a stage."""
    curriculum, stage = run.curriculum, run.curriculum.stage(epochs[0])
    step_counts = set(run.train.tokens.n_steps.tolist())
    trained = _range({curriculum.training_counts(stage, n)[1] for n in step_counts})
    prompted = _range({curriculum.n_prompt_latents(stage, n) for n in step_counts})
    return f"stage {stage}, {trained} {curriculum.method.latents} in training and {prompted} in evaluation"


def _removal(run: Run, epochs: list[int]) -> str:
    """How much of the written chain is gone in some epochs of an iCoT run."""
    first, last = run.curriculum.step_stage(epochs[0], 0, 1), run.curriculum.stage(epochs[-1])
    if first == run.curriculum.last_removal:
        return "the whole chain removed"
    return f"{_range({first, last})} tokens of each chain removed"


def measured_step(run: Run) -> str:
    """Time and memory of one optimizer step at the first epoch's stage (the second of two: the first warms up)."""
    mx.reset_peak_memory()
    config, epoch = run.config, run.first_epoch
    step = TrainStep(run.model, new_optimizer(run.model, config), config, run.group)
    batches = training_batches(run.train.tokens, run.curriculum, epoch, run.group)
    seconds = 0.0
    for number, micro_batches in enumerate(islice(group_batches(batches, config), 2)):
        started = time.perf_counter()
        step(micro_batches, epoch, number, config.lr)
        seconds = time.perf_counter() - started
    total = seconds * run.steps_per_epoch * (config.num_epochs - epoch)
    stage, memory = run.curriculum.stage(epoch), human_size(mx.get_peak_memory())
    return (
        f"time:  {seconds:.2f} s a step at stage {stage}, about {human_time(total)} of training, without evaluation\n"
        f"memory: {memory} at its peak"
    )


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
