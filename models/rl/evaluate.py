"""What a policy is worth, apart from its training: returns of whole episodes, a film of one, and an export to serve."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np

from course.core import InputError, files, report
from course.core.catalogue import ROOT
from models.rl.envs import opened, seeds, specification

CONFIDENCE = 0.95
LARGEST_FILM = report.FILM_BYTES
NOT_DRAWN = 3  # exit status of the process that draws, where it cannot
WHOLE_GAMES = {"episodic_life": False, "reward_clipping": False}  # Atari is judged by whole games and their own points


def evaluate(policy, name, episodes, seed, *, envs=10, limit=None, **kwargs):
    """Play exactly `episodes` episodes of `name` with `policy`, a function of observations [N, ...] -> actions [N].

    Returns {"returns": float64 [episodes], "lengths": int64 [episodes], "mean", "std", "interval": (low, high)}, the
    interval holding the true mean with 95 % confidence (Student's t).  The environments are the evaluation's own,
    `envs` of them at once (N, the same in every call of `policy`), seeded by `seed`; each plays its share of the
    episodes, the same number to within one: to take those that end first would favour the short.  `limit`: steps after
    which an episode is truncated, instead of the environment's own limit.  Of Atari games the whole game counts, with
    the points as they are.  `kwargs` go to `models.rl.envs.vector`.
    """
    from scipy import stats

    if episodes < 1:
        raise InputError(f"{episodes} episodes cannot be evaluated: give at least 1")
    count = min(envs, episodes)
    share = np.full(count, episodes // count) + (np.arange(count) < episodes % count)
    returns, lengths = [[] for _ in range(count)], [[] for _ in range(count)]
    current, steps = np.zeros(count), np.zeros(count, np.int64)
    with opened(name, count, seed, **_settings(name, limit), **kwargs) as playing:
        obs, _ = playing.reset()
        while any(len(own) < wanted for own, wanted in zip(returns, share, strict=True)):
            obs, reward, terminated, truncated, _ = playing.step(np.asarray(policy(obs)))
            current += reward
            steps += 1
            for i in np.flatnonzero(terminated | truncated):
                if len(returns[i]) < share[i]:
                    returns[i].append(current[i])
                    lengths[i].append(steps[i])
                current[i], steps[i] = 0, 0
    returns = np.concatenate(returns)
    mean, error = returns.mean(), returns.std(ddof=1) / np.sqrt(episodes) if episodes > 1 else np.inf
    half = stats.t.ppf((1 + CONFIDENCE) / 2, max(episodes - 1, 1)) * error
    return {"returns": returns, "lengths": np.concatenate(lengths), "mean": float(mean), "std": float(returns.std()),
            "interval": (float(mean - half), float(mean + half))}  # fmt: skip


def _settings(name, limit):
    """What `vector` is called with for evaluation."""
    if name.startswith("ALE/"):
        return WHOLE_GAMES | ({"frames": 4 * limit} if limit else {})
    return {"max_episode_steps": limit} if limit else {}


def uniform(name, seed):
    """The policy that draws every action at random: what a learned one has to beat."""
    rng = np.random.default_rng(seed)
    with opened(name, 1, seed) as one:
        space = one.single_action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        return lambda obs: rng.integers(space.n, size=len(obs))
    return lambda obs: rng.uniform(space.low, space.high, (len(obs), *space.shape)).astype(space.dtype)


# --- films -----------------------------------------------------------------------------------------------------------


class CannotBeDrawn(InputError):
    """An environment that has no pictures, or a machine that lacks the libraries which draw them."""


def film(policy, name, path, seed, *, every=2, fps=25, width=240, limit=1_000, colours=64, **kwargs):
    """Play one episode with `policy` (observations [1, ...] -> actions [1]) and write it to `path`; returns its return.

    A .gif of `every` second frame at `fps` frames a second, `width` pixels wide, made of fewer frames and colours until
    it is below `LARGEST_FILM` bytes; or an .mp4 of the same frames.  `limit`: steps after which the film stops, and the
    return with it.  An Atari game is played with the preprocessing of `models.rl.atari`.  `kwargs` go to what makes the
    environment.  Raises `CannotBeDrawn`, an `InputError`, where it cannot be drawn.

    MuJoCo's graphics library and TensorFlow cannot share a process (Mesa's and XLA's LLVM clash): its episodes are
    played here without pictures, and a process of its own plays the same actions again from the same seed and draws.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise InputError(f"{path}: a film is a .gif or an .mp4")
    options = {"every": every, "fps": fps, "width": width, "limit": limit, "colours": colours, **kwargs}
    if "mujoco" in str(specification(name).entry_point):
        return _drawn_apart(policy, name, path, seed, options)
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # it draws without a screen
    return _drawn_here(policy, name, path, seed, **options)


def _drawn_here(policy, name, path, seed, *, every, fps, width, limit, colours, **kwargs):
    frames, env = [], _made(name, kwargs)

    def watch(step):
        if step % every == 0:
            frames.append(_picture(env, name, width))

    total, _ = _episode(policy, env, seed, limit, watch)
    (_write_gif if path.suffix == ".gif" else _write_mp4)(path, frames, fps, colours)
    return total


def _drawn_apart(policy, name, path, seed, options):
    kwargs = {key: value for key, value in options.items() if key not in ("every", "fps", "width", "limit", "colours")}
    total, actions = _episode(policy, gymnasium.make(name, **kwargs), seed, options["limit"])
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "actions.npy", actions)
        words = [name, str(path.resolve()), json.dumps([seed, options | {"limit": len(actions)}])]
        done = subprocess.run([sys.executable, "-m", "models.rl.evaluate", folder, *words], cwd=folder, text=True,
                              capture_output=True, env={"MUJOCO_GL": "egl", **os.environ, "PYTHONPATH": str(ROOT)}
                              )  # fmt: skip
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if done.returncode == NOT_DRAWN or done.returncode < 0:  # or the graphics library has crashed
            raise CannotBeDrawn(f"{name} cannot be drawn here ({last[:200]})")
        if done.returncode:
            raise RuntimeError(f"the process that draws {name} failed:\n{done.stderr}")
        again = json.loads((Path(folder) / "return.json").read_text())
    if not np.isclose(again, total, rtol=1e-6):
        raise RuntimeError(f"{name} returned {again} where it had returned {total}: the film is of another episode")
    return total


