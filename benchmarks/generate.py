"""Measure how long greedy decoding takes, and compare with PyTorch.

    python benchmarks/generate.py                       # 64 prompts of ProsQA's lengths, 32 new tokens each
    python benchmarks/generate.py --peer --runs 3
    python benchmarks/generate.py --sweep examples      # values: examples=8,64; also batch, latents, length

The model is GPT-2 124M with random weights. There is no end token, so every example gets all its new tokens. --peer
decodes as the official code does, only --peer-examples of the prompts; the ratio is per example. --lean-peer decodes
all of them in batches through a cache. Prints one JSON line.
"""

import argparse

import workload

NO_END = -1  # an id of no token


def serve_ours(options: argparse.Namespace) -> None:
    """Work as a worker that decodes with this project's code."""
    import ours

    import mlx.core as mx

    from dataset import TrainingSequence, collate
    from models.precision import compute_dtype, computing_in
    from parallel.streams import on_gpu

    ours.start_streams(options.threads, options.precision)
    model = ours.new_model(options).eval()
    mx.eval(model.parameters())
    sequences = [TrainingSequence(*row) for row in prompts(options, options.examples)]
    dtype = compute_dtype(options.precision == "bf16")

    def run() -> dict:
        shortest = options.new_tokens
        for start in range(0, len(sequences), options.batch):
            batch = collate(sequences[start : start + options.batch], pad_id=0)
            with computing_in(model, dtype):
                outputs = model.generate(batch.to_mlx(), options.new_tokens, NO_END)
            shortest = min(shortest, *map(len, outputs))
            if not on_gpu():
                mx.clear_cache()
        return {"shortest": shortest}

    workload.serve(run, ours.facts)


def serve_peer(options: argparse.Namespace) -> None:
    """Work as a worker that decodes with PyTorch."""
    import peer
    import torch

    torch.set_num_threads(options.threads)
    sizes = options.vocabulary, options.layers, options.width, options.heads, options.inner
    model = peer.new_model(*sizes, options.dropout)
    rows = prompts(options, options.peer_examples if options.worker == "peer" else options.examples)

    def official() -> None:
        for row in rows:
            peer.generate(model, row, options.new_tokens, NO_END)

    def lean() -> None:
        for start in range(0, len(rows), options.batch):
            peer.lean_generate(model, rows[start : start + options.batch], options.new_tokens, NO_END)

    def run() -> dict:
        with peer.precision(options.precision):
            (official if options.worker == "peer" else lean)()
        peer.synchronize()
        return {}

    workload.serve(run, lambda: {"torch": torch.__version__})


def prompts(options: argparse.Namespace, n_examples: int) -> list[workload.Row]:
    """Make questions with their latents."""
    return workload.rows(argparse.Namespace(**vars(options) | {"batch": n_examples}), labeled=False)


def measure(options: argparse.Namespace, arguments: list[str]) -> dict:
    """Measure one configuration on all sides; returns the fields of the JSON line."""
    ours, *others = workload.compare(options, __file__, arguments)
    rows = prompts(options, options.examples)
    result = {
        "benchmark": "generate",
        "preset": options.preset,
        "examples": options.examples,
        "batch": options.batch,
        "prompt_tokens": len(rows[0].ids),
        "latents": rows[0].n_latents,
        "precision": options.precision,
        "new_tokens": options.new_tokens,
        "shortest_answer": int(ours.median("shortest")),  # fewer than new_tokens only where something is wrong
        "seconds": round(ours.median(), 4),
        "cpu_seconds": round(ours.median("cpu_seconds"), 4),
        "seconds_per_example": round(ours.median() / options.examples, 5),
        "tokens_per_second": round(options.examples * options.new_tokens / ours.median(), 2),
        **ours.facts,
    }
    for other in others:
        n_examples = options.peer_examples if other.name == "peer" else options.examples
        found = workload.ratios(ours, other)
        scale = options.examples / n_examples
        result |= {key: round(value * scale, 3) if "ratio" in key else value for key, value in found.items()}
        result[f"{other.name}_seconds_per_example"] = round(other.median() / n_examples, 5)
    return result | workload.machine(options.threads)


def main() -> None:
    parser = workload.parser(__doc__, batch=32)
    parser.add_argument("--examples", type=int, default=64, help="prompts (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens decoded for each (default: 32)")
    parser.add_argument("--peer-examples", type=int, default=2, help="prompts that the peer decodes (default: 2)")
    parser.add_argument("--sweep", help="examples, batch, latents or length, with =VALUES for values of your own")
    defaults = {"examples": [8, 16, 32, 64], "batch": [1, 4, 16, 32, 64], "latents": [0, 2, 6], "length": [57, 360]}
    workload.command(
        "generate", parser, {"ours": serve_ours, "peer": serve_peer, "lean_peer": serve_peer}, measure, defaults
    )


if __name__ == "__main__":
    main()
