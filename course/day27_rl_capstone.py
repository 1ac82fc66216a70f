"""Day 27 - Self-driving: PPO drives from pixels on roads it has never seen, if its training roads differed enough.

Paper:     Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347; Tobin et al. 2017, "Domain
           Randomization", arXiv:1703.06907; Cobbe et al. 2019, "Quantifying Generalization in Reinforcement Learning",
           arXiv:1812.02341; Bengio et al. 2009, "Curriculum Learning", ICML; Coulter 1992, "Implementation of the Pure
           Pursuit Path Tracking Algorithm", CMU-RI-TR-92-01
Task:      drive the car of Gymnasium's CarRacing-v3 round tracks that are kept out of training
Shapes:    pictures uint8 [N,4,42,42] -> steering and pedal: means and log deviations [N,4]; values [N]
Reference: 906 +- 21 over 100 random tracks (World Models); the environment counts as solved at 900
Run:       python -m course.day27_rl_capstone --preset cpu --seed 0
Departs:   1. CarRacing's own picture, but in grey, 42 x 42, without its indicators, and drawn by OpenCV: the drawing
              takes 12 of CarRacing's 12.3 ms a frame, ours half a millisecond for each eighth frame.  (highway-env,
              the other candidate, takes 7 to 65 ms a step in Python, and shows a handful of cars as numbers.)
           2. an action is held for eight frames; gas and brake are one pedal; one device in float32

Preset cpu takes up to 90 minutes on two cores.
"""

# %%
import dataclasses
import time
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from course import core
from course.day18_ppo import Recipe, examples, losses
from models.rl import curves, envs, evaluate, policies, ppo, racing, rollout
from models.rl.normalise import ReturnScaler
from models.rl.provenance import provenance
from models.rl.resume import Resume

