"""Figures that several units draw: each function takes data and returns a matplotlib Figure."""

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogFormatter, MaxNLocator

matplotlib.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.max_open_warning": 0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "font.size": 9,
        "axes.titlesize": 10,
        "legend.frameon": False,
        # Okabe and Ito's palette: told apart by colour-blind readers too
        "axes.prop_cycle": matplotlib.cycler(
            color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
        ),
    }
)


def close(figure):
    """Free a figure that has been saved."""
    plt.close(figure)


def _lines(axes, series, x):
    """Draw on `axes` the `series`, over `x`, as `curves` takes them."""
    for name, values in series.items():
        values = np.atleast_2d(np.asarray(values, dtype=float))
        own = x.get(name) if isinstance(x, dict) else x
        at = np.arange(1, values.shape[1] + 1) if own is None else np.asarray(own)
        mean, spread = values.mean(axis=0), values.std(axis=0)
        (line,) = axes.plot(at, mean, label=name, marker="o" if len(at) < 3 else None)
        if len(values) > 1:
            axes.fill_between(at, mean - spread, mean + spread, alpha=0.2, color=line.get_color(), linewidth=0)
    if x is None:  # epochs, rounds, steps
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


class _Plain(LogFormatter):
    """0.2 and 20000, not 2e-01 and 2e+04."""

    def _num_to_string(self, x, vmin, vmax):
        return f"{x:.10g}"

    def set_locs(self, locs=None):
        super().set_locs(locs)
        if self._sublabels and 1 < len(self._sublabels) < 9:  # Matplotlib's are 2, 3, 4 and 6: they touch
            self._sublabels = {1, 2, 5}


def _plain_numbers(axis):
    """Label an axis, if it is logarithmic, with plain numbers; between the powers of ten where it shows at most two."""
    if axis.get_scale() != "log":
        return
    axis.set_major_formatter(_Plain())
    axis.set_minor_formatter(_Plain(minor_thresholds=(2, 0.7)))


def curves(series, *, title="", xlabel="epoch", ylabel="", x=None, yscale="linear", xscale="linear", size=(5.4, 3.4)):
    """Lines over a common axis.

    `series`: name -> values [T], or [S, T] for S seeds, drawn as the mean with a band of one standard deviation.
    `x`: the axis [T] (default 1..T), or name -> axis where the lines do not share one.
    """
    figure, axes = plt.subplots(figsize=size)
    _lines(axes, series, x)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale=yscale, xscale=xscale)
    _plain_numbers(axes.xaxis)
    axes.legend()
    return figure


def panels(groups, *, title="", xlabel="epoch", size=(3.6, 2.9), x=None, legend="each", **options):
    """Several `curves` side by side; `groups`: panel title -> series, and `x`, as `curves` takes them.

    `legend`: "each" panel has its own, or "side": one for all, to the right; `options` (yscale, ylim, ...) go to every
    panel's axes.
    """
    figure, axes = plt.subplots(1, len(groups), figsize=(size[0] * len(groups), size[1]), squeeze=False)
    for axis, (name, series) in zip(axes[0], groups.items(), strict=True):
        _lines(axis, series, x)
        axis.set(title=name, xlabel=xlabel, **options)
        _plain_numbers(axis.xaxis)
        _plain_numbers(axis.yaxis)
        if legend == "each":
            axis.legend()
    if legend == "side":
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(title)
    return figure


def histograms(counts, edges, *, title="", xlabel="", ylabel="count", yscale="log", size=(5.4, 3.4)):
    """Histograms over common bins, as outlines; `counts`: name -> [K], `edges` [K + 1], both as np.histogram's."""
    figure, axes = plt.subplots(figsize=size)
    for i, (name, values) in enumerate(counts.items()):
        axes.stairs(values, edges, label=name, color=f"C{i}", linewidth=1.4)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale=yscale)
    axes.legend()
    return figure


