"""Command lines made from dataclasses by tyro, with errors in one line."""

import contextlib
import io
import re

import tyro

from course.core.errors import InputError


def read(default, argv, *, prog, description=None):
    """Parse `argv` into a copy of the dataclass instance `default`; its trailing comments are the flags' help.

    `--help` prints and exits as usual.  Any other refusal of tyro's is raised as an `InputError` of one line.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(type(default), args=list(argv), default=default, prog=prog, description=description)
    except SystemExit as error:
        if not error.code:
            raise
        raise InputError(f"{_one_line(complaint.getvalue())}; see {prog} --help") from None


def _one_line(box):
    """The sense of tyro's framed message: its first paragraph, and the flag it thinks was meant."""
    paragraphs, current = [], []
    for line in box.splitlines():
        text = line.strip("│╭╰╮╯ \t")
        if set(text) <= {"─"} or line.startswith("╭"):
            paragraphs.append(" ".join(current))
            current = []
        else:
            current.append(text)
    paragraphs = [text for text in [*paragraphs, " ".join(current)] if text]
    meant = next((re.search(r"--[\w-]+", text) for text in paragraphs if text.startswith("Perhaps you meant")), None)
    first = paragraphs[0].rstrip(".") if paragraphs else "the command line could not be read"
    return first + (f" (perhaps {meant[0]}?)" if meant else "")
