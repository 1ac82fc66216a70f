"""Day 3's record: what each experiment found -> tables and figures of the run, and metrics, which are returned.

Errors are in per cent of the images; test labels are right, training and validation labels partly wrong.  `_std` is
the population standard deviation over the seeds.
"""

import numpy as np

from course.core import plots
from models.overfitting import figures, trials


def ladders(run, cfg, widths, depths, features):
    """`widths`, `depths`: what the unit's `rung` found at each; `features`: errors of `random_features`."""

    def over(rungs, part, key):
        return np.array([rung[part][key] for rung in rungs]).T  # [seeds, rungs]

    capacity = [rung["capacity"] for rung in widths]
    lines = {"test": over(widths, "new sets", "test"), "test, with L2": over(widths, "with L2", "test"),
             "training": over(widths, "new sets", "train")}  # fmt: skip
    least = {"test": features["test"], "training": features["train"], "x": np.array(cfg.features) / cfg.size}
    run.figure("double_descent", figures.double_descent({"x": capacity} | lines, least, cfg.noise))
    run.figure("decomposition", figures.decompositions({
        "width, new sets": ("hidden units", cfg.widths, [rung["new sets"] for rung in widths]),
        "width, bootstrap of one set": ("hidden units", cfg.widths, [rung["bootstrap"] for rung in widths]),
        "width, new sets, with L2": ("hidden units", cfg.widths, [rung["with L2"] for rung in widths]),
        f"depth, layers of {cfg.narrow}": ("hidden layers", cfg.depths, [rung["new sets"] for rung in depths]),
    }))  # fmt: skip
    run.figure("depth", figures.ladder(cfg.depths, {
        f"{name}, {part}": over(depths, group, key) for name, group in (("plain", "new sets"), ("with L2", "with L2"))
        for part, key in (("test", "test"), ("training", "train"))}, "hidden layers"))  # fmt: skip
    run.record["tables"]["ladders"] = [
        {"ladder": ladder, "hidden": size, "parameters": rung["parameters"], "sets": part,
         "train": float(np.mean(rung[part]["train"])), "test": float(np.mean(rung[part]["test"])),
         "test_std": float(np.std(rung[part]["test"])),
         **{term: rung[part][term] for term in ("noise", "bias2", "variance", "error", "on drawn labels")},
         **{f"votes_{term}": value for term, value in rung[part]["votes"].items()}}
        for ladder, sizes, rungs in (("width", cfg.widths, widths), ("depth", cfg.depths, depths))
        for size, rung in zip(sizes, rungs, strict=True) for part in ("new sets", "with L2", "bootstrap")]  # fmt: skip

    each = [rung[part] for rung in widths + depths for part in ("new sets", "with L2", "bootstrap")]
    total = np.array([row["noise"] + row["bias2"] + row["variance"] for row in each])
    expected, drawn = (np.array([row[key] for row in each]) for key in ("error", "on drawn labels"))
    test, tame = lines["test"].mean(axis=0), lines["test, with L2"].mean(axis=0)
    peak = highest(test)
    after = peak + int(test[peak:].argmin())
    ratios = lines["test"][:, peak] / lines["test"][:, after]
    there = widths[peak]
    return {
        "double_descent_peak_ratio": test[peak] / test[after],
        "double_descent_peak_at": capacity[peak],
        "peak_variance_share": there["new sets"]["variance"] / there["new sets"]["error"],
        "double_descent_peak_ratio_std": float(ratios.std()),
        "peak_test_error": test[peak], "peak_training_error": lines["training"][:, peak].mean(),
        "test_error_before_peak": test[: peak + 1].min(), "test_error_after_peak": test[after],
        "widest_test_error": test[-1],
        "peak_test_error_with_l2": tame[peak], "lowest_test_error_with_l2": tame.min(),
        "features_peak_ratio": peak_ratio(np.mean(features["test"], axis=0)),
        "features_peak_at": float(least["x"][highest(np.mean(features["test"], axis=0))]),
        **{f"{place}_{term}": rung["new sets"][term] for place, rung in (("narrowest", widths[0]), ("peak", there),
           ("widest", widths[-1])) for term in ("bias2", "variance")},
        "noise": there["new sets"]["noise"],
        "peak_variance_bootstrap": there["bootstrap"]["variance"], "peak_bias2_bootstrap": there["bootstrap"]["bias2"],
        "identity_gap": float(np.abs(total / expected - 1).max()),
        "identity_gap_on_drawn_labels": float(np.abs(total / drawn - 1).max()),
        "deepest_test_error": float(np.mean(depths[-1]["new sets"]["test"])),
        "shallowest_test_error": float(np.mean(depths[0]["new sets"]["test"])),
    }  # fmt: skip


def highest(values):
    """Index of the highest point that has a lower one before it: the second rise, not where the ladder begins."""
    values = np.asarray(values)
    rise = values - np.minimum.accumulate(values)
    return int(rise.argmax()) if rise.max() > 0 else len(values) - 1


def peak_ratio(values):
    """The error at the peak over the lowest behind it."""
    peak = highest(values)
    return float(values[peak] / np.min(values[peak:]))


def curves(run, cfg, found):
    """Learning curves: `found`, of each of cfg.curve_widths, errors {"train", "test": [seeds, sizes]}."""
    lines = {f"{width} hidden units, {part}": errors[key] for width, errors in zip(cfg.curve_widths, found, strict=True)
             for part, key in (("test", "test"), ("training", "train"))}  # fmt: skip
    run.figure("learning_curves", figures.ladder(cfg.curve, lines, "training examples (labels right)"))
    out = {}
    for width, errors in zip(cfg.curve_widths, found, strict=True):
        train, test = (np.mean(errors[part], axis=0) for part in ("train", "test"))
        for place, n in ((0, cfg.curve[0]), (-1, cfg.curve[-1])):
            out |= {f"width_{width}_n_{n}_test_error": test[place], f"width_{width}_n_{n}_gap": (test - train)[place]}
    return out


