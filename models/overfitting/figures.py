"""Day 3's figures: each function takes what an experiment found and returns a matplotlib Figure."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

TERMS = {"error": "expected error", "variance": "variance", "bias2": "bias²", "noise": "noise (known)"}


def band(axes, x, values, label, **style):
    """The mean of values [S,T] over x [T], with one population standard deviation to each side."""
    values = np.asarray(values, dtype=float)
    mean, spread = values.mean(axis=0), values.std(axis=0)
    (line,) = axes.plot(x, mean, marker=".", label=label, **style)
    axes.fill_between(x, mean - spread, mean + spread, alpha=0.2, color=line.get_color(), linewidth=0)


def double_descent(mlp, features, noise):
    """Two panels of the error against the number of parameters, as a multiple of what the labels ask for.

    `mlp`, `features`: name of a line -> [seeds, sizes], and under "x" the sizes [T].
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    titles = "MLPs, one hidden layer", "random features, least squares"
    for axes, title, lines in zip(panels, titles, (mlp, features), strict=True):
        axes.axvline(1, color="#888888", linestyle="--", linewidth=1)
        axes.text(1.1, 97, "interpolation\nthreshold", va="top", fontsize=8)
        axes.axhline(100 * noise, color="#bbbbbb", linestyle=":", linewidth=1)
        for name, values in lines.items():
            if name != "x":
                band(axes, lines["x"], values, name)
        axes.set(title=title, xscale="log", ylim=(0, 100), xlabel="parameters / (examples x classes)")
        axes.legend(loc="upper left", fontsize=8)
    panels[0].set_ylabel("error, %")
    panels[1].set_xlabel("features / examples")
    return figure


def decompositions(groups):
    """A panel for each of `groups`: title -> (axis label, x [T], terms [T] dicts of `decompose`)."""
    figure, panels = plt.subplots(1, len(groups), figsize=(3.5 * len(groups), 3.5), sharey=True)
    for axes, (title, (label, x, terms)) in zip(panels, groups.items(), strict=True):
        for key, name in TERMS.items():
            axes.plot(x, [row[key] for row in terms], marker=".", label=name, zorder=3 if key == "error" else 2,
                      color="black" if key == "error" else None)  # fmt: skip
        axes.set(title=title, xlabel=label)
        if max(x) > 20:
            axes.set_xscale("log", base=2)
    panels[0].set_ylabel("squared error")
    panels[0].legend(fontsize=8)
    return figure


def ladder(x, lines, xlabel):
    """Error against capacity or training examples: name -> [seeds, T]; lines named "... training" are dashed."""
    figure, axes = plt.subplots(figsize=(5.4, 3.6))
    colours = {}
    for name, values in lines.items():
        group = name.rpartition(", ")[0]
        colour = colours.setdefault(group, f"C{len(colours)}")
        band(axes, x, values, name, color=colour, linestyle="--" if name.endswith("training") else "-")
    if max(x) > 20:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=xlabel, ylabel="error, %", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


def cures(rows):
    """Gap and test error, with deviations, of the `rows` of the table of cures."""
    names = [row["cures"] for row in rows][::-1]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 0.8 + 0.28 * len(rows)), sharey=True)
    parts = (panels[0], "gap", "validation error - training error, points"), (panels[1], "test", "test error, %")
    for axes, key, label in parts:
        values, spread = ([row[name] for row in rows][::-1] for name in (key, f"{key}_std"))
        colours = ["#E69F00" if name in ("none", "all five") else "#0072B2" for name in names]
        axes.barh(names, values, xerr=spread, capsize=2, color=colours, error_kw={"linewidth": 1})
        axes.set(xlabel=label)
        axes.grid(visible=False, axis="y")
        for place, (value, wide) in enumerate(zip(values, spread, strict=True)):
            axes.text(max(value, 0) + wide, place, f" {value:.1f}", va="center", fontsize=8)
        axes.margins(x=0.12, y=0.02)
    return figure


def losses(history):
    """Validation loss over the epochs: name -> [seeds, epochs]."""
    figure, axes = plt.subplots(figsize=(5.4, 3.6))
    for name, values in history.items():
        values = np.asarray(values)
        epochs = np.arange(1, values.shape[1] + 1)
        (line,) = axes.plot(epochs, values.mean(axis=0), label=name)
        low, high = values.mean(axis=0) - values.std(axis=0), values.mean(axis=0) + values.std(axis=0)
        axes.fill_between(epochs, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
    axes.set(xlabel="epoch", ylabel="validation cross-entropy")
    axes.legend(fontsize=8)
    return figure


def orders(found):
    """Dropout and batch normalisation: name -> ratios [layers, seeds], test and mended errors [seeds]."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 2.6), sharey=True)
    place, groups = np.arange(len(found))[::-1], len(next(iter(found.values()))["ratios"])
    for layer in range(groups):
        values = np.array([row["ratios"][layer] for row in found.values()])
        left.barh(place + 0.2 - 0.4 * layer / max(groups - 1, 1), values.mean(axis=1), 0.36, xerr=values.std(axis=1),
                  capsize=2, label=f"normalisation {layer + 1}")  # fmt: skip
    for offset, key, label in (0.2, "test", "running statistics of training"), (-0.2, "mended", "taken anew"):
        values = np.array([row[key] for row in found.values()])
        right.barh(place + offset, values.mean(axis=1), 0.36, xerr=values.std(axis=1), capsize=2, label=label)
    left.axvline(1, color="black", linewidth=1)
    left.set(yticks=place, yticklabels=list(found), xlabel="variance met in test mode / noted in training")
    right.set(xlabel="test error, %")
    for axes in (left, right):
        axes.grid(visible=False, axis="y")
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=2)
    return figure


def uncertainty(entropy, wrong, curves):
    """Predictive entropy where the answer is right and where it is wrong; error after refusing the least certain.

    entropy [N], wrong bool [N]; `curves`: name -> error in per cent [T] after refusing 0 ... 50 %.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3))
    edges = np.linspace(0, max(entropy.max(), 1e-3), 31)
    for name, part in ("right", ~wrong), ("wrong", wrong):
        if part.any():
            left.hist(entropy[part], edges, weights=np.full(part.sum(), 100 / part.sum()), alpha=0.6,
                      label=f"{name} answers ({part.sum():,})")  # fmt: skip
    left.set(xlabel="predictive entropy, nats", ylabel="share of these answers, %")
    left.legend(fontsize=8)
    for name, values in curves.items():
        right.plot(np.linspace(0, 50, len(values)), values, label=name)
    right.set(xlabel="refused, the least certain first, %", ylabel="error on the others, %", ylim=(0, None))
    right.legend(fontsize=8)
    return figure
