"""CarRacing from pixels at a price that two cores can pay: Gymnasium's car and tracks, drawn by OpenCV.

Of a step of CarRacing-v3 the physics takes a fiftieth; the rest goes into drawing 1000 x 800 pixels, which are then
shrunk to 96 x 96, at every frame, though an agent looks at every eighth.  `Racing` draws what is looked at, in grey and
at the size that is wanted, and nothing else.  Physics, tracks, rewards and ends of episodes are CarRacing's own.
`import models.rl.racing` registers "Racing-v0".
"""

import contextlib
import dataclasses
from functools import partial

import cv2
import gymnasium
import numpy as np
from gymnasium.envs.box2d import car_racing
from gymnasium.envs.box2d.car_racing import CarRacing

from course.core import InputError
from models.rl import envs, rollout

FPS = car_racing.FPS
REPEAT = 8  # frames of 1/50 s that an action is held for
SIZE = 42  # pixels of a side of what is seen
FRAMES = 1_000  # of an episode, as CarRacing-v3 has them
HELD_OUT = (0, 1_000)  # numbers of the tracks that no training sees
TRAINING = (1_000, 2**31 - 1)
# CarRacing's window: pixels, and those of a unit of length; where the car stands in it, from its lower left corner
WINDOW, ZOOM, AT = np.array([1000.0, 800.0]), car_racing.ZOOM * car_racing.SCALE, np.array([500.0, 200.0])
FINER = 4  # times as many pixels a side are drawn and then averaged: OpenCV's own smooth edges make polygons larger
# levels of grey: the field, its paler patches, the road, the two colours of the kerbs
FIELD, PATCH, ROAD, WHITE, RED = range(5)
PLAIN = np.array([162, 177, 103, 255, 76], np.float64)
CONTRAST = 40  # between road and field, where the levels are drawn at random
SIGHT = 50.0  # units of length from the car within which polygons are drawn
HALF_ROAD = car_racing.TRACK_WIDTH  # from its middle to its edge


