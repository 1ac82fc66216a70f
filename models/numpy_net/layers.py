"""Layers of a fully connected network, each a forward and its backward (the conventions are the package's)."""

import numpy as np

# --- affine ----------------------------------------------------------------------------------------------------------


def affine_forward(x, w, b):
    """out = x w + b.  x [N, d1, ..., dk] with d1*...*dk = D, w [D, M], b [M] -> out [N, M], cache."""
    return x.reshape(len(x), -1) @ w + b, (x, w)


def affine_backward(d_out, cache):
    """d_out [N, M] -> dx (x's shape), dw [D, M], db [M].

    out_nj = sum_i x_ni w_ij + b_j, hence  dL/dx = d_out w^T,  dL/dw = x^T d_out,  dL/db = sum over n of d_out.
    """
    x, w = cache
    return (d_out @ w.T).reshape(x.shape), x.reshape(len(x), -1).T @ d_out, d_out.sum(axis=0)


# --- activations: elementwise, any shape; each cache holds what makes its derivative cheapest -------------------------


def identity_forward(x):
    """out = x: the activation of a linear network."""
    return x, None


def identity_backward(d_out, cache):
    """dout/dx = 1."""
    return d_out


def relu_forward(x):
    """out = max(x, 0)."""
    return np.maximum(x, 0), x


def relu_backward(d_out, x):
    """dout/dx = 1 where x > 0, else 0 (at the kink x = 0 we take 0)."""
    return d_out * (x > 0)


def leaky_relu_forward(x, slope=0.01):
    """out = x where x > 0, else slope * x: a unit that is off still passes some gradient."""
    return np.where(x > 0, x, slope * x), (x, slope)


def leaky_relu_backward(d_out, cache):
    """dout/dx = 1 where x > 0, else slope."""
    x, slope = cache
    return np.where(x > 0, d_out, slope * d_out)


def sigmoid(x):
    """1 / (1 + e^-x), without overflow: the exponential is only taken of -|x|."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def sigmoid_forward(x):
    """out = 1 / (1 + e^-x)."""
    out = sigmoid(x)
    return out, out


def sigmoid_backward(d_out, out):
    """dout/dx = out (1 - out)."""
    return d_out * out * (1 - out)


def tanh_forward(x):
    """out = tanh x."""
    out = np.tanh(x)
    return out, out


def tanh_backward(d_out, out):
    """dout/dx = 1 - out^2."""
    return d_out * (1 - out**2)


# name, as a network's file records it -> (forward, backward)
ACTIVATIONS = {
    "identity": (identity_forward, identity_backward),
    "relu": (relu_forward, relu_backward),
    "leaky_relu": (leaky_relu_forward, leaky_relu_backward),
    "sigmoid": (sigmoid_forward, sigmoid_backward),
    "tanh": (tanh_forward, tanh_backward),
}
