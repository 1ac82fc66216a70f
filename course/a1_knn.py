"""Assignment 1 - k-Nearest Neighbours: 5,000 remembered pictures name 28 of 100 rightly, and 49,000 name 33.

Paper:     Cover, Hart 1967, "Nearest neighbor pattern classification", IEEE Trans. Information Theory 13, 21-27
Task:      name a picture as the k most similar training pictures are named; k chosen by 5-fold cross-validation
Shapes:    pictures [A,32,32,3] and [B,32,32,3] -> rows [A,3072] and [B,3072] -> distances [A,B] -> votes [A,10]
Reference: CIFAR-10 accuracy 27 % at k = 1, above 28 % at the best k (CS231n assignment 1, knn notebook: 5,000 / 500)
Run:       python -m course.a1_knn --preset cpu --seed 0
Departs:   the first 5,000 and 500 pictures need not be the assignment's, and 500 are few: the chosen k also names all
           10,000 test pictures (`test_accuracy_all`), and 1,000 by all 49,000 (`test_accuracy_large`)
"""

# %%
import dataclasses
import time

import numpy as np
from matplotlib import pyplot as plt
from scipy.fft import dct
from scipy.spatial.distance import cdist
from sklearn.neighbors import KNeighborsClassifier

from course import core
from models.numpy_net import knn

REFERENCE = {
    "test_accuracy": (28, "%", "CS231n 2018, assignment 1, knn notebook, best k, 'above 28 %', CIFAR-10, 5,000 / 500"),
    "test_accuracy_k1": (27, "%", "CS231n 2018, assignment 1, knn notebook, k = 1: 'about 27 %', CIFAR-10"),
}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the random pixels and cubes of the note on dimension
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 5_000  # pictures that are remembered, and divided into the folds
    test: int = 500  # pictures for the figures at the end
    folds: int = 5  # of the cross-validation
    ks: tuple[int, ...] = (1, 3, 5, 8, 10, 12, 15, 20, 50, 100)  # numbers of neighbours tried
    timed: int = 50  # of the training pictures: compared with all of them in three ways
    compared: int = 250  # of the training pictures: named by four times as many others, under L1 and L2
    large_train: int = 49_000  # pictures remembered for the last figure
    large_test: int = 1_000  # pictures for the last figure


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "train": 1_000, "test": 100, "timed": 10, "compared": 50,
              "large_train": 4_000, "large_test": 200},
    "cpu": {"stand_in": "fashion_mnist"}, "full": {},
}  # fmt: skip


# %% [markdown]
# ## Distances
# Nothing is learned: the training pictures are kept, and all the work is done when a picture is to be named. It is
# compared with each of them, pixel by pixel, by the Euclidean distance (L2)
#
# $$d(a, b) = \sqrt{\textstyle\sum_i (a_i - b_i)^2} \quad(1)$$
#
# Eq. 1 three times: with loops over both sets; with one loop, by broadcasting; with none, by multiplying out:
#
# $$|a - b|^2 = |a|^2 - 2\, a \cdot b + |b|^2 \quad(2)$$
#
# and the only term that belongs to pairs, $a \cdot b$, is for all pairs together one matrix product.


# %%
def distances_two_loops(a, b):
    """Eq. 1.  a [A, D], b [B, D] -> [A, B]."""
    out = np.empty((len(a), len(b)))
    # exercise: one distance at a time
    for i in range(len(a)):
        for j in range(len(b)):
            out[i, j] = np.sqrt(np.sum((a[i] - b[j]) ** 2))
    # end exercise
    return out


def distances_one_loop(a, b):
    """Eq. 1 for one row of a [A, D] and all of b [B, D] at a time -> [A, B]."""
    out = np.empty((len(a), len(b)))
    # exercise: one row at a time
    for i in range(len(a)):
        out[i] = np.sqrt(np.sum((a[i] - b) ** 2, axis=1))
    # end exercise
    return out


