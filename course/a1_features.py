"""Assignment 1 - Features: edges and hues, computed by hand, lift every classifier above what it makes of raw pixels.

Paper:     Dalal, Triggs 2005, "Histograms of Oriented Gradients for Human Detection", CVPR 2005
Task:      classify 32x32 photographs by linear SVM, softmax and two-layer network, on pixels and on features
Shapes:    image [N,32,32,3] -> orientations [N,4,4,9] and hues [N,10] -> features [N,154], standardised, and a bias
Reference: CIFAR-10 validation, 155 numbers an image: linear SVM about 44 %, two-layer network about 60 % at best
Run:       python -m course.a1_features --preset cpu --seed 0
Departs:   1. gradients are centred differences, hue bins equal parts of the circle: both as in scikit-image
           2. pictures without colour have no hue: there the histogram is of brightness, and the run says so
"""

# %%
import dataclasses
import functools
import itertools

import numpy as np
from matplotlib import pyplot as plt
from skimage.color import rgb2hsv
from skimage.feature import hog as skimage_hog
from sklearn.metrics import confusion_matrix

from course import a1_two_layer_net as two
from course import core
from models.numpy_net import linear

REFERENCE = {
    "features_svm_validation": (44.0, "%", "CS231n 2018, assignment 1, features notebook, linear SVM, CIFAR-10"),
    "features_network_validation": (60.0, "%", "CS231n 2018, assignment 1, features notebook, best network, CIFAR-10"),
}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the weights and the order of the examples
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 49_000  # first training images
    validation: int = 1_000  # the next ones: every choice is made on them
    test: int = 1_000  # first test images: each classifier answers them once; they choose nothing
    cell: int = 8  # pixels on the side of a cell
    orientations: int = 9  # bins over 180 degrees
    hues: int = 10  # bins over the circle of colours
    steps: int = 6_000  # of the linear classifiers, 250 images each
    hidden: int = 1_000  # units of the networks
    epochs: int = 30  # of the networks


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "train": 1_500, "validation": 500, "test": 500, "steps": 150, "hidden": 50,
              "epochs": 5},
    "cpu": {"stand_in": "fashion_mnist", "steps": 2_000, "hidden": 400, "epochs": 12},
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## Where the edges are, and which way they run
# A pixel says how bright one place is; what makes a horse a horse is where brightness changes. On the grey picture $g$,
#
# $$g_x = g(r, c{+}1) - g(r, c{-}1), \quad g_y = g(r{+}1, c) - g(r{-}1, c), \quad
#   m = \sqrt{g_x^2 + g_y^2}, \quad \theta = \operatorname{atan2}(g_y, g_x) \bmod 180° \quad(1)$$
#
# (0 along the border). Modulo 180°: a dark horse before a bright sky has the same edges as a bright one before a dark.


# %%
def grey(x):
    """uint8 [N, H, W, C] -> brightness [N, H, W] in 0..1; colours by the weights of ITU-R BT.709."""
    x = x.astype(np.float32) / 255
    return x[..., 0] if x.shape[-1] == 1 else x @ np.array([0.2125, 0.7154, 0.0721], np.float32)


def oriented_gradients(g):
    """Eq. 1: brightness [N, H, W] -> magnitude and angle (degrees, 0 <= angle < 180), both [N, H, W]."""
    g_x, g_y = np.zeros_like(g), np.zeros_like(g)
    # exercise: eq. 1
    g_x[:, :, 1:-1] = g[:, :, 2:] - g[:, :, :-2]
    g_y[:, 1:-1] = g[:, 2:] - g[:, :-2]
    magnitude, angle = np.sqrt(g_x**2 + g_y**2), np.rad2deg(np.arctan2(g_y, g_x)) % 180
    # end exercise
    return magnitude, angle


