"""Architectures and algorithms that more than one unit, or serving and compression, use."""

from course.core import runtime

runtime.environment()
