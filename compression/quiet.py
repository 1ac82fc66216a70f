"""What Keras, the converter and C++ tell about a model that is loaded, converted or exported, kept off the terminal."""

import contextlib
import io
import os
import tempfile


@contextlib.contextmanager
def quiet():
    """Keep Python's standard output and everything on the standard error, C++'s included, off the terminal; the latter
    comes out where the block fails."""
    original = os.dup(2)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(original, held.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)
