"""Convolution and pooling, each from its definition (naive) and fast.

Pictures x are [N, H, W, C], kernels w [kh, kw, C, F], biases b [F], outputs [N, H', W', F], as in Keras.  `pad` is the
number of zeros on each side, or "same" for Keras's rule: H' = H / stride rounded up, an odd zero last.  `dilation` is
the distance of a kernel's taps.  Rows and columns at the end that a stride does not reach are not read.

A convolution is a matrix product: write each window as a row of kh kw C numbers, and the outputs are these rows times
the kernels as a matrix [kh kw C, F].  The three versions differ in how many rows they write at once: none (naive, four
loops), all (im2col), or those of a few pictures, which stay in the cache (`conv_forward`, the fast one).
"""

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

CHUNK = 2**21  # bytes of windows written at a time: what the level-2 caches of two cores hold


# --- geometry ---------------------------------------------------------------------------------------------------------


def _span(taps, dilation):
    """(height, width) covered by a kernel of `taps` = (kh, kw)."""
    return tuple(dilation * (n - 1) + 1 for n in taps)


def _padded(x, w, stride, pad, dilation):
    """x with zeros around each picture, and the number of them before its first (row, column)."""
    if x.ndim != 4 or w.ndim != 4 or x.shape[3] != w.shape[2]:
        raise ValueError(f"pictures {x.shape} and kernels {w.shape} do not fit: need [N, H, W, C] and [kh, kw, C, F]")
    if not len(x):
        raise ValueError(f"pictures {x.shape}: an empty batch cannot be convolved, give one picture at least")
    sizes, spans = x.shape[1:3], _span(w.shape[:2], dilation)
    if pad == "same":
        total = [max((math.ceil(n / stride) - 1) * stride + span - n, 0) for n, span in zip(sizes, spans, strict=True)]
    else:
        total = [2 * pad, 2 * pad]
    if any(n + zeros < span for n, zeros, span in zip(sizes, total, spans, strict=True)):
        raise ValueError(f"a kernel that covers {spans} is larger than pictures {sizes} with pad {pad}: pad more")
    before = tuple(zeros // 2 for zeros in total)
    return np.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in total), (0, 0))), before


def _windows(x, taps, stride=1, dilation=1):
    """View [N, H', W', kh, kw, C] of all windows of padded pictures x [N, H, W, C]: nothing is copied."""
    every = sliding_window_view(x, _span(taps, dilation), axis=(1, 2))  # [N, H - .. + 1, W - .. + 1, C, span, span]
    return every[:, ::stride, ::stride, :, ::dilation, ::dilation].transpose(0, 1, 2, 4, 5, 3)


def _seen(x, i, j, size, stride):
    """View [N, H', W', C] of the pixels of x [N, H, W, C] at (i, j) of each of the `size` = (H', W') windows."""
    rows, columns = (slice(start, start + stride * (n - 1) + 1, stride) for start, n in zip((i, j), size, strict=True))
    return x[:, rows, columns]


# --- convolution from its definition ----------------------------------------------------------------------------------


def conv_naive_forward(x, w, b, stride=1, pad=0, dilation=1):
    """out[n, i, j, f] = sum over the window at (i, j) of x[n] * w[..., f], plus b[f] -> out [N, H', W', F], cache."""
    padded, before = _padded(x, w, stride, pad, dilation)
    windows = _windows(padded, w.shape[:2], stride, dilation)
    out = np.empty((*windows.shape[:3], len(b)), np.result_type(x, w))
    for n, i, j, f in np.ndindex(out.shape):
        out[n, i, j, f] = (windows[n, i, j] * w[..., f]).sum() + b[f]
    return out, (padded, w, before, x.shape, stride, dilation)


def conv_naive_backward(d_out, cache):
    """d_out [N, H', W', F] -> dx, dw, db: each output hands its derivative to its window and its kernel."""
    padded, w, (top, left), shape, stride, dilation = cache
    d_padded, dw, db = np.zeros_like(padded), np.zeros_like(w), np.zeros_like(w[0, 0, 0])
    high, wide = _span(w.shape[:2], dilation)
    for n, i, j, f in np.ndindex(d_out.shape):
        rows = slice(i * stride, i * stride + high, dilation)
        columns = slice(j * stride, j * stride + wide, dilation)
        d_padded[n, rows, columns] += w[..., f] * d_out[n, i, j, f]
        dw[..., f] += padded[n, rows, columns] * d_out[n, i, j, f]
        db[f] += d_out[n, i, j, f]
    return d_padded[:, top : top + shape[1], left : left + shape[2]], dw, db


