"""Test functions of two variables with closed-form gradients, and the paths that update rules take on them.

Each function takes points w [..., 2] and returns its values [...] and its gradients [..., 2].
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from matplotlib import pyplot as plt

CONDITION = 50.0  # ratio of the quadratic's curvatures


def quadratic(w):
    """f = (x^2 + CONDITION y^2) / 2: a valley that is steep across and flat along."""
    curvature = np.array([1.0, CONDITION])
    return (curvature * w**2).sum(axis=-1) / 2, curvature * w


def rosenbrock(w):
    """f = (1 - x)^2 + 100 (y - x^2)^2 (Rosenbrock 1960): a curved valley, its floor nearly flat."""
    x, y = w[..., 0], w[..., 1]
    off = y - x**2
    return (1 - x) ** 2 + 100 * off**2, np.stack([-2 * (1 - x) - 400 * x * off, 200 * off], axis=-1)


def beale(w):
    """f = sum over k = 1, 2, 3 of (c_k - x + x y^k)^2 with c = 1.5, 2.25, 2.625 (Beale 1958): plateaus and walls."""
    x, y = w[..., 0], w[..., 1]
    value, gradient = 0.0, 0.0
    for k, c in enumerate((1.5, 2.25, 2.625), start=1):
        rest = c - x + x * y**k
        value = value + rest**2
        gradient = gradient + 2 * rest[..., None] * np.stack([y**k - 1, k * x * y ** (k - 1)], axis=-1)
    return value, gradient


def saddle(w):
    """f = x^2 / 2 - y^2 / 2 + y^4 / 4: the origin is a saddle, the minima, of -1/4, are at y = -1 and y = 1."""
    x, y = w[..., 0], w[..., 1]
    return (x**2 - y**2) / 2 + y**4 / 4, np.stack([x, y**3 - y], axis=-1)


@dataclasses.dataclass(frozen=True)
class Surface:
    """A function, where to start on it, and what there is to find."""

    function: Callable
    start: tuple[float, float]
    minima: tuple[tuple[float, float], ...]
    window: tuple[float, float, float, float]  # left, right, bottom, top of its picture

    @property
    def least(self):
        """The function's least value."""
        return float(self.function(np.array(self.minima[0]))[0])


SURFACES = {
    "quadratic": Surface(quadratic, (-1.8, 0.8), ((0.0, 0.0),), (-2.0, 0.6, -1.0, 1.0)),
    "Rosenbrock": Surface(rosenbrock, (-1.2, 1.0), ((1.0, 1.0),), (-1.7, 1.7, -0.6, 2.0)),
    "Beale": Surface(beale, (1.0, 1.5), ((3.0, 0.5),), (-0.5, 4.2, -1.5, 1.8)),
    "saddle": Surface(saddle, (1.0, 1e-4), ((0.0, 1.0), (0.0, -1.0)), (-0.6, 1.2, -1.5, 1.5)),
}


def walk(descend, rule, surface, rates, steps):
    """Paths [steps + 1, R, 2] of an update rule from the surface's start, at R learning rates at once.

    descend(params, gradients, states, t, rule, lr) takes the step t = 1, 2, ... on name -> array, in place.
    """
    params, states = {"w": np.tile(np.array(surface.start), (len(rates), 1))}, {}
    path = [params["w"].copy()]
    for t in range(1, steps + 1):
        gradients = {"w": surface.function(params["w"])[1]}
        descend(params, gradients, states, t, rule, np.array(rates)[:, None])
        path.append(params["w"].copy())
    return np.stack(path)


@np.errstate(all="ignore")  # too large a learning rate overflows, and is not chosen
def best_walks(descend, rules, steps, near=1e-3):
    """Each rule on each surface at the best of 25 learning rates from 1e-4 to 1.

    Best is the least mean over the path of log(f - least f + 1e-6): it rewards to be low early, and to stay there.
    rules: name -> rule.  Returns rows (surface, rule, lr, height above the minimum at the end, steps until below
    `near`) and {surface: {rule: path [steps + 1, 2]}}.
    """
    rows, paths, rates = [], {name: {} for name in SURFACES}, np.geomspace(1e-4, 1, 25)
    for (name, surface), (title, rule) in itertools.product(SURFACES.items(), rules.items()):
        tried = walk(descend, rule, surface, rates, steps)
        above = np.nan_to_num(surface.function(tried)[0] - surface.least, nan=np.inf)  # [steps + 1, R]
        best = int(np.log(above + 1e-6).mean(axis=0).argmin())
        arrived = np.flatnonzero(above[:, best] < near)
        rows.append({"surface": name, "rule": title, "lr": float(rates[best]), "height": float(above[-1, best]),
                     f"steps to {near:g}": int(arrived[0]) if len(arrived) else None})  # fmt: skip
        paths[name][title] = tried[:, best]
    return rows, paths


def draw(paths, *, columns=2):
    """Paths over contours, a panel a surface; `paths`: surface's name -> {optimizer's name: points [T, 2]}."""
    rows = -(-len(paths) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), squeeze=False)
    for axis, (name, lines) in zip(axes.flat, paths.items(), strict=False):
        surface = SURFACES[name]
        left, right, bottom, top = surface.window
        grid = np.stack(np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200)), axis=-1)
        height = np.log10(surface.function(grid)[0] - surface.least + 1e-3)  # valleys show on a log scale only
        axis.contourf(grid[0, :, 0], grid[:, 0, 1], height, levels=24, cmap="Greys_r", alpha=0.55)
        for line, points in lines.items():
            axis.plot(*np.asarray(points).T, label=line, linewidth=1.3, marker=".", markersize=2.5)
        axis.plot(*surface.start, "ko", markersize=5)
        axis.plot(*np.transpose(surface.minima), "k*", markersize=10, linestyle="")
        axis.set(title=name, xlim=(left, right), ylim=(bottom, top))
        axis.grid(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center")
    return figure
