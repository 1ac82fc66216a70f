"""What the reinforcement-learning units share: environments, memories, rollouts, evaluation, resuming.

The idea of each method (its targets, its loss, its advantages) stands in its unit; here is what surrounds it.  Modules:
envs (many environments as one), atari (the preprocessing, wrapper by wrapper), evaluate (returns, films, exports),
resume (a training loop that a kill cannot hurt), replay and dqn (learning from memory), rollout, normalise and ppo
(learning from what was just seen), world (a grid world as pixels).
"""

from course.core import runtime

runtime.environment()
