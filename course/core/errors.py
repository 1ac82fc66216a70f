"""How a command fails: one clear line for what the user can mend, a traceback for what only we can."""

import sys


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do, in one line."""


def cli(main, argv=None):
    """Run `main(argv)` as a command.

    An `InputError` becomes one line on stderr and exit status 2; Ctrl-C becomes one line and status 130, the
    shell's own for an interrupt.  Anything else is a defect of ours and keeps its traceback.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
