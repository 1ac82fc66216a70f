"""Smaller and faster versions of a trained model, and what they cost in accuracy."""

from course.core import runtime

runtime.environment()
