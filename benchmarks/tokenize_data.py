"""Measure how long reading, checking and tokenizing a training set of GSM8K's size takes, without and with the cache.

    python benchmarks/tokenize_data.py                  # 385,620 generated items of GSM8K's length and character
    python benchmarks/tokenize_data.py --alternatives   # also tiktoken's threads and `datasets`, which are not used

Each figure is one process, from its start until the data is ready for the first batch, with its peak memory. Needs
GPT-2's vocabulary (see text/tokenizer.py) and 0.5 GB of disk in $TMPDIR; removes what it writes.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NAMES = ("Hannah", "Travis", "Tom", "Maggie", "Kenny", "Carla", "Sam", "Priya", "José", "Wei", "Olga", "Nadia", "Omar")
THINGS = ("apples", "spoons", "tickets", "pages of a book", "hours of work", "cups of dog food", "goldfish", "stamps")
PLACES = ("at the market", "in Lou’s shop", "on Saturday morning", "during the first week of school", "at her aunt’s")
VERBS = ("buys", "gives away", "finds", "sells", "borrows", "counts", "packs", "loses")


def write_items(path: Path, n_items: int) -> None:
    """Write generated problems like GSM8K's: questions of about 65 tokens, 2 to 5 steps of about 10."""
    rng = random.Random(0)
    path.write_text(json.dumps([make_item(rng) for _ in range(n_items)]), encoding="utf-8")


def make_item(rng: random.Random) -> dict:
    """Generate one problem: a number that every step changes."""
    name, thing, total = rng.choice(NAMES), rng.choice(THINGS), rng.randint(2, 99)
    sentences, steps = [f"{name} has {total} {thing} {rng.choice(PLACES)}."], []
    for _ in range(rng.choice((2, 2, 3, 3, 3, 4, 5))):
        sign, number = rng.choice("+-*"), rng.randint(2, 60)
        result = {"+": total + number, "-": total - number, "*": total * number}[sign]
        sentences.append(f"{rng.choice(NAMES)} {rng.choice(VERBS)} {number} more of them, {rng.choice(PLACES)}.")
        steps.append(f"<<{total}{sign}{number}={result}>>")
        total = result
    question = " ".join([*sentences, f"How many {thing} does {name} have left at the end of it all?"])
    return {"question": question, "steps": steps, "answer": str(total)}


def get_ready(path: str, cache: str) -> str:
    """Load a training set as run.py does, then build 1000 batches."""
    import dataset
    from config import Config
    from text.tokenizer import load_tokenizer

    config = Config(save_path="", name="", val_path="", coconut=True, num_epochs=25, epochs_per_stage=3, c_thought=2,
                    max_latent_stage=3, token_cache=cache)  # fmt: skip
    curriculum = dataset.Curriculum(config, load_tokenizer(None))
    tokens = dataset.Data(path, curriculum, n_positions=1024, debug_limit=0, keep_texts=False).tokens
    ready = time.perf_counter()
    n_batches = sum(1 for _ in islice(dataset.training_steps(tokens, curriculum, epoch=4), 1000))
    each = (time.perf_counter() - ready) / n_batches
    return f"{len(tokens):,} items, {len(tokens.tokens):,} tokens; then {1000 * each:.2f} ms per batch of 32"


def thread_pool(path: str, cache: str) -> str:
    """Compare tiktoken's own threads with a plain loop, on a tenth of the items."""
    from text.reader import read_examples
    from text.tokenizer import load_tokenizer

    encoding = load_tokenizer(None)._encoding
    examples = read_examples(path)
    texts = [text for e in examples[: len(examples) // 10] for text in (e.question, *e.steps, e.answer)]
    start = time.perf_counter()
    encoding.encode_ordinary_batch(texts, num_threads=2)
    pooled, start = time.perf_counter() - start, time.perf_counter()
    for text in texts:
        encoding.encode_ordinary(text)
    return f"{pooled:.1f} s for a tenth of the items with 2 threads, {time.perf_counter() - start:.1f} s in a loop"


def hugging_face(path: str, cache: str) -> str:
    """Make the same ids with Dataset.map of `datasets`, which has a cache of its own."""
    import datasets

    from text.reader import Example
    from text.tokenizer import load_tokenizer
    from text.tokens import encode_example

    tokenizer = load_tokenizer(None)

    def encode(rows: dict) -> dict:
        items = zip(rows["question"], rows["steps"], rows["answer"], strict=True)
        return {"pieces": [encode_example(Example(*item), tokenizer) for item in items]}

    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
    tokens = rows.map(encode, batched=True, remove_columns=rows.column_names, new_fingerprint="benchmark")
    start = time.perf_counter()
    for index in range(3200):
        _ = tokens[index]
    return f"{len(tokens):,} items; then {1000 * (time.perf_counter() - start) / 100:.2f} ms to get 32 of them by index"


def measure(what: str, path: Path, cache: Path) -> None:
    """Run one of the functions above in a new process and print its time and its facts."""
    command = [sys.executable, __file__, "--child", what, str(path), str(cache)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(f"  {time.perf_counter() - start:6.1f} s in all, {done.stdout.strip()}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=385_620, help="how many (default: GSM8K's training set)")
    parser.add_argument("--alternatives", action="store_true", help="also measure what is not used")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, path, cache = options.child
        facts = globals()[what](path, cache)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(f"peak {peak / 1e9:.2f} GB; {facts}")
        return
    runs = [("get_ready", title) for title in ("first time", "from the cache", "from the cache again")]
    if options.alternatives:
        runs += [("thread_pool", "tiktoken's threads")]
        runs += [("hugging_face", f"datasets, {time_of}") for time_of in ("first time", "from its cache")]
    with tempfile.TemporaryDirectory(prefix="coconut-tokenize-") as folder:
        path, cache = Path(folder, "items.json"), Path(folder, "cache")
        write_items(path, options.items)
        print(f"{options.items:,} items, {path.stat().st_size / 1e6:.0f} MB of JSON")
        for what, title in runs:
            print(title)
            measure(what, path, cache)
            print(f"         {sum(f.stat().st_size for f in cache.rglob('*') if f.is_file()) / 1e6:,.0f} MB of cache")


if __name__ == "__main__":
    main()
