"""What a lesson's update rules must pass: Keras's steps, known paths, Adam's first step, and what weight decay does.

Throughout, rule(g, state, t, lr) is the step of one array at t = 1, 2, ..., and descend(params, gradients, states, t,
rule, lr, decay=0.0) takes it for every array of name -> array, in place, shrinking the weights by lr * decay besides.
`states` is an empty dict before the first step.
"""

import functools
import inspect
import itertools
import math

import keras
import numpy as np
import tensorflow as tf

from course.core import plots
from models.numpy_net import checks, gradcheck, losses, surfaces, twin
from models.numpy_net import net as nets

# --- beside Keras -----------------------------------------------------------------------------------------------------


def follow(update, optimizer, params, variables, ours, theirs, batches):
    """Largest absolute difference between our parameters and Keras's after each step.

    update(params, gradients, states, t) changes a copy of `params` (name -> array) in place, `optimizer` the Keras
    `variables`, which are in the same order.  ours(params, *batch) -> gradients by name; theirs(*batch) -> list of
    tensors; each at its own side's weights.  batches: one tuple of arrays a step.
    """
    params, states, gaps = {name: array.copy() for name, array in params.items()}, {}, []
    optimizer.build(variables)

    @tf.function(autograph=False)  # autograph would read all of Keras
    def step(*batch):
        optimizer.apply(theirs(*batch), variables)

    for t, batch in enumerate(batches, start=1):
        update(params, ours(params, *batch), states, t)
        step(*map(tf.constant, batch))
        pairs = zip(params.values(), variables, strict=True)
        gaps.append(max(float(np.abs(array - variable.numpy()).max()) for array, variable in pairs))
    return gaps


def on_the_same_gradients(update, optimizer, rng, steps, dtype):
    """`follow` on random gradients [20, 10], each coordinate's of a size of its own between 1e-3 and 10."""
    sizes = 10 ** rng.uniform(-3, 1, (20, 10))
    batches = [((rng.standard_normal((20, 10)) * sizes).astype(dtype),) for _ in range(steps)]
    start = (0.1 * rng.standard_normal((20, 10))).astype(dtype)
    return follow(update, optimizer, {"w": start}, [keras.Variable(start, dtype=dtype)],
                  lambda params, g: {"w": g}, lambda g: [g], batches)  # fmt: skip


def on_a_network(update, optimizer, net, x, y, rng, steps, dtype, batch=32):
    """`follow` training `net` on (x [N, D], y [N]): our gradients by backpropagation, Keras's by GradientTape."""
    net, model, x = nets.cast(net, dtype), twin.model(net, dtype), x.astype(dtype)
    rows = [rng.integers(0, len(x), batch) for _ in range(steps)]

    def ours(params, x, y):
        now = nets.Net(params, net.activation)
        scores, memory = nets.forward(now, x)
        return nets.backward(now, losses.softmax_cross_entropy(scores, y)[1], memory)

    def theirs(x, y):
        with tf.GradientTape() as tape:
            scores = model(x)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, scores, from_logits=True))
        return tape.gradient(loss, model.trainable_variables)

    return follow(update, optimizer, net.params, model.trainable_variables, ours, theirs,
                  [(x[chosen], y[chosen]) for chosen in rows])  # fmt: skip


