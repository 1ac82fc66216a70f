"""The process that tensorflow-model-optimization works in: `python -m compression.legacy_worker FOLDER`.

FOLDER holds what `compression.legacy` has put there: request.json, weights.npz and the data.  Left in it:
before.npy and after.npy (the network's answers before and after), result.npz (its weights), report.json, model.tflite.
"""

import json
import sys
import time
import traceback
from pathlib import Path

import numpy as np

EXAMPLES = 200  # as in `legacy`, which this process does not import: it would bring Keras 3


def build(steps, weights):
    """The network in `tf_keras`: steps as `legacy.described` gives them, `weights` an .npz of theirs."""
    import tf_keras

    made = [tf_keras.Input(steps[0]["shape"], name=steps[0]["name"])]
    for i, step in enumerate(steps[1:]):
        config = step["config"]
        if config.get("activation") == "silu":
            config = config | {"activation": "swish"}
        layer = getattr(tf_keras.layers, step["kind"])(name=step["name"], trainable=step["trainable"], **config)
        given = [made[place] for place in step["inputs"]]
        made.append(layer(given if len(given) > 1 else given[0]))
        layer.set_weights([weights[f"{i}/{j}"] for j in range(len(layer.get_weights()))])
    return tf_keras.Model(made[0], made[-1], name="classifier")


def wrapped(model, wrap):
    """`model` with `wrap` around every layer that has a kernel, depthwise ones left out.

    The wrappers read a layer's weights when they are built: they get the layers themselves, no copies.
    """
    import tf_keras

    def copy(layer):
        own = isinstance(layer, (tf_keras.layers.Conv1D, tf_keras.layers.Conv2D, tf_keras.layers.Dense))
        return wrap(layer) if own and not isinstance(layer, tf_keras.layers.DepthwiseConv2D) else layer

    return tf_keras.models.clone_model(model, clone_function=copy)


