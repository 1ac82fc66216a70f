"""Normalisation: outputs of mean 0 and variance 1, then scaled by gamma and shifted by beta, both learned.

The methods differ only in which numbers share a mean and a variance: a feature's in all examples (batch), an example's
in all features (layer) or in a group of them (group).  Pictures are [N, H, W, C]; their features are the channels, and
positions count as further examples (batch and, as in Keras, layer) or as further features (group).

With x_hat = (x - mean) / sqrt(var + eps) over the m numbers of one set, the derivatives through mean and var cancel to

    dL/dx = (d - mean(d) - x_hat * mean(d * x_hat)) / sqrt(var + eps),    d = dL/dx_hat,

both means over the set: what would change the set's mean or its spread is taken out (Ioffe and Szegedy 2015, section
3, simplified).
"""

import numpy as np

# --- the part they share ----------------------------------------------------------------------------------------------


def _normalise(x, axes, eps):
    """x with mean 0 and variance 1 over `axes` -> x_hat, and the mean, variance and 1 / sqrt(var + eps), axes kept."""
    mean = x.mean(axis=axes, keepdims=True)
    centred = x - mean
    var = np.square(centred).mean(axis=axes, keepdims=True)
    inverse_std = 1 / np.sqrt(var + eps)
    return centred * inverse_std, mean, var, inverse_std


def _normalise_backward(d_hat, x_hat, inverse_std, axes):
    """dL/dx_hat -> dL/dx, by the equation at the head of this file."""
    mean, slope = d_hat.mean(axis=axes, keepdims=True), (d_hat * x_hat).mean(axis=axes, keepdims=True)
    return (d_hat - mean - x_hat * slope) * inverse_std


def _scale_backward(d_out, x_hat):
    """dgamma and dbeta [D] of out = gamma x_hat + beta, where the last of d_out's axes is D."""
    rows = tuple(range(d_out.ndim - 1))
    return (d_out * x_hat).sum(axis=rows), d_out.sum(axis=rows)


# --- batch ------------------------------------------------------------------------------------------------------------


def running_statistics(features, dtype=np.float32):
    """{"mean", "var"} [features] of no data yet, for `batch_norm_forward` to keep."""
    return {"mean": np.zeros(features, dtype), "var": np.ones(features, dtype)}


def batch_norm_forward(x, gamma, beta, running=None, *, train, momentum=0.9, eps=1e-5):
    """x [N, D], gamma and beta [D] -> out [N, D], cache (Ioffe and Szegedy 2015, algorithm 1).

    In training each feature is normalised by its mean and (biased) variance over the batch, and `running`, {"mean",
    "var"} [D] each, follows them in place: running <- momentum * running + (1 - momentum) * batch.  In testing it is
    normalised by `running`, so that an example's answer does not depend on its company.  Raises `ValueError` when
    testing without it.
    """
    if not train:
        if running is None:
            raise ValueError("batch normalisation is tested with the running mean and variance: give them as `running`")
        inverse_std = 1 / np.sqrt(running["var"] + eps)
        x_hat = (x - running["mean"]) * inverse_std
        return gamma * x_hat + beta, (x_hat, gamma, inverse_std, False)
    x_hat, mean, var, inverse_std = _normalise(x, 0, eps)
    if running is not None:
        for name, batch in ("mean", mean[0]), ("var", var[0]):
            running[name] *= momentum
            running[name] += (1 - momentum) * batch
    return gamma * x_hat + beta, (x_hat, gamma, inverse_std, True)


def batch_norm_backward(d_out, cache):
    """d_out [N, D] -> dx [N, D], dgamma [D], dbeta [D]; after a forward in testing, mean and variance are constants."""
    x_hat, gamma, inverse_std, train = cache
    d_hat = d_out * gamma
    dx = _normalise_backward(d_hat, x_hat, inverse_std, 0) if train else d_hat * inverse_std
    return dx, *_scale_backward(d_out, x_hat)


def spatial_batch_norm_forward(x, gamma, beta, running=None, *, train, momentum=0.9, eps=1e-5):
    """x [N, H, W, C], gamma and beta [C] -> out, cache: each channel over all examples and positions (section 3.2)."""
    out, cache = batch_norm_forward(
        x.reshape(-1, x.shape[-1]), gamma, beta, running, train=train, momentum=momentum, eps=eps
    )
    return out.reshape(x.shape), cache


def spatial_batch_norm_backward(d_out, cache):
    """d_out [N, H, W, C] -> dx [N, H, W, C], dgamma [C], dbeta [C]."""
    dx, d_gamma, d_beta = batch_norm_backward(d_out.reshape(-1, d_out.shape[-1]), cache)
    return dx.reshape(d_out.shape), d_gamma, d_beta


# --- layer and group --------------------------------------------------------------------------------------------------


def layer_norm_forward(x, gamma, beta, *, eps=1e-5):
    """x [..., D], gamma and beta [D] -> out, cache: each example over its features (Ba et al. 2016, eq. 3)."""
    x_hat, _, _, inverse_std = _normalise(x, -1, eps)
    return gamma * x_hat + beta, (x_hat, gamma, inverse_std)


def layer_norm_backward(d_out, cache):
    """d_out [..., D] -> dx [..., D], dgamma [D], dbeta [D]."""
    x_hat, gamma, inverse_std = cache
    return _normalise_backward(d_out * gamma, x_hat, inverse_std, -1), *_scale_backward(d_out, x_hat)


def group_norm_forward(x, gamma, beta, groups, *, eps=1e-5):
    """x [N, D], gamma and beta [D] -> out, cache: each example over each of `groups` runs of D / groups features.

    Wu and He 2018, eqs. 1, 2 and 7.  Raises `ValueError` where the groups do not divide the features.
    """
    out, cache = spatial_group_norm_forward(x[:, None, None], gamma, beta, groups, eps=eps)
    return out[:, 0, 0], cache


def group_norm_backward(d_out, cache):
    """d_out [N, D] -> dx [N, D], dgamma [D], dbeta [D]."""
    dx, d_gamma, d_beta = spatial_group_norm_backward(d_out[:, None, None], cache)
    return dx[:, 0, 0], d_gamma, d_beta


def spatial_group_norm_forward(x, gamma, beta, groups, *, eps=1e-5):
    """x [N, H, W, C], gamma and beta [C] -> out, cache: as `group_norm_forward`, over a group's positions too."""
    n, h, w, c = x.shape
    if c % groups:
        raise ValueError(f"{c} channels cannot be divided into {groups} groups: take a divisor of {c}")
    x_hat, _, _, inverse_std = _normalise(x.reshape(n, h * w, groups, c // groups), (1, 3), eps)
    x_hat = x_hat.reshape(x.shape)
    return gamma * x_hat + beta, (x_hat, gamma, inverse_std)


def spatial_group_norm_backward(d_out, cache):
    """d_out [N, H, W, C] -> dx [N, H, W, C], dgamma [C], dbeta [C]."""
    x_hat, gamma, inverse_std = cache
    grouped = (len(d_out), d_out.shape[1] * d_out.shape[2], inverse_std.shape[2], -1)
    dx = _normalise_backward((d_out * gamma).reshape(grouped), x_hat.reshape(grouped), inverse_std, (1, 3))
    return dx.reshape(d_out.shape), *_scale_backward(d_out, x_hat)
