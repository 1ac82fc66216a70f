"""Day 27: the car's picture beside Gymnasium's, tracks that stay apart, the drivers, and what a drive is said to be."""

import cv2
import gymnasium
import numpy as np
import pytest

from course import core
from course import day27_rl_capstone as day27
from models.rl import envs, policies, racing


def held(action, frames=racing.REPEAT):
    """CarRacing's own actions for one of ours."""
    return [np.array([action[0], max(action[1], 0), max(-action[1], 0)])] * frames


def grey(picture):
    """What `Racing` should show of CarRacing's picture [96, 96, 3]."""
    seen = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[:84, 6:90]
    return cv2.resize(seen, (racing.SIZE, racing.SIZE), interpolation=cv2.INTER_AREA).astype(float)


def test_the_picture_and_the_rewards_are_car_racings():
    ours, theirs = gymnasium.make("Racing-v0", tracks=(7, 8)), gymnasium.make("CarRacing-v3")
    seen, info = ours.reset(seed=0)
    assert info == {"track": 7}
    assert (seen == seen[:1]).all()
    theirs.reset(seed=7)
    for step in range(12):
        action = np.array([0.2 * np.sin(step), 0.3 if step < 6 else -0.1])
        seen, reward, *_ = ours.step(action)
        results = [theirs.step(one) for one in held(action)]
        assert reward == pytest.approx(sum(result[1] for result in results))
        if step > 7:  # the camera has come down to the car
            picture = grey(results[-1][0])
            assert np.abs(picture - seen[-1]).mean() < 4
            assert np.corrcoef(picture.ravel(), seen[-1].ravel())[0, 1] > 0.95
    ours.close()
    theirs.close()


def test_observations_are_a_stack_of_pictures_the_newest_last():
    env = gymnasium.make("Racing-v0", tracks=(0, 1))
    before, _ = env.reset(seed=0)
    after, *_ = env.step(np.array([0.0, 1.0]))
    assert after.dtype == np.uint8
    assert after.shape == (4, racing.SIZE, racing.SIZE)
    np.testing.assert_array_equal(after[:3], before[1:])
    assert (after[3] != before[3]).any()
    env.close()


def test_tracks_of_training_and_evaluation_share_no_number():
    assert racing.HELD_OUT[1] <= racing.TRAINING[0]
    env = gymnasium.make("Racing-v0", tracks=(5, 8))
    assert {env.reset(seed=seed)[1]["track"] for seed in range(12)} == {5, 6, 7}
    env.close()


def test_a_drive_is_repeated_by_its_seed_and_a_track_by_its_number():
    def first(seed, tracks):
        env = gymnasium.make("Racing-v0", tracks=tracks, recolour=True)
        seen, info = env.reset(seed=seed)
        road = env.unwrapped.telemetry()[3]
        env.close()
        return seen, info["track"], road

    (a, number, road), (b, again, _) = (first(3, (0, 10**6)) for _ in range(2))
    assert number == again
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(first(9, (number, number + 1))[2], road)


def test_roads_are_recoloured_for_each_drive_and_can_be_told_from_the_field():
    env = gymnasium.make("Racing-v0", tracks=(0, 1), recolour=True)
    own, pairs = env.unwrapped, []
    for seed in range(8):
        env.reset(seed=seed)
        field, road = own.levels[0], own.levels[401]  # after the field and its 400 patches
        assert abs(field - road) >= racing.CONTRAST
        assert np.abs(own.seen[-1].astype(float) - field).min() < 1
        assert np.abs(own.seen[-1].astype(float) - road).min() < 1
        pairs.append((field, road))
    assert len(set(pairs)) == 8
    assert {field > road for field, road in pairs} == {True, False}
    env.close()


def test_a_drive_is_judged_in_the_colours_that_were_asked_for():
    def idle(pictures, _):
        return np.zeros((len(pictures), 2))

    plain, recoloured, again = (racing.drive(idle, [0], recolour=recolour).pictures[0, 0, -1]
                                for recolour in (False, True, True))  # fmt: skip
    assert np.isin(racing.PLAIN[[racing.FIELD, racing.ROAD]], plain).all()
    assert (plain != recoloured).mean() > 0.5
    np.testing.assert_array_equal(recoloured, again)


def test_the_gentlest_of_several_tracks_is_driven():
    env = gymnasium.make("Racing-v0", tracks=racing.TRAINING, candidates=5)
    own = env.unwrapped
    env.reset(seed=1)
    drawn = np.random.default_rng(1).integers(*racing.TRAINING, size=5).tolist()
    assert own.number in drawn
    turning = {number: own._turning(number) for number in drawn}
    assert turning[own.number] == min(turning.values())
    env.close()