def _episode(policy, env, seed, limit, watch=lambda step: None):
    """Play an episode of at most `limit` steps -> (return, actions); `watch` is called before each step and at the end,
    that with the number 0.  Closes `env`."""
    total, actions = 0.0, []
    try:
        obs, _ = env.reset(seed=seeds(seed, 1)[0])
        for step in range(limit):
            watch(step)
            actions.append(np.asarray(policy(np.asarray(obs)[None]))[0])
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            total += float(reward)
            if terminated or truncated:
                break
        watch(0)
    finally:
        env.close()
    return total, np.array(actions)


def _made(name, kwargs):
    if name.startswith("ALE/"):
        from models.rl import atari

        return atari.make(name, render_mode="rgb_array", **WHOLE_GAMES | kwargs)
    with contextlib.closing(gymnasium.make(name)) as env:
        if "rgb_array" not in env.metadata.get("render_modes", []):
            raise CannotBeDrawn(f"{name} cannot be drawn: it knows no render_mode rgb_array")
    return gymnasium.make(name, render_mode="rgb_array", **kwargs)


def _picture(env, name, width):
    """What the environment looks like now: a PIL image of at most `width` pixels."""
    from PIL import Image

    try:
        image = Image.fromarray(np.asarray(env.render(), np.uint8))
    except Exception as error:  # whatever the graphics libraries of an environment raise where they are not there
        raise CannotBeDrawn(f"{name} cannot be drawn here ({' '.join(str(error).split())[:200]})") from error
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.BILINEAR)
    return image


