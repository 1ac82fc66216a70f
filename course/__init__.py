"""The Deep Learning Workbook: one module a unit, each run as `python -m course.<unit>`."""

import sys

from course.core import runtime

runtime.environment()

# `python -m course.day21_capsnet --help` imports this package before the unit.  The unit's flags are read here,
# from its source, so that --help and a mistyped flag answer at once and not after TensorFlow's five seconds.
if sys.argv[0] == "-m":
    from course.core import experiment

    experiment.check_command_line(sys.orig_argv)
