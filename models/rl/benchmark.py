"""How many steps a second DQN on Pong and PPO on HalfCheetah train for, beside Stable-Baselines3 doing the same work.

Same environment and preprocessing, network (the numbers of parameters must agree), batch, copies of the environment,
threads, and updates for a step (the counts must agree, or no ratio is given).  What is timed is training: acting, the
environments, the buffer or the rollout, the updates.  All programs are alive at once and take turns of equally many
steps, one at a time, so that a busy spell of the machine meets them all; the first turn, which compiles, does not
count.  The ratio is the median of those of the rounds.  Stable-Baselines3 runs with its environments in a loop, with
each in a process, and with a single thread for PyTorch, which suits small networks; the fastest of the three counts.
The exit status is 1 where a bound is missed.
"""

import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import tempfile
from pathlib import Path

from course.core import InputError, bounds, cli, files, flags, runtime
from course.core.bounds import Ratio
from course.core.experiment import Run, to_json

OURS = "ours"
RIVALS = {  # Stable-Baselines3 with its environments in a loop, each in a process, and with one thread for PyTorch
    "loop": {"vector": "loop"}, "processes": {"vector": "processes"}, "one thread": {"vector": "loop", "threads": 1},
}  # fmt: skip
BOUNDS = {"dqn": 1.3, "ppo": 1.5}  # at least: steps a second, ours / Stable-Baselines3's
SETTINGS = {  # what both sides are told; epsilon stays where most of a training spends its time
    "dqn": {"env": "ALE/Pong-v5", "envs": 8, "batch": 32, "every": 4, "warmup": 400, "capacity": 20_000,
            "target_every": 250, "epsilon": 0.05, "turn": 800},
    "ppo": {"env": "HalfCheetah-v5", "envs": 4, "steps": 512, "batch": 64, "epochs": 10, "turn": 4_096, "seed": 0,
            "lr": 3e-4, "anneal": False, "adam_epsilon": 1e-5, "gamma": 0.99, "lam": 0.95, "clip": 0.2,
            "entropy_weight": 0.0, "value_weight": 1.0, "clip_norm": 0.5},
}  # fmt: skip


@dataclasses.dataclass
class Benchmark:
    """What to measure, and for how long."""

    tasks: tuple[str, ...] = ("dqn", "ppo")  # of dqn, ppo
    rounds: int = 5  # turns of each program that count; odd, so that one of them has the median ratio
    threads: int = 0  # of TensorFlow, PyTorch and the Atari emulator; 0: one a core
    sb3: str = ".venv-sb3/bin/python"  # interpreter that has Stable-Baselines3 (make rl-benchmark)
    record: str = ""  # JSON file for the figures


# --- ours: the units' own code, in a child ---------------------------------------------------------------------------


def dqn(s):
    """Day 17's network, targets and loss in the loop of `models.rl.dqn`: parameters, and a function of a turn."""
    import keras
    import numpy as np

    from models.rl import dqn, envs
    from models.rl.replay import Replay

    unit = importlib.import_module("course.day17_dqn")
    agent = dataclasses.replace(unit.ATARI, batch=s["batch"], every=s["every"], target_every=s["target_every"])
    env = envs.vector(s["env"], s["envs"], 0, threads=s["threads"])
    shape, actions = env.single_observation_space.shape, int(env.single_action_space.n)
    online, target = dqn.pair(lambda: unit.network(shape, actions, agent.dueling))
    optimizer = keras.optimizers.Adam(agent.lr, global_clipnorm=10)
    loop = dqn.Loop(2**62, agent.batch, s["warmup"], agent.every, agent.at_once, agent.target_every,
                    epsilon=(s["epsilon"], s["epsilon"], 1), report=s["turn"])  # fmt: skip
    reports = dqn.train(
        env, Replay(s["capacity"], shape[1:], s["envs"], stack=shape[0]), online, target,
        unit.rule(agent, online, target, optimizer), loop, rng=np.random.default_rng(0),
        finished=envs.Episodes(s["envs"]), obs=env.reset()[0],
    )  # fmt: skip
    before = {"step": 0, "updates": 0}

    def turn():
        _, report = next(reports)
        done = {key: report[key] - before[key] for key in before}
        before.update({key: report[key] for key in before})
        return {"steps": done["step"], "seconds": done["step"] / report["steps_per_second"],
                "updates": done["updates"]}  # fmt: skip

    return online.count_params(), turn


