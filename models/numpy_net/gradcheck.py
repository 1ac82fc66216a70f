"""Gradients checked against centred finite differences.

A derivative is the limit of (L(w + h) - L(w - h)) / 2h.  At a finite h its error is of order h^2 (truncation) plus
eps |L| / h (rounding, eps = 2.2e-16 in float64).  At h = 1e-5 both are about 1e-11, enough to tell a right gradient
from one that is nearly right.
"""

import dataclasses

import numpy as np

STEP = 1e-5
# |a - n| is divided by |a| + |n|, but never by less than this: below it, rounding alone (1e-11) would look like a
# relative error.  A gradient smaller than the floor is thus held to the absolute error `tolerance * FLOOR`.
FLOOR = 1e-3


@dataclasses.dataclass
class Check:
    """Worst disagreement over one array."""

    name: str
    size: int  # coordinates of the array
    checked: int  # coordinates compared
    skipped: int  # coordinates left out because a step of h crossed a kink
    relative: float  # max |a - n| / max(|a| + |n|, FLOOR)
    absolute: float  # max |a - n|
    norm: float  # |a - n| / (|a| + |n|) of the gradients as vectors, which needs no floor


def relative_error(a, n, floor=FLOOR):
    """Elementwise |a - n| / max(|a| + |n|, floor)."""
    return np.abs(a - n) / np.maximum(np.abs(a) + np.abs(n), floor)


def _length(vector):
    return np.sqrt(np.square(vector).sum())


def numerical_gradient(loss, array, *, step=STEP, coordinates=None, pieces=None):
    """Centred differences of `loss()`, a number that is computed from `array`, which is changed in place and restored.

    coordinates: flat indices to differentiate by (default: all).
    pieces: `pieces()` -> boolean array that tells on which side of its kink each ReLU stands.  Where it differs
    between w - h and w + h the difference quotient is no derivative, and the answer there is NaN.
    Returns the derivatives [len(coordinates)].
    """
    if array.dtype != np.float64:
        raise TypeError(f"finite differences need float64, not {array.dtype}: float32 leaves two right digits")
    flat = array.reshape(-1)
    if not np.shares_memory(flat, array):
        raise ValueError("the array must be contiguous, so that it can be changed in place")
    coordinates = range(flat.size) if coordinates is None else coordinates
    slopes = np.empty(len(coordinates))
    for row, i in enumerate(coordinates):
        centre = flat[i]
        flat[i] = centre + step
        above, side_above = loss(), pieces() if pieces else None
        flat[i] = centre - step
        below, side_below = loss(), pieces() if pieces else None
        flat[i] = centre
        slopes[row] = (above - below) / (2 * step)
        if pieces and not np.array_equal(side_above, side_below):
            slopes[row] = np.nan
    return slopes


def check(loss, arrays, gradients, *, samples=None, rng=None, step=STEP, pieces=None):
    """Compare `gradients` with the finite differences of `loss()`, array by array (both: name -> float64 array).

    samples: check that many random coordinates of each array (drawn by `rng`), for networks too large to check whole.
    Returns a list of `Check`.  Raises `ValueError` where a shape is wrong, or where kinks left nothing to compare.
    """
    checks = []
    for name, array in arrays.items():
        if gradients[name].shape != array.shape:
            raise ValueError(f"the gradient of {name} has shape {gradients[name].shape}, the array {array.shape}")
        coordinates = np.arange(array.size)
        if samples is not None and samples < array.size:
            coordinates = rng.choice(array.size, samples, replace=False)
        numerical = numerical_gradient(loss, array, step=step, coordinates=coordinates, pieces=pieces)
        smooth = ~np.isnan(numerical)
        if not smooth.any():
            raise ValueError(f"every coordinate of {name} crosses a kink: take other inputs or a smaller step")
        analytic, numerical = gradients[name].reshape(-1)[coordinates][smooth], numerical[smooth]
        difference = analytic - numerical
        checks.append(
            Check(
                name=name,
                size=array.size,
                checked=int(smooth.sum()),
                skipped=int((~smooth).sum()),
                relative=float(relative_error(analytic, numerical).max()),
                absolute=float(np.abs(difference).max()),
                norm=float(_length(difference) / max(_length(analytic) + _length(numerical), np.finfo(float).tiny)),
            )
        )
    return checks


def check_layer(forward, backward, arrays, rng, *, step=STEP, pieces=None):
    """Check a forward/backward pair by every array argument (`arrays`: name -> float64 array, in `forward`'s order).

    The loss is the sum of the output weighted by random numbers, so that no two errors can cancel, and none can hide
    behind a derivative of zero.  The output at the start is taken off first, number by number: no derivative changes,
    and rounding is that of one output, not of their sum.  Returns a list of `Check`.
    """
    out, cache = forward(*arrays.values())
    out = out.copy()  # an identity hands back the array that is about to be changed
    upstream = rng.standard_normal(out.shape)
    answer = backward(upstream, cache)
    gradients = dict(zip(arrays, answer if isinstance(answer, tuple) else (answer,), strict=True))

    def loss():
        return ((forward(*arrays.values())[0] - out) * upstream).sum()

    return check(loss, arrays, gradients, step=step, pieces=pieces)
