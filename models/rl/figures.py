"""Figures of learning runs, for the units that draw them."""

import re

from course.core import plots
from models.rl import evaluate

BAND = "line: mean of the runs; band: one standard deviation"


def named(label):
    """A task or an arm as the name of a metric or a file: "cart pole, A2C" -> "cart_pole_a2c"."""
    return re.sub("[^a-z0-9]+", "_", label.lower())


def learning(run, done):
    """Day 18's figures: one a task, and one of what the two algorithms do on CartPole.

    done: task -> runs, each a dict of logs over "steps".
    """
    logs = {"return": "return", "KL, eq. 7": "approx_kl", "clipped share": "clip_fraction",
            "explained variance": "explained_variance"}  # fmt: skip
    for label, runs in done.items():
        groups = {title: {label: [one[column] for one in runs]} for title, column in logs.items()}
        run.figure(named(label), plots.panels(groups, x=runs[0]["steps"], xlabel="steps", size=(3.2, 2.7), title=BAND))
    if poles := {label: runs for label, runs in done.items() if label.startswith("cart pole")}:
        groups = {title: {label: [one[title] for one in runs] for label, runs in poles.items()}
                  for title in ("return", "entropy")}  # fmt: skip
        steps = {label: runs[0]["steps"] for label, runs in poles.items()}
        run.figure("ppo_and_a2c", plots.panels(groups, x=steps, xlabel="steps", title=BAND))


def ablation(run, rows):
    """Bars of `rows` ({"arm", "mean return", "deviation", "environment"}), none where there are none."""
    if rows:
        means, errors = ({row["arm"]: row[key] for row in rows} for key in ("mean return", "deviation"))
        title = f"{rows[0]['environment']}: mean of the runs, and one standard deviation"
        run.figure("ablation", plots.bars(means, errors=errors, ylabel="return", title=title))


def reinforce(run, curves, measured, snapshots):
    """Day 16's figures: the returns while learning (task -> arm -> runs [S,U]), and the gradient's noise."""
    run.figure("returns", plots.panels(curves, xlabel="update", size=(4.6, 3.2), title=BAND))
    over = {}
    for row in measured:
        over.setdefault(row["weights"], []).append(row["over signal"])  # None, a gap, where it was not seen
    run.figure("gradient", plots.curves(over, x=snapshots, xlabel="updates before", yscale="log",
                                        ylabel="variance / squared mean"))  # fmt: skip


def imagination(run, found, at):
    """The model-based unit's figures: returns over real episodes of both agents, and how its rounds went.

    found: agent -> runs, each a list of rows; at: agent -> the real episodes [K] of its rows.
    """
    curves = {arm: [[row["return"] for row in rows] for rows in runs] for arm, runs in found.items()}
    run.figure("real_episodes", plots.curves(curves, x=at, xlabel="real episodes", xscale="log", title=BAND,
                                             ylabel="return, 100 episodes"))  # fmt: skip
    based = found["model-based"]
    rounds = {"before imagining": [[row["before imagining"] for row in rows] for rows in based],
              "after imagining": curves["model-based"]}  # fmt: skip
    losses = {name: [[row[name] for row in rows] for rows in based] for name in ("squared error", "cross-entropy")}
    run.figure("imagination", plots.panels({"return in reality": rounds, "model's loss": losses}, xlabel="round",
                                           title=BAND))  # fmt: skip


def switches(run, found, table, over):
    """Day 17's figures of CartPole: learning curves, scores, and estimates beside what followed for the arms `over`.

    found: arm -> runs, each a dict with the lists "step", "return", "estimate" and "realised"; table: rows {"arm",
    "score", "deviation"}.
    """
    step = next(iter(found.values()))[0]["step"]
    titles = {"return of the last 100 episodes": "return", "what Q expects": "estimate"}
    curves = {title: {name: [one[key] for one in runs] for name, runs in found.items()}
              for title, key in titles.items()}  # fmt: skip
    figure = plots.panels(curves, x=step, xlabel="steps", legend="side", title=BAND)
    figure.axes[1].set_ylim(0, 200)  # nothing is worth more than 100; what diverges leaves the picture
    run.figure("switches", figure)
    means, errors = ({row["arm"]: row[key] for row in table} for key in ("score", "deviation"))
    run.figure("scores", plots.bars(means, errors=errors, ylabel="mean return of the trained policy on CartPole"))
    pairs = {name: {key: [one[key] for one in found[name]] for key in ("estimate", "realised")}
             for name in over if name in found}  # fmt: skip
    if pairs:
        run.figure("overestimation", plots.panels(pairs, x=step, xlabel="steps", title=BAND))


def game(run, history, expected, realised):
    """Day 17's figures of a game: how it was learned, and Q of states [M] beside the returns [M] that followed."""
    curves = {"points an episode (clipped)": {"last 100": history["return"]}, "mean Q": {"batches": history["q"]}}
    run.figure("learning", plots.panels(curves, x=history["step"], xlabel="decisions"))
    ends = [realised.min(), realised.max()]
    figure = plots.curves({"equal": ends}, x=ends, xlabel="discounted return that followed", ylabel="Q")
    figure.axes[0].scatter(realised[::10], expected[::10], s=3, alpha=0.3, color="C1")
    run.figure("expected", figure)


def film(run, label, policy, name, seed, **kwargs):
    """`evaluate.film` among the run's figures; where it cannot be drawn, the record says why, under "not_filmed".

    MuJoCo draws with libraries that not every machine has.
    """
    file = f"{named(label)}.gif"
    try:
        evaluate.film(policy, name, run.folder / "figures" / file, seed, **kwargs)
        run.picture(file)  # it is there, and listed
    except evaluate.CannotBeDrawn as error:
        run.record.setdefault("not_filmed", {})[label] = str(error)
        print(f"no film: {error}", flush=True)
