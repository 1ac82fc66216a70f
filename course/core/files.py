"""Files that are there whole or not at all, whatever kills the process meanwhile."""

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from pathlib import Path

from course.core.errors import InputError

TEMPORARY = ".tmp-"  # every unfinished file or folder starts with this; readers pass over it


def _sync_folder(folder):
    """Make a rename inside `folder` survive a power cut: the entry lives in the folder, not in the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path):
    """Create `path` and its parents; `InputError` where that is refused (read-only, or a file is in the way)."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f"{TEMPORARY}{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink(missing_ok=True)  # a sweep may have come first
    except OSError as error:
        raise InputError(
            f"cannot write in the folder {path} ({error.strerror}): choose another or mend its permissions"
        ) from error
    return path


@contextlib.contextmanager
def atomic_path(target):
    """Yield a temporary path beside `target`; on a clean exit it is synced and renamed onto `target`."""
    target = Path(target)
    make_folder(target.parent)
    temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{target.name}")  # keeps the suffix
    try:
        with _room_on_disk(target.parent):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _room_on_disk(folder):
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"the disk of {folder} is full: free some space; nothing was changed") from error
        raise


def write_atomic(target, content):
    """Write text (UTF-8) or bytes to `target`, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextlib.contextmanager
def atomic_folder(target, last=None):
    """Yield a temporary folder beside `target`; on a clean exit every file in it is synced and it becomes `target`.

    `target` must not exist: published folders (model versions) are never overwritten.  `last` names a file (relative)
    that must be complete last; since the folder appears by one rename this only orders the syncing.
    """
    target = Path(target)
    make_folder(target.parent)
    temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}-{target.name}"
    temporary.mkdir()
    try:
        with _room_on_disk(target.parent):
            yield temporary
        files = sorted((path for path in temporary.rglob("*") if path.is_file()), key=lambda path: path.name == last)
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for folder in [path for path in temporary.rglob("*") if path.is_dir()] + [temporary]:
            _sync_folder(folder)
        if target.exists():
            raise FileExistsError(errno.EEXIST, "already published", str(target))
        temporary.rename(target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder):
    """Remove what a killed process left unfinished in `folder` (not below it)."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def sha256(path):
    """Hex digest of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