def squares(a, b):
    """Eq. 2.  a [A, D], b [B, D] -> squared distances [A, B], which rounding may have taken a little below 0."""
    # exercise: three terms, of shapes [A, 1], [A, B] and [B], and no loop
    return np.sum(a**2, axis=1)[:, None] - 2 * (a @ b.T) + np.sum(b**2, axis=1)
    # end exercise


def distances(a, b):
    """Eqs. 1 and 2: a [A, D], b [B, D] -> [A, B]."""
    # exercise: the root of eq. 2, and a guard for what rounding has taken below 0
    return np.sqrt(np.maximum(squares(a, b), 0))
    # end exercise


# %% [markdown]
# The version with one loop need not beat the one with two: it writes $B \times D$ differences to memory and reads them
# again. The product of eq. 2 wins by far: it uses every number that it has fetched for many pairs.
#
# Eq. 2 has a price. For a picture and its copy it takes large numbers from each other, to leave 0 or, after rounding,
# something like $\pm 10^{-12}$. The root of the negative one is no number, hence the guard; that of the other is
# $10^{-6}$, far more than the error of any other distance. Pixels that are whole numbers are a lucky case: all
# three terms are then whole and far below $2^{53}$, and float64 makes no error at all.


# %%
def compare_ways(x, count):
    """Distances from the first `count` rows of x [N, D], 0..255, to the others, three ways -> rows, rounding errors."""
    table, small, first = [], x / 255, None
    for name, way in {"two loops": distances_two_loops, "one loop": distances_one_loop, "no loop": distances}.items():
        found, began = [], [time.perf_counter()]
        for rows in small, x:
            found.append(way(rows[:count], rows[count:]))
            began.append(time.perf_counter())
        first = first or found  # two loops: the others' differences are from them
        gaps = [a - b for a, b in zip(found, first, strict=True)]
        table.append({"way": name, "microseconds a pair": 1e6 * np.diff(began).min() / gaps[0].size,
                      "largest difference": float(np.abs(gaps[0]).max()),
                      "Frobenius difference": float(np.linalg.norm(gaps[0])),
                      "Frobenius difference, whole pixels": float(np.linalg.norm(gaps[1]))})  # fmt: skip
    own = np.diag(squares(small[:1_000], small[:1_000]))  # 0, but for rounding
    return table, {"squares_below_0": int((own < 0).sum()), "distance_to_a_copy": float(np.sqrt(own.max()))}


# %% [markdown]
# ## The vote
# The k nearest pictures vote. Where two classes have equal votes, or two pictures the same distance, a rule must
# decide, lest the answer depend on how the program was written: the smaller label wins, and the picture that is first.


# %%
def nearest(distances, k):
    """distances [A, B] -> column numbers of the k smallest in each row, ascending, the first of equals first [A, k]."""
    # exercise: one line; the sort must be stable
    return np.argsort(distances, axis=1, kind="stable")[:, :k]
    # end exercise


def votes(labels, classes):
    """The neighbours' labels, int [A, k] -> votes for each class [A, classes]."""
    # exercise: count how often each class stands in each row
    return (labels[:, :, None] == np.arange(classes)).sum(axis=1)
    # end exercise


def predict_labels(distances, y, k):
    """distances [A, B] to training pictures with labels y [B] -> the majority of the k nearest, int [A]."""
    # exercise: most votes win, and of equals the smallest label
    return votes(y[nearest(distances, k)], y.max() + 1).argmax(axis=1)  # argmax: the first of equals
    # end exercise


# %% [markdown]
# ## Choosing k
# On the training pictures k = 1 is never wrong, for each is its own nearest neighbour: they cannot choose k. The test
# pictures must not: they shall tell how good the chosen k is on new pictures, once. Hence cross-validation: the
# training part falls into five folds, each is named by the four others, and the mean of the five accuracies chooses.
# Distances depend on neither k nor fold, so that one matrix of all pairs serves for all fifty.


