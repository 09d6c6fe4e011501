"""A run, loaded and checked before anything is written."""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from mlx.utils import tree_flatten

from coconut import Coconut
from config import FIELDS, Config
from dataset import Curriculum, Data, count_batches, warn_of_shared_questions
from methods import METHOD_KEYS
from models.loading import find_tokenizer, load_model
from models.precision import name_precision
from models.source import Source, find_source
from parallel.distributed import ALONE, Group, parameter_digest
from parallel.streams import n_streams, on_gpu
from training import resume
from training.checkpoint import describe_run, own_folder, read_metadata, trained_epoch
from training.memory import rows_at_once, say_kernels, say_memory
from utils import UserError, say, warn, write_text

# What a trained model thinks, beside its method; a new key of that kind belongs here (see thoughts_of)
THOUGHT_KEYS = ("c_thought", "max_latent_stage", "pad_latent_to_max")
# The stage of an epoch, and those drawn for its items.
STAGE_KEYS = ("curriculum", "epochs_per_stage", "tokens_per_epoch", "uniform_prob", "seed")


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
    contents: dict[str, str] = field(default_factory=dict)  # content_digests
    group: Group = ALONE

    @cached_property
    def directory(self) -> Path:
        """The folder that metrics, predictions and pictures go to; checkpoints go to config.run_dir."""
        return output_directory(self.config)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; a smaller last group of micro-batches is a step too."""
        n_batches = count_batches(len(self.train), self.config, self.group)
        return -(-n_batches // self.config.gradient_accumulation_steps)

    @cached_property
    def n_rows(self) -> int:
        """Rows of a micro-batch on a GPU."""
        if not on_gpu():
            return self.config.batch_size_training
        return rows_at_once(self.model.transformer, self.config, self.train.tokens, self.curriculum)

    @property
    def first_epoch(self) -> int:
        """The epoch to start with; the key `resume` counts only in a fresh directory (official run.py)."""
        return self.saved.state.epoch if self.saved else self.config.resume

    @cached_property
    def spans(self) -> list[range]:
        """The epochs of this start, those that train alike together."""
        epochs = range(self.first_epoch, self.config.num_epochs)
        return list(self.curriculum.spans(epochs, self.train.tokens.step_counts()[-1]))

    def metadata(self, epochs_done: int, stage: int) -> dict:
        """What a checkpoint written now says about itself."""
        facts = describe_run(self.curriculum, epochs_done, stage, self.group.world_size)
        precision = name_precision(self.config.bf16)
        return facts | {"contents": self.contents, "streams": n_streams(), "precision": precision}


def prepare(config: Config, blas: str, group: Group, stack: ExitStack) -> Run:
    """Load everything on every rank; then rank 0 makes the run directory and holds it while the stack is open.

    blas: the name of the BLAS in use, for the summary. Raises UserError, on all ranks together, for any mistake.
    """
    directory, problem, run = output_directory(config), None, None
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        if group.is_main:  # before the slow loading, so that of two starts at a time only one goes on
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(resume.locked(directory))
            stack.callback(_remove_unused, missing)  # without the lock they are another process's
        run = load(config, group)
        print_summary(run, blas)
    except UserError as error:
        problem = error
    group.agree(problem)
    check_ranks(run)
    if group.is_main:
        resume.clean(directory)
        if not config.only_eval:
            write_text(directory / "config.yaml", run.config.to_yaml())
    return run


def _remove_unused(made: list[Path]) -> None:
    """Remove the directories that this start has made, where at its end nothing but its lock is in them."""
    for folder in made:
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {".lock"}:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def output_directory(config: Config) -> Path:
    """save_path/name; under the name of a training run its folder debug/ with `debug`, only_eval/ for an evaluation."""
    for folder in (config.run_dir, *config.run_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"save_path, name: {folder} is a file; a directory is needed there to write into")
    if not (config.debug or config.only_eval) and _holds_evaluation(config.run_dir):
        raise UserError(
            f"name: {config.run_dir} holds the results of an evaluation, which training would overwrite; give this "
            f"run another `name`, or move that directory away"
        )
    apart = "debug" if config.debug else "only_eval" if config.only_eval else None
    if not apart or not config.run_dir.is_dir():
        return config.run_dir
    is_anothers = _is_of_no_debug_run(config.run_dir) if config.debug else _has_begun(config.run_dir)
    return config.run_dir / apart if is_anothers or resume.holds_training(config.run_dir) else config.run_dir


def _has_begun(run_dir: Path) -> bool:
    """Whether a training run has begun there, which may not have saved anything yet."""
    return (run_dir / "first_batch.txt").is_file()


def _is_of_no_debug_run(run_dir: Path) -> bool:
    """Whether an evaluation or a training run, one that has not saved anything yet too, has written its files there."""
    written = _config_lines(run_dir)
    return bool(written) and b"debug: true" not in written


def _holds_evaluation(run_dir: Path) -> bool:
    """Whether the files of an evaluation are there and those of no training run."""
    written = _config_lines(run_dir)
    return b"only_eval: true" in written and b"debug: true" not in written and not resume.holds_training(run_dir)


def _config_lines(run_dir: Path) -> list[bytes]:
    """The lines of the config.yaml that the last start left there; [] without one."""
    file = run_dir / "config.yaml"
    return file.read_bytes().splitlines() if file.is_file() else []


def load(config: Config, group: Group = ALONE, keep_texts: bool = False) -> Run:
    """Read data and weights: latest checkpoint of the run directory > load_model_path > model_id > fresh weights.

    keep_texts: read the training set's texts too, past the token cache, which is then not written.
    """
    saved = _find_saved(config)
    source = find_source(config, saved.path if saved else _best_of_named_run(config))
    tokenizer = find_tokenizer(source, config)
    if saved:
        for note in resume.check_same_run(saved, config, group.world_size):
            say(f"note: changed since the last start: {note}")
        # The epochs that the first start skipped: later warm-up steps are counted from there.
        config = replace(config, resume=saved.metadata.get("config", {}).get("resume", config.resume))
    if folder := own_folder(source.weights):
        if not saved:
            resume.check_intact(folder)
            resume.check_form(folder, config)
        resume.check_tokenizer(folder, tokenizer)
        config = as_trained(config, folder)
    curriculum, n_positions = Curriculum(config, tokenizer), source.shape.n_positions
    valid = Data(config.val_path, curriculum, n_positions, debug_limit=32)
    train = None
    if not config.only_eval:
        train = Data(config.train_path, curriculum, n_positions, debug_limit=5000, keep_texts=keep_texts)
        warn_of_shared_questions(train, valid)
        curriculum.limit_removal(train.tokens)
    contents = content_digests(config, train, valid)
    if saved:
        resume.check_contents(saved, contents, config)
    transformer = load_model(source, config, tokenizer)
    transformer.grad_checkpoint = config.grad_checkpoint
    return Run(config, source, curriculum, Coconut(transformer), train, valid, saved, contents, group)


def _find_saved(config: Config) -> resume.Saved | None:
    """What to resume from; an evaluation and a debug run are runs of their own."""
    if config.only_eval or config.debug or not config.run_dir.is_dir():
        return None
    return resume.find_saved(config.run_dir)


def content_digests(config: Config, train: Data | None, valid: Data) -> dict[str, str]:
    """SHA-256 of what the keys name: of tokens for data, so that neither a path nor the form of a file matters."""
    found = {name: _digest_of(data) for name, data in (("train_path", train), ("val_path", valid)) if data}
    path = Path(config.model_config_path or "")
    if config.model_config_path and path.is_file():
        found["model_config_path"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _digest_of(data: Data) -> str:
    """Items that were left out as too long count too: which ones that are may change with num_epochs."""
    digest = hashlib.sha256(data.tokens.starts)
    digest.update(data.tokens.tokens)
    return digest.hexdigest()


def check_ranks(run: Run) -> None:
    """Raise RunError where the ranks have read different configurations, data, weights or states."""
    if run.group.world_size == 1:
        return
    place = (run.saved.metadata.get("position") if run.saved else None, run.first_epoch)
    data = {"training data": run.contents.get("train_path", ""), "validation data": run.contents["val_path"]}
    facts = {
        "configuration": zlib.crc32(run.config.to_yaml().encode()),
        "vocabulary": zlib.crc32(run.curriculum.tokenizer.fingerprint.encode()),
        **{name: zlib.crc32(digest.encode()) for name, digest in data.items()},
        "place in the run": zlib.crc32(repr(place).encode()),
        "parameters": parameter_digest(run.model.parameters()),
    }
    run.group.check_equal(facts, "at the start")
    say(f"at the start all {run.group.world_size} ranks have the same configuration, data and parameters")


def print_summary(run: Run, blas: str) -> None:
    """The run's first lines: what it is, on what device, with what data, and where it writes."""
    config, shape = run.config, run.model.transformer.config
    n = n_streams()
    device = f"GPU ({name_precision(config.bf16)})" if on_gpu() else f"CPU ({blas}, {n} stream{'s' * (n != 1)})"
    length = "evaluation only" if config.only_eval else f"{config.num_epochs} epochs"
    n_parameters, n_trained = (
        sum(array.size for _, array in tree_flatten(tree))
        for tree in (run.model.parameters(), run.model.trainable_parameters())
    )
    trained = f", {n_trained:,} of them train" if n_trained < n_parameters else ""
    sizes = f"{len(run.valid):,} items of {config.val_path}"
    if run.train:
        sizes = f"{len(run.train):,} training items of {config.train_path}, {sizes}"
    say(f"run:   {config.name}, {config.method.name}, {length}, on {device}")
    size = f"{shape.n_layer} layers, {shape.n_embd} wide"
    say(f"model: {n_parameters:,} parameters ({size}{trained}) from {run.source}")
    say(f"data:  {sizes}; vocabulary from {run.curriculum.tokenizer.source}")
    say(f"files: {run.directory}")
    if disk := resume.check_disk(config, 4 * n_trained, run.first_epoch):
        say(disk)
    if on_gpu():
        say_kernels()
    if run.train and on_gpu():
        say_memory(run.model.transformer, config, run.train.tokens, run.curriculum, run.n_rows)
    if run.train and trains_no_thought(run.curriculum, run.first_epoch, run.train.tokens.step_counts()):
        warn(
            f"{config.method.name}: this run trains no thought: c_thought is {config.c_thought}, max_latent_stage "
            f"{config.max_latent_stage}, and its last stage is {run.curriculum.stage(config.num_epochs - 1)}"
        )
    if run.train:
        warn_of_long_warm_up(run)
    if config.bf16 and not on_gpu():
        warn("bf16 is many times slower on CPU; float32 is used")
    if not on_gpu() and (config.quantize or getattr(shape, "quantization", None)):
        warn("a quantized base takes about ten times as long on a CPU; without `quantize` it stays as it is")


