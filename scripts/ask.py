"""Ask a trained model a question and see what its thoughts decode to: `python -m scripts.ask CHECKPOINT ["QUESTION"]`

    python -m scripts.ask pretrained/graph-coconut "ec;id;lm;ka;kg;bh;nf;nk;il;gb;cj;ei;?bm:e"
    python -m scripts.ask runs/gsm-coconut "A pen costs 2 dollars. What do 3 pens cost?" --thoughts 2

Without a question it reads one from each line that is typed or piped in. A thought is decoded by the model's output
layer: the tokens that it would most likely write next, with their probabilities.
"""

from startup import signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports

import argparse
import sys

from startup import blas  # noqa: F401  before mlx

import numpy as np

from analysis.probing import Probe, likeliest, logits, open_checkpoint, thoughts, tokenize_question
from dataset import collate
from training.evaluation import read_answer
from utils import UserError, command_parser, exit_status, say

SHOWN = 5  # tokens of a thought


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: ask(parse_args(arguments)))


def ask(options: argparse.Namespace) -> None:
    """Print what the model makes of each question."""
    probe = open_checkpoint(options.checkpoint, options.tokenizer)
    n_thoughts = probe.n_thoughts if options.thoughts is None else options.thoughts
    for question in [options.question] if options.question else typed_questions(probe, n_thoughts):
        say("\n".join(answer(probe, question, n_thoughts)))


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser("scripts.ask", __doc__)
    parser.add_argument("checkpoint", help="a checkpoint folder, or the folder of a run")
    parser.add_argument("question", nargs="?", help="default: read questions, one a line")
    parser.add_argument("--thoughts", type=int, help="how many thoughts to think (default: as many as were trained)")
    parser.add_argument("--tokenizer", help="the vocabulary, where the one that the checkpoint names has moved")
    options = parser.parse_args(arguments)
    if options.thoughts is not None and options.thoughts < 0:
        parser.error(f"--thoughts {options.thoughts}: expected 0 or more")
    return options


def typed_questions(probe: Probe, n_thoughts: int):
    """The questions typed or piped in, one a line, up to an empty line or the end."""
    if sys.stdin.isatty():
        title = probe.curriculum.method.title
        say(f"{title} with {n_thoughts} {probe.curriculum.method.latents}. An empty line or Ctrl-D ends.")
    while question := _next_line():
        yield question


def _next_line() -> str:
    try:
        return input("question: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def answer(probe: Probe, question: str, n_thoughts: int) -> list[str]:
    """The lines about one question. Raises UserError where it does not fit into the model's positions."""
    curriculum, tokenizer = probe.curriculum, probe.curriculum.tokenizer
    example = tokenize_question(probe, question)
    prompt = curriculum.prompt(example, n_thoughts)
    n_positions = probe.model.transformer.config.n_positions
    if len(prompt.ids) >= n_positions:
        raise UserError(f"the question and {n_thoughts} thoughts take {len(prompt.ids)} of {n_positions} positions")
    batch = collate([prompt], tokenizer.eos_id).to_mlx()
    [ids] = probe.model.generate(batch, curriculum.config.answer_limit, tokenizer.eos_id)
    text = tokenizer.decode(ids)
    lines = []
    if prompt.n_latents:
        scores = logits(probe, thoughts(probe, [example], n_thoughts))[0]  # [K, vocabulary]
        lines = [f"thought {k}: {decoded(row, probe)}" for k, row in enumerate(scores, 1)]
    written = text.split("#")[0].strip()
    return [*lines, *([f"written: {written}"] if written else []), f"answer: {read_answer(text) or '(none)'}"]


def decoded(row: np.ndarray, probe: Probe) -> str:
    """The most likely tokens of a thought with their probabilities; row [vocabulary] are its logits."""
    return "  ".join(f"{token!r} {share:.2f}" for token, share in likeliest(probe, row, SHOWN))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