# %%
def accuracies(labels, y, ks):
    """The labels of neighbours, nearest first, int [A, K], and the truth y [A] -> per cent right for each k <= K."""
    return [100 * np.mean(votes(labels[:, :k], labels.max() + 1).argmax(axis=1) == y) for k in ks]


def cross_validate(distances, y, ks, folds):
    """Symmetric distances [N, N] of the training pictures, labels y [N] -> per cent right, [len(ks), folds]."""
    found, rows = np.empty((len(ks), folds)), np.arange(len(y))
    for column, fold in enumerate(np.array_split(rows, folds)):
        # exercise: name this fold's pictures by those of the others, for every k; sort the neighbours only once
        others = np.setdiff1d(rows, fold)
        near = nearest(distances[np.ix_(fold, others)], max(ks))
        found[:, column] = accuracies(y[others][near], y[fold], ks)
        # end exercise
    return found


# %% [markdown]
# ## Another distance
# L1, $\sum_i |a_i - b_i|$, adds the differences as they are. **Which preprocessing leaves an L1 classifier as it is?**
# Subtracting a mean, one for all pixels or one for each, cancels in the difference. Dividing all by one standard
# deviation scales every distance alike, and nearer stays nearer; dividing each pixel by its own gives the pixels other
# weights, and is another classifier. Shuffling the pixels only reorders the sum. Rotating the axes is what tells the
# two apart: L2 is a length, whatever the axes; L1 is bound to them. The table measures each answer: distances that
# agree but for one common factor, and predictions that do not change.


# %%
def invariances(x, y, count, rng):
    """The first `count` rows of x [N, D] named (k = 1) by 4 x count others, before and after preprocessing -> rows."""
    mean, spread = x.mean(axis=0), x.std(axis=0)
    changes = {
        "none": lambda x: x, "subtract one mean": lambda x: x - mean.mean(),
        "subtract each pixel's mean": lambda x: x - mean, "divide by one standard deviation": lambda x: x / x.std(),
        "divide by each pixel's": lambda x: x / np.where(spread > 0, spread, 1),
        "shuffle the pixels": lambda x: x[:, np.random.default_rng(0).permutation(x.shape[1])],
        "rotate the axes (cosine transform)": lambda x: dct(x, norm="ortho", axis=1),
    }  # fmt: skip
    rows, table, before = rng.choice(len(x), 5 * count, replace=False), [], {}
    y = y[rows]
    for change, function in changes.items():
        z = function(x)[rows]
        for metric, way in {"L1": lambda a, b: cdist(a, b, "cityblock"), "L2": distances}.items():
            d = way(z[:count], z[count:])
            said = predict_labels(d, y[count:], 1)
            first, said_first = before.setdefault(metric, (d, said))
            ratio = d / first
            table.append({"preprocessing": change, "distance": metric, "accuracy": 100 * np.mean(said == y[:count]),
                          "distances change by": float(np.abs(ratio / np.median(ratio) - 1).max()),
                          "predictions changed": int((said != said_first).sum())})  # fmt: skip
    return table


# %% [markdown]
# ## Reading the matrix of distances
# A bright row is a test picture that is far from all training pictures, a bright column a training picture that is far
# from all test pictures. Which are they? With $m$ the mean of the training pictures $b_j$, and $v$ their total
# variance, eq. 2 averaged over $j$ says it:
#
# $$\frac{1}{B} \sum_j |a - b_j|^2 = |a - m|^2 + v \quad(3)$$
#
# A row is bright as far as its picture is from the mean image, a grey blur, whatever it shows.
#
# ## The curse of dimension
# To hold 1 % of a cube's volume, a smaller cube needs an edge of $0.01^{1/D}$: 0.01 in one dimension, 0.63 in ten,
# 0.9985 in 3,072. Neighbourhoods are no longer local, and among random points the nearest is hardly nearer than the
# farthest. What saves the method for pictures is that neighbouring pixels are alike: they fill far fewer dimensions
# than they have. Measured: the contrast $1 - d_{\min} / d_{\max}$ by the number of random pixels compared.


