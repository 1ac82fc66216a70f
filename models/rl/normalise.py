"""Running statistics of what an environment gives: observations to mean 0 and deviation 1, rewards to a common scale.

Sums are merged in float64 (Chan, Golub and LeVeque 1979, eq. 2.1): a sum of squares less a square of sums, the short
way, loses all its digits where the mean is large against the deviation.
"""

import keras
import numpy as np
from keras import ops


def merge(mean, variance, count, values):
    """The (mean [D], variance [D], count) of what was seen so far, given theirs and `values` [K, D], in float64."""
    values = np.asarray(values, dtype=np.float64)
    total = count + len(values)
    shift = values.mean(axis=0) - mean
    squares = variance * count + values.var(axis=0) * len(values) + shift**2 * count * len(values) / total
    return mean + shift * len(values) / total, squares / total, total


@keras.saving.register_keras_serializable("models.rl")
class RunningNormalization(keras.layers.Layer):
    """(x - mean) / sqrt(variance + epsilon), cut to [-clip, clip], by statistics that only `update` changes.

    They are weights of the layer, so that they are saved with the network they belong to: a policy without the
    statistics it was trained with is another policy.  Before the first update x passes as it is (but cut).
    """

    def __init__(self, clip=10.0, epsilon=1e-8, **kwargs):
        super().__init__(**kwargs)
        self.clip, self.epsilon = clip, epsilon

    def build(self, shape):
        for name, size, start in ("mean", shape[1:], "zeros"), ("variance", shape[1:], "ones"), ("count", (), "zeros"):
            weight = self.add_weight(
                shape=size, initializer=start, dtype="float64", trainable=False, autocast=False, name=name
            )
            setattr(self, name, weight)

    def call(self, x):
        scale = 1.0 / ops.sqrt(self.variance + self.epsilon)
        x = (ops.cast(x, self.compute_dtype) - ops.cast(self.mean, self.compute_dtype)) * ops.cast(
            scale, self.compute_dtype
        )
        return ops.clip(x, -self.clip, self.clip)

    def update(self, x):
        """Take the observations x [..., *shape] into the statistics, all with the same weight."""
        mean, variance, count = (ops.convert_to_numpy(weight) for weight in (self.mean, self.variance, self.count))
        rows = np.asarray(x).reshape(-1, *mean.shape)
        for weight, value in zip(
            (self.mean, self.variance, self.count), merge(mean, variance, count, rows), strict=True
        ):
            weight.assign(value)

    def as_numpy(self):
        """The layer as it is now, as a NumPy function of x [B, *shape] (float32): for acting without TensorFlow."""
        mean = ops.convert_to_numpy(self.mean).astype(np.float32)
        scale = (1.0 / np.sqrt(ops.convert_to_numpy(self.variance) + self.epsilon)).astype(np.float32)
        clip = np.float32(self.clip)
        # minimum and maximum: np.clip's own checks take longer than the few numbers of an observation
        return lambda x: np.minimum(np.maximum((x - mean) * scale, -clip), clip)

    def get_config(self):
        return super().get_config() | {"clip": self.clip, "epsilon": self.epsilon}


class ReturnScaler:
    """Divides rewards by the running deviation of the discounted return, r / sqrt(Var[G] + epsilon), cut to +-clip.

    G is summed forwards, G_t = gamma G_{t-1} + r_t, and begins anew with an episode; rewards are not centred, which
    would change what is worth doing where episodes may end (Engstrom et al. 2020, sec. 3, who found the trick in the
    code of PPO and not in its paper).  `variables` makes it something that `run.checkpoint` saves.
    """

    def __init__(self, envs, gamma, clip=10.0, epsilon=1e-8):
        self.gamma, self.clip, self.epsilon = gamma, clip, epsilon
        start = {"mean": 0.0, "variance": 1.0, "count": 0.0, "returns": np.zeros(envs)}
        self.variables = [keras.Variable(np.array(value), dtype="float64", trainable=False, name=name)
                          for name, value in start.items()]  # fmt: skip

    def scale(self, rewards, done):
        """rewards, done [T, N] of the next T steps -> scaled rewards [T, N], by statistics that include them."""
        mean, variance, count, returns = (ops.convert_to_numpy(variable) for variable in self.variables)
        seen = np.empty(rewards.shape)
        for t, reward in enumerate(rewards):
            seen[t] = returns = self.gamma * returns + reward
            returns = np.where(done[t], 0.0, returns)
        state = (*merge(mean, variance, count, seen.reshape(-1)), returns)
        for variable, value in zip(self.variables, state, strict=True):
            variable.assign(value)
        scaled = rewards / np.sqrt(state[1] + self.epsilon)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)
