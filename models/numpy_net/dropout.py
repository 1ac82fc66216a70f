"""Dropout (Srivastava et al. 2014), inverted: the scaling is done in training, so that testing is left as it is."""

import numpy as np


def dropout_forward(x, keep, rng, *, train):
    """x of any shape -> out, cache.  In training each number is kept with probability `keep`, else set to 0.

    What is kept is divided by `keep`, so that the expectation of the output is x; in testing out = x.  The mask is
    drawn from `rng`: the same generator state gives the same mask.  Raises `ValueError` unless 0 < keep <= 1.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep = {keep} is no probability of keeping a unit: give a number above 0 and up to 1")
    if not train or keep == 1:
        return x, None
    draws = rng.random(x.shape, dtype=x.dtype if x.dtype == np.float32 else np.float64)
    mask = ((draws < keep) / keep).astype(x.dtype)
    return x * mask, mask


def dropout_backward(d_out, mask):
    """d_out -> dx: what was dropped passes no gradient, what was kept passes it divided by `keep`."""
    return d_out if mask is None else d_out * mask