# %%
def contrasts(x, rng, points=1_000):
    """Contrast, median of 100 rows, of random pixels of x [N, D] and of points in a cube -> dimensions, two curves."""

    def contrast(rows):
        d = distances(rows[:100], rows[100:])
        return float(np.median(1 - d.min(axis=1) / d.max(axis=1)))

    dimensions = [d for d in (3, 10, 30, 100, 300, 1_000, 3_000) if d <= x.shape[1]]
    pixels = [contrast(x[:points, rng.choice(x.shape[1], d, replace=False)]) for d in dimensions]
    return dimensions, {"pixels": pixels, "cube": [contrast(rng.uniform(size=(points, d))) for d in dimensions]}


# %%
def draw_distances(run, d, pictures, x):
    """A corner of the matrix d [A, B] as a picture; pictures of its brightest rows (`pictures`) and columns (x)."""
    figure, axes = plt.subplots(figsize=(8, 3))
    axes.imshow(d[:120, :400], aspect="auto", cmap="gray", interpolation="nearest")
    axes.set(xlabel="training picture", ylabel="test picture", title="distance (brighter: farther)")
    axes.grid(False)
    run.figure("distance_matrix", figure)
    rows, columns = (d.mean(axis=axis).argsort()[::-1][:8] for axis in (1, 0))
    titles, images = [f"row {i}" for i in rows] + [f"column {i}" for i in columns], [*pictures[rows], *x[columns]]
    run.figure("brightest", core.plots.image_grid(images, titles, title="pictures of the brightest rows and columns"))