def ppo(s):
    """Day 18's whole `learn`: parameters, and a function of a turn.

    Each turn is a training of its own, whose first update, which compiles, is one more than the turn has and not
    counted.
    """
    import tensorflow as tf

    from models.rl import envs, policies

    unit = importlib.import_module("course.day18_ppo")
    recipe = dataclasses.replace(unit.MUJOCO, **{key: s[key] for key in ("envs", "steps", "batch", "epochs")})
    update, column = s["envs"] * s["steps"], unit.LOGS.index
    with envs.opened(s["env"], 1, 0) as one:
        (kind, k), size = policies.of(one.single_action_space), one.single_observation_space.shape[0]
    networks = unit.build(recipe, size, kind, k)

    def turn():
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder), {}, tf.distribute.get_strategy())
            *_, logs = unit.learn(run, "turn", s["env"], recipe, 0, update + s["turn"])
        counted = logs[1:]
        return {"steps": int(len(counted) * update), "seconds": float(counted[:, column("seconds")].sum()),
                "updates": int(counted[:, column("updates")].sum())}  # fmt: skip

    return sum(int(weight.shape.num_elements()) for net in networks for weight in net.trainable_variables), turn


def child(task, settings, pipe):
    """In a process of its own: say how many parameters there are, then answer each message by a turn of training."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(settings["threads"])
    tf.config.threading.set_inter_op_parallelism_threads(settings["threads"])
    parameters, turn = {"dqn": dqn, "ppo": ppo}[task](settings)
    pipe.send({"parameters": parameters, "versions": runtime.versions()})
    while pipe.recv():
        pipe.send(turn())


@contextlib.contextmanager
def ours(task, settings):
    """For a `with` block: (what the child said of itself, a function that lets it train for a turn)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(task, settings, there), daemon=True)
    process.start()
    there.close()

    def turn():
        here.send(True)
        return here.recv()

    try:
        yield here.recv(), turn
    finally:
        with contextlib.suppress(OSError):
            here.send(False)
        process.join(10)
        process.kill()