def beside_keras(descend, rules, net, x, y, *, seed, steps=100):
    """Both of the above in both precisions: {(what, dtype): {rule: differences [steps]}}.

    rules: name -> (rule, decay, learning rate, function that makes the Keras optimizer).  A rule's constants have
    Keras's names and are handed to both sides, as are decay and learning rate, rounded to float32 first: Keras keeps
    some of them so whatever its variables are, and in float64 a 0.9 that differs by 2e-8 would be all one sees.
    """
    found = {}
    for dtype, (name, (rule, decay, lr, optimizer)) in itertools.product(("float64", "float32"), rules.items()):
        constants = {
            parameter.name: float(np.float32(parameter.default))
            for parameter in inspect.signature(rule).parameters.values()
            if parameter.default is not parameter.empty
        }
        lr, decay = float(np.float32(lr)), float(np.float32(decay))
        update = functools.partial(descend, rule=functools.partial(rule, **constants), lr=lr, decay=decay)
        options = constants | ({"weight_decay": decay} if decay else {})
        for what, check, given in (
            ("same gradients", on_the_same_gradients, ()),
            ("own network", on_a_network, (net, x, y)),
        ):
            gaps = check(
                update, optimizer(learning_rate=lr, **options), *given, np.random.default_rng(seed), steps, dtype
            )
            found.setdefault((what, dtype), {})[name] = gaps
    return found


def draw_beside_keras(found):
    """Figure of `beside_keras` in float64, with the bound; what is below 1e-17 is drawn there."""
    shown = {what: {name: np.maximum(gaps, 1e-17) for name, gaps in curves.items()}
             for (what, dtype), curves in found.items() if dtype == "float64"}  # fmt: skip
    figure = plots.panels(shown, xlabel="step", yscale="log", ylim=(5e-18, 1e-5), legend="side",
                          title="largest difference from Keras's weights, float64")  # fmt: skip
    for axes in figure.axes:
        axes.axhline(1e-6, color="grey", linewidth=0.8)  # the bound
    return figure


# --- known answers ----------------------------------------------------------------------------------------------------


def first_steps(adam):
    """Rows: Adam's first step in units of the learning rate, with bias correction and (as at t = infinity) without."""
    return [{"gradient": g, "corrected": -adam(g, {}, 1, 1.0), "uncorrected": -adam(g, {}, math.inf, 1.0)}
            for g in (1e-3, 1.0, 1e3)]  # fmt: skip


def quadratic_path(start, lr, momentum, steps):
    """Closed form of gradient descent with momentum on `surfaces.quadratic`, points [steps + 1, 2] (Polyak 1964).

    Along an axis of curvature h, one step is a matrix: (w, m) -> (w + m', m') with m' = momentum m - lr h w.  Its
    powers are the path, its spectral radius the rate at which the distance shrinks in the end.
    """
    step = np.array([[[1 - lr * h, momentum], [-lr * h, momentum]] for h in (1.0, surfaces.CONDITION)])
    powers = np.stack([np.linalg.matrix_power(step, t) for t in range(steps + 1)])
    return powers[:, :, 0, 0] * np.asarray(start)