REFERENCE = {"return": (906, "", "Ha and Schmidhuber 2018, World Models, 100 random tracks: CarRacing-v0")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of networks, tracks and draws; trial i adds i
    trials: int = 3  # independent runs of the whole recipe
    steps: int = 1_000_000  # decisions of each, eight frames long, of all cars together
    arms: tuple[str, ...] = ()  # of ARMS, one run each; none: all of them
    arm_steps: int = 1_000_000  # decisions of each arm's run; 0: no arms
    evaluated: int = 100  # tracks that judge a driver


PRESETS = {"smoke": dict(trials=1, steps=512, arm_steps=0, evaluated=2),
           "cpu": dict(steps=320_000, arms=("8 tracks", "one colour"), arm_steps=320_000, evaluated=50),
           "full": {}}  # fmt: skip


# %% [markdown]
# ## What varies, is learned
# A network that has driven eight roads may have learned to drive, or eight roads by heart; its training return does not
# tell which.  Only tracks that were *never* driven do, and they have to be kept apart by number, as test pictures are.
# The recipe varies what should not matter, so that nothing can be learned by heart:
#
# - the **tracks**: two thousand million numbers to draw from, and a thousand others held out;
# - the **colours**: the levels of grey of road and meadow are drawn anew for each drive (*domain randomisation*), also
#   such that the road is the brighter; what remains true of every picture is the geometry;
# - a **curriculum**: at first the gentlest of several tracks that are drawn, later any;
# - **patience**: who finds no new piece of road for some time has had an accident.  It saves the time that a car would
#   spend lost in a meadow, where nothing can be learned.


# %%
@dataclasses.dataclass(frozen=True)
class Roads:
    """What a driver meets while it learns."""

    tracks: int = 0  # different ones; 0: as many as there are numbers
    recolour: bool = True
    gentle: int = 6  # at the start of the curriculum the gentlest of so many is driven; 1: no curriculum
    patience: int = 12  # decisions without a new piece of road (two seconds)


WHOLE = "whole recipe"
ARMS = {"8 tracks": Roads(tracks=8), "one colour": Roads(recolour=False), "no curriculum": Roads(gentle=1),
        "no patience": Roads(patience=0)}  # fmt: skip
RECIPE = Recipe(envs=8, steps=128, epochs=8, batch=128, lr=8e-4, gamma=0.98, lam=0.95, entropy_weight=0.002,
                target_kl=0.05, normalise_observations=False, units=192)  # fmt: skip


def candidates(roads, share):
    """How many tracks the gentlest is chosen from, `share` (0..1) of the training being done: 1 from the middle on."""
    return 1 + round((roads.gentle - 1) * max(0.0, 1 - 2 * share))


# %% [markdown]
# ## One pair of eyes
# Four pictures tell where the road is and how fast it comes.  Policy and value look through the same convolutions; the
# loss is day 18's, eqs. 3 to 6 there, and so are the advantages.  The pedal starts with a little gas: a car that stands
# with one foot on each pedal explores nothing.  The actions' deviation starts at a fifth: an action is held for eight
# frames, and with three times as much the car is in the meadow before it has seen a bend; no other setting mattered
# half as much.


# %%
def build(recipe, shape):
    """(policy [B,4,42,42] -> [B,4], value -> [B,1], both at once), on one trunk."""
    start = keras.initializers.Orthogonal
    pictures = keras.Input(shape, dtype="uint8")
    x = layers.Rescaling(1 / 255)(layers.Permute((2, 3, 1))(pictures))
    for filters, size, stride in (16, 6, 3), (32, 4, 2), (32, 3, 1):
        x = layers.Conv2D(filters, size, stride, activation="relu", kernel_initializer=start(2**0.5))(x)
    x = layers.Dense(recipe.units, "relu", kernel_initializer=start(2**0.5))(layers.Flatten()(x))
    gas = keras.initializers.Constant([0.0, 0.3])
    mean = layers.Dense(2, kernel_initializer=start(0.01), bias_initializer=gas)(x)
    outputs, value = policies.GaussianHead(-1.6)(mean), layers.Dense(1, kernel_initializer=start(1.0))(x)
    return keras.Model(pictures, outputs), keras.Model(pictures, value), keras.Model(pictures, [outputs, value])


def compiled(model):
    """`model` as a function of NumPy arrays that is one compiled call."""
    call = tf.function(lambda x: model(x, training=False), reduce_retracing=True)
    return lambda x: call(tf.convert_to_tensor(x)).numpy()


# %%
LOGS = ("steps", "return", "length", "approx_kl", "clip_fraction", "entropy", "explained_variance", "seconds")


def learn(run, label, roads, seed, steps, recipe=RECIPE):
    """Drive and learn for `steps` decisions: the policy, and the logs [updates, len(LOGS)].

    An interrupted run goes on with its networks, its optimizer and its counts; the drives under way begin anew.
    """
    core.runtime.seed(seed)
    low, high = racing.TRAINING
    env = envs.vector("Racing-v0", recipe.envs, seed, tracks=(low, low + roads.tracks if roads.tracks else high),
                      recolour=roads.recolour, patience=roads.patience)  # fmt: skip
    kind, k = policies.of(env.single_action_space)
    policy, value, both = build(recipe, env.single_observation_space.shape)
    rng, episodes, scaler = np.random.default_rng(seed), envs.Episodes(recipe.envs), ReturnScaler(recipe.envs, 0.98)
    optimizer = keras.optimizers.Adam(recipe.lr, epsilon=recipe.adam_epsilon, global_clipnorm=recipe.clip_norm)

    def loss(batch):
        outputs, v = both(batch["observations"], training=True)
        return losses(lambda _: outputs, lambda _: v, kind, recipe, batch)

    update = ppo.updater(loss, both.trainable_variables, optimizer, target_kl=recipe.target_kl)
    forward, judge = compiled(policy), compiled(value)
    resume = Resume(run, label, None, seed=seed, envs=env, episodes=episodes, generators={"draws": rng}, both=both,
                    optimizer=optimizer, scaler=scaler)  # fmt: skip
    observation, logs, step = resume.begin(), list(resume.arrays.get("curve", [])), resume.step
    while step < steps:
        began = time.perf_counter()
        for car in env.envs:
            car.unwrapped.candidates = candidates(roads, step / steps)
        act = policies.acting(kind, forward, rng, recipe.steps, recipe.envs, k)
        seen = rollout.collect(env, act, observation, recipe.steps, episodes)
        rewards = scaler.scale(seen.rewards, seen.done)
        data, explained = examples(seen, rewards, forward, judge, kind, recipe)
        optimizer.learning_rate = recipe.lr * max(0.0, 1 - step / steps)
        found = update(data, ppo.orders(rng, recipe.epochs, len(data["values"]), recipe.batch))
        observation, step = seen.following, step + len(data["values"])
        totals, lengths = zip(*seen.finished, strict=True) if seen.finished else ([np.nan], [np.nan])
        found |= {"steps": step, "return": np.mean(totals), "length": np.mean(lengths), "explained_variance": explained,
                  "seconds": time.perf_counter() - began}  # fmt: skip
        logs.append([found[key] for key in LOGS])
        if len(logs) % 20 == 0:
            resume.save(step, observation, curve=np.array(logs))
            print(f"{label} step {step}/{steps}  return {found['return']:.0f}  KL {found['approx_kl']:.3f}  "
                  f"{RECIPE.envs * RECIPE.steps / found['seconds']:.0f} decisions/s", flush=True)  # fmt: skip
    env.close()
    return policy, np.array(logs)


# %% [markdown]
# ## A driver with instruments
# What is good driving?  Besides random actions, the scale gets a driver that has no need to see: it is told its place,
# its speed and the middle of the road.  *Pure pursuit* steers for a point of the middle some way ahead: with $\beta$
# that point's angle off the car's nose, the steering is $-k\beta$ (1).  The speed is held to what the sharpest bend
# in sight allows, $v = \sqrt{a / \kappa}$ (2), with curvature $\kappa$ and a bearable lateral acceleration $a$.  The
# car has rear-wheel drive: in a bend it takes the foot off the gas, or it would spin.  Its constants are tuned by hand,
# on tracks of the training.


# %%
def pursue(position, heading, speed, middle, *, a=160.0, top=70.0, k=0.7):
    """Steering and pedal [2] by eqs. 1 and 2, from what `racing.Racing.telemetry` gives."""
    count, here = len(middle), int(np.linalg.norm(middle - position, axis=1).argmin())
    # exercise: steer for a point ahead, at a speed that the bends allow
    aim = middle[(here + 3 + round(speed / 10)) % count] - position
    off = np.angle(np.exp(1j * (np.arctan2(-aim[0], aim[1]) - heading)))
    road = np.diff(middle[(here + np.arange(5 + round(speed / 4))) % count], axis=0)
    bends = np.abs(np.angle(np.exp(1j * np.diff(np.arctan2(road[:, 1], road[:, 0])))))
    curvature = np.convolve(bends, np.ones(3) / 3, "valid").max() / np.linalg.norm(road, axis=1).mean()
    wanted = min(top, np.sqrt(a / max(curvature, 1e-6)))
    gas = np.clip(0.05 * (wanted - speed), -0.15, 0.5) * (1 - 0.7 * min(1, 2 * abs(off)) * (wanted > speed))
    return np.array([np.clip(-k * off, -1, 1), gas], np.float32)
    # end exercise


# %% [markdown]
# ## Judged on the held-out tracks
# Each driver has one drive on each of the same tracks, to the end: of the lap, of the field, or of the time, 1,000
# frames.  The return is CarRacing's own: 1,000 for the whole road, less 0.1 a frame.  Tracks of the training are driven
# too, and the held-out ones in colours drawn at random: the differences are what was learned by heart.  The settings
# above were tried on the first of the held-out tracks; judged is on the last.


# %%
def held_out(cfg):
    """The numbers of the tracks that drivers are judged on."""
    return range(racing.HELD_OUT[1] - cfg.evaluated, racing.HELD_OUT[1])


def learned(policy):
    """The driver that takes the mean action of `policy`, which sees the pictures alone."""
    forward = compiled(policy)
    return lambda pictures, _: np.clip(policies.Gaussian.mode(forward(pictures)), -1, 1)


def chance(seed):
    """The driver that draws its actions at random."""
    rng = np.random.default_rng(seed)
    return lambda pictures, _: rng.uniform(-1, 1, (len(pictures), 2))


def pursuit(_, told):
    """The driver with instruments."""
    return np.stack([pursue(*one) for one in told])


def judged(driver, cfg, roads=None):
    """{where: summary of a driver's drives}: held-out tracks, the same recoloured, tracks of its training if any."""
    drive, tracks = racing.drive, held_out(cfg)
    rows = {"held out": drive(driver, tracks), "held out, recoloured": drive(driver, tracks, recolour=True)}
    if roads:
        driven = [racing.TRAINING[0] + i for i in range(min(cfg.evaluated, roads.tracks or cfg.evaluated))]
        rows["training"] = drive(driver, driven)
    return {where: drives.summary() for where, drives in rows.items()}


def trial(run, cfg, label, roads, seed, steps):
    """Learn and be judged; the policy is kept in the run's folder.  JSON."""
    policy, logs = learn(run, label, roads, seed, steps)
    with core.files.atomic_path(run.folder / "checkpoints" / label / "policy.keras") as path:
        policy.save(path)
    found = {column: curves.binned(values) for column, values in zip(LOGS, logs.T, strict=True)}
    return found | {"judged": judged(learned(policy), cfg, roads)}


# %% [markdown]
# ## What went wrong
# A mean return hides how a driver fails.  The worst drives are shown as pictures: what the car saw in the seconds
# around the last piece of road that it found.


# %%
def gallery(drives, worst=4, shown=10):
    """Pictures [worst * shown, 42, 42] of the worst drives, and a label for each of these."""
    pictures, labels = [], []
    for i in np.argsort(drives.returns)[:worst]:
        length, total = drives.lengths[i], drives.returns[i]
        found = np.flatnonzero(drives.rewards[:length, i] > 0)
        last = found[-1] if len(found) and drives.ends[i] != "time" else length - 1
        first = int(np.clip(last - shown // 2, 0, max(0, length - shown)))
        pictures += list(drives.pictures[np.minimum(first + np.arange(shown), length - 1), i, -1])
        since = first * racing.REPEAT / racing.FPS
        labels.append(f"track {drives.tracks[i]}: {total:.0f}\n{drives.ends[i]}\nfrom {since:.1f} s")
    return np.stack(pictures), labels


def paths(drivers, tracks):
    """The ways of several drivers (name -> `racing.Drives` of the same tracks) on the first track, from above."""
    ways = {f"{name}: {drives.returns[0]:.0f}": drives.paths[: drives.lengths[0], 0].T
            for name, drives in drivers.items()}  # fmt: skip
    figure = core.plots.curves({name: y for name, (_, y) in ways.items()}, x={name: x for name, (x, _) in ways.items()},
                               size=(5, 5), xlabel="", title=f"track {tracks[0]}, held out: return")  # fmt: skip
    figure.axes[0].set_aspect("equal")
    return figure


# %% [markdown]
# ## What came out
# On roads that it has never seen the recipe collects 643 (its three runs deviate by 14), the scripted driver 884,
# chance -57; on its own training's roads it has 625, so nothing was learned by heart.  It drives faster than the
# scripted one, 56 units of length a second to 50, and does not brake for what it sees too late: three drives in ten
# end in the meadow, most of them behind a sharp bend, as the gallery shows, and one in a hundred comes home within
# its 1,000 frames, where the scripted driver does in 64.  The curve still rises; what the reference did with many
# more frames is not reached here.
#
# What varied was learned, and nothing else.  With one colour alone it is a little better on roads of that colour,
# 672, and on roads of other colours it is lost: 267, where the recipe has 594.  That network has learned levels of
# grey.  With eight tracks it has 531 on the held-out ones, and on its own eight, which happen to be hard, 345: too
# few of them for the curves that there are.  (Both from one run each, of the same length.)


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if unknown := set(cfg.arms) - set(ARMS):
        raise core.InputError(f"--arms: there is no {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    if not 0 < cfg.evaluated <= racing.HELD_OUT[1]:
        raise core.InputError(f"--evaluated {cfg.evaluated}: {racing.HELD_OUT[1]} tracks are held out: give 1 to that")
    with core.run("day27_rl_capstone", core.alone(options), cfg) as run:
        plan = {WHOLE: [(f"whole-{i}", Roads(), cfg.seed + i, cfg.steps) for i in range(cfg.trials)]}
        if cfg.arm_steps:
            plan |= {name: [(name.replace(" ", "-"), ARMS[name], cfg.seed, cfg.arm_steps)] for name in cfg.arms or ARMS}
        done = {name: [run.once(one[0], partial(trial, run, cfg, *one)) for one in calls]
                for name, calls in plan.items()}  # fmt: skip
        scripted = run.once("scripted", partial(judged, pursuit, cfg))
        rows = {"random": [run.once("random", partial(judged, chance(cfg.seed), cfg))], "scripted": [scripted]}
        rows |= {name: [one["judged"] for one in trials] for name, trials in done.items()}
        table = [{"driver": name, "tracks": where, "runs": len(found)}
                 | {key: np.mean([one[where][key] for one in found]) for key in found[0][where]}
                 | {"deviation": np.std([one[where]["return"] for one in found])}
                 for name, found in rows.items() for where in found[0]]  # fmt: skip
        at = {(row["driver"], row["tracks"]): row for row in table}
        best, trials = at[WHOLE, "held out"], done[WHOLE]

        policy = keras.saving.load_model(run.folder / "checkpoints" / "whole-0" / "policy.keras")
        driver, tracks = learned(policy), held_out(cfg)
        drives = racing.drive(driver, tracks)
        pictures, labels = gallery(drives)
        evaluate.film(lambda pictures: driver(pictures, None), "Racing-v0", run.picture("drive.gif"), cfg.seed, every=1,
                      fps=6, tracks=(tracks[0], tracks[0] + 1))  # fmt: skip
        note = "" if cfg.steps >= 200_000 and cfg.evaluated >= 50 else f"{cfg.steps} decisions, {cfg.evaluated} tracks"
        run.record["data"] = provenance("Racing-v0", note)
        run.record["tables"] = {"drivers": table}
        run.record["history"] = {key: np.mean([one[key] for one in trials], axis=0).tolist() for key in LOGS}
        run.record["metrics"] = {
            "return": best["return"], "return_scripted": at["scripted", "held out"]["return"],
            "return_random": at["random", "held out"]["return"], "deviation_of_runs": best["deviation"],
            "laps": best["laps"], "accidents": best["accidents"],
            "return_on_training_tracks": at[WHOLE, "training"]["return"],
            "return_recoloured": at[WHOLE, "held out, recoloured"]["return"],
            "decisions_per_second": np.mean([RECIPE.envs * RECIPE.steps / np.median(one["seconds"]) for one in trials]),
        }  # fmt: skip
        series = {name: [at[name, "held out"]["return"]] * len(trials[0]["steps"]) for name in ("scripted", "random")}
        series[WHOLE] = [one["return"] for one in trials]
        run.figure("learning", core.plots.curves(series, x=trials[0]["steps"], xlabel="decisions", ylabel="return"))
        run.figure("drivers", core.plots.bars({f"{row['driver']}, {row['tracks']}": row["return"] for row in table},
                                              errors={f"{row['driver']}, {row['tracks']}": row["deviation"]
                                                      for row in table}, ylabel="mean return"))  # fmt: skip
        run.figure("failures", core.plots.image_grid(pictures, columns=10, row_labels=labels))
        run.figure("paths", paths({"scripted": racing.drive(pursuit, tracks[:1]), WHOLE: drives}, tracks))
    return run.record


if __name__ == "__main__":
    core.cli(main)