# --- one matrix of all windows ----------------------------------------------------------------------------------------


def conv_im2col_forward(x, w, b, stride=1, pad=0, dilation=1):
    """As `conv_naive_forward`: the windows as a matrix [N H' W', kh kw C], which is kept for the way back."""
    padded, before = _padded(x, w, stride, pad, dilation)
    windows = _windows(padded, w.shape[:2], stride, dilation)
    columns = windows.reshape(-1, w[..., 0].size)  # here they are copied: kh kw times the pictures
    out = columns @ w.reshape(-1, w.shape[3]) + b
    return out.reshape(*windows.shape[:3], -1), (columns, w, before, padded.shape, x.shape, stride, dilation)


def conv_im2col_backward(d_out, cache):
    """d_out [N, H', W', F] -> dx, dw, db: the way back of a matrix product, then of the copying, tap by tap."""
    columns, w, (top, left), padded_shape, shape, stride, dilation = cache
    d = d_out.reshape(-1, d_out.shape[3])
    d_windows = (d @ w.reshape(-1, w.shape[3]).T).reshape(*d_out.shape[:3], *w.shape[:3])
    d_padded = np.zeros(padded_shape, d_windows.dtype)
    for i, j in np.ndindex(w.shape[:2]):
        seen = _seen(d_padded, i * dilation, j * dilation, d_out.shape[1:3], stride)
        seen += d_windows[:, :, :, i, j]
    return d_padded[:, top : top + shape[1], left : left + shape[2]], (columns.T @ d).reshape(w.shape), d.sum(axis=0)


# --- a few pictures at a time: the fast one ---------------------------------------------------------------------------


