"""The cross-entropy and its gradient against float64."""

import mlx.core as mx
import numpy as np
import pytest

from models.ops import cross_entropy


def reference(logits, targets):
    """Losses and the gradient of their weighted sum, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    log_softmax = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    rows = np.arange(len(targets))
    gradient = np.exp(log_softmax)
    gradient[rows, targets] -= 1
    return -log_softmax[rows, targets], gradient


@pytest.mark.parametrize("n_columns", [50_260, 50_257, 512, 261, 7])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_losses_and_gradient_are_those_of_float64(n_columns, scale):
    """Also with rows whose length is no multiple of a block, or shorter than one."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((16, n_columns)) * scale).astype(np.float32)
    targets, weights = rng.integers(0, n_columns, 16), rng.random(16).astype(np.float32)
    losses, gradient = reference(logits, targets)

    def total(x):
        return (cross_entropy(x, mx.array(targets)) * mx.array(weights)).sum()

    np.testing.assert_allclose(cross_entropy(mx.array(logits), mx.array(targets)), losses, rtol=2e-6, atol=2e-6)
    _, ours = mx.value_and_grad(total)(mx.array(logits))
    np.testing.assert_allclose(ours, gradient * weights[:, None], rtol=2e-5, atol=1e-7)