def trains_no_thought(curriculum: Curriculum, first_epoch: int, counts: Sequence[int]) -> bool:
    """Whether a method that thinks never does so in the epochs of a run; counts: the numbers of steps of its items."""
    if not curriculum.thoughts_per_step:
        return curriculum.method.thinks  # c_thought 0
    config = curriculum.config
    spans = list(curriculum.spans(range(first_epoch, config.num_epochs), max(counts)))
    stages = {curriculum.stage(epochs[0]) for epochs in spans}
    if config.uniform_prob:
        stages |= set(range(max(counts) + 1))
    return bool(spans) and not any(curriculum.training_counts(stage, n)[1] for stage in stages for n in counts)


def warn_of_long_warm_up(run: Run) -> None:
    """Warn where a run ends before its learning rate has reached lr."""
    config = run.config
    n_steps = (config.num_epochs - config.resume) * run.steps_per_epoch
    if 0 < n_steps < config.warmup_steps:
        warn(
            f"warmup_steps: the run has {n_steps:,} optimizer steps, {config.warmup_steps:,} are to warm up; the "
            f"learning rate ends at {config.lr * n_steps / config.warmup_steps:.3g} and never reaches lr "
            f"({config.lr:g})"
        )


def thoughts_of(values: Mapping) -> dict:
    """The keys of a configuration that decide what a trained model thinks, and their values.

    An evaluation compares its own with those in the checkpoint's metadata. values: key -> value; a key that an old
    checkpoint does not have counts as its default.
    """
    method = next(name for name in METHOD_KEYS if values.get(name))
    keys = THOUGHT_KEYS if method == "coconut" else ()
    return {"method": method} | {name: values.get(name, FIELDS[name].default) for name in keys}


