"""Nearest neighbours in Euclidean distance, without a loop: one matrix product does nearly all of the work."""

import numpy as np


def _squared_lengths(rows):
    return np.einsum("nd,nd->n", rows, rows)


def distances(a, b):
    """Euclidean distances of every row of a [A, D] to every row of b [B, D] -> [A, B], in their dtype.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, so that the D differences of a pair are never formed.  For rows that nearly
    coincide the three terms cancel: the answer is exact only to about sqrt(eps) times their length, and rounding can
    take the square below 0, where it is held.
    """
    squares = a @ b.T
    squares *= -2
    squares += _squared_lengths(a)[:, None]
    squares += _squared_lengths(b)
    return np.sqrt(np.maximum(squares, 0, out=squares), out=squares)


def nearest(queries, examples, k):
    """The k nearest of examples [N, D] to each of queries [M, D] -> distances [M, k], rows of `examples` [M, k].

    Nearest first.  Raises `ValueError` unless 1 <= k <= N.
    """
    if not 1 <= k <= len(examples):
        raise ValueError(f"k = {k} neighbours cannot be had: give a number from 1 to {len(examples)}, the examples")
    # |query|^2 is the same for every example: it is added to the k chosen ones only
    rank = queries @ examples.T
    rank *= -2
    rank += _squared_lengths(examples)
    rows = np.argpartition(rank, k - 1, axis=1)[:, :k]
    ranks = np.take_along_axis(rank, rows, axis=1)
    order = np.argsort(ranks, axis=1, kind="stable")
    squares = np.take_along_axis(ranks, order, axis=1) + _squared_lengths(queries)[:, None]
    return np.sqrt(np.maximum(squares, 0)), np.take_along_axis(rows, order, axis=1)
