"""The experiment: `python run.py CONFIG [key=value ...]` trains and evaluates Coconut or a baseline."""

try:
    from startup import signals
except ModuleNotFoundError:  # PYTHONSAFEPATH (python -P) leaves out this file's folder
    import sys

    sys.path.insert(0, __file__.rpartition("/")[0] or ".")
    from startup import signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports

import errno
import os
import shlex
import sys
from contextlib import ExitStack

try:
    from startup import blas, settings  # before mlx
except OSError as problem:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
if __name__ == "__main__":
    settings.own_pictures()
from config import Config, load_config, usage
from parallel.distributed import ALONE, FailedElsewhere, Group, join
from parallel.streams import use_device, use_streams
from training import dry_run, trainer
from training.memory import limit_memory
from training.setup import prepare
from utils import RunError, Stopped, UserError, say


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status: 0 success, 1 failure, 2 a mistake of the user's, 128 + signal."""
    group, message = ALONE, ""
    try:
        group = join(os.environ)
        command(arguments, group)
        sys.stdout.flush()
        return 0
    except UserError as error:
        status, message = 2, f"error: {error}"
    except RunError as error:
        status, message = 1, f"error: {error}"
    except FailedElsewhere as error:
        status = error.status
    except BrokenPipeError:  # `python run.py ... | head`
        status = signals.reader_left()
        is_run = not {"-h", "--help", "--dry-run"} & set(arguments)
        message = f"nobody reads stdout any more, so the run {go_on(arguments, group)}" if is_run else ""
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; make room and run the same command again, what was saved before is intact" if is_full else ""
        status, message = 1, f"error: {error}{hint}"
    except Stopped as stopped:
        status, message = 128 + stopped.signal, go_on(arguments, group) if group.is_main else ""
    group.ignore_launcher()
    if message:
        try:
            print(message, file=sys.stderr, flush=True)
        except OSError:  # nobody reads stderr either (`2>&1 | head`), or its disk is full
            signals.discard(sys.stderr)
    return status


def go_on(arguments: list[str], group: Group) -> str:
    """The line that says how to resume."""
    launcher = "the same mlx.launch with " if group.world_size > 1 else ""
    return f"stopped. To go on: {launcher}python run.py {shlex.join(arguments)}"


def command(arguments: list[str], group: Group) -> None:
    """Do what the command line says."""
    words = [argument for argument in arguments if argument != "--dry-run"]
    if {"-h", "--help"} & set(words):
        say(usage())
        return
    config = read_config(words, group)
    set_up_device(config)
    if words == arguments:
        execute(config, group)
    else:
        dry_run.show_plan(config, blas.describe(), group)


def read_config(words: list[str], group: Group) -> Config:
    """The configuration of the command line, read by every rank. Raises UserError on all ranks together."""
    config, problem = None, None
    try:
        if not words:
            raise UserError(f"which configuration?\n\n{usage()}")
        config = load_config(words[0], words[1:])
    except UserError as error:
        problem = error
    group.agree(problem)
    return config


def set_up_device(config: Config) -> None:
    """Choose device, precision and streams: several share a batch on a CPU, with grad_checkpoint only if asked for."""
    if config.tf32:
        settings.no_graphs()
    else:
        settings.exact_products()
    settings.long_graphs()
    settings.own_kernels()
    use_device(os.environ.get("COCONUT_DEVICE"))
    limit_memory()
    n = use_streams(os.environ.get("COCONUT_STREAMS") or ("1" if config.grad_checkpoint else None))
    if n > 1:
        settings.lift_graph_width()


def execute(config: Config, group: Group) -> None:
    """One run from configuration to result: load everything, then evaluate once or train."""
    with ExitStack() as stack:
        run = prepare(config, blas.describe(), group, stack)
        if config.only_eval:
            trainer.evaluate_once(run)
        else:
            trainer.train(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
