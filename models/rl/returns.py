"""What PPO has learned after equally many steps: day 18's, and Stable-Baselines3's with the same hyper-parameters.

    python -m models.rl.returns                     HalfCheetah and Hopper, ten seeds of each: about an hour
    python -m models.rl.returns --record FILE       and a copy of the record

The same network, initialisation, rollout, minibatches, epochs, clipping, annealed rate, Adam's epsilon, and the same
normalisation of observations and rewards; the value's squared error weighs 0.5, Stable-Baselines3's default, which is
twice what the authors' code and day 18 have.  Each trained policy is judged by its mean action on episodes of its own.
Returns differ much from seed to seed: besides the means, of which ours is to be no less, there is Welch's interval of
their difference.  Finished trainings are kept, and the same command goes on.  The exit status is 1 where ours is less.
"""

import dataclasses
import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from course import core
from course.core import bounds
from models.rl import policies
from models.rl.benchmark import OURS, theirs, told

THEIRS = "Stable-Baselines3"


@dataclasses.dataclass
class Config:
    """What is learned, and for how long."""

    seed: int = 0  # trial i has this and 100 i
    trials: int = 10  # trainings of each program on each task
    envs: tuple[str, ...] = ("HalfCheetah-v5", "Hopper-v5")  # tasks with continuous actions
    steps: int = 300_000  # of all environments of a training together
    evaluated: int = 100  # episodes that judge a policy
    together: int = dataclasses.field(default=2, metadata={"where": True})  # trainings of the rival at a time
    sb3: str = dataclasses.field(default=".venv-sb3/bin/python", metadata={"where": True})  # interpreter that has it
    record: str = dataclasses.field(default="", metadata={"where": True})  # JSON file to copy the record to


PRESETS = {"smoke": dict(trials=2, envs=("HalfCheetah-v5",), steps=4_096, evaluated=2), "cpu": dict()}


def rival(cfg, recipe, env, seed):
    """Train Stable-Baselines3's PPO by day 18's `recipe`, in a process of its own: its returns and its speed."""
    settings = {
        **dataclasses.asdict(recipe), "env": env, "vector": "loop", "threads": 1, "seed": seed, "turn": cfg.steps,
        "judged": cfg.evaluated,
    }  # fmt: skip
    with theirs(cfg.sb3, "ppo", settings) as (said, turn):
        done = turn()
    mean = sum(done["returns"]) / len(done["returns"])
    print(f"{THEIRS}, {env}, seed {seed}: mean return {mean:.1f}", flush=True)
    return {"mean": mean, "steps": done["steps"], "versions": said["versions"]}


def difference(first, second):
    """95 % interval of the difference of two means, by Welch's t-test; None with less than two values of each."""
    from scipy import stats

    if min(len(first), len(second)) < 2:
        return None
    return [float(end) for end in stats.ttest_ind(first, second, equal_var=False).confidence_interval()]


def compare(run, cfg):
    """Train all and compare: rows of the table, two a task, and the versions of the rival's libraries."""
    unit = importlib.import_module("course.day18_ppo")
    recipe = dataclasses.replace(unit.MUJOCO, value_weight=1.0)  # of half the squared error
    seeds, rows = [cfg.seed + 100 * i for i in range(cfg.trials)], []
    for env in cfg.envs:
        calls = [(f"theirs-{env}-{seed}", partial(rival, cfg, recipe, env, seed)) for seed in seeds]
        with ThreadPoolExecutor(cfg.together) as pool:
            other = list(pool.map(lambda call: run.once(*call), calls))
        ours = [run.once(f"ours-{env}-{seed}", partial(unit.trial, run, f"{env}-{seed}", env, recipe, seed,
                                                       cfg.steps, cfg.evaluated)) for seed in seeds]  # fmt: skip
        means = {OURS: [one["mean"] for one in ours], THEIRS: [one["mean"] for one in other]}
        rows += [{"environment": env, "program": name, "steps": other[0]["steps"], "mean return": np.mean(values),
                  "runs": values, "above the other": difference(values, against)} for (name, values), against in
                 zip(means.items(), reversed(means.values()), strict=True)]  # fmt: skip
    return rows, other[0]["versions"]


def show(rows):
    """The comparison on the terminal: the names of the tasks on which ours learned less."""
    worse = []
    for ours, other in zip(rows[::2], rows[1::2], strict=True):
        if ours["mean return"] < other["mean return"]:
            worse.append(ours["environment"])
    cells = [(task, program, steps, mean, above) for task, program, steps, mean, _, above in map(_cells, rows)]
    bounds.table("", ("task", "program", "steps", "mean return", "above the other, 95 %"), cells)
    return worse


def _cells(row):
    """A row of the table as texts."""
    return (row["environment"], row["program"], f"{row['steps']:,}", f"{row['mean return']:,.0f}",
            ", ".join(f"{value:,.0f}" for value in row["runs"]),
            " to ".join(f"{end:,.0f}" for end in row["above the other"] or []))  # fmt: skip


def markdown(record):
    """A record as the table of a README."""
    lines = [
        told(record, record["versions"], record["rival"]),
        "",
        "| task | program | steps | mean return | of the runs | above the other, 95 % | |",
        "|---" * 7 + "|",
    ]
    for ours, other in zip(*[iter(record["tables"]["returns"])] * 2, strict=True):
        for row in (ours, other):
            verdict = "" if row is other else "no less" if ours["mean return"] >= other["mean return"] else "**less**"
            lines.append(f"| {' | '.join((*_cells(row), verdict))} |")
    return "\n".join(lines)


def main(argv=None):
    """Read the command, train what is not trained yet, compare, show and record."""
    argv = [*(sys.argv[1:] if argv is None else argv)]
    options, cfg = core.parse(Config, PRESETS, argv, unit="models.rl.returns")
    if not Path(cfg.sb3).exists():
        raise core.InputError(f"{cfg.sb3} is not there: make rl-benchmark builds it")
    for env in cfg.envs:
        policies.require("--envs", env, policies.Gaussian)
    options = core.alone(options)
    with core.run("rl_returns", options, cfg, typed=" ".join(["python -m models.rl.returns", *argv])) as run:
        rows, versions = compare(run, cfg)
        run.record["metrics"] = {f"{row['environment']}, {row['program']}": row["mean return"] for row in rows}
        run.record["tables"] = {"returns": rows}
        run.record["rival"] = versions
        worse = show(rows)
    if cfg.record:
        core.files.write_atomic(cfg.record, (run.folder / "result.json").read_text())
    if worse:
        print(f"missed: {', '.join(worse)}: less learned than by {THEIRS}", file=sys.stderr)
        raise SystemExit(1)
    return run.record


if __name__ == "__main__":
    core.cli(main)
