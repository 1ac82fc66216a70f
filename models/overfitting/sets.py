"""Small training sets drawn from a large one, some of their labels wrong on purpose."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from sklearn.decomposition import PCA

from course.core import InputError


def check(cfg):
    """Raise `InputError` where the settings of day 3 cannot be measured."""
    for name in ("seeds", "resamples"):
        if getattr(cfg, name) < 2:
            raise InputError(f"--{name} {getattr(cfg, name)}: a variance needs at least two networks")
    for keep in (cfg.keep, *cfg.keeps):
        if not 0 < keep <= 1:
            raise InputError(f"--keep {keep}: a probability to keep a unit is above 0 and at most 1")
    if cfg.noise >= 1:
        raise InputError(f"--noise {cfg.noise}: some labels must stay right, give a share below 1")


def corrupt(labels, classes, share, rng):
    """labels int [N] -> labels [N] of which about `share` have become another class, each with the same probability."""
    return (labels + rng.integers(1, classes, len(labels)) * (rng.random(len(labels)) < share)) % classes


def distribution(labels, classes, share):
    """labels int [N] -> [N,C]: the probabilities of what `corrupt` makes of each."""
    right = np.eye(classes)[labels]
    return (1 - share) * right + share / (classes - 1) * (1 - right)


def shifted(images, by=2):
    """[N,H,W,C] -> [(2 by + 1)^2,N,H,W,C]: the pictures moved by up to `by` pixels each way, black coming in; the
    first is not moved."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (by, by), (by, by), (0, 0)))
    offsets = sorted(itertools.product(range(2 * by + 1), repeat=2), key=lambda at: abs(at[0] - by) + abs(at[1] - by))
    return np.stack([padded[:, i : i + height, j : j + width] for i, j in offsets])


@dataclasses.dataclass(frozen=True)
class Pool:
    """A large set to draw small ones from."""

    images: np.ndarray  # uint8 [N,H,W,C]
    right: np.ndarray  # labels int [N]
    noisy: np.ndarray  # the same, a share of them wrong
    noise: float  # that share
    project: Callable  # uint8 images [n,H,W,C] -> inputs float32 [n,I]: principal components, of mean square 1
    x_test: np.ndarray  # inputs of the test part [M,I]
    y_test: np.ndarray  # its labels, right
    classes: int

    @property
    def truth(self):
        """[M,C]: the probabilities that the test labels would have, were they spoilt as the noisy ones are."""
        return distribution(self.y_test, self.classes, self.noise)

    def rows(self, sets, size, rng):
        """Row numbers [sets,size] of disjoint random sets; `InputError` where there are too few rows."""
        if sets * size > len(self.right):
            raise InputError(f"{sets} sets of {size:,} examples are asked of {len(self.right):,}: ask for fewer")
        return rng.permutation(len(self.right))[: sets * size].reshape(sets, size)

    def take(self, rows, labels):
        """rows [S,n], labels [N] (`right` or `noisy`) -> inputs [S,n,I], labels [S,n], one-hot targets [S,n,C]."""
        x = self.project(self.images[rows.ravel()]).reshape(*rows.shape, -1)
        return x, labels[rows], self.one_hot(labels[rows])

    def moved(self, rows, by=2):
        """rows [S,n] -> inputs [K,S,n,I] of the pictures as they are and moved by up to `by` pixels, as `shifted`."""
        copies = shifted(self.images[rows.ravel()], by)
        return np.stack([self.project(images).reshape(*rows.shape, -1) for images in copies])

    def one_hot(self, labels):
        """int [...] -> float32 [...,C]."""
        return np.eye(self.classes, dtype=np.float32)[labels]


def pool(data, *, inputs, noise, tests, seed):
    """The `Pool` of an `ImageSet`, with `tests` of its test images.

    The components are those of the first 10,000 training images: labels play no part in them.  `InputError` where the
    set has fewer numbers a picture or fewer test images than asked for.
    """

    def flat(images):
        return images.reshape(len(images), -1) / np.float32(255)

    def project(images):
        return (pca.transform(flat(images)) / scale).astype(np.float32)

    most = int(np.prod(data.x_train.shape[1:]))
    if inputs > most:
        raise InputError(f"--inputs {inputs}: pictures of {data.provenance['name']} have {most} numbers: ask for fewer")
    if tests > len(data.x_test):
        raise InputError(f"{tests:,} test images are asked of {len(data.x_test):,}: give a smaller --tests")
    pca = PCA(inputs, svd_solver="randomized", random_state=seed).fit(flat(data.x_train[:10_000]))
    scale = np.sqrt(pca.explained_variance_.mean())
    noisy = corrupt(data.y_train, len(data.labels), noise, np.random.default_rng((seed, 0)))
    test = project(data.x_test[:tests]), data.y_test[:tests]
    return Pool(data.x_train, data.y_train, noisy, noise, project, *test, len(data.labels))
