"""Architectures and algorithms, and what single units need around their lesson."""

from course.core import runtime

runtime.environment()