def image_grid(images, titles=None, *, columns=8, title="", row_labels=None, colours=None, cell=1.0):
    """Pictures in rows of `columns`.

    `images`: [N, H, W], [N, H, W, 1] or [N, H, W, 3], 0..255 or 0..1 (float pictures are scaled by their own range only
    where they leave it).  `titles`, `colours`: one a picture (its caption and the caption's colour); `row_labels`: one
    a row.
    """
    rows = -(-len(images) // columns)
    height = cell * (1.3 if titles is not None else 1.05)
    figure, axes = plt.subplots(rows, columns, figsize=(cell * columns, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for i, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        image = np.squeeze(np.asarray(image))
        top = 255 if image.dtype == np.uint8 else max(1.0, float(image.max()))
        axis.imshow(image / top, cmap="gray", vmin=min(0.0, float(image.min()) / top), vmax=1, interpolation="nearest")
        if titles is not None:
            axis.set_title(titles[i], fontsize=7, color=colours[i] if colours is not None else "black", pad=2)
    for axis, label in zip(axes[:, 0], row_labels or [], strict=False):
        axis.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle(title)
    return figure


def predictions(images, captions, right, *, title="", columns=8):
    """Pictures under what a model says of them; the captions where `right` [N] is false are in colour."""
    colours = ["black" if yes else "#D55E00" for yes in right]
    title = f"{title} (wrong in colour)" if not all(right) else title
    return image_grid(images, captions, colours=colours, columns=columns, cell=1.25, title=title)


def confusion(matrix, labels, *, title=""):
    """Confusion matrix [C, C], rows the true class; colour is the share of the row, the number is the count."""
    matrix = np.asarray(matrix)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 1.6 + 0.42 * len(labels)
    figure, axes = plt.subplots(figsize=(side + 0.5, side))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.grid(False)
    for i, j in np.argwhere(matrix):
        axes.text(
            j,
            i,
            str(matrix[i, j]),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if share[i, j] > 0.5 else "black",
        )
    ticks = np.arange(len(labels))
    axes.set(xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="true", title=title, yticklabels=labels)
    axes.set_xticklabels(labels, rotation=45, ha="right", rotation_mode="anchor")
    return figure


def bars(values, *, title="", ylabel="", errors=None, form=None, size=None):
    """A bar a name (`values`: name -> number) with its value beside it; `errors`: name -> half-width of an interval.

    form: of the value, as "{:.1f}"; by default three digits, or the whole number where that has more.
    """
    figure, axes = plt.subplots(figsize=size or (5.6, 0.9 + 0.24 * len(values)))
    names = list(values)[::-1]  # the first on top
    widths = [errors[name] for name in names] if errors else None
    drawn = axes.barh(names, [values[name] for name in names], xerr=widths, capsize=3)
    forms = [form or ("{:,.0f}" if abs(values[name]) >= 1000 else "{:.3g}") for name in names]
    labels = [one.format(values[name]) for one, name in zip(forms, names, strict=True)]
    axes.bar_label(drawn, labels=labels, fontsize=8, padding=3)
    axes.margins(x=0.1 if min(values.values()) >= 0 else 0.2)  # the value of a negative bar stands to its left
    axes.grid(visible=False, axis="y")
    axes.set(title=title, xlabel=ylabel)
    return figure


def pareto(points, *, xlabel, ylabel, title="", xscale="log", numbered=False):
    """Named points (`points`: name -> (cost, value)) and the front of those that none beats in both.

    numbered: numbers at the points and the names, those on the front in bold, beside the axes, where there are many.
    """
    figure, axes = plt.subplots(figsize=(8, 4.6) if numbered else (5.4, 3.6))
    best, front = -np.inf, {}
    for name, (cost, value) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if value > best:
            best = value
            front[name] = cost, value
    axes.step(*zip(*front.values(), strict=True), where="post", color="#bbbbbb", zorder=1)
    for i, (name, (cost, value)) in enumerate(points.items(), 1):
        colour = {"color": "C0" if name in front else "#999999"} if numbered else {}
        axes.scatter(cost, value, zorder=2, label=f"{i}  {name}", **colour)
        axes.annotate(i if numbered else name, (cost, value), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale=xscale)
    _plain_numbers(axes.xaxis)
    axes.margins(x=0.18, y=0.15)
    if numbered:
        listed = figure.legend(loc="outside right center", fontsize=8)
        for text, name in zip(listed.get_texts(), points, strict=True):
            text.set_fontweight("bold" if name in front else "normal")
    return figure
