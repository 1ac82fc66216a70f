"""Evaluation of whole episodes without favour to the short, films, and exported policies."""

import json
import subprocess

import gymnasium
import keras
import numpy as np
import pytest
from PIL import Image

from compression import data as compression_data
from course import core
from models.rl import evaluate


class Coin(gymnasium.Env):
    """Episodes of 1 step or of 99, as a fair coin falls; a reward of 1 a step."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 1 if self.np_random.random() < 0.5 else 99
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


@pytest.fixture(scope="module", autouse=True)
def coin():
    gymnasium.register("Coin-v0", Coin)
    yield
    del gymnasium.registry["Coin-v0"]


def zeros(obs):
    return np.zeros(len(obs), np.int64)


def test_short_episodes_are_not_favoured():
    """Mean 50, standard deviation 49: of 2,000 episodes within 4.5 standard errors.  Those that end first are short."""
    found = evaluate.evaluate(zeros, "Coin-v0", 2_000, 0, envs=500)
    assert abs(found["mean"] - 50) < 4.5 * 49 / np.sqrt(2_000)
    assert set(found["returns"]) == {1.0, 99.0}
    assert np.array_equal(found["returns"], found["lengths"])


@pytest.mark.parametrize(("episodes", "copies"), [(1, 10), (7, 3), (10, 10), (23, 10)])
def test_exactly_as_many_episodes_as_asked_for(episodes, copies):
    asked = []
    found = evaluate.evaluate(lambda obs: asked.append(len(obs)) or zeros(obs), "Coin-v0", episodes, 0, envs=copies)
    assert len(found["returns"]) == len(found["lengths"]) == episodes
    assert set(asked) == {min(episodes, copies)}


def test_the_interval_holds_the_mean_as_often_as_it_says():
    held = 0
    for seed in range(100):
        low, high = evaluate.evaluate(zeros, "Coin-v0", 30, seed, envs=30)["interval"]
        held += low <= 50 <= high
    assert held >= 88  # 95 expected, standard deviation 2


def test_a_seed_repeats_an_evaluation():
    def one(seed):
        return evaluate.evaluate(evaluate.uniform("CartPole-v1", 0), "CartPole-v1", 20, seed)["returns"]

    assert np.array_equal(one(3), one(3))
    assert not np.array_equal(one(3), one(4))


def test_cart_poles_returns_are_those_of_episodes_played_one_by_one():
    """A policy that always holds the pole for about 9 steps, and Gymnasium's own single environment."""
    found = evaluate.evaluate(zeros, "CartPole-v1", 200, 0)
    env, lengths = gymnasium.make("CartPole-v1"), []
    for seed in range(200):
        env.reset(seed=seed)
        for step in range(500):
            if env.step(0)[2]:
                lengths.append(step + 1)
                break
    assert found["returns"].min() >= 8
    assert abs(found["mean"] - np.mean(lengths)) < 4 * np.std(lengths) * np.sqrt(2 / 200)


def test_limit_truncates():
    upright = lambda obs: (obs[:, 2] + obs[:, 3] > 0).astype(int)  # noqa: E731 - holds the pole for some 200 steps
    assert (evaluate.evaluate(upright, "CartPole-v1", 12, 0, limit=25)["returns"] == 25).all()
    assert evaluate.evaluate(upright, "CartPole-v1", 12, 0)["mean"] > 100
    games = evaluate.evaluate(evaluate.uniform("ALE/Pong-v5", 0), "ALE/Pong-v5", 2, 0, limit=50)
    assert (games["lengths"] == 50).all()


def test_atari_is_evaluated_by_whole_games_and_unclipped_points():
    found = evaluate.evaluate(evaluate.uniform("ALE/MsPacman-v5", 0), "ALE/MsPacman-v5", 2, 0, envs=2, noop_max=1)
    assert (found["returns"] >= 50).all()  # dots are worth 10 each
    assert (found["returns"] % 10 == 0).all()
    assert (found["lengths"] > 200).all()  # three lives


def test_no_episodes_are_refused():
    with pytest.raises(core.InputError, match="give at least 1"):
        evaluate.evaluate(zeros, "Coin-v0", 0, 0)


def test_uniform_draws_every_action():
    drawn = evaluate.uniform("CartPole-v1", 0)(np.zeros((1_000, 4)))
    assert 400 < drawn.sum() < 600
    drawn = evaluate.uniform("Pendulum-v1", 0)(np.zeros((1_000, 3)))
    assert drawn.shape == (1_000, 1)
    assert (-2 <= drawn.min() < -1.9) and (1.9 < drawn.max() <= 2)


# --- films -----------------------------------------------------------------------------------------------------------