# %% [markdown]
# ## Histograms in cells
# Each cell of 8x8 pixels keeps a histogram: bin $b$ of $B$ adds up the magnitudes of the pixels whose angle is in
# $[b, b{+}1) \cdot 180° / B$, divided by the pixels of the cell (2). A shift by a pixel hardly changes it. Full HOG
# also takes 2x2 neighbouring cells as a block $v$ (blocks overlap) and makes it of length 1: contrast drops out.
#
# $$v \leftarrow \frac{v}{\sqrt{|v|^2 + \epsilon^2}}, \quad v \leftarrow \min(v, 0.2), \quad
#   v \leftarrow \frac{v}{\sqrt{|v|^2 + \epsilon^2}} \quad(3)$$


# %%
def histograms(values, bins, cell, weights=None):
    """values [N, H, W] in [0, 1) -> sums of `weights` (default 1) by cell and bin, over the cell's pixels
    [N, H // cell, W // cell, bins]; what no whole cell covers is left out."""
    n, rows, columns = len(values), values.shape[1] // cell, values.shape[2] // cell
    whole = np.s_[:, : rows * cell, : columns * cell]
    values, weights = values[whole], None if weights is None else weights[whole].ravel()
    # exercise: the number of each pixel's cell, counted over all pictures, times `bins`, plus its bin; np.bincount
    down, right = np.arange(rows * cell) // cell, np.arange(columns * cell) // cell
    place = (np.arange(n)[:, None, None] * rows + down[:, None]) * columns + right
    slot = place * bins + np.minimum((values * bins).astype(int), bins - 1)
    table = np.bincount(slot.ravel(), weights, minlength=n * rows * columns * bins)
    # end exercise
    return (table / cell**2).astype(np.float32).reshape(n, rows, columns, bins)


def normalised_blocks(table, epsilon=1e-5):
    """Eq. 3: histograms [N, R, C, B] -> blocks [N, R-1, C-1, 4 B]."""
    rows, columns = table.shape[1] - 1, table.shape[2] - 1
    v = np.concatenate([table[:, i : i + rows, j : j + columns] for i in (0, 1) for j in (0, 1)], axis=-1)
    for ceiling in (0.2, np.inf):
        v = np.minimum(v / np.sqrt((v**2).sum(axis=-1, keepdims=True) + epsilon**2), ceiling)
    return v


def hog(x, cell=8, orientations=9, blocks=False):
    """Eq. 2, in `blocks` eq. 3 too: uint8 [N, H, W, C] -> histograms of oriented gradients [N, D]."""
    magnitude, angle = oriented_gradients(grey(x))
    table = histograms(angle / 180, orientations, cell, magnitude)
    return (normalised_blocks(table) if blocks else table).reshape(len(x), -1)


# %% [markdown]
# ## Colour
# Hue is the place on the circle red - yellow - green - cyan - blue - magenta: with $M$ and $m$ the largest and smallest
# of $R, G, B$ and $d = M - m$, $6h$ is $(G - B)/d \bmod 6$ if red is the largest, $2 + (B - R)/d$ if green is,
# $4 + (R - G)/d$ if blue is (4); without colour, $d = 0$, $h$ is 0. Saturation is $d / M$. A histogram of hues knows
# nothing of place or shape: ships and planes are blue around, deer and frogs green.


# %%
def hue_and_saturation(x):
    """Eq. 4: uint8 [N, H, W, 3] -> hue in [0, 1) and saturation in 0..1, both [N, H, W]."""
    x = x.astype(np.float32) / 255
    r, g, b = np.moveaxis(x, -1, 0)
    largest, d = x.max(axis=-1), np.ptp(x, axis=-1)
    # exercise: eq. 4; where two are equally large, red goes before green before blue
    whole = np.where(d > 0, d, 1)
    hue = np.where(largest == g, 2 + (b - r) / whole, 4 + (r - g) / whole)
    hue = np.where(largest == r, (g - b) / whole % 6, hue) / 6
    hue[d == 0] = 0
    # end exercise
    return hue % 1, d / np.maximum(largest, 1e-6)