def as_trained(config: Config, folder: Path) -> Config:
    """The configuration of an evaluation, with the stage and thoughts that the checkpoint was trained with.

    Where `resume` is given, as in the official files, the configuration decides, and warn_of_other_thoughts compares.
    """
    if not config.only_eval or config.resume_given:
        return config
    metadata = read_metadata(folder)
    trained = metadata["config"]
    for name, value in thoughts_of(trained).items():
        own = thoughts_of(config.to_dict()).get(name, value)
        if own != value:
            say(f"note: {name}: {value}, as {folder} was trained, not {own}; with `resume` given, yours would count")
    keys = (*METHOD_KEYS, *THOUGHT_KEYS, *STAGE_KEYS)
    taken = {name: trained.get(name, FIELDS[name].default) for name in keys}
    return replace(config, resume=trained_epoch(metadata), **taken)


def evaluated_epochs(run: Run) -> int:
    """The number in the names of an evaluation's files (see trainer.evaluate_once)."""
    folder = own_folder(run.source.weights)
    return run.config.resume if run.config.resume_given or not folder else read_metadata(folder)["epoch"]


def about_evaluation(run: Run) -> dict:
    """What an evaluation is about, for each of its records: checkpoint, data, stage and thoughts."""
    facts = {"checkpoint": str(run.source), "data": run.config.val_path, "data_sha256": run.contents["val_path"]}
    return facts | {"stage": run.curriculum.stage(run.config.resume)} | thoughts_of(run.config.to_dict())


