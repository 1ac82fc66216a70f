"""Version folders: which of them a model's policy wants, and what changes when one is written again."""

from pathlib import Path

from serving.server import backends

_INT64_MAX = 2**63 - 1


def wanted_versions(config, failed=()):
    """{number: folder} of the versions that a `ModelConfig`'s policy wants; None where its folder cannot be read.

    The latest versions are those that load: one in `failed` stays wanted, should it be mended, and does not count.  So
    a server that is started anew finds the last good version, as one that was running has kept it.

    A version is a folder with a whole number for a name and a complete model in it.  Of two spellings of one number,
    as 007 and 7, the one later in the alphabet counts, as in the stock server.
    """
    found = {}
    try:
        for folder in sorted(Path(config.base_path).iterdir()):
            is_number = folder.name.isascii() and folder.name.isdecimal() and int(folder.name) <= _INT64_MAX
            if is_number and backends.is_complete(folder):
                found[int(folder.name)] = folder
    except OSError:
        return None
    policy = config.model_version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return found
    if kind == "specific":
        return {number: found[number] for number in policy.specific.versions if number in found}
    wanted, places = {}, policy.latest.num_versions or 1
    for number in sorted(found, reverse=True):
        if places:
            wanted[number] = found[number]
            places -= number not in failed
    return wanted


def stamp(path):
    """What changes when a file, or one anywhere in a folder, is written again; () where it cannot be read."""
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        return tuple((file, stat.st_mtime_ns, stat.st_size) for file in files for stat in (file.stat(),))
    except OSError:
        return ()
