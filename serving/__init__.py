"""From a trained model to an endpoint: the pipeline, the embedded server, its client and the demos."""

from course.core import runtime

runtime.environment()
