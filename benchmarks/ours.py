"""This project's side of the benchmarks: model, streams, and facts about the process. Only workers import it.

Import it before anything else that imports mlx: it loads OpenBLAS.
"""

import argparse
import os

import workload  # noqa: F401  puts the repository's root on the path

from startup import blas, settings

import mlx.core as mx

from coconut import Coconut
from models.gpt2 import GPT2, GPT2Config
from parallel.streams import on_gpu, use_device, use_streams
from training.memory import limit_memory


def new_model(options: argparse.Namespace) -> Coconut:
    """Make a model of the given size with random weights."""
    mx.random.seed(0)
    sizes = {"n_layer": options.layers, "n_embd": options.width, "n_head": options.heads, "n_inner": options.inner}
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), options.dropout)
    return Coconut(GPT2(GPT2Config(vocab_size=options.vocabulary, **sizes, **rates)))


def start_streams(n: int, precision: str = "float32") -> None:
    """Compute on n CPU streams, as run.py does with COCONUT_STREAMS=n; on a GPU in float32, or in tf32."""
    if precision == "tf32":
        settings.no_graphs()
    else:
        settings.exact_products()
    settings.long_graphs()
    settings.own_kernels()
    use_device(os.environ.get("COCONUT_DEVICE"))
    limit_memory()
    if use_streams(str(n)) > 1:
        settings.lift_graph_width()


def facts() -> dict:
    """Return the device, the BLAS and the peak memory of MLX in GB."""
    device = str(mx.device_info().get("device_name", "CPU")) if on_gpu() else "CPU"
    return {"device": device, "blas": blas.describe(), "peak_mlx_gb": round(mx.get_peak_memory() / 1e9, 3)}
