"""Update rules: each changes `params` (name -> array) in place, given gradients of the same names and shapes.

`rule(params, gradients, state, lr, **constants)`: `state`, a dict that is empty before the first step, keeps what the
rule remembers, as flat names ("velocity/W1", "step"), so that a checkpoint can hold it.  Formulas, constants and the
place of each epsilon are those of keras.optimizers; below, g is the gradient, and all operations are elementwise.
"""

import numpy as np


def _slot(state, kind, name, like, value=0.0):
    """What `state` keeps for parameter `name`: at the first step an array of `like`'s shape, filled with `value`."""
    key = f"{kind}/{name}"
    if key not in state:
        state[key] = np.full_like(like, value)
    return state[key]


def sgd(params, gradients, state, lr=None):
    """Gradient descent: w <- w - lr g.  It remembers nothing: `sgd(params, gradients, lr)` is the same."""
    lr = state if lr is None else lr
    for name, gradient in gradients.items():
        params[name] -= lr * gradient


def momentum(params, gradients, state, lr, *, momentum=0.9):
    """The heavy ball (Polyak 1964): v <- momentum v - lr g;  w <- w + v."""
    for name, gradient in gradients.items():
        velocity = _slot(state, "velocity", name, params[name])
        velocity *= momentum
        velocity -= lr * gradient
        params[name] += velocity


def nesterov(params, gradients, state, lr, *, momentum=0.9):
    """Nesterov's momentum: v <- momentum v - lr g;  w <- w + momentum v - lr g.

    `params` holds the point to which the velocity is about to carry, at which the gradient is thus taken (Sutskever et
    al. 2013, eqs. 3-4, in the variables of Bengio et al. 2013, section 3.5).
    """
    for name, gradient in gradients.items():
        velocity, step = _slot(state, "velocity", name, params[name]), lr * gradient
        velocity *= momentum
        velocity -= step
        params[name] += momentum * velocity - step


def adagrad(params, gradients, state, lr, *, initial_accumulator=0.1, epsilon=1e-7):
    """a <- a + g^2;  w <- w - lr g / sqrt(a + epsilon)  (Duchi et al. 2011, section 1.1).

    a starts from `initial_accumulator`: from 0 the first step would be lr in every coordinate, however small g.
    """
    for name, gradient in gradients.items():
        total = _slot(state, "accumulator", name, params[name], initial_accumulator)
        total += np.square(gradient)
        params[name] -= lr * gradient / np.sqrt(total + epsilon)


def rmsprop(params, gradients, state, lr, *, rho=0.9, epsilon=1e-7):
    """v <- rho v + (1 - rho) g^2;  w <- w - lr g / sqrt(v + epsilon)  (Tieleman and Hinton 2012, lecture 6e)."""
    for name, gradient in gradients.items():
        square = _slot(state, "square", name, params[name])
        square *= rho
        square += (1 - rho) * np.square(gradient)
        params[name] -= lr * gradient / np.sqrt(square + epsilon)


def adam(params, gradients, state, lr, *, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """m <- m + (1 - beta_1)(g - m);  v <- v + (1 - beta_2)(g^2 - v);  w <- w - alpha_t m / (sqrt(v) + epsilon),

    alpha_t = lr sqrt(1 - beta_2^t) / (1 - beta_1^t) at step t = 1, 2, ...: the form at the end of section 2 of Kingma
    and Ba 2015, in which epsilon stands beside the v that is not yet corrected ("epsilon hat").
    """
    state["step"] = step = int(state.get("step", 0)) + 1
    alpha = lr * (1 - beta_2**step) ** 0.5 / (1 - beta_1**step)
    for name, gradient in gradients.items():
        mean, square = (_slot(state, kind, name, params[name]) for kind in ("mean", "square"))
        mean += (1 - beta_1) * (gradient - mean)
        square += (1 - beta_2) * (np.square(gradient) - square)
        params[name] -= alpha * mean / (np.sqrt(square) + epsilon)


def adamw(params, gradients, state, lr, *, weight_decay=0.004, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    """First w <- w - lr weight_decay w for every parameter, then Adam's step (Loshchilov and Hutter 2019, algorithm 2).

    The decay goes round the division by sqrt(v), which would spare just the weights with large gradients.
    """
    for name in gradients:
        params[name] -= lr * weight_decay * params[name]
    adam(params, gradients, state, lr, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)
