"""Figures of capsules.  `draw`: capsules [N,10,16], labels [N,K] -> pixels [N,K,side * side], one drawing a label."""

import numpy as np
from matplotlib import pyplot as plt

from course import core


def learning(capsnet, cnn):
    """Learning curves from the histories of the two."""
    error = {
        name: 100 * (1 - np.array(next(past[key] for key in past if "accuracy" in key)))
        for name, past in (("capsnet", capsnet), ("cnn", cnn))
    }
    loss = {"capsnet: margin loss": capsnet["lengths_loss"], "cnn: cross-entropy": cnn["loss"]}
    drawn = {"capsnet": capsnet["pixels_loss"]}
    groups = {"training error, %": error, "loss": loss, "squared error of a drawing": drawn}
    return core.plots.panels(groups)


def routing(trace):
    """Coupling entropy, and the lengths it leads to, from rows of `entropy`, `true` and `rival`, one a round."""
    column = {name: [row[name] for row in trace] for name in trace[0]}
    lengths = {"of the true digit": column["true"], "of its longest rival": column["rival"]}
    groups = {"coupling entropy / log 10": {"primary capsules": column["entropy"]}, "length of the capsule": lengths}
    return core.plots.panels(groups, xlabel="routing round")


def ablation(arms, tests):
    """Test error in per cent (`arms`: routing rounds -> error) on `tests` images, with a binomial standard error."""
    spread = {name: np.sqrt(value * (100 - value) / tests) for name, value in arms.items()}
    title, ylabel = "Routing rounds (plain: no reconstruction)", "test error, % (+- standard error)"
    return core.plots.bars(arms, errors=spread, title=title, ylabel=ylabel)


def robustness(strengths, arms):
    """Accuracy in per cent over the strength of affine maps (`scenes.affine`); `arms`: model -> a value a strength."""
    title = "Trained on shifted digits, tested on affine ones"
    strength = "strength (1: turned by up to 20°, sheared by 0.2, scaled by 0.8 to 1.2)"
    return core.plots.curves(arms, x=strengths, title=title, ylabel="accuracy, %", xlabel=strength)


def dimensions(draw, capsules, labels):
    """Each dimension of the capsule of digit labels[n] in capsules[n] moved by -0.25 to 0.25 in steps of 0.05, as in
    figure 4 of Sabour et al. 2017: capsules [N,J,D], labels [N] -> N mosaics of D rows."""
    steps, size = np.arange(-5, 6) * 0.05, capsules.shape[-1]
    figure, axes = plt.subplots(1, len(labels), figsize=(4.4 * len(labels), 6.2))
    for axis, capsule, label in zip(np.ravel(axes), capsules, labels, strict=True):
        moved = np.tile(capsule, (size, len(steps), 1, 1))
        for dimension in range(size):
            moved[dimension, :, label, dimension] += steps
        moved = moved.reshape(-1, *capsule.shape)
        drawn = draw(moved, np.full((len(moved), 1), label))
        side = round(drawn.shape[-1] ** 0.5)
        mosaic = drawn.reshape(size, -1, side, side).swapaxes(1, 2).reshape(size * side, -1)
        axis.imshow(mosaic, cmap="gray_r", vmin=0, vmax=1)
        axis.grid(False)
        axis.set(title=f"the capsule of a {label}", xlabel="added to the dimension", ylabel="dimension",
                 xticks=(np.arange(0, 11, 5) + 0.5) * side, xticklabels=["-0.25", "0", "+0.25"],
                 yticks=(np.arange(size) + 0.5) * side, yticklabels=range(1, size + 1))  # fmt: skip
    return figure


def reconstructions(draw, images, capsules, found, labels, names, columns=12):
    """Test images and what the decoder draws from the capsule that was found; in red the wrong ones."""
    wrong = np.flatnonzero(found != labels)[: columns // 3]
    shown = np.concatenate([np.flatnonzero(found == labels)[: columns - len(wrong)], wrong])
    drawn = draw(capsules[shown], found[shown, None])
    return core.plots.image_grid(
        np.concatenate([images[shown], drawn.reshape(images[shown].shape)]),
        [names[i] for i in labels[shown]] + [names[i] for i in found[shown]],
        columns=len(shown),
        row_labels=["image,\ntrue class", "drawn,\nclass found"],
        colours=["black" if right else "red" for right in found[shown] == labels[shown]] * 2,
    )


def overlaps(draw, images, capsules, labels, pixels, absent, columns=8):
    """Two digits in two colours: the picture, its digits, what their capsules draw, and what an absent digit's draws.

    images [N,H,W,1], labels [N,2], pixels [N,2,H*W], absent [N,1].
    """
    images, capsules, labels, pixels, absent = (a[:columns] for a in (images, capsules, labels, pixels, absent))
    blue, orange = np.array([0.0, 0.45, 0.85]), np.array([1.0, 0.5, 0.0])

    def coloured(pair):  # [N,2,H*W] -> [N,H,W,3]
        mixed = pair[:, 0, :, None] * blue + pair[:, 1, :, None] * orange
        return np.clip(mixed, 0, 1).reshape(*images.shape[:3], 3)

    grey = draw(capsules, absent).reshape(images.shape)
    rows = [np.repeat(images, 3, -1), coloured(pixels), coloured(draw(capsules, labels)), np.repeat(grey, 3, -1)]
    titles = [f"{a} and {b}" for a, b in labels] + [""] * 2 * len(images) + [f"asked for {a}" for a in absent[:, 0]]
    beside = ["picture", "its digits", "drawn from\ntheir capsules", "from an absent\ndigit's capsule"]
    return core.plots.image_grid(np.concatenate(rows), titles, columns=len(images), row_labels=beside)