class Racing(CarRacing):
    """Observations uint8 [stack, 42, 42], the oldest first; actions [2] in -1..1: steering (right is positive), and gas
    (positive) or brake (negative).  A step is `REPEAT` frames; an episode ends after `FRAMES`, as CarRacing-v3's does.

    What is seen is CarRacing's own picture without the indicators at its lower edge and six of its 96 columns at either
    side, half as large; and without the flight towards the car in the first second.

    tracks: numbers (from, below) of which each episode's is drawn; a number is a seed of CarRacing.
    recolour: draw the levels of grey anew for each episode (domain randomisation); the road may be the brighter.
    candidates: so many tracks are drawn, and the one with the gentlest curves is driven (for a curriculum: it may be
    changed while episodes are played).
    patience: steps without a new piece of road after which the episode is over, as if by an accident; 0: never.
    """

    def __init__(self, render_mode=None, tracks=HELD_OUT, stack=4, recolour=False, candidates=1, patience=0):
        if not 0 <= tracks[0] < tracks[1] < 2**31 or candidates < 1:
            raise InputError(f"tracks {tracks[0]} to {tracks[1]}, {candidates} candidates: there is none to drive")
        super().__init__(render_mode=render_mode)
        self.tracks, self.recolour, self.candidates, self.patience = tracks, recolour, candidates, patience
        self.draws = np.random.default_rng()
        self.observation_space = gymnasium.spaces.Box(0, 255, (stack, SIZE, SIZE), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.draws = np.random.default_rng(seed)
        numbers = self.draws.integers(*self.tracks, size=self.candidates).tolist()
        if len(numbers) > 1:
            numbers = [min(numbers, key=self._turning)]
        super().reset(seed=numbers[0])
        self.number, self.idle, levels = numbers[0], 0, PLAIN
        if self.recolour:
            field, road = self.draws.uniform(0, 240, 2)
            while abs(field - road) < CONTRAST:
                field, road = self.draws.uniform(0, 240, 2)
            levels = np.array([field, field + 15, road, PLAIN[WHITE], PLAIN[RED]])
        self.polygons, kinds = _polygons(self.road_poly)
        self.levels, self.centres = levels[kinds], self.polygons.mean(axis=1)
        self.seen = np.repeat(self.picture()[None], self.observation_space.shape[0], axis=0)
        return self.seen, {"track": self.number}

    def step(self, action):
        if action is None:  # by CarRacing's own `reset`
            return super().step(None)
        steering, pedal = np.clip(action, -1, 1)
        control, total, visited = np.array([steering, max(pedal, 0), max(-pedal, 0)]), 0.0, self.tile_visited_count
        for _ in range(REPEAT):
            _, reward, terminated, truncated, info = super().step(control)
            total += reward
            if terminated:
                break
        self.idle = 0 if self.tile_visited_count > visited else self.idle + 1
        terminated = terminated or 0 < self.patience <= self.idle
        self.seen = np.concatenate([self.seen[1:], self.picture()[None]])
        return self.seen, total, terminated, truncated, info | {"track": self.number}

    def _render(self, mode):
        """Draw a frame where somebody wants to see it; CarRacing asks for one at each."""
        return None if mode == "state_pixels" else super()._render(mode)

    def _turning(self, number):
        """How much the track of this number turns in all, in radians."""
        super().reset(seed=number)
        return np.abs(np.diff(np.unwrap([beta for _, beta, _, _ in self.track]))).sum()

    def picture(self):
        """What is seen now: uint8 [42, 42], the car near the lower edge, looking up."""
        hull, image = self.car.hull, np.zeros((FINER * SIZE, FINER * SIZE), np.uint8)
        here, angle = np.array(hull.position), -hull.angle
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

        def draw(polygons, levels):  # corners [P, C, 2]: all are turned at once, which takes longer than to fill them
            x, y = np.moveaxis((polygons - here) @ turn * ZOOM + AT, -1, 0)
            at = np.stack([x * 96 / WINDOW[0] - 6, (WINDOW[1] - y) * 96 / WINDOW[1]], axis=-1) * (len(image) / 84) - 0.5
            for corners, level in zip(np.round(at * 16).astype(np.int32), levels.tolist(), strict=True):
                cv2.fillConvexPoly(image, corners, level, shift=4)

        near = np.abs(self.centres - here).max(axis=1) < SIGHT
        near[0] = True  # the field itself, below all
        draw(self.polygons[near], self.levels[near])
        for body in self.car.drawlist:
            level = 255 * np.dot(body.color, (0.299, 0.587, 0.114))
            for fixture in body.fixtures:
                draw(np.array([[body.transform * corner for corner in fixture.shape.vertices]]), np.array([level]))
        return cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

    def telemetry(self):
        """What a driver with instruments knows: position [2] and heading of the car (radians, 0 is up), its speed, and
        the middle of the road [tiles, 2], in the units of length of CarRacing and seconds."""
        hull = self.car.hull
        middle = np.array([(x, y) for _, _, x, y in self.track])
        return np.array(hull.position), hull.angle, float(np.hypot(*hull.linearVelocity)), middle


def _polygons(road):
    """What stands still on a track, in the order of drawing: corners [P, 4, 2], kinds [P]."""
    far, side = car_racing.PLAYFIELD, car_racing.GRASS_DIM
    square = np.array([(1.0, 0.0), (0.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
    patches = [side * (square + (x, y)) for x in range(-20, 20, 2) for y in range(-20, 20, 2)]
    kinds = [FIELD] + [PATCH] * len(patches)
    for _, colour in road:
        kinds.append({(255, 255, 255): WHITE, (255, 0, 0): RED}.get(tuple(colour), ROAD))
    return np.array([2 * far * (square - 0.5), *patches, *(corners for corners, _ in road)]), np.array(kinds)


gymnasium.register("Racing-v0", entry_point=f"{__name__}:Racing", max_episode_steps=FRAMES // REPEAT)


# --- drivers, judged ------------------------------------------------------------------------------------------------

LOST = 5 * FPS // REPEAT  # decisions at the end of the time without a new piece of road: five seconds


@dataclasses.dataclass
class Drives:
    """One drive on each of N tracks, of at most T decisions; what stands behind the end of a drive means nothing.

    pictures [T, N, stack, 42, 42]; rewards [T, N]; lengths [N]; ends [N]: "lap"; "left the field"; "lost", who had
    found no new road for five seconds when the time was over; or "time"; paths [T, N, 2], speeds [T, N]; away [T, N]:
    the distance from the middle of the road.
    """

    tracks: list[int]
    pictures: np.ndarray
    rewards: np.ndarray
    lengths: np.ndarray
    ends: list[str]
    paths: np.ndarray
    speeds: np.ndarray
    away: np.ndarray

    @property
    def returns(self):
        return self.rewards.sum(axis=0)

    def summary(self):
        """Means over the drives; shares of 0..1: of laps, of accidents, and of the time beside the road."""
        driven = np.arange(len(self.speeds))[:, None] < self.lengths
        return {"return": float(self.returns.mean()), "lowest": float(self.returns.min()),
                "laps": self.ends.count("lap") / len(self.ends),
                "accidents": sum(self.ends.count(end) for end in ("lost", "left the field")) / len(self.ends),
                "beside the road": float((self.away > HALF_ROAD)[driven].mean()),
                "speed": float(self.speeds[driven].mean())}  # fmt: skip


def drive(driver, tracks, seed=0, recolour=False):
    """`Drives` of one drive on each of `tracks` (numbers), to its end.

    driver: (pictures [N, stack, 42, 42], the `telemetry` of each of the N cars) -> actions [N, 2].
    """
    tracks, told = list(tracks), []
    cars = [partial(gymnasium.make, "Racing-v0", tracks=(n, n + 1), recolour=recolour) for n in tracks]
    with contextlib.closing(envs.SameStep(cars, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)) as env:
        env.reset(seed=seed)

        def act(pictures, _):
            told.append([car.unwrapped.telemetry() for car in env.envs])
            return np.asarray(driver(pictures, told[-1]))

        batch = rollout.play(env, act, FRAMES // REPEAT)
    ends = []
    for length, rewards, cut in zip(batch.lengths, batch.rewards.T, batch.truncated, strict=True):
        if cut:
            ends.append("lost" if rewards[max(0, length - LOST) : length].max() < 0 else "time")
        else:
            ends.append("left the field" if rewards[length - 1] < -50 else "lap")
    away = [[np.linalg.norm(middle - position, axis=1).min() for position, _, _, middle in row] for row in told]
    return Drives(tracks, batch.observations, batch.rewards, batch.lengths, ends,
                  np.array([[position for position, *_ in row] for row in told]),
                  np.array([[speed for _, _, speed, _ in row] for row in told]), np.array(away))  # fmt: skip