def colours(x, bins=10, regions=1, weighted=False):
    """Histogram of hue (of brightness where pictures are grey) in regions^2 squares of the picture [N, D]; weighted: by
    saturation, since the hue of what is nearly grey is noise."""
    hue, saturation = (grey(x), None) if x.shape[-1] == 1 else hue_and_saturation(x)
    return histograms(hue, bins, x.shape[1] // regions, saturation if weighted else None).reshape(len(x), -1)


def thumbnail(x, side=4):
    """The picture shrunk to side x side by averaging [N, side^2 C]: where which colour is, roughly."""
    cell = x.shape[1] // side
    x = x[:, : side * cell, : side * cell].reshape(len(x), side, cell, side, cell, -1)
    return (x.mean(axis=(2, 4), dtype=np.float32) / 255).reshape(len(x), -1)


def extract_features(x, functions, chunk=1000):
    """uint8 [N, H, W, C] -> the answers [N, D_i] of all feature functions side by side [N, D], float32."""
    # exercise: `chunk` pictures at a time, so that little is held in memory
    pieces = (x[first : first + chunk] for first in range(0, len(x), chunk))
    return np.concatenate([np.concatenate([function(piece) for function in functions], axis=1) for piece in pieces])
    # end exercise


def check(x):
    """Largest differences from scikit-image over the pictures x; of hues, around the circle."""
    shown = grey(x)
    theirs = [skimage_hog(image, 9, (8, 8), (2, 2), block_norm="L2-Hys") for image in shown]
    found = {"hog_difference": float(np.abs(hog(x, blocks=True) - theirs).max())}
    if x.shape[-1] == 3:
        apart = np.abs(hue_and_saturation(x)[0] - rgb2hsv(x)[..., 0])
        found["hue_difference"] = float(np.minimum(apart, 1 - apart).max())
    return found


# %% [markdown]
# ## The same classifiers on three inputs
# Pixels; the 154 numbers; and *something extra*: half as wide cells in normalised blocks, hues in the four quarters
# (weighted by saturation), a thumbnail. Every number is standardised by the training images' mean and deviation: then
# thousandths count as much as tens. For the linear classifiers a column of ones is the bias.

# %%
SETTINGS = {  # learning rates and regularisation strengths tried; for the network, those found by hand on each input
    "SVM": list(itertools.product((0.001, 0.01), (0.1, 1.0))),
    "softmax": list(itertools.product((0.01, 0.1), (0.001, 0.03))),
    "network": {"pixels": (0.01, 0.001), "features": (0.1, 0.0003), "extra": (0.02, 0.01)},
}


def inputs(cfg):
    """The feature functions of each input, by its name."""
    edges = functools.partial(hog, cell=cfg.cell, orientations=cfg.orientations)
    fine = functools.partial(hog, cell=cfg.cell // 2, orientations=cfg.orientations, blocks=True)
    quarters = functools.partial(colours, bins=cfg.hues, regions=2, weighted=True)
    return {"pixels": [lambda x: x.reshape(len(x), -1)], "features": [edges, functools.partial(colours, bins=cfg.hues)],
            "extra": [fine, quarters, thumbnail]}  # fmt: skip


def standardised(images, functions):
    """Features of the training, validation and test images, standardised, a column of ones last."""
    parts = (extract_features(x, functions) for x in (images.x_train, images.x_val, images.x_test))
    return linear.prepare(*parts, scale=True)


def fit_linear(loss, x, images, cfg, lr, reg):
    """Train a linear classifier on x[0], the first of `standardised` -> weights [D, C], accuracies in per cent."""
    classes, rng = int(images.y_train.max()) + 1, np.random.default_rng((cfg.seed, 1))
    w, _ = linear.train(loss, x[0], images.y_train, classes, lr=lr, reg=reg, steps=cfg.steps, batch=250, rng=rng)
    return w, {"train": linear.accuracy(w, x[0][:5000], images.y_train[:5000]),
               "validation": linear.accuracy(w, x[1], images.y_val)}  # fmt: skip


def compare(name, images, cfg):
    """All classifiers on the input `name` -> rows of the table, test answers by classifier."""
    x, rows, answers = standardised(images, inputs(cfg)[name]), [], {}
    for kind, loss in ("SVM", linear.svm), ("softmax", linear.softmax):
        tried = {setting: fit_linear(loss, x, images, cfg, *setting) for setting in SETTINGS[kind]}
        best = max(tried, key=lambda setting: tried[setting][1]["validation"])
        rows.append({"classifier": kind, "lr": best[0], "reg": best[1]} | tried[best][1])
        answers[kind] = linear.predict(tried[best][0], x[2])
    lr, reg = SETTINGS["network"][name]
    recipe = two.Recipe(cfg.hidden, None, 1.0, lr, 0.03 ** (1 / cfg.epochs), reg, 200, cfg.epochs, 0.9, keep=0.5)
    train, held, test = (part[:, :-1] for part in x)  # a network has biases of its own
    examples, held, classes = (train, images.y_train), (held, images.y_val), tried[best][0].shape[1]
    params, history = two.train(recipe, examples, held, classes, cfg.seed, name)
    answers["network"] = two.predict(params, test)
    rows.append({"classifier": "network", "lr": lr, "reg": reg, "train": history["train_accuracy"][-1],
                 "validation": history["validation_accuracy"][-1]})  # fmt: skip
    for row in rows:
        row["test"] = 100 * float((answers[row["classifier"]] == images.y_test).mean())
        print(f"{row['classifier']} on {name}: {row['validation']:.1f} % on validation")
    return {"rows": [{"input": name, "numbers": train.shape[1]} | row for row in rows], "answers": answers}


# %% [markdown]
# ## What each part is worth
# The linear SVM once more, with one feature at a time and with other numbers of bins. The pictures are read once, into
# many narrow bins: a wide bin is the sum of its narrow ones.

# %%
NARROW = {"orientations": 36, "hues": 300}


def ablation(images, cfg):
    """Validation accuracy of the SVM by features -> rows."""
    edges = functools.partial(hog, cell=cfg.cell, orientations=NARROW["orientations"])
    tables = [[extract_features(x, [function]) for x in (images.x_train, images.x_val)]
              for function in (edges, functools.partial(colours, bins=NARROW["hues"]))]  # fmt: skip
    rows = []
    for wide in (9, 10), (9, 0), (0, 10), (2, 10), (4, 10), (18, 10), (9, 3), (9, 30), (9, 100):
        parts = [[t.reshape(len(t), -1, narrow // bins).sum(axis=2) for t in table]
                 for bins, narrow, table in zip(wide, NARROW.values(), tables, strict=True) if bins]  # fmt: skip
        x = linear.prepare(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)), scale=True)
        _, accuracies = fit_linear(linear.svm, x, images, cfg, 0.01, 0.1)
        rows.append({"orientations": wide[0], "hues": wide[1], "numbers": x[0].shape[1] - 1} | accuracies)
        print("SVM on {orientations} orientations, {hues} hues: {validation:.1f} %".format(**rows[-1]), flush=True)
    return rows


# %% [markdown]
# ## What is gained, and what is still wrong
# By class: on CIFAR-10 edges help the deer, bird and horse most, and hardly the ship and the plane, which a blue
# background gives away to pixels too. And do the errors make sense? The question can be asked of the
# numbers: of the pictures taken for another class, how many lie nearer to that class's mean than to their own class's?
# A classifier that knew only the classes' means would have to make these errors; the network is better than that one.


# %%
def nearer_to_the_wrong(x, y, x_test, y_test, said):
    """Of the wrong answers `said` the per cent that lie nearer to that class's mean than to the true class's."""
    means = np.stack([x[y == label].mean(axis=0) for label in range(y.max() + 1)])
    wrong = said != y_test
    to_said, to_true = (np.linalg.norm(x_test[wrong] - means[label[wrong]], axis=1) for label in (said, y_test))
    return 100 * float((to_said < to_true).mean())


def draw_features(x, labels):
    """Some pictures, their edges, and the orientations of their cells as scikit-image draws them."""
    drawn = [skimage_hog(image, visualize=True, cells_per_block=(1, 1))[1] for image in grey(x)]
    scaled = [image / image.max() for image in (*oriented_gradients(grey(x))[0], *drawn)]
    return core.plots.image_grid([*x, *scaled], labels + [""] * len(scaled), columns=len(x), cell=1.3,
                                 row_labels=["picture", "edges", "orientations"])  # fmt: skip


def draw_classes(truth, answers, labels):
    """Share of each class that is recognised, by input."""
    figure, axes = plt.subplots(figsize=(9, 3))
    for i, (name, said) in enumerate(answers.items()):
        share = [100 * (said[truth == label] == label).mean() for label in range(len(labels))]
        axes.bar(np.arange(len(labels)) + 0.27 * (i - 1), share, 0.25, label=name)
    axes.set(xticks=range(len(labels)), xticklabels=labels, ylabel="recognised, %", title="two-layer network, test")
    axes.legend(ncols=3)
    return figure


def draw_errors(x, truth, said, labels, columns=8):
    """For each class the first test pictures wrongly taken for it, under their true class."""
    wrong = [np.flatnonzero((said == label) & (truth != label)) for label in range(len(labels))]
    full = [label for label, rows in enumerate(wrong) if len(rows) >= columns]  # the others have too few to show
    rows = np.concatenate([wrong[label][:columns] for label in full])
    return core.plots.image_grid(x[rows], [labels[y] for y in truth[rows]], columns=columns, cell=1.1,
                                 row_labels=[f"taken for\n{labels[label]}" for label in full])  # fmt: skip


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("a1_features", options, cfg) as run:
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        images, labels = core.data.three_way(data, cfg.train, cfg.validation, cfg.test), data.labels
        if not 2 <= cfg.cell <= images.x_train.shape[1] // 2 or cfg.test < 20 * len(labels):
            raise core.InputError(f"--cell {cfg.cell} --test {cfg.test}: cells of 2 to half a side, 20 tests a class")
        if images.x_train.shape[-1] == 1:
            print("grey pictures: histograms of brightness stand where those of hue would")
        arms = {name: run.once(name, functools.partial(compare, name, images, cfg)) for name in inputs(cfg)}
        bins = run.once("bins", lambda: ablation(images, cfg))
        rows, truth = [row for arm in arms.values() for row in arm["rows"]], images.y_test
        said = {name: np.array(arm["answers"]["network"]) for name, arm in arms.items()}
        x = standardised(images, inputs(cfg)["features"])
        nearer = nearer_to_the_wrong(x[0], images.y_train, x[2], truth, said["features"])
        run.record |= {"data": data.provenance, "tables": {"classifiers": rows, "bins": bins}}
        found = {f"{row['input']}_{row['classifier'].lower()}_{part}": row[part]
                 for part in ("test", "validation") for row in rows}  # fmt: skip
        first = {name: found[name] for name in ("features_svm_test", "features_network_test", "extra_network_test")}
        checks = check(images.x_train[:20]) | {"errors_nearer_to_the_wrong_class": nearer}
        run.record["metrics"] = first | found | checks
        run.figure("features", draw_features(images.x_train[:8], [labels[y] for y in images.y_train[:8]]))
        shown = {f"{row['input']}, {row['classifier']}": row["test"] for row in rows}
        run.figure("test_accuracy", core.plots.bars(shown, ylabel="test accuracy, %"))
        shown = {f"{row['orientations']} orientations, {row['hues']} hues": row["validation"] for row in bins}
        run.figure("bins", core.plots.bars(shown, ylabel="validation accuracy of the SVM, %"))
        run.figure("classes", draw_classes(truth, said, labels))
        run.figure("errors", draw_errors(images.x_test, truth, np.array(arms["features"]["answers"]["SVM"]), labels))
        for name, answers in said.items():
            figure = core.plots.confusion(confusion_matrix(truth, answers), labels, title=f"network on {name}, test")
            run.figure(f"confusion_{name}", figure)
    return run.record


if __name__ == "__main__":
    core.cli(main)