def contraction(descend, momentum, steps):
    """Rows for gradient descent and momentum at their best settings on `surfaces.quadratic`: our path against the
    closed form, and the factor a step by which the distance from the minimum shrinks, by theory and as walked.

    momentum(g, state, t, lr, momentum): the rule; with momentum = 0 it is gradient descent.
    """
    surface, rows = surfaces.SURFACES["quadratic"], []
    k = surfaces.CONDITION
    root = np.sqrt(k)
    plain, heavy = (k - 1) / (k + 1), (root - 1) / (root + 1)
    for name, lr, beta, rate in (("SGD", 2 / (1 + k), 0.0, plain),
                                 ("momentum", (1 + heavy) ** 2 / k, heavy**2, heavy)):  # fmt: skip
        path = surfaces.walk(descend, functools.partial(momentum, momentum=beta), surface, [lr], steps)[:, 0]
        exact = quadratic_path(surface.start, lr, beta, steps)
        distance = np.linalg.norm(path, axis=1)
        rows.append({"rule": name, "lr": lr, "beta": beta, "rate by closed form": rate,
                     "rate of the last half": (distance[-1] / distance[steps // 2]) ** (1 / (steps - steps // 2)),
                     "difference of the paths": np.abs(path - exact).max()})  # fmt: skip
    return rows


def shrinking(descend, rule, seed, steps=500, lr=1e-3, strength=0.5, scales=(0.01, 1.0, 100.0)):
    """What weight decay does to 1,000 weights that start at 1 and feel gradients of pure noise, of several scales.

    descend(params, gradients, states, t, rule, lr, decay): `decay` shrinks the weights outside of the rule.
    Returns {"decoupled": {scale: mean weight [steps]}, "in the gradient": the same} and (1 - lr strength)^t [steps].
    """
    found = {"decoupled": {}, "in the gradient": {}}
    for (kind, curves), scale in itertools.product(found.items(), scales):
        inside = strength if kind == "in the gradient" else 0.0
        rng, params, states, curve = np.random.default_rng(seed), {"w": np.ones(1000)}, {}, []
        for t in range(1, steps + 1):
            noise = scale * rng.standard_normal(1000)
            descend(params, {"w": noise + inside * params["w"]}, states, t, rule, lr, strength - inside)
            curve.append(float(params["w"].mean()))
        curves[f"{scale:g}"] = curve
    return found, (1 - lr * strength) ** np.arange(1, steps + 1)


def loss_gradients(named, seed):
    """Losses (name -> function of scores and labels) against finite differences: rows, as of `checks.rows`."""
    rng = np.random.default_rng(seed)
    scores, y = 2 * rng.standard_normal((20, 10)), rng.integers(0, 10, 20)
    found = {name: gradcheck.check(lambda f=loss: f(scores, y)[0], {"scores": scores}, {"scores": loss(scores, y)[1]})
             for name, loss in named.items()}  # fmt: skip
    return checks.rows(found)


# --- all of them ------------------------------------------------------------------------------------------------------


def record(run, descend, rules, named_losses, x, y, *, seed):
    """Tables, metrics and figures of all of the above go to `run`.

    rules: as of `beside_keras`, among them "Adam" and "momentum"; on the surfaces only those without decay, which would
    move the minima.  named_losses: as of `loss_gradients`.  x [N, D], y [N]: what the network beside Keras's learns.
    """
    tables, metrics = run.record["tables"], run.record["metrics"]
    net = nets.create(np.random.default_rng(seed), (x.shape[1], 32, int(y.max()) + 1))
    found = beside_keras(descend, rules, net, x, y, seed=seed)
    tables["largest difference from Keras"] = [
        {"rule": name} | {", ".join(key): max(curves[name]) for key, curves in found.items()} for name in rules
    ]
    for name, precision in ("keras_difference", "float64"), ("keras_difference_float32", "float32"):
        metrics[name] = max(
            max(gaps) for (_, dtype), curves in found.items() if dtype == precision for gaps in curves.values()
        )
    run.figure("keras", draw_beside_keras(found))

    adam, momentum = rules["Adam"][0], rules["momentum"][0]
    tables["Adam's first step / learning rate"] = first = first_steps(adam)
    metrics["adam_first_step"], metrics["adam_first_step_uncorrected"] = first[1]["corrected"], first[1]["uncorrected"]
    shrunk, closed = shrinking(descend, adam, seed)
    metrics["decay_error_adamw"], metrics["decay_error_adam_l2"] = (
        max(abs(curve[-1] - closed[-1]) for curve in curves.values()) for curves in shrunk.values())  # fmt: skip
    shown = {f"decay {kind}": curves | {"closed form": closed} for kind, curves in shrunk.items()}
    run.figure("decay", plots.panels(shown, xlabel="step", ylim=(0, 1.05), ylabel="mean weight, by noise"))

    tables["quadratic, closed form"] = contraction(descend, momentum, steps=300)
    metrics["closed_form_difference"] = max(row["difference of the paths"] for row in tables["quadratic, closed form"])
    free = {name: rule for name, (rule, decay, *_) in rules.items() if not decay}
    tables["surfaces"], paths = surfaces.best_walks(descend, free, steps=300)
    run.figure("paths", surfaces.draw(paths))

    tables["gradients of the losses"] = loss_gradients(named_losses, seed)
    metrics["loss_gradients_worst"] = max(row["relative"] for row in tables["gradients of the losses"])