def train(model, data, training, callbacks=()):
    """Train on as `training.fit` does: the same optimizer, rate, augmentation and loss."""
    import tensorflow as tf
    import tf_keras

    batch = min(training["batch"], len(data["x_train"]))
    steps = len(data["x_train"]) // batch
    total = steps * training["epochs"]
    warm = round(training["warm_up"] * total)
    rising = {"warmup_target": training["lr"], "warmup_steps": warm} if warm else {}
    start = 0.0 if warm else training["lr"]
    rate = tf_keras.optimizers.schedules.CosineDecay(start, max(1, total - warm), **rising)
    decay = training["weight_decay"] or None
    if training["optimizer"] == "sgd":
        momentum = training["momentum"]
        optimizer = tf_keras.optimizers.SGD(rate, momentum=momentum, nesterov=momentum > 0, weight_decay=decay)
    else:
        optimizer = tf_keras.optimizers.AdamW(rate, weight_decay=decay or 0.0)
    smoothing = training["label_smoothing"]

    def loss(labels, logits):
        target = tf.one_hot(tf.reshape(tf.cast(labels, tf.int32), [-1]), logits.shape[-1])
        target = (1 - smoothing) * target + smoothing / logits.shape[-1]
        return -tf.reduce_sum(target * tf.nn.log_softmax(logits), axis=-1)

    change = tf_keras.Sequential()
    if data["x_train"].ndim == 4 and training["flip"]:
        change.add(tf_keras.layers.RandomFlip("horizontal", seed=training["seed"]))
    if data["x_train"].ndim == 4 and training["shift"]:
        share = training["shift"]
        change.add(
            tf_keras.layers.RandomTranslation(
                share, share, fill_mode="reflect", interpolation="nearest", seed=training["seed"]
            )
        )
    order = tf.data.Dataset.range(len(data["x_train"])).shuffle(len(data["x_train"]), seed=training["seed"])

    def rows(index):
        x, y = tf.numpy_function(
            lambda i: (data["x_train"][i].astype(np.float32), data["y_train"][i]), [index], (tf.float32, tf.int32)
        )
        x = tf.ensure_shape(x, [batch, *data["x_train"].shape[1:]])
        return change(x, training=True) if change.layers else x, tf.ensure_shape(y, [batch])

    class Line(tf_keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            values = "  ".join(f"{name} {value:.4g}" for name, value in (logs or {}).items())
            print(f"toolkit epoch {epoch + 1}/{training['epochs']}  {values}", flush=True)

    model.compile(optimizer, loss, metrics=["accuracy"])
    model.fit(order.batch(batch, drop_remainder=True).map(rows).prefetch(2), epochs=training["epochs"], verbose=0,
              callbacks=[*callbacks, Line()])  # fmt: skip
    return total


def prune(model, data, settings):
    """Magnitude pruning with the polynomial schedule, to its end after three fifths of the steps."""
    from tensorflow_model_optimization.sparsity import keras as sparsity

    training = settings["training"]
    steps = training["epochs"] * (len(data["x_train"]) // min(training["batch"], len(data["x_train"])))
    end = max(1, round(0.6 * steps))
    schedule = sparsity.PolynomialDecay(0.0, settings["sparsity"], 0, end, frequency=max(1, end // 40))
    pruned = wrapped(model, lambda layer: sparsity.prune_low_magnitude(layer, pruning_schedule=schedule))
    train(pruned, data, training, [sparsity.UpdatePruningStep()])
    return sparsity.strip_pruning(pruned)


def cluster(model, data, settings):
    """Clusters of each kernel, from a linear start, trained on."""
    import tensorflow_model_optimization as toolkit
    from tensorflow_model_optimization.python.core.clustering.keras.cluster_config import GradientAggregation
    from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster as experimental

    clustering = toolkit.clustering.keras

    def wrap(layer):
        wrapper = experimental.cluster_weights(
            layer,
            number_of_clusters=settings["clusters"],
            cluster_centroids_init=clustering.CentroidInitialization.LINEAR,
            preserve_sparsity=settings["keep_zeros"],
        )
        # as `compression.cluster`: by the sum of its members' gradients, the default, a value that thousands of weights
        # share would move thousands of times as far as a weight, and the network would run away
        wrapper.cluster_gradient_aggregation = GradientAggregation.AVG
        return wrapper

    clustered = wrapped(model, wrap)
    train(clustered, data, settings["training"])
    return clustering.strip_clustering(clustered)


def quantise(model, data, settings):
    """Quantisation-aware training by the toolkit's 8-bit scheme, or by the one that keeps zeros or clusters."""
    import tensorflow_model_optimization as toolkit

    combine = toolkit.experimental.combine
    if settings["keep_clusters"]:
        scheme = combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=settings["keep_zeros"])
    elif settings["keep_zeros"]:
        scheme = combine.Default8BitPrunePreserveQuantizeScheme()
    else:
        scheme = toolkit.quantization.keras.default_8bit.Default8BitQuantizeScheme()
    keras = toolkit.quantization.keras
    with keras.quantize_scope():
        quantised = keras.quantize_apply(keras.quantize_annotate_model(model), scheme)
    x = np.asarray(data["x_train"][:EXAMPLES], np.float32)
    _measure(model, quantised, x)
    _input_range(quantised, *((0.0, 255.0) if settings["pixels"] else (x.min(), x.max())))
    for layer in model.layers:
        if not layer.trainable:  # the wrapper has taken the kernel out of the layer, and trains it whatever is said
            wrapper = quantised.get_layer(f"quant_{layer.name}")
            wrapper.trainable = False
            wrapper._non_trainable_weights += wrapper._trainable_weights
            wrapper._trainable_weights = []
    train(quantised, data, settings["training"])
    if settings["pixels"]:  # rounding in the augmentation may have widened it
        _input_range(quantised, 0.0, 255.0)
    if settings["keep_clusters"]:
        quantised = combine.strip_clustering_cqat(quantised)
    return quantised


def _measure(model, quantised, x):
    """Set the ranges of `quantised` to those of the outputs of `model` for `x`.

    The toolkit's begin at -6 and 6 and move by a thousandth a step: a short training would end before they fit.
    """
    import tf_keras

    inner = [layer for layer in model.layers if any(twin.name == f"quant_{layer.name}" for twin in quantised.layers)]
    outputs = tf_keras.Model(model.input, [layer.output for layer in inner]).predict(x, verbose=0, batch_size=50)
    for layer, values in zip(inner, outputs, strict=True):
        for weight in quantised.get_layer(f"quant_{layer.name}").weights:
            name = weight.name.rpartition("/")[2]
            if name.endswith(("activation_min:0", "output_min:0")):
                weight.assign(min(float(values.min()), 0.0))
            elif name.endswith(("activation_max:0", "output_max:0")):
                weight.assign(max(float(values.max()), 0.0))


def _input_range(model, low, high):
    """Round the input to `low`..`high`, 0 included.

    At 0..255 a pixel is its own quantised value, as in the files of `lite.convert`.  Another range grows in training
    with what it meets.
    """
    for weight in model.layers[1].weights:
        if weight.name.endswith("_min:0"):
            weight.assign(min(float(low), 0.0))
        elif weight.name.endswith("_max:0"):
            weight.assign(max(float(high), 0.0))


def main(folder):
    """Do what the request in `folder` says and leave the answers there."""
    import tensorflow as tf
    import tf_keras

    request = json.loads((folder / "request.json").read_text())
    settings = request["settings"]
    tf_keras.utils.set_random_seed(settings["training"]["seed"])
    data = {key: np.load(folder / f"{key}.npy", mmap_mode="r") for key in ("x_train", "y_train", "x_val", "y_val")}
    x = np.asarray(data["x_val"][:EXAMPLES], np.float32)
    weights = np.load(folder / "weights.npz")
    model = build(request["steps"], weights)
    np.save(folder / "before.npy", model.predict(x, verbose=0, batch_size=100))

    names = {layer.name: [weight.name.rpartition("/")[2] for weight in layer.weights] for layer in model.layers}
    technique = {"prune": prune, "cluster": cluster, "quantise": quantise}[settings["technique"]]
    made, report = technique(model, data, settings), {}
    if settings["technique"] == "quantise":
        from compression import lite

        start = time.perf_counter()
        content = lite.convert(made, "int8", x[:10], pixels=settings["pixels"])
        report = {"convert_seconds": time.perf_counter() - start} | lite.parity(content, made, x)
        (folder / "model.tflite").write_bytes(content)
    back = [_weights(made, step["name"], names[step["name"]]) for step in request["steps"][1:]]
    np.savez(folder / "result.npz", **{f"{i}/{j}": array for i, own in enumerate(back) for j, array in enumerate(own)})
    again = build(request["steps"], np.load(folder / "result.npz"))
    np.save(folder / "after.npy", again.predict(x, verbose=0, batch_size=100))
    report["versions"] = {"tf_keras": tf_keras.__version__, "tensorflow": tf.__version__}
    (folder / "report.json").write_text(json.dumps(report))


def _weights(model, name, weights):
    """What has become of the weights of a layer by that name; in a wrapper, which has more, they are found by name."""
    layers = {layer.name: layer for layer in model.layers}
    if name in layers:
        return layers[name].get_weights()
    named = {weight.name.rpartition("/")[2]: weight.numpy() for weight in layers[f"quant_{name}"].weights}
    return [named[weight] for weight in weights]


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as error:  # the last line is what `legacy` shows: an error may have many, the least telling last
        traceback.print_exc()
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
