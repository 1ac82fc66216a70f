"""Weights to start from: variances chosen so that signals keep their size from layer to layer."""

import numpy as np


def he(rng, inputs, outputs, dtype=np.float32):
    """[inputs, outputs], normal, variance 2 / inputs, since ReLU halves a signal's power (He et al. 2015, eq. 10)."""
    return (rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)).astype(dtype)


def xavier(rng, inputs, outputs, dtype=np.float32):
    """[inputs, outputs], uniform in +-sqrt(6 / (inputs + outputs)): for activations with slope 1 at 0, a compromise
    between the sizes of signals going forward and gradients going back (Glorot and Bengio 2010, eq. 16)."""
    limit = np.sqrt(6 / (inputs + outputs))
    return rng.uniform(-limit, limit, (inputs, outputs)).astype(dtype)


def normal(rng, inputs, outputs, scale, dtype=np.float32):
    """[inputs, outputs], normal, standard deviation `scale`, whatever the width: what the two above improve on."""
    return (rng.standard_normal((inputs, outputs)) * scale).astype(dtype)
