"""Write a checkpoint for the older MLX port: `python -m scripts.export CHECKPOINT OUT.safetensors`.

CHECKPOINT is a folder or file as for the key load_model_path. (transformers opens our checkpoint folders directly.)
"""

from startup import signals

if __name__ == "__main__":
    signals.at_once()  # before the slow imports

import sys
from pathlib import Path

from startup import blas  # noqa: F401  before mlx

from models.weights import canonical, read_tensors, to_mlx_layout
from training.checkpoint import read_metadata, write_tensors
from utils import UserError, command_parser, exit_status, replacing, say


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    parser = command_parser("scripts.export", __doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder or weights file")
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--method", choices=("coconut", "cot"), help="default: the method recorded in the checkpoint")
    options = parser.parse_args(arguments)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
