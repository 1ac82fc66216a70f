"""`python -m course.core.data`: the data sets, where they come from, and whether they are here."""

import argparse

from course.core import data
from course.core.data import fetch, images
from course.core.errors import cli


def table():
    """A rich table of all sets."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, padding=0, title=f"Data sets, kept in {fetch.data_folder()}")
    for heading in ("name", "what", "from", "download", "licence", "here"):
        made.add_column(heading, no_wrap=heading in {"name", "download", "here"})
    for name, entry in data.SETS.items():
        if entry.package:
            origin, size = f"{entry.package.registry} {entry.package.name}", f"{entry.package.size / 1e6:.1f} MB"
        else:
            origin, size = "the repository", "-"
        if entry.tfds:
            origin += " or TFDS"
        made.add_row(name, entry.what, origin, size, entry.licence, _here(name, entry))
    return made


def _here(name, entry):
    if images.own_copy(name):
        return "your copy"
    if entry.committed and entry.committed.exists():
        return "yes"
    return "yes" if entry.package and fetch.cache_path(name, entry.package).exists() else "no"


def main(argv):
    """List the data sets, fetch some, or rebuild the committed subset."""
    parser = argparse.ArgumentParser(prog="python -m course.core.data", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", metavar="{list,fetch,make-subset}")
    commands.add_parser("list", help="list the data sets (what no command does)")
    getting = commands.add_parser("fetch", help="get data sets, so that loading them later needs no network")
    getting.add_argument("names", nargs="+", metavar="NAME")
    making = commands.add_parser("make-subset", help="draw the committed Fashion-MNIST subset again")
    making.add_argument("path", nargs="?", help="the zip file to write (default: the committed one)")
    options = parser.parse_args(argv)
    if options.command == "fetch":
        for name in options.names:  # a wrong name is found before the first fetch starts
            images.entry(name)
        for name in options.names:
            data.load(name)
    elif options.command == "make-subset":
        from course.core.data import subset

        known = data.SETS["fashion_mnist_12k"]
        digest = subset.make_subset(options.path or known.committed)
        agrees = "as pinned" if digest == known.committed_sha256 else f"not the pinned {known.committed_sha256}"
        print(f"{options.path or known.committed}: sha256 {digest}, {agrees}")
    else:
        from rich.console import Console

        Console().print(table())


if __name__ == "__main__":
    cli(main)