def draw_choice(ks, found, train):
    """Accuracy of every fold, their mean and standard deviation, and that of the training part on itself, by k."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.3))
    axes[0].plot(ks, found, "o", markersize=3, color="#56B4E9")
    axes[0].errorbar(ks, found.mean(axis=1), yerr=found.std(axis=1), capsize=3, label="mean, standard deviation")
    axes[0].set(title="cross-validation", xlabel="k", ylabel="accuracy, %", xscale="log")
    axes[1].plot(ks, train, label="training pictures, themselves included")
    axes[1].plot(ks, found.mean(axis=1), label="cross-validation")
    axes[1].set(title="why the training part cannot choose k", xlabel="k", xscale="log")
    for axis, place in zip(axes, ("lower center", "upper right"), strict=True):
        axis.legend(loc=place)
    return figure


def draw_neighbours(d, pictures, y_test, parts, labels, rows=6, k=7):
    """Test pictures and their k nearest training pictures, those of another class in colour."""
    images, titles, right = [], [], []
    for i, near in enumerate(nearest(d[:rows], k)):
        images += [pictures[i], *parts.x_train[near]]
        titles += [f"test: {labels[y_test[i]]}", *(labels[label] for label in parts.y_train[near])]
        right += [True, *(parts.y_train[near] == y_test[i])]
    return core.plots.predictions(images, titles, right, columns=k + 1, title="the nearest training pictures")


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if cfg.train > cfg.large_train or cfg.test > cfg.large_test:
        raise core.InputError("--train and --test take the first of --large-train and --large-test: give no more")
    if not 2 <= cfg.folds <= cfg.train or max(cfg.ks) > cfg.train - -(-cfg.train // cfg.folds):
        raise core.InputError(f"--ks {max(cfg.ks)}, --folds {cfg.folds}: a fold must leave that many neighbours")
    if 5 * cfg.compared > cfg.train or cfg.timed >= cfg.train:
        raise core.InputError("--compared may be a fifth of --train at most, --timed must be less than --train")
    with core.run("a1_knn", options, cfg) as run:
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        parts, rng = core.data.three_way(data, cfg.large_train, 0, cfg.large_test), np.random.default_rng(cfg.seed)
        everything, pictures = (array.reshape(len(array), -1) for array in (parts.x_train, parts.x_test))
        x, y, classes = everything[: cfg.train].astype(float), parts.y_train[: cfg.train], len(data.labels)

        (ways, copies), pairs = compare_ways(x, cfg.timed), distances(x, x)
        found = cross_validate(pairs, y, cfg.ks, cfg.folds)
        train = accuracies(y[nearest(pairs, max(cfg.ks))], y, cfg.ks)  # each its own neighbour
        print("per cent right by k:", dict(zip(cfg.ks, found.mean(axis=1).round(2).tolist(), strict=True)), flush=True)
        preprocessing = run.once("invariances", lambda: invariances(x, y, cfg.compared, rng))
        dimensions, contrast_of = contrasts(x, np.random.default_rng((cfg.seed, 1)))
        best = int(found.mean(axis=1).argmax())
        print(f"k = {cfg.ks[best]} is chosen; the test pictures now, {run.seconds:.0f} s", flush=True)

        x_test, y_test = pictures[: cfg.test].astype(float), parts.y_test[: cfg.test]
        d, k = distances(x_test, x), cfg.ks[best]
        counts, said_k1 = votes(y[nearest(d, k)], classes), predict_labels(d, y, 1)
        said, tied = counts.argmax(axis=1), (counts == counts.max(axis=1, keepdims=True)).sum(axis=1) > 1
        library = KNeighborsClassifier(k, algorithm="brute").fit(x, y).predict(x_test)
        _, rows = knn.nearest(pictures.astype(np.float32), everything.astype(np.float32), k)
        large = accuracies(parts.y_train[rows], parts.y_test, (k,))
        _, rows = knn.nearest(data.x_test.reshape(-1, x.shape[1]).astype(np.float32), x.astype(np.float32), k)
        all_k1, all_k = accuracies(y[rows], data.y_test, (1, k))
        gap = np.mean(d**2, axis=1) - np.sum((x_test - x.mean(axis=0)) ** 2, axis=1) - x.var(axis=0).sum()
        choice = [{"k": k, "mean": folds.mean(), "standard deviation": folds.std(), "on itself": own, "folds": folds}
                  for k, folds, own in zip(cfg.ks, found, train, strict=True)]  # fmt: skip
        tables = {"three ways": ways, "cross-validation": choice, "preprocessing": preprocessing}
        run.record |= {"data": data.provenance, "tables": tables}
        run.record["metrics"] = {
            "test_accuracy_large": large[0], "test_accuracy_all": all_k, "test_accuracy": 100 * np.mean(said == y_test),
            "test_accuracy_k1_all": all_k1, "test_accuracy_k1": 100 * np.mean(said_k1 == y_test), "best_k": k,
            "cv_accuracy": found[best].mean(), "cv_accuracy_std": found[best].std(), "train_accuracy_k1": train[0],
            "distance_difference_largest": ways[2]["largest difference"],
            "distance_difference_frobenius": ways[2]["Frobenius difference"],
            "distance_difference_whole_pixels": ways[2]["Frobenius difference, whole pixels"],
            **{f"microseconds_a_pair_{row['way'].replace(' ', '_')}": row["microseconds a pair"] for row in ways},
            **copies, "sklearn_disagreements": int((said != library).sum()),
            "tied_votes": 100 * np.mean(tied), "row_mean_identity_error": float(np.abs(gap / d.mean() ** 2).max()),
            "l1_accuracy": preprocessing[0]["accuracy"], "l2_accuracy": preprocessing[1]["accuracy"],
            **{f"contrast_{name}": values[-1] for name, values in contrast_of.items()},
        }  # fmt: skip
        draw_distances(run, d, parts.x_test, parts.x_train)
        run.figure("cross_validation", draw_choice(cfg.ks, found, train))
        run.figure("neighbours", draw_neighbours(d, parts.x_test, y_test, parts, data.labels))
        names = {"xlabel": "dimensions", "ylabel": "contrast: 1 - nearest / farthest"}
        run.figure("contrast", core.plots.curves(contrast_of, x=dimensions, xscale="log", **names))
    return run.record


if __name__ == "__main__":
    core.cli(main)
