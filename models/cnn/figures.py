"""Pictures of what a convolutional network has learned."""

import keras
import numpy as np
from matplotlib import pyplot as plt

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


def draw(run, model, images, scratch, grid, history):
    """Every figure of the lesson into its run: the checks, the grid's trade-offs, and what `model` has learned."""
    run.figure("gradient_check", checks.draw(scratch["tables"]["gradient check"]))
    curves = {dtype: tuple(map(np.asarray, pair)) for dtype, pair in scratch["curves"].items()}
    run.figure("keras_twin", numpy_twin.draw(curves))
    costs = {"flops": "FLOPs", "ms": "latency of one picture, ms", "ms_of_32": "latency of 32 pictures, ms"}
    for cost, label in costs.items():
        points = {row["arm"]: (row[cost], row["val_accuracy"]) for row in grid}
        run.figure(f"pareto_{cost}", plots.pareto(points, xlabel=label, ylabel="validation accuracy, %"))
    panels = {"cross-entropy": {"training": history["loss"], "validation": history["val_loss"]},
              "accuracy": {"training": history["accuracy"], "validation": history["val_accuracy"]}}  # fmt: skip
    run.figure("learning_curves", plots.panels(panels))
    first = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    run.figure("filters", filters(np.asarray(first.kernel), "first layer, strongest first"))
    active = [layer.name for layer in model.layers if isinstance(layer, keras.layers.ReLU)]
    run.figure("feature_maps", feature_maps(model, images[0], active))
