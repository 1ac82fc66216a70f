"""Reading pickles from elsewhere: only what is on an allow-list can be named, so no code of the file's choice runs."""

import pickle
from pathlib import Path

from course.core.errors import InputError

# what a pickled NumPy array (no object arrays) names; the two spellings are NumPy 1's and NumPy 2's
NUMPY = frozenset(
    {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),  # how protocols below 3 carry bytes
    }
)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, name, allowed, encoding):
        super().__init__(file, encoding=encoding)
        self.name, self.allowed = name, allowed

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise InputError(
                f"{self.name} asks for {module}.{name}, which does not belong in a pickle of "
                "data: it was refused and not run; do not trust this file"
            )
        if module.startswith("numpy.core"):  # where it lives since NumPy 2
            module = module.replace("numpy.core", "numpy._core", 1)
        return super().find_class(module, name)


def load(file, allowed, *, encoding="ASCII"):
    """The object pickled in `file` (a path or an open binary file).

    allowed: set of (module, name), all that the pickle may name; `NUMPY` is ready made for arrays.  encoding: of
    Python 2 strings; "latin1" for arrays pickled by Python 2.  Raises `InputError` naming the first thing refused,
    before it is looked up, or for a damaged file.
    """
    if isinstance(file, str | Path):
        try:
            with Path(file).open("rb") as opened:
                return load(opened, allowed, encoding=encoding)
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}): check the path") from error
    name = getattr(file, "name", "the pickle")
    try:
        return _Unpickler(file, name, allowed, encoding).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can make nearly any exception
        raise InputError(f"{name} is not a whole pickle ({type(error).__name__}: {error}): fetch it again") from error
