"""GPT-2 in MLX: the model (gpt2.py), its operations (ops.py) and cache (cache.py), the compute type (precision.py),
weights files (weights.py), and building a model from one (loading.py).

Importing it warns once where matrix products would run on the slow BLAS of MLX's Linux wheels. The room does not
replace that BLAS itself: only an entry point can do so, before mlx is loaded.
"""

import ctypes
import sys
import warnings

from parallel.streams import on_gpu


def _warn_of_slow_blas() -> None:
    if sys.platform != "linux" or "startup.blas" in sys.modules or hasattr(ctypes.CDLL(None), "cblas_sgemm"):
        return
    if not on_gpu():
        warnings.warn(
            "matrix products run 20 to 30 times slower on MLX's own BLAS; "
            "add `from startup import blas` before anything that imports mlx",
            RuntimeWarning,
            stacklevel=3,
        )


_warn_of_slow_blas()
