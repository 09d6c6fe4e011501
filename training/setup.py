"""A run, loaded and checked before anything is written."""

import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlx.utils import tree_flatten

from coconut import Coconut
from config import Config
from dataset import Curriculum, Data, count_batches, warn_of_shared_questions
from models.loading import Source, find_source, load_gpt2
from parallel.distributed import ALONE, Group, parameter_digest
from parallel.streams import n_streams, on_gpu
from text.tokenizer import load_tokenizer
from training import resume
from training.checkpoint import describe_run, read_metadata
from utils import UserError, say, warn, write_text


@dataclass(frozen=True)
class Run:
    """Everything that a run is made of."""

    config: Config
    source: Source
    curriculum: Curriculum
    model: Coconut
    train: Data | None
    valid: Data
    saved: resume.Saved | None  # what the run directory holds already
    group: Group = ALONE

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; a smaller last group of micro-batches is a step too."""
        n_batches = count_batches(len(self.train), self.config, self.group)
        return -(-n_batches // self.config.gradient_accumulation_steps)

    @property
    def first_epoch(self) -> int:
        """The epoch to start with; the key `resume` counts only in a fresh directory (official run.py)."""
        return self.saved.state.epoch if self.saved else self.config.resume

    def metadata(self, epochs_done: int, stage: int) -> dict:
        """What a checkpoint written now says about itself."""
        return describe_run(self.curriculum, epochs_done, stage, self.group.world_size)


def prepare(config: Config, blas: str, group: Group, stack: ExitStack) -> tuple[Run, Path]:
    """Load everything on every rank; then rank 0 makes the run directory and holds it while the stack is open.

    blas: the name of the BLAS in use, for the summary. Raises UserError, on all ranks together, for any mistake.
    """
    directory, problem, run = output_directory(config), None, None
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        if group.is_main:  # before the slow loading, so that of two starts at a time only one goes on
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(resume.locked(directory))
        run = load(config, group)
        print_summary(run, directory, blas)
    except UserError as error:
        problem = error
    if problem and group.is_main:
        _remove_unused(made)
    group.agree(problem)
    check_ranks(run)
    if group.is_main:
        resume.clean(directory)
        if not config.only_eval:
            write_text(directory / "config.yaml", config.to_yaml())
    return run, directory


def _remove_unused(made: list[Path]) -> None:
    """Remove the directories that this start has made, where nothing but its lock is in them."""
    for folder in made:
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {".lock"}:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def output_directory(config: Config) -> Path:
    """save_path/name; an evaluation under the name of a training run writes into only_eval/ inside it."""
    for folder in (config.run_dir, *config.run_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"save_path, name: {folder} is a file; a directory is needed there to write into")
    if config.only_eval and config.run_dir.is_dir() and resume.holds_training(config.run_dir):
        return config.run_dir / "only_eval"
    return config.run_dir


def load(config: Config, group: Group = ALONE) -> Run:
    """Read data and weights: latest checkpoint of the run directory > load_model_path > model_id > fresh weights."""
    saved = resume.find_saved(config.run_dir) if config.run_dir.is_dir() and not config.only_eval else None
    source = find_source(config, saved.path if saved else _best_of_named_run(config))
    tokenizer = load_tokenizer(config.tokenizer, source.folder)
    if saved:
        for note in resume.check_same_run(saved, config, group.world_size):
            say(f"note: changed since the last start: {note}")
    if source.weights and source.weights.is_dir():
        if not saved:
            resume.check_intact(source.weights)
            resume.check_form(source.weights, config)
        resume.check_tokenizer(source.weights, tokenizer)
    curriculum, n_positions = Curriculum(config, tokenizer), source.gpt2.n_positions
    valid = Data(config.val_path, curriculum, n_positions, debug_limit=32)
    train = None
    if not config.only_eval:
        train = Data(config.train_path, curriculum, n_positions, debug_limit=5000, keep_texts=False)
        warn_of_shared_questions(train, valid)
        curriculum.limit_removal(train.tokens)
    transformer = load_gpt2(source, config, tokenizer)
    transformer.grad_checkpoint = config.grad_checkpoint
    return Run(config, source, curriculum, Coconut(transformer), train, valid, saved, group)


def check_ranks(run: Run) -> None:
    """Raise RunError where the ranks have read different configurations, data, weights or states."""
    if run.group.world_size == 1:
        return
    place = (run.saved.metadata.get("position") if run.saved else None, run.first_epoch)
    datasets = {"training data": run.train, "validation data": run.valid}
    facts = {
        "configuration": zlib.crc32(run.config.to_yaml().encode()),
        "vocabulary": zlib.crc32(run.curriculum.tokenizer.fingerprint.encode()),
        **{name: zlib.crc32(data.tokens.tokens) if data else 0 for name, data in datasets.items()},
        "place in the run": zlib.crc32(repr(place).encode()),
        "parameters": parameter_digest(run.model.parameters()),
    }
    run.group.check_equal(facts, "at the start")
    say(f"at the start all {run.group.world_size} ranks have the same configuration, data and parameters")


def print_summary(run: Run, directory: Path, blas: str) -> None:
    """The run's first lines: what it is, on what device, with what data, and where it writes."""
    config, shape = run.config, run.model.transformer.config
    n = n_streams()
    device = "GPU" if on_gpu() else f"CPU ({blas}, {n} stream{'s' * (n != 1)})"
    length = "evaluation only" if config.only_eval else f"{config.num_epochs} epochs"
    n_parameters = sum(array.size for _, array in tree_flatten(run.model.parameters()))
    sizes = f"{len(run.valid):,} items of {config.val_path}"
    if run.train:
        sizes = f"{len(run.train):,} training items of {config.train_path}, {sizes}"
    say(f"run:   {config.name}, {config.method.name}, {length}, on {device}")
    say(f"model: {n_parameters:,} parameters ({shape.n_layer} layers, {shape.n_embd} wide) from {run.source}")
    say(f"data:  {sizes}; vocabulary from {run.curriculum.tokenizer.source}")
    say(f"files: {directory}")
    if disk := resume.check_disk(config, 4 * n_parameters, run.first_epoch):
        say(disk)
    if config.bf16 and not on_gpu():
        warn("bf16 is many times slower on CPU; float32 is used")


def warn_of_other_stage(run: Run, stage: int) -> None:
    """Warn where a checkpoint is evaluated at another stage than it was trained at."""
    trained_at = read_metadata(run.source.weights).get("stage", stage)
    most = run.config.max_latent_stage
    if min(trained_at, most) != min(stage, most):
        warn(
            f"{run.source.weights} was trained at stage {trained_at}; `resume: {run.config.resume}` evaluates it at "
            f"stage {stage}"
        )


def _best_of_named_run(config: Config) -> Path | None:
    """The best checkpoint, where load_model_path names the directory of a whole run."""
    path = Path(config.load_model_path or "")
    if not config.load_model_path or not path.is_dir() or not resume.holds_training(path):
        return None
    best = resume.best_checkpoint(path)
    say(f"{path} is a run: taking {best.name}, the best of its last stage")
    return best