def cures(run, found):
    """Every combination of the cures: table, bars of the telling ones, validation losses of each alone."""
    rows = []
    for row in found:
        names = [f"dropout, keep {row['keep']:g}" if name == "dropout" else name for name in row["cures"]]
        values = {key: np.array(row[key]) for key in ("train", "validation", "test")}
        values["gap"] = values["validation"] - values["train"]
        spread = {f"{key}_std": float(value.std()) for key, value in values.items()}
        label = "all five" if len(names) == 5 else " + ".join(names) or "none"
        rows.append({"cures": label, "count": len(names)} | {k: float(v.mean()) for k, v in values.items()} | spread)
    run.record["tables"]["cures"] = sorted(rows, key=lambda row: row["count"])
    none, every = (next(row for row in rows if row["cures"] == name) for name in ("none", "all five"))
    alone = sorted((row for row in rows if row["count"] == 1), key=lambda row: -row["gap"])
    shown = [none, *alone, *without(rows, found), every]
    best = min(rows, key=lambda row: row["validation"])
    run.figure("cures", figures.cures(shown + [best | {"cures": f"best in validation:\n{best['cures']}"}]))
    single = {"none": found[0]["losses"]} | {row["cures"][0]: row["losses"] for row in found
              if row["cures"] in (["dropout"], ["batch norm"], ["L2"], ["augmentation"])
              and row["keep"] == found[0]["keep"]}  # fmt: skip
    every = next(row for row in found if len(row["cures"]) == 4 and "early stopping" not in row["cures"])
    run.figure("cure_losses", figures.losses(single | {"all four": every["losses"]}))
    pick = {"none": none, "all": rows[find(found, 5)], "best_validation": best}
    pick |= {row["cures"].replace(", ", "_").replace(" ", "_").replace(".", ""): row for row in alone}
    metrics = {"gap_reduction_all_cures": none["gap"] - pick["all"]["gap"]}
    for name, row in pick.items():
        metrics |= {f"{name.lower()}_{key}": row[key] for key in ("gap", "gap_std", "test")}
    return metrics


def find(found, count):
    """Index of the row with `count` cures."""
    return next(i for i, row in enumerate(found) if len(row["cures"]) == count)


def without(rows, found):
    """The rows with all cures but one, renamed for it."""
    everything = set(found[find(found, 5)]["cures"])
    return [row | {"cures": f"all but {(everything - set(raw['cures'])).pop()}"}
            for row, raw in zip(rows, found, strict=True) if len(raw["cures"]) == 4]  # fmt: skip


def orders(run, found):
    """Dropout and batch normalisation in several orders: variance ratios, errors before and after mending."""
    table = []
    for name, row in found.items():
        ratios = {f"ratio_{layer + 1}": float(np.mean(values)) for layer, values in enumerate(row["ratios"])}
        errors = {f"{key}{end}": float(of(row[key]))
                  for key in ("test", "mended") for end, of in (("", np.mean), ("_std", np.std))}  # fmt: skip
        table.append({"order": name} | ratios | errors)
    run.record["tables"]["order of dropout and batch norm"] = table
    run.figure("dropout_batch_norm_order", figures.orders(found))
    slug = {row["order"]: row["order"].replace(", ", "_").replace(" ", "_") for row in table}
    return {f"{slug[row['order']]}_{key}": row[key] for row in table
            for key in row if key == "test" or key == "mended" or key.startswith("ratio")}  # fmt: skip


def uncertainty(run, found, data):
    """`found`: {"one pass", "MC dropout"} -> entropy, chosen [S,N] of the first N test images of `data`."""
    count = len(found["MC dropout"]["entropy"][0])
    images, labels, names = data.x_test[:count], data.y_test[:count], data.labels
    found = {kind: {key: np.array(value) for key, value in row.items()} for kind, row in found.items()}
    for row in found.values():
        row["wrong"] = row["chosen"] != labels
    mc, shares = found["MC dropout"], np.linspace(0, 0.5, 26)
    refused = {
        kind: np.mean([trials.refusal(*one, shares) for one in zip(row["entropy"], row["wrong"], strict=True)], axis=0)
        for kind, row in found.items()
    }
    run.figure("mc_dropout", figures.uncertainty(mc["entropy"].ravel(), mc["wrong"].ravel(), refused))
    entropy, chosen, wrong = (mc[key][0] for key in ("entropy", "chosen", "wrong"))
    most = np.argsort(-entropy)[:24]
    captions = [f"{names[labels[i]]}\nsaid {names[chosen[i]]}\n{entropy[i]:.2f} nats" for i in most]
    title = "least certain test images"
    run.figure("most_uncertain", plots.predictions(images[most], captions, ~wrong[most], title=title))
    out = {"mc_entropy_right": float(mc["entropy"][~mc["wrong"]].mean()),
           "mc_entropy_wrong": float(mc["entropy"][mc["wrong"]].mean())}  # fmt: skip
    for kind, row in found.items():
        slug = kind.lower().replace(" ", "_")
        auc = [trials.detects(e, w) for e, w in zip(row["entropy"], row["wrong"], strict=True)]
        out |= {f"{slug}_error": 100 * float(row["wrong"].mean()), f"{slug}_error_detection_auc": float(np.mean(auc)),
                f"{slug}_error_10_percent_refused": float(refused[kind][5])}  # fmt: skip
    return out
