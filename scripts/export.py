"""Write a checkpoint for another program: `python -m scripts.export CHECKPOINT OUT`.

    python -m scripts.export runs/x/checkpoint_5 x.safetensors      for the older MLX port (GPT-2)
    python -m scripts.export runs/y/checkpoint_5 y --fuse           adapters added to their base: a Hugging Face folder
    python -m scripts.export runs/y/checkpoint_5 y --peft           adapters for the library PEFT

CHECKPOINT is a folder or file as for the key load_model_path. transformers opens a checkpoint of a whole model
directly, and mlx-lm the adapters of one with lora_rank. PEFT has no place for the rows of the three special tokens,
which thoughts need; they are written beside the adapters, as special_tokens.safetensors.
"""

from startup import signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports

import json
import sys
from pathlib import Path

from startup import blas  # noqa: F401  before mlx

from config import FIELDS, Config
from models.loading import find_tokenizer, load_model
from models.lora import ADAPTERS, ROWS, LoraModel
from models.source import find_source
from models.weights import canonical, read_tensors, to_mlx_layout
from training.checkpoint import read_metadata, write_tensors
from utils import UserError, command_parser, exit_status, replacing, say, write_text


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = command_parser("scripts.export", __doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder or weights file")
    parser.add_argument("out", type=Path, help="the .safetensors file, or with --fuse and --peft the folder, to write")
    parser.add_argument("--method", choices=("coconut", "cot"), help="default: the method recorded in the checkpoint")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--fuse", action="store_true", help="write the base with the adapters added")
    form.add_argument("--peft", action="store_true", help="write the adapters as PEFT's")
    options = parser.parse_args(arguments)
    write = fuse if options.fuse else peft if options.peft else None
    if write:
        return exit_status(lambda: write(options.checkpoint, options.out))
    return exit_status(lambda: export(options.checkpoint, options.out, options.method))


def export(checkpoint: Path, out: Path, method: str | None) -> None:
    """Convert names and layout. Raises UserError if the method is neither given nor recorded in the checkpoint."""
    if not checkpoint.exists():
        raise UserError(f"{checkpoint} does not exist")
    method = method or read_metadata(checkpoint).get("method")
    if method is None:
        raise UserError(f"{checkpoint} does not record its method; name it with --method coconut or --method cot")
    tensors = to_mlx_layout(canonical(read_tensors(checkpoint), checkpoint), method)
    with replacing(out) as temporary:
        write_tensors(temporary, tensors)
    say(f"wrote {out}: {len(tensors)} tensors in the older MLX port's names and layout ({method})")


def fuse(checkpoint: Path, out: Path) -> None:
    """Write a whole model that any program opens which reads Hugging Face's folders."""
    model, eos_id = open_adapters(checkpoint)
    tensors = model.fused()
    n_rows = next(len(array) for name, array in tensors.items() if name.endswith("embed_tokens.weight"))
    values = model.config.to_dict(eos_id) | {"vocab_size": n_rows}
    values.pop("quantization", None)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / "model.safetensors", tensors, {"format": "pt", "method": read_metadata(checkpoint)["method"]})
    for name, text in (model.config.texts | {"config.json": json.dumps(values, indent=1)}).items():
        write_text(out / name, text)
    say(f"wrote {out}: {len(tensors)} tensors; load_model_path and transformers open it as a whole model")


def peft(checkpoint: Path, out: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json."""
    model, _ = open_adapters(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / "adapter_model.safetensors", model.peft_tensors(), {"format": "pt"})
    write_text(out / "adapter_config.json", json.dumps(model.peft_config(), indent=1))
    if rows := model.saved_tensors().get(ROWS):
        write_tensors(out / ROWS, rows)
    say(f"wrote {out}: adapters for PEFT, for the base {model.lora.model_id}")


def open_adapters(checkpoint: Path) -> tuple[LoraModel, int]:
    """The model of a checkpoint with adapters, and the id of its end-of-text token."""
    if not (checkpoint / ADAPTERS).is_file():
        raise UserError(f"{checkpoint}: holds no adapters; --fuse and --peft are for runs with lora_rank")
    recorded = {name: value for name, value in read_metadata(checkpoint)["config"].items() if name in FIELDS}
    config = Config(**recorded | {"load_model_path": str(checkpoint), "tokenizer": None, "only_eval": True})
    source = find_source(config)
    tokenizer = find_tokenizer(source, config)
    return load_model(source, config, tokenizer), tokenizer.eos_id


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
