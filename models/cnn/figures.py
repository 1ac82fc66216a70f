"""Pictures of what a convolutional network has learned."""

import keras
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from course.core import plots
from models.numpy_net import checks
from models.numpy_net import twin as numpy_twin


def filters(kernels, title=""):
    """Kernels [kh,kw,C,F] with C 1 or 3 as pictures, largest norm first; grey is 0, each on its own scale."""
    order = np.argsort(-np.sqrt(np.square(kernels).sum(axis=(0, 1, 2))))
    pictures = np.moveaxis(kernels, -1, 0)[order]
    scaled = 0.5 + pictures / np.maximum(np.abs(pictures).max(axis=(1, 2, 3), keepdims=True), 1e-12) / 2
    return plots.image_grid(scaled, columns=min(8, len(scaled)), title=title)


def feature_maps(model, image, names, channels=8):
    """The strongest maps of the named layers of `model` for one picture [H,W,C], the picture itself at the left."""
    probe = keras.Model(model.inputs, [model.get_layer(name).output for name in names])
    answers = probe.predict(image[None], verbose=0)
    figure, axes = plt.subplots(len(names), channels + 1, figsize=(channels + 1, 1.12 * len(names)), squeeze=False)
    for i, (row, maps) in enumerate(zip(axes, answers, strict=True), start=1):
        maps = maps[0][:, :, np.argsort(-maps[0].mean(axis=(0, 1)))[:channels]]
        row[0].imshow(image.squeeze(), cmap="gray")
        side = "x".join(map(str, maps.shape[:2]))
        row[0].set_ylabel(f"layer {i}\n{side}", fontsize=8, rotation=0, ha="right", va="center")
        for axis, drawn in zip(row[1:], np.moveaxis(maps, -1, 0), strict=False):
            axis.imshow(drawn, cmap="viridis", vmin=0, interpolation="nearest")
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
    return figure


COSTS = {  # of a row of the grid -> its name on the axis, the axis's unit and scale
    "flops": ("FLOPs of one picture, millions", 1e6, "log"),
    "ms": ("latency of one picture, ms", 1, "linear"),
    "ms_of_32": ("latency of 32 pictures, ms", 1, "linear"),
}


def trade_off(points, label, scale):
    """`plots.pareto` of many arms (name -> (cost, accuracy)), of which many cost the same: names at alternate sides."""
    figure = plots.pareto(points, xlabel=label, ylabel="validation accuracy, %", xscale=scale)
    figure.set_size_inches(7.2, 5.4)
    (axes,) = figure.axes
    for i, text in enumerate(sorted(axes.texts, key=lambda text: text.xy[1])):
        text.set(ha=("left", "right")[i % 2], va="center", position=((7, -7)[i % 2], 0))
    if scale == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def draw(run, model, images, scratch, grid, history):
    """Every figure of the lesson into its run: the checks, the grid's trade-offs, and what `model` has learned."""
    run.figure("gradient_check", checks.draw(scratch["tables"]["gradient check"]))
    curves = {dtype: tuple(map(np.asarray, pair)) for dtype, pair in scratch["curves"].items()}
    run.figure("keras_twin", numpy_twin.draw(curves))
    for cost, (label, unit, scale) in COSTS.items():
        points = {row["arm"]: (row[cost] / unit, row["val_accuracy"]) for row in grid}
        run.figure(f"pareto_{cost}", trade_off(points, label, scale))
    panels = {"cross-entropy": {"training": history["loss"], "validation": history["val_loss"]},
              "accuracy": {"training": history["accuracy"], "validation": history["val_accuracy"]}}  # fmt: skip
    run.figure("learning_curves", plots.panels(panels))
    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    run.figure("filters", filters(np.asarray(first.kernel), "first layer, strongest first"))
    active = [layer.name for layer in model.layers if isinstance(layer, keras.layers.ReLU)]
    run.figure("feature_maps", feature_maps(model, images[0], active))
