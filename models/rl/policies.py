"""Policies as distributions: what a network puts out, and what is drawn from it, for day 16 and those that build on it.

Each of the two classes is a set of functions of the network's outputs.  Draws and modes are NumPy's, for acting;
log-probabilities and entropies are of tensors, for gradients.  A draw is made from noise that is drawn beforehand, for
all steps at once.
"""

import gymnasium
import keras
import numpy as np
from gymnasium.spaces import Box, Discrete
from keras import layers, ops

from course.core import InputError
from models.rl.envs import opened


class Categorical:
    """One of K actions: outputs [B, K] are logits, actions [B] int32."""

    @staticmethod
    def noise(rng, steps, envs, k):
        """[steps, envs, K] from the Gumbel distribution: the place of the largest sum with the logits is a draw."""
        return -np.log(rng.standard_exponential((steps, envs, k), np.float32))

    @staticmethod
    def sample(outputs, noise):
        return (outputs + noise).argmax(axis=-1).astype(np.int32)

    @staticmethod
    def mode(outputs):
        return outputs.argmax(axis=-1).astype(np.int32)

    @staticmethod
    def log_prob(outputs, actions):
        return ops.sum(ops.log_softmax(outputs) * ops.one_hot(actions, outputs.shape[-1]), axis=-1)

    @staticmethod
    def entropy(outputs):
        return -ops.sum(ops.softmax(outputs) * ops.log_softmax(outputs), axis=-1)


class Gaussian:
    """K real numbers, independent: outputs [B, 2K] are means and the logarithms of deviations, actions [B, K]."""

    @staticmethod
    def noise(rng, steps, envs, k):
        """[steps, envs, K] from the standard normal."""
        return rng.standard_normal((steps, envs, k), np.float32)

    @staticmethod
    def sample(outputs, noise):
        k = outputs.shape[-1] // 2
        return outputs[..., :k] + np.exp(outputs[..., k:]) * noise

    @staticmethod
    def mode(outputs):
        return outputs[..., : outputs.shape[-1] // 2]

    @staticmethod
    def log_prob(outputs, actions):
        mean, log_std = ops.split(outputs, 2, axis=-1)
        each = -0.5 * ((actions - mean) / ops.exp(log_std)) ** 2 - log_std - 0.5 * float(np.log(2 * np.pi))
        return ops.sum(each, axis=-1)

    @staticmethod
    def entropy(outputs):
        return ops.sum(ops.split(outputs, 2, axis=-1)[1] + 0.5 * float(np.log(2 * np.pi * np.e)), axis=-1)


SPACES = {Categorical: Discrete, Gaussian: Box}  # of actions


def of(space):
    """The kind of policy for an action space, and the number K of its actions or dimensions."""
    return (Categorical, int(space.n)) if hasattr(space, "n") else (Gaussian, space.shape[0])


def require(flag, name, *kinds):
    """Raise `InputError`, in the name of the command line's `flag`, unless the environment `name` is there, observes a
    vector of numbers, and takes actions that one of `kinds` draws (default: any of the two)."""
    try:
        with opened(name, 1, 0) as one:
            seen, taken = one.single_observation_space, one.single_action_space
    except (InputError, ImportError, gymnasium.error.Error) as error:  # or what it is made with is not installed
        raise InputError(f"{flag} {name}: {error}") from error
    if not isinstance(seen, Box) or len(seen.shape) != 1:
        raise InputError(f"{flag} {name}: it observes {seen}; choose an environment that observes a vector of numbers")
    wanted = {SPACES[kind] for kind in kinds or SPACES}
    if type(taken) not in wanted or len(taken.shape) != (type(taken) is Box):
        names = " or ".join(sorted(space.__name__ for space in wanted))
        raise InputError(f"{flag} {name}: its actions are {taken}; choose an environment whose actions are a {names}")


@keras.saving.register_keras_serializable("models.rl")
class GaussianHead(layers.Layer):
    """Means [B, K] -> means and log deviations [B, 2K]; the latter are K weights, the same for every observation."""

    def __init__(self, log_std=0.0, **kwargs):
        super().__init__(**kwargs)
        self.start = log_std

    def build(self, shape):
        constant = keras.initializers.Constant(self.start)
        self.log_std = self.add_weight(shape=shape[1:], initializer=constant, name="log_std")

    def call(self, mean):
        return ops.concatenate([mean, ops.broadcast_to(self.log_std, ops.shape(mean))], axis=-1)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 2 * shape[-1])

    def as_numpy(self):
        """The layer as it is now, as a NumPy function."""
        log_std = ops.convert_to_numpy(self.log_std)
        return lambda mean: np.concatenate([mean, np.broadcast_to(log_std, mean.shape)], axis=-1)

    def get_config(self):
        return super().get_config() | {"log_std": self.start}


def acting(kind, forward, rng, steps, envs, k):
    """A function (observations [envs, ...], step) -> actions drawn from the policy whose outputs `forward` gives."""
    noise = kind.noise(rng, steps, envs, k)
    return lambda observations, t: kind.sample(forward(observations), noise[t])


def best(space, forward):
    """A function of observations -> the likeliest actions, within the bounds of `space`, as `evaluate` takes it."""
    kind, clip = of(space)[0], within(space)
    return lambda observations: clip(kind.mode(forward(np.asarray(observations, np.float32))))


def within(space):
    """A function that brings actions within the bounds of `space`, if it has any.

    MuJoCo clips forces by itself, but charges for what was asked: a HalfCheetah judged without this loses by it.
    """
    if not hasattr(space, "low"):
        return lambda actions: actions
    return lambda actions: np.minimum(np.maximum(actions, space.low), space.high)
