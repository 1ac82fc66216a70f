"""Losses on raw scores.  Each returns (mean loss, dL/dscores), fused: the composed derivatives cancel, and with them
every division by a probability that has underflowed to zero."""

import numpy as np

from models.numpy_net.layers import sigmoid


def log_softmax(scores):
    """scores [..., C] -> log softmax over the last axis, same shape.

    Softmax is unchanged when a constant is taken from every score; with the maximum taken, no exponential exceeds 1
    and their sum is at least 1, so that neither overflow nor log 0 can happen, whatever the scores.
    """
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(scores):
    """scores [..., C] -> probabilities, same shape; p_c = e^{s_c} / sum_k e^{s_k}."""
    return np.exp(log_softmax(scores))


def softmax_cross_entropy(scores, labels):
    """scores [N, C], labels int [N] in 0..C-1 -> L = -1/N sum_n log p_{n, y_n}, dL/dscores = (p - onehot(y)) / N."""
    rows = np.arange(len(scores))
    log_p = log_softmax(scores)
    d_scores = np.exp(log_p)
    d_scores[rows, labels] -= 1
    return -log_p[rows, labels].mean(), d_scores / len(scores)


def bce_with_logits(scores, targets):
    """scores and targets (0..1) of one shape -> binary cross-entropy of sigmoid(scores), mean over all elements.

    L = -t log s(z) - (1 - t) log(1 - s(z)) = max(z, 0) - t z + log(1 + e^{-|z|});  dL/dz = s(z) - t.
    """
    if np.shape(scores) != np.shape(targets):  # [N, 1] against [N] would broadcast to [N, N] without a word
        raise ValueError(f"scores {np.shape(scores)} and targets {np.shape(targets)} must have the same shape")
    loss = np.maximum(scores, 0) - targets * scores + np.log1p(np.exp(-np.abs(scores)))
    return loss.mean(), (sigmoid(scores) - targets) / scores.size