# --- theirs ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def theirs(python, task, settings):
    """As `ours`, of Stable-Baselines3 in its own environment.  Raises `InputError` where it does not run there."""
    script = Path(__file__).resolve().with_name("sb3_worker.py")
    words = [Path(python).absolute(), script, task, json.dumps(settings)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with (
        tempfile.TemporaryDirectory() as folder,  # MuJoCo writes its warnings to a file in the working folder
        subprocess.Popen(words, **pipes, text=True, cwd=folder) as process,
    ):

        def answer():
            if not (line := process.stdout.readline()):
                last = (process.stderr.read().strip().splitlines() or ["no reason given"])[-1]
                raise InputError(f"Stable-Baselines3 does not run with {python} ({last}): make rl-benchmark builds it")
            return json.loads(line)

        def turn():
            process.stdin.write(f"{settings['turn']}\n")
            process.stdin.flush()
            return answer()

        try:
            yield answer(), turn
        finally:
            process.kill()


# --- the measurement -------------------------------------------------------------------------------------------------


def measure(task, options):
    """All programs in turns: {program: [rate of each round]}, and the versions of our libraries and of theirs.

    Raises RuntimeError where they did not do the same work.
    """
    settings = SETTINGS[task] | {"threads": options.threads or len(os.sched_getaffinity(0))}
    with contextlib.ExitStack() as stack:
        started = {OURS: stack.enter_context(ours(task, settings))}
        for name, own in RIVALS.items():
            started[name] = stack.enter_context(theirs(options.sb3, task, settings | own))
        if len({said["parameters"] for said, _ in started.values()}) > 1:
            found = {name: said["parameters"] for name, (said, _) in started.items()}
            raise RuntimeError(f"{task}: the networks differ in their numbers of parameters: {found}")
        rates = {name: [] for name in started}
        for number in range(options.rounds + 1):
            turns = {name: turn() for name, (_, turn) in started.items()}
            if not number:
                continue
            if len({(one["steps"], one["updates"]) for one in turns.values()}) > 1:
                raise RuntimeError(f"{task}: the programs did unlike work: {turns}")
            for name, one in turns.items():
                rates[name].append(one["steps"] / one["seconds"])
            told = "  ".join(f"{name} {own[-1]:,.0f}" for name, own in rates.items())
            print(f"{task}, round {number}/{options.rounds}, steps/s: {told}", flush=True)
        return rates, [said["versions"] for said, _ in started.values()][:2]


def against(task, rates):
    """`Ratio` of the round whose ratio is the median, and the ratios of all rounds."""
    rival = max(RIVALS, key=lambda name: sorted(rates[name])[len(rates[name]) // 2])
    pairs = sorted(zip(rates[OURS], rates[rival], strict=True), key=lambda pair: pair[0] / pair[1])
    first, second = pairs[len(pairs) // 2]
    what = f"{task.upper()}, {SETTINGS[task]['env']}"
    ratio = Ratio(what, f"ours / Stable-Baselines3 ({rival})", first, second, BOUNDS[task], True)
    return ratio, [a / b for a, b in pairs]


def told(record, ours, theirs):
    """A line for a README: the machine, the versions of both programs' libraries, the command."""
    hardware = record["hardware"]
    return (f"{hardware['cpu']}, {hardware['cores']} cores; TensorFlow {ours['tensorflow']}, Keras {ours['keras']};"
            f" Stable-Baselines3 {theirs['stable_baselines3']}, PyTorch {theirs['torch']}."
            f" `{record['command']}`")  # fmt: skip


def markdown(record):
    """A record as the table of a README: all programs, the ratio of the median round, the bound."""
    tasks = [task for task in SETTINGS if task in record]
    lines = [
        told(record, *record[tasks[0]]["versions"]),
        "",
        f"| task, steps/s | {' | '.join((OURS, *RIVALS))} | ratio | of the rounds | bound | |",
        "|---" * (6 + len(RIVALS)) + "|",
    ]
    for task in tasks:
        one = record[task]
        middle = (f"{statistics.median(one['rates'][name]):,.0f}" for name in (OURS, *RIVALS))
        rounds = f"{one['ratios'][0]:.2f} to {one['ratios'][-1]:.2f}"
        cells = (one["what"], *middle, f"{one['value']:.2f}", rounds, f">= {one['bound']}",
                 "met" if one["met"] else "**missed**")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv):
    options = flags.read(Benchmark(), argv, prog="python -m models.rl.benchmark", description=__doc__)
    if unknown := set(options.tasks) - set(SETTINGS):
        raise InputError(f"--tasks: there is no {', '.join(sorted(unknown))}: choose from {', '.join(SETTINGS)}")
    if options.rounds < 1 or options.rounds % 2 == 0:
        raise InputError(f"--rounds {options.rounds}: give an odd number, so that one round has the median ratio")
    if not Path(options.sb3).exists():
        raise InputError(f"{options.sb3} is not there: make rl-benchmark builds it")
    found, load, record = [], os.getloadavg(), {"options": dataclasses.asdict(options), "settings": SETTINGS}
    for task in options.tasks:
        rates, versions = measure(task, options)
        ratio, spread = against(task, rates)
        found.append(ratio)
        record[task] = {"rates": rates, "ratios": spread, "versions": versions,
                        **dataclasses.asdict(ratio), "value": ratio.value, "met": ratio.met}  # fmt: skip
    bounds.show(found, unit="steps/s")
    for task in options.tasks:
        rounds = ", ".join(f"{value:.2f}" for value in record[task]["ratios"])
        print(f"{task}: ratios of the rounds {rounds}")
    if options.record:
        command = shlex.join(["python", "-m", "models.rl.benchmark", *argv])
        record |= {"hardware": runtime.hardware(), "commit": runtime.commit(), "load": load, "command": command}
        files.write_atomic(options.record, to_json(record))
    bounds.conclude(found)


if __name__ == "__main__":
    cli(main)