def test_a_film_shows_one_episode(tmp_path):
    path = tmp_path / "episode.gif"
    total = evaluate.film(zeros, "CartPole-v1", path, 0, every=3)
    assert 8 <= total <= 11
    with Image.open(path) as gif:
        assert gif.n_frames == -(-int(total) // 3) + 1
        assert gif.width == 240
        first = np.asarray(gif.convert("L"), float)
        gif.seek(gif.n_frames - 1)
        assert np.abs(np.asarray(gif.convert("L"), float) - first).max() > 100
    assert evaluate.film(zeros, "CartPole-v1", path, 0) == total


def test_a_long_film_is_kept_small(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "LARGEST_FILM", 30_000)
    path = tmp_path / "game.gif"
    evaluate.film(evaluate.uniform("ALE/Pong-v5", 0), "ALE/Pong-v5", path, 0, limit=150)
    assert 5_000 < path.stat().st_size <= 30_000


def test_films_are_mp4_too(tmp_path):
    import cv2

    evaluate.film(zeros, "CartPole-v1", tmp_path / "episode.mp4", 0, every=1, width=161)
    reader = cv2.VideoCapture(str(tmp_path / "episode.mp4"))
    assert reader.get(cv2.CAP_PROP_FRAME_COUNT) >= 8
    assert reader.read()[1].shape[1] == 160


def test_what_cannot_be_filmed_is_one_line(tmp_path):
    with pytest.raises(core.InputError, match=r"a \.gif or an \.mp4"):
        evaluate.film(zeros, "CartPole-v1", tmp_path / "episode.txt", 0)
    with pytest.raises(evaluate.CannotBeDrawn, match="Coin-v0 cannot be drawn"):
        evaluate.film(zeros, "Coin-v0", tmp_path / "episode.gif", 0)
    assert list(tmp_path.iterdir()) == []


def test_mujoco_is_filmed_beside_tensorflow(tmp_path):
    """It is drawn by another process: the two libraries together would end this one."""
    import tensorflow  # noqa: F401 - what the drawing cannot share a process with

    path = tmp_path / "pendulum.gif"
    try:
        total = evaluate.film(evaluate.uniform("InvertedPendulum-v5", 0), "InvertedPendulum-v5", path, (3, 1))
    except evaluate.CannotBeDrawn as error:
        pytest.skip(str(error))
    with Image.open(path) as gif:
        assert gif.n_frames == -(-(int(total) + 1) // 2) + 1  # the step that drops the pole earns nothing
        assert gif.width == 240
    played = evaluate.evaluate(evaluate.uniform("InvertedPendulum-v5", 0), "InvertedPendulum-v5", 1, (3, 1))
    assert total == played["mean"]


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (evaluate.NOT_DRAWN, evaluate.CannotBeDrawn, "cannot be drawn here .*no EGL"),
        (-11, evaluate.CannotBeDrawn, "cannot be drawn here"),  # the graphics library crashed
        (1, RuntimeError, "failed:(.|\n)*no EGL"),  # a defect is not passed over
    ],
)
def test_only_what_cannot_be_drawn_is_said_to_be_so(status, kind, message, tmp_path, monkeypatch):
    ended = subprocess.CompletedProcess([], status, "", "Traceback\nno EGL\n")
    monkeypatch.setattr(evaluate.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(kind, match=message):
        evaluate.film(evaluate.uniform("InvertedPendulum-v5", 0), "InvertedPendulum-v5", tmp_path / "x.gif", 0, limit=5)
    assert list(tmp_path.iterdir()) == []


# --- exports ---------------------------------------------------------------------------------------------------------


def test_an_exported_policy_answers_and_brings_its_observations(tmp_path, monkeypatch):
    import tensorflow as tf

    monkeypatch.setattr(evaluate, "PARTS", {"train": 4, "val": 2, "test": 3})
    monkeypatch.setattr(evaluate, "MOST", {"train": 50, "val": 10, "test": 20})
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(2)])
    folder = evaluate.export_policy(model, "day16_reinforce", "CartPole-v1", tmp_path, labels=["left", "right"])
    assert folder.parent == tmp_path / "day16_reinforce"

    assets = folder / "assets.extra"
    found = compression_data.load(str(assets / "observations.npz"))
    assert found.labels == ["left", "right"]
    assert json.loads((assets / "trained_on.json").read_text()) == {
        "unit": "day16_reinforce",
        "data": "./observations.npz",
    }
    assert (len(found.x_val), len(found.x_test)) == (10, 20)
    assert 20 <= len(found.x_train) <= 50
    assert not {row.tobytes() for row in found.x_train} & {row.tobytes() for row in found.x_test}
    values = model.predict_on_batch(found.x_test)
    assert np.array_equal(values.argmax(axis=1), found.y_test)

    answer = tf.saved_model.load(str(folder)).signatures["serving_default"](observation=tf.constant(found.x_test))
    np.testing.assert_allclose(answer["values"], values, atol=1e-5)
    assert np.array_equal(answer["action"], found.y_test)
    assert [label.decode() for label in answer["label"].numpy()] == [found.labels[i] for i in found.y_test]
    assert np.array_equal(
        keras.saving.load_model(assets / "model.keras").predict_on_batch(found.x_test).argmax(1), found.y_test
    )


def test_labels_must_name_every_action(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PARTS", {"train": 1, "val": 1, "test": 1})
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(core.InputError, match="3 labels for 2 actions"):
        evaluate.export_policy(model, "day16_reinforce", "CartPole-v1", tmp_path, labels=["left", "right", "up"])


def test_observations_are_thinned_while_they_come():
    """1,000 steps of 2 games with room for 30: every 2^k-th is kept, never more than 60, and evenly thinned to 30."""
    kept, most = evaluate.Thinned(30, 10**9), 0
    for step in range(1_000):
        kept.add(np.full((2, 3), step, np.float64))
        most = max(most, sum(len(held) for held in kept.held))
    x = kept.evenly()
    assert 30 < most <= 60
    assert x.shape == (30, 3)
    assert x.dtype == np.float32
    assert x[0, 0] == 0
    assert x[-1, 0] > 900
    assert np.diff(x[:, 0]).max() <= 2 * kept.every
    few = evaluate.Thinned(30, 5 * 12)  # bytes of five observations
    for step in range(50):
        few.add(np.full((2, 3), step, np.float64))
    assert len(few.evenly()) == 5


def test_exported_labels_are_the_models_whatever_was_played(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PARTS", {"train": 2, "val": 1, "test": 1})
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    arrays = evaluate.observations(
        lambda obs: np.arange(len(obs)) % 2, lambda obs: model(obs).numpy().argmax(1), "CartPole-v1", 0
    )
    for part in ("train", "val", "test"):
        assert np.array_equal(arrays[f"y_{part}"], model(arrays[f"x_{part}"]).numpy().argmax(1))