def test_patience_ends_a_drive_that_gets_nowhere():
    env = gymnasium.make("Racing-v0", tracks=(0, 1), patience=3)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[2] for _ in range(5)]
    env.close()
    assert ends.index(True) in (2, 3)  # the first step may still find the piece of road that the car stands on


@pytest.mark.parametrize(("tracks", "candidates"), [((5, 5), 1), ((-1, 3), 1), ((0, 9), 0)])
def test_there_must_be_a_track_to_drive(tracks, candidates):
    with pytest.raises(core.InputError, match="there is none to drive"):
        racing.Racing(tracks=tracks, candidates=candidates)


def test_the_curriculum_goes_from_the_gentlest_to_any_track():
    roads = day27.Roads(gentle=6)
    assert [day27.candidates(roads, share) for share in (0.0, 0.25, 0.5, 1.0)] == [6, 3, 1, 1]
    assert day27.candidates(day27.Roads(gentle=1), 0.0) == 1


STRAIGHT = np.stack([np.zeros(60), 3.5 * np.arange(60.0)], axis=1)


def test_pursuit_steers_towards_the_road_and_keeps_straight_on_it():
    steering, gas = day27.pursue(np.array([0.0, 0.0]), 0.0, 10.0, STRAIGHT)
    assert steering == pytest.approx(0, abs=1e-6)
    assert gas > 0
    right, _ = day27.pursue(np.array([-5.0, 0.0]), 0.0, 10.0, STRAIGHT)  # the road is to the right
    left, _ = day27.pursue(np.array([5.0, 0.0]), 0.0, 10.0, STRAIGHT)
    assert right > 0 > left
    turned, _ = day27.pursue(np.array([0.0, 0.0]), 0.4 + 4 * np.pi, 10.0, STRAIGHT)  # heading left, two whole turns on
    assert turned == pytest.approx(0.7 * 0.4, abs=1e-5)


def test_pursuit_brakes_before_a_bend():
    angle = np.arange(40) * 0.2
    bend = np.concatenate([STRAIGHT[:10], STRAIGHT[9] + np.stack([1 - np.cos(angle), np.sin(angle)], axis=1) * 17.5])
    assert day27.pursue(STRAIGHT[2], 0.0, 60.0, bend)[1] < 0 < day27.pursue(STRAIGHT[2], 0.0, 60.0, STRAIGHT)[1]


def test_pursuit_is_a_driver_to_be_beaten():
    drives = racing.drive(day27.pursuit, [1000, 1001])
    assert min(drives.returns) > 700
    assert drives.summary()["accidents"] == 0


def test_what_a_drive_is_said_to_be():
    def straight_on(pictures, _):
        return np.tile([0.0, 0.1], (len(pictures), 1))

    drives = racing.drive(straight_on, [0])
    length = drives.lengths[0]
    assert drives.ends == ["left the field"]
    assert length < racing.FRAMES // racing.REPEAT
    assert drives.returns[0] == pytest.approx(drives.rewards[:length, 0].sum())
    assert drives.rewards[length - 1, 0] < -50
    summary = drives.summary()
    assert summary["accidents"] == 1
    assert summary["beside the road"] > 0.3
    still = racing.drive(lambda pictures, _: np.zeros((len(pictures), 2)), [0, 1])
    assert still.ends == ["lost", "lost"]
    assert still.summary()["speed"] < 1
    pictures, labels = day27.gallery(still, worst=1, shown=5)
    assert pictures.shape == (5, racing.SIZE, racing.SIZE)
    assert "lost" in labels[0]


def test_policy_and_value_share_their_eyes_and_the_pedal_starts_with_gas():
    policy, value, both = day27.build(day27.RECIPE, (4, racing.SIZE, racing.SIZE))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, racing.SIZE, racing.SIZE), np.uint8)
    outputs, v = both(pictures)
    np.testing.assert_allclose(outputs, policy(pictures), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(v, value(pictures), rtol=1e-5, atol=1e-6)
    steering, pedal = policies.Gaussian.mode(np.array(outputs)).T
    assert np.abs(steering).max() < 0.1
    np.testing.assert_allclose(pedal, 0.3, atol=0.1)


def test_a_vector_of_cars_says_where_a_drive_was_cut():
    with envs.opened("Racing-v0", 2, 0, patience=2) as env:
        env.reset()
        found = [env.step(np.zeros((2, 2))) for _ in range(4)]
    done = [terminated.any() for _, _, terminated, _, _ in found]
    assert any(done)
    obs, _, terminated, _, info = found[done.index(True)]
    assert (envs.final_observations(obs, info)[terminated] != obs[terminated]).any()


def test_an_unknown_arm_is_refused(tmp_path):
    with pytest.raises(core.InputError, match="there is no nine_tracks"):
        day27.main(["--preset", "smoke", "--arms", "nine_tracks", "--runs", str(tmp_path)])