def evaluation_line(run: Run) -> str:
    """What is evaluated, at which stage and with which thoughts, and what decides that."""
    about = about_evaluation(run)
    facts = ", ".join(f"{name} {about[name]}" for name in about if name not in ("checkpoint", "data", "data_sha256"))
    is_own = own_folder(run.source.weights) and not run.config.resume_given
    why = "as the checkpoint was trained" if is_own else f"as the configuration says (resume: {run.config.resume})"
    return f"eval:  {facts}; {why}"


def warn_of_other_thoughts(run: Run, stage: int) -> None:
    """Warn where a checkpoint is evaluated with another stage or other thoughts than it was trained with."""
    metadata, weights = read_metadata(own_folder(run.source.weights)), run.source.weights
    if not metadata:
        return
    trained_at, most = metadata["stage"], run.config.max_latent_stage
    if min(trained_at, most) != min(stage, most):
        warn(
            f"{weights} was trained at stage {trained_at}; `resume: {run.config.resume}` evaluates it at stage {stage}"
        )
    trained, own = thoughts_of(metadata["config"]), thoughts_of(run.config.to_dict())
    for name in trained.keys() & own.keys():
        if trained[name] != own[name]:
            warn(f"{weights} was trained with {name}: {trained[name]}; this evaluation uses {name}: {own[name]}")


def _best_of_named_run(config: Config) -> Path | None:
    """The best checkpoint, where load_model_path names the directory of a whole run."""
    path = Path(config.load_model_path or "")
    if not config.load_model_path or not path.is_dir() or not resume.holds_training(path):
        return None
    best = resume.best_checkpoint(path)
    say(f"{path} is a run: taking {best.name}, the best of its last stage")
    return best
