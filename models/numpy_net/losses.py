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


def svm(scores, labels, margin=1.0):
    """Multiclass hinge loss (Weston and Watkins 1999): L = 1/N sum_n sum_{c != y_n} max(0, s_c - s_{y_n} + margin).

    scores [N, C], labels int [N] -> L, dL/dscores [N, C].  Each class within the margin of the right one has the
    slope 1/N, and the right one minus the number of those; at the kink itself, where a term is 0, we take 0.
    """
    rows = np.arange(len(scores))
    short = np.maximum(scores - scores[rows, labels][:, None] + margin, 0)  # by how much each falls short of the margin
    short[rows, labels] = 0
    d_scores = (short > 0).astype(scores.dtype)
    d_scores[rows, labels] = -d_scores.sum(axis=1)
    return short.sum() / len(scores), d_scores / len(scores)


def softmax_squared_error(scores, labels):
    """Squared distance of the probabilities from the one-hot truth (Brier 1950): L = 1/NC sum_nc (p_nc - [c = y_n])^2.

    scores [N, C], labels int [N] -> L, dL/dscores.  With u = dL/dp = 2 (p - onehot) / NC, softmax's own derivative
    makes dL/ds = p (u - sum_c p_c u_c): nearly 0 where the network is sure, even of a wrong answer.
    """
    rows, p = np.arange(len(scores)), softmax(scores)
    away = p.copy()
    away[rows, labels] -= 1
    u = 2 * away / away.size
    return np.square(away).mean(), p * (u - (p * u).sum(axis=1, keepdims=True))


def focal(scores, labels, gamma=2.0):
    """Cross-entropy turned to what is not learned yet (Lin et al. 2017, eq. 4): L = -1/N sum_n (1 - p)^gamma log p.

    scores [N, C], labels int [N]; p is the probability of the truth -> L, dL/dscores, that of cross-entropy times
    (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p.
    """
    rows, log_p = np.arange(len(scores)), log_softmax(scores)
    d_scores, log_true = np.exp(log_p), log_p[rows, labels]
    p, wrong = np.exp(log_true), -np.expm1(log_true)  # wrong = 1 - p, exact where p is nearly 1
    d_scores[rows, labels] = -wrong
    # (1 - p)^(gamma - 1) has no bound where gamma < 1 and p = 1; the product with p - onehot = 0 has the limit 0
    inner = gamma * p * np.maximum(wrong, np.finfo(wrong.dtype).tiny) ** (gamma - 1) * log_true
    factor = wrong**gamma - inner
    return -(wrong**gamma * log_true).mean(), d_scores * factor[:, None] / len(scores)


def label_smoothing(scores, labels, amount=0.1):
    """Cross-entropy with `amount` of the truth shared among all classes (Szegedy et al. 2016, section 7).

    scores [N, C], labels int [N]; the targets are t = (1 - amount) onehot + amount / C -> L = -1/N sum_nc t log p,
    dL/dscores = (p - t) / N.  Its least value is the entropy of t, at p = t, not 0 at infinite scores.
    """
    log_p = log_softmax(scores)
    targets = np.full_like(log_p, amount / scores.shape[1])
    targets[np.arange(len(scores)), labels] += 1 - amount
    return -(targets * log_p).sum(axis=1).mean(), (np.exp(log_p) - targets) / len(scores)


def expected_calibration_error(p, labels, bins=15):
    """How far confidence is from accuracy (Guo et al. 2017, eq. 3): p [N, C] probabilities, labels int [N] -> 0..1.

    The answers are sorted into equal bins of their confidence, the largest probability: ECE is the mean, over all
    answers, of |accuracy - mean confidence| of the answer's bin.
    """
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    which = np.minimum((confidence * bins).astype(int), bins - 1)  # a confidence of 1 is in the last bin
    return float(np.abs(np.bincount(which, right - confidence)).sum() / len(labels))
