"""Learning curves of runs whose logs are of uneven worth: many updates, and few episodes that ended in each."""

import numpy as np


def binned(values, points=40):
    """Logs [U] of a run -> means over `points` parts of it of equal length (over fewer, if the run is shorter), a list.

    NaN (an update in which no episode ended) is passed over; a part of nothing else has the value of the part before,
    and the first parts that of the first which has one.  Logs that have none at all stay NaN.
    """
    parts = np.array_split(np.asarray(values, np.float64), min(points, len(values)))
    means = np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])
    known = np.flatnonzero(np.isfinite(means))
    if not len(known):
        return means.tolist()
    before = np.searchsorted(known, np.arange(len(means)), side="right") - 1
    return means[known[np.maximum(before, 0)]].tolist()


def running(values, window, at):
    """The mean of the last `window` of `values` when `at` [K] of them were there -> [K]; beyond the end, the last one.

    While there are fewer than `window`, the mean of those.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    until = np.minimum(at, len(values))
    since = np.maximum(until - window, 0)
    return (sums[until] - sums[since]) / (until - since)


def row(label, name, steps, runs):
    """A row of a table of returns: `runs`, each {"mean", "steps_per_second"}, of arm `label` in environment `name`."""
    means = [one["mean"] for one in runs]
    return {"environment": name, "arm": label, "steps": steps, "runs": len(runs), "mean return": np.mean(means),
            "deviation": np.std(means), "worst run": min(means),
            "steps_per_second": np.mean([one["steps_per_second"] or np.nan for one in runs])}  # fmt: skip
