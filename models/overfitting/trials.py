"""Day 3's means around the networks of the unit: least squares, minibatches, variance shift, uncertainty."""

import keras
import numpy as np
from keras import ops
from sklearn.metrics import roc_auc_score

from course.core import runtime
from models.stacked import answers, cross_entropy, error, trainer


def decompose_votes(chosen, labels):
    """chosen [R,N] classes, labels [N] -> Domingos' terms, per cent: error = bias + unbiased - helped."""
    votes = np.stack([(chosen == c).mean(axis=0) for c in range(max(chosen.max(), labels.max()) + 1)])  # [C,N]
    main, right = votes.argmax(axis=0), (chosen == labels).mean(axis=0)
    good = main == labels
    terms = {"bias": ~good, "unbiased": good * (1 - right), "helped": ~good * right, "error": 1 - right}
    return {name: 100 * float(term.mean()) for name, term in terms.items()}


def random_features(pool, cfg):
    """Least squares on p random ReLU features, the shortest solution where there are many (Belkin et al. 2019).

    On the unit's training sets; returns errors in per cent {"train", "test": [cfg.seeds, len(cfg.features)]}.
    """
    rng, out = np.random.default_rng((cfg.seed, 1)), {"train": [], "test": []}
    for x, y, target in zip(*pool.take(pool.rows(cfg.seeds, cfg.size, rng), pool.noisy), strict=True):
        w = rng.standard_normal((x.shape[1], max(cfg.features))).astype(np.float32) * (2 / x.shape[1]) ** 0.5
        seen, new = np.maximum(x @ w, 0), np.maximum(pool.x_test @ w, 0)
        second = [np.linalg.lstsq(seen[:, :p], target, rcond=1e-6)[0] for p in cfg.features]
        for name, hidden, labels in ("train", seen, y), ("test", new, pool.y_test):
            out[name].append([error((hidden[:, : len(v)] @ v)[None], labels)[0] for v in second])
    return out


def minibatches(x, target, batch, *, of=None, counts=None, moved=0.0):
    """`draw` for `models.stacked.trainer`: `batch` random examples, with replacement, for each of S networks.

    x [T,n,I], target [T,n,C]: T training sets.  `of` [S]: which of them a network learns from (without it S = T);
    `counts` [S]: only from that many first examples.  x may be [K,T,n,I], K versions of each example of which the first
    is the example itself: then a network whose `moved` [S] is 1 gets any of them.
    """
    x = x if x.ndim == 4 else x[None]
    versions, sets, size, inputs = x.shape
    of = np.arange(sets) if of is None else np.asarray(of)
    counts = size if counts is None else counts
    counts, moved = (np.broadcast_to(np.float32(a), of.shape)[:, None] for a in (counts, moved))
    first = np.int32(of * size)[:, None]
    flat, goal = ops.convert_to_tensor(x.reshape(-1, inputs)), ops.convert_to_tensor(target.reshape(sets * size, -1))
    chance = keras.random.SeedGenerator()

    def draw():
        at, version = (keras.random.uniform((len(of), batch), seed=chance) for _ in range(2))
        row = first + ops.cast(at * counts, "int32")
        place = row + sets * size * ops.cast(version * (1 + (versions - 1) * moved), "int32")
        return ops.take(flat, place, axis=0), ops.take(goal, row, axis=0)

    return draw


def learning(cfg, pool, build, width):
    """Errors {"train", "test": [seeds, sizes]} of networks of `width` hidden units, made by the unit's `build`.

    Each is trained on the first n of its seed's examples, n of cfg.curve, labels right.
    """
    runtime.seed(cfg.seed)
    x, y, target = pool.take(pool.rows(cfg.seeds, max(cfg.curve), np.random.default_rng((cfg.seed, 3))), pool.right)
    of, counts = np.repeat(np.arange(cfg.seeds), len(cfg.curve)), np.tile(cfg.curve, cfg.seeds)
    model = build(len(of), cfg.inputs, (width,), pool.classes)
    draw = minibatches(x, target, cfg.batch, of=of, counts=counts)
    trainer(model, draw, cross_entropy, 5e-3, cfg.curve_steps)(cfg.curve_steps)
    wrong = answers(model, x[of]).argmax(axis=2) != y[of]
    train = [100 * row[:n].mean() for row, n in zip(wrong, counts, strict=True)]
    test = error(answers(model, pool.x_test), pool.y_test)
    out = {name: np.reshape(values, (cfg.seeds, -1)) for name, values in (("train", train), ("test", test))}
    print(f"{width} hidden units, n = {cfg.curve}: test error {out['test'].mean(axis=0).round(1)} %", flush=True)
    return out


def errors(model, pool, **parts):
    """Errors [S] on each of `parts`, name=(x [S,n,I], y [S,n]), and on the pool's test part."""
    parts |= {"test": (pool.x_test, pool.y_test)}
    return {name: error(answers(model, x), y) for name, (x, y) in parts.items()}


def variance_shift(model, norms, x, *, mend=False):
    """The variance that each of the layers `norms` meets in test mode over the one it has noted in training.

    x [S,n,I] -> [len(norms), S], each a ratio of sums over the units.  With `mend` each layer also takes the mean and
    variance that it meets, the first layer first, since each changes what the next one sees.
    """
    out = []
    for norm in norms:
        mean, variance = ops.moments(keras.Model(model.input, norm.input)(x), axes=1, keepdims=True)
        out.append(ops.sum(variance, axis=(1, 2)) / ops.sum(norm.variance, axis=(1, 2)))
        if mend:
            norm.mean.assign(mean)
            norm.variance.assign(variance)
    return np.stack(out)


def entropy(p):
    """Probabilities [...,C] -> nats [...]."""
    return -(p * np.log(np.maximum(p, 1e-12))).sum(axis=-1)


def refusal(uncertain, wrong, shares):
    """Error in per cent on what is left when the share with the highest `uncertain` [N] is refused, of each share."""
    ordered = wrong[np.argsort(uncertain, kind="stable")]
    return [100 * ordered[: round((1 - share) * len(wrong))].mean() for share in shares]


def detects(uncertain, wrong):
    """Probability that a wrong answer is less certain than a right one (area under the ROC curve); NaN without both."""
    return roc_auc_score(wrong, uncertain) if 0 < wrong.sum() < len(wrong) else float("nan")