def _parts(windows):
    """Slices of the batch whose windows take about CHUNK bytes."""
    pictures = max(1, CHUNK // windows[0].nbytes)
    return [slice(first, first + pictures) for first in range(0, len(windows), pictures)]


def conv_forward(x, w, b, stride=1, pad=0, dilation=1):
    """As `conv_naive_forward`.  What is kept for the way back is x alone: copying windows again costs less than memory.

    A window's rows are runs of kw C neighbouring numbers of x, since channels come last: they are copied whole.
    """
    padded, before = _padded(x, w, stride, pad, dilation)
    windows, kernels = _windows(padded, w.shape[:2], stride, dilation), w.reshape(-1, w.shape[3])
    out = np.empty((*windows.shape[:3], w.shape[3]), np.result_type(x, w))
    for part in _parts(windows):
        rows = out[part].reshape(-1, w.shape[3])
        np.matmul(windows[part].reshape(len(rows), -1), kernels, out=rows)
        rows += b
    return out, (padded, w, before, x.shape, stride, dilation)


def conv_backward(d_out, cache):
    """d_out [N, H', W', F] -> dx, dw, db.

    The windows' derivatives are made as planes, one for each tap and channel: adding a plane to the shifted picture
    runs along whole rows, where with channels last it would stop after C numbers.
    """
    padded, w, (top, left), shape, stride, dilation = cache
    windows, kernels = _windows(padded, w.shape[:2], stride, dilation), w.reshape(-1, w.shape[3])
    dx, dw = np.empty(shape, d_out.dtype), np.zeros(kernels.shape, d_out.dtype)
    for part in _parts(windows):
        d = d_out[part].reshape(-1, w.shape[3])
        dw += windows[part].reshape(len(d), -1).T @ d
        taps = (kernels @ d.T).reshape(*w.shape[:3], *d_out[part].shape[:3])  # [kh, kw, C, n, H', W']
        d_padded = np.zeros((w.shape[2], taps.shape[3], *padded.shape[1:3]), d_out.dtype).transpose(1, 2, 3, 0)
        for i, j in np.ndindex(w.shape[:2]):
            seen = _seen(d_padded, i * dilation, j * dilation, d_out.shape[1:3], stride)
            seen += taps[i, j].transpose(1, 2, 3, 0)
        dx[part] = d_padded[:, top : top + shape[1], left : left + shape[2]]
    d = d_out.reshape(-1, w.shape[3])
    return dx, dw.reshape(w.shape), np.ones(len(d), d.dtype) @ d  # a product with ones sums faster than sum()


# --- pooling ----------------------------------------------------------------------------------------------------------


def _pooled(x, size, stride):
    """(H', W') and the stride, `size` unless given; raises `ValueError` where a window is larger than the pictures."""
    if x.ndim != 4 or min(x.shape[1:3]) < size:
        raise ValueError(f"a window of {size} does not fit into pictures {x.shape}: need [N, H, W, C], H and W >= size")
    stride = size if stride is None else stride
    return tuple((n - size) // stride + 1 for n in x.shape[1:3]), stride


def max_pool_naive_forward(x, size, stride=None):
    """out[n, i, j, c] = max over the size x size window at (i, j) of x[n, :, :, c] -> out [N, H', W', C], cache.

    stride: the distance of neighbouring windows, `size` by default.
    """
    out_size, stride = _pooled(x, size, stride)
    out = np.empty((len(x), *out_size, x.shape[3]), x.dtype)
    for n, i, j, c in np.ndindex(out.shape):
        out[n, i, j, c] = x[n, i * stride : i * stride + size, j * stride : j * stride + size, c].max()
    return out, (x, size, stride)


def max_pool_naive_backward(d_out, cache):
    """d_out [N, H', W', C] -> dx: the derivative goes to the largest number of the window, the first among equals."""
    x, size, stride = cache
    dx = np.zeros_like(x)
    for n, i, j, c in np.ndindex(d_out.shape):
        window = x[n, i * stride : i * stride + size, j * stride : j * stride + size, c]
        row, column = np.unravel_index(window.argmax(), window.shape)
        dx[n, i * stride + row, j * stride + column, c] += d_out[n, i, j, c]
    return dx


def max_pool_reshape_forward(x, size):
    """As `max_pool_naive_forward` where the windows tile the pictures: their rows and columns become axes of their own.

    Raises `ValueError` where they do not.
    """
    n, h, w, c = x.shape
    if h % size or w % size:
        raise ValueError(f"windows of {size} do not tile pictures of {h} x {w}: use max_pool_forward")
    tiles = x.reshape(n, h // size, size, w // size, size, c)
    out = tiles.max(axis=(2, 4))
    return out, (tiles, out)


def max_pool_reshape_backward(d_out, cache):
    """d_out [N, H', W', C] -> dx; equal largest numbers share the derivative: the first of them is not looked for."""
    tiles, out = cache
    winners = tiles == out[:, :, None, :, None]
    share = d_out / winners.sum(axis=(2, 4), dtype=d_out.dtype)
    n, rows, size, columns, _, c = tiles.shape
    return (winners * share[:, :, None, :, None]).reshape(n, rows * size, columns * size, c)


def max_pool_forward(x, size, stride=None):
    """As `max_pool_naive_forward`, fast for any size and stride: the largest of size^2 shifted pictures."""
    out_size, stride = _pooled(x, size, stride)
    out = _seen(x, 0, 0, out_size, stride).copy()
    for i, j in np.ndindex(size, size):
        np.maximum(out, _seen(x, i, j, out_size, stride), out=out)
    return out, (x, out, size, stride)


def max_pool_backward(d_out, cache):
    """d_out [N, H', W', C] -> dx, as `max_pool_naive_backward`."""
    x, out, size, stride = cache
    dx, left = np.zeros_like(x), d_out.copy()  # what each window has still to give
    for i, j in np.ndindex(size, size):
        given = left * (_seen(x, i, j, out.shape[1:3], stride) == out)
        left -= given
        seen = _seen(dx, i, j, out.shape[1:3], stride)
        seen += given
    return dx


def avg_pool_forward(x, size, stride=None):
    """out[n, i, j, c] = mean over the size x size window at (i, j) of x[n, :, :, c] -> out [N, H', W', C], cache."""
    out_size, stride = _pooled(x, size, stride)
    out = np.zeros((len(x), *out_size, x.shape[3]), x.dtype)
    for i, j in np.ndindex(size, size):
        out += _seen(x, i, j, out_size, stride)
    return out / size**2, (x.shape, size, stride)


def avg_pool_backward(d_out, cache):
    """d_out [N, H', W', C] -> dx: every number of a window gets the same part of its derivative."""
    shape, size, stride = cache
    dx, part = np.zeros(shape, d_out.dtype), d_out / size**2
    for i, j in np.ndindex(size, size):
        seen = _seen(dx, i, j, d_out.shape[1:3], stride)
        seen += part
    return dx