def _write_gif(path, frames, fps, colours):
    """Write `frames` with one palette for all, thinned out where they come to more than `LARGEST_FILM` bytes."""
    from PIL import Image

    step = 1
    while True:
        kept = frames[::step]
        palette = kept[len(kept) // 2].quantize(colours, dither=Image.Dither.NONE)
        drawn = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in kept]
        held = io.BytesIO()
        drawn[0].save(held, "GIF", save_all=True, append_images=drawn[1:], duration=round(1000 * step / fps), loop=0)
        if held.tell() <= LARGEST_FILM or len(kept) < 10:
            return files.write_atomic(path, held.getvalue())
        step += 1
        colours = max(16, colours // 2)


def _write_mp4(path, frames, fps, _):
    import cv2

    size = tuple(side - side % 2 for side in frames[0].size)  # the codec takes even sides only
    with files.atomic_path(path) as temporary:
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
        if not writer.isOpened():
            raise InputError(f"{path}: no codec for .mp4 here; ask for a .gif")
        for frame in frames:
            writer.write(np.asarray(frame.crop((0, 0, *size)))[..., ::-1])  # OpenCV's channels are blue first
        writer.release()


# --- export ----------------------------------------------------------------------------------------------------------

PARTS = {"train": 20, "val": 5, "test": 10}  # episodes whose observations are kept
MOST = {"train": 4_000, "val": 1_000, "test": 2_000}  # observations kept of them
MOST_BYTES = 48 * 2**20  # of all observations together, before compression


def export_policy(model, unit, name, exports="exports", *, policy=None, labels=None, seed=0, **kwargs):
    """Export `model`, observations of `name` [B, ...] -> logits or Q values [B, actions], as the next version in
    `exports`/<unit>; returns the version's folder.

    Signature serving_default: `observation` [B, ...] in the environment's own dtype -> `action` int64 [B], the best,
    `label` [B], its name, and `values` [B, actions].  Beside it go the Keras model and `observations.npz`, what
    `python -m compression.benchmark <unit>` trains and measures on: observations that `policy` (by default: the model's
    best action) met in evaluation episodes, and the model's best action there, whatever `policy` took to see more.  The
    training, validation and test parts come from different episodes.  `labels`: the actions' names.
    """
    import tensorflow as tf

    from course.core import export

    model = export.in_float32(model)

    def choose(obs):
        return model.predict_on_batch(obs).argmax(axis=-1)

    arrays = observations(policy or choose, choose, name, seed, **kwargs)
    x = arrays["x_train"]
    actions = model.output_shape[-1]
    labels = [str(label) for label in labels or range(actions)]
    if len(labels) != actions:
        raise InputError(f"{unit}: {len(labels)} labels for {actions} actions")
    names = tf.constant(labels)

    def answer(observation):
        values = tf.cast(model(tf.cast(observation, tf.float32), training=False), tf.float32)
        best = tf.argmax(values, axis=-1)
        return {"action": best, "label": tf.gather(names, best), "values": values}

    held = io.BytesIO()
    np.savez_compressed(held, labels=np.array(labels), **arrays)
    base = Path(exports) / unit
    have = [int(path.name) for path in base.glob("*") if path.name.isdecimal()]
    folder = base / str(max([int(time.time()), *(number + 1 for number in have)]))
    export.export(
        model, folder,
        {"serving_default": (answer, [tf.TensorSpec([None, *x.shape[1:]], x.dtype, name="observation")])},
        sample={"serving_default": {"observation": x[:4]}}, labels=labels,
        extra={"observations.npz": held.getvalue()}, trained_on={"unit": unit, "data": "./observations.npz"},
    )  # fmt: skip
    print(f"exported: {folder}", flush=True)
    return folder


def observations(policy, label, name, seed, **kwargs):
    """Observations met by `policy`, and what `label` says of them: {"x_train", "y_train", "x_val", ..., "y_test"}.

    policy, label: observations [N, ...] -> actions [N].  x: float32 or uint8 [n, ...]; y: int32 [n].  Each part is of
    `PARTS` episodes of its own, thinned evenly to `MOST` observations, or to its share of `MOST_BYTES`.
    """
    arrays = {}
    for i, (part, episodes) in enumerate(PARTS.items()):
        kept = Thinned(MOST[part], MOST_BYTES * MOST[part] // sum(MOST.values()))

        def watching(obs, kept=kept):
            kept.add(obs)
            return np.asarray(policy(obs))

        evaluate(watching, name, episodes, (seed, i), envs=episodes, **kwargs)
        x = kept.evenly()
        y = np.concatenate([np.asarray(label(x[at : at + 256])) for at in range(0, len(x), 256)])
        arrays |= {f"x_{part}": x, f"y_{part}": y.astype(np.int32)}
    return arrays


class Thinned:
    """Keeps the observations [N, ...] of every time step, or of every second, fourth, ... when they become too many:
    never more than twice `most`, or `most_bytes`."""

    def __init__(self, most, most_bytes):
        self.most, self.most_bytes, self.every, self.seen, self.held = most, most_bytes, 1, 0, []

    def add(self, obs):
        """One time step."""
        if self.seen % self.every == 0:
            self.held.append(np.array(obs if obs.dtype == np.uint8 else obs.astype(np.float32)))
            if len(self.held) > 1 and len(self.held) * len(obs) > 2 * self._room():
                self.held, self.every = self.held[::2], 2 * self.every
        self.seen += 1

    def evenly(self):
        """What is kept, thinned evenly to what there is room for: [n, ...]."""
        x = np.concatenate(self.held)
        return x[np.unique(np.linspace(0, len(x) - 1, min(len(x), self._room())).astype(int))]

    def _room(self):
        return max(1, min(self.most, self.most_bytes // self.held[0][0].nbytes))


def main(folder, name, path, settings):
    """Draw the episode that the actions in `folder` make, in a process that knows nothing of networks."""
    actions, (seed, options) = iter(np.load(Path(folder) / "actions.npy")), json.loads(settings)
    try:
        import mujoco  # noqa: F401 - which loads what draws
    except Exception as error:
        raise CannotBeDrawn(f"MuJoCo has nothing to draw with: {error}") from error
    total = _drawn_here(lambda obs: next(actions)[None], name, Path(path), seed, **options)
    files.write_atomic(Path(folder) / "return.json", json.dumps(total))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except CannotBeDrawn as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(NOT_DRAWN)
