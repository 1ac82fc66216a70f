"""Assignment 1, k-nearest neighbours: distances, votes, folds and what leaves an L1 classifier as it is."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from course import a1_knn, core
from models.numpy_net import knn

WAYS = [a1_knn.distances_two_loops, a1_knn.distances_one_loop, a1_knn.distances]


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return x[:600], y[:600].astype(np.int32)


@pytest.mark.parametrize("way", WAYS)
def test_distances_by_hand(way):
    a, b = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[3.0, 4.0], [0.0, 1.0], [-3.0, -4.0]])
    expected = [[5, 1, 5], [0, np.sqrt(18), 10]]
    np.testing.assert_allclose(way(a, b), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_distances_are_those_of_scipy_and_the_library(way, rng):
    a, b = rng.uniform(size=(7, 300)), rng.uniform(size=(11, 300))
    np.testing.assert_allclose(way(a, b), cdist(a, b), rtol=0, atol=1e-9)  # the bound of the assignment's check is 1e-3
    np.testing.assert_allclose(way(a, b), knn.distances(a, b), rtol=0, atol=1e-9)


def test_whole_pixels_have_no_rounding(rng):
    x = rng.integers(0, 256, (30, 3072)).astype(float)
    two, one, none = (way(x, x) for way in WAYS)
    np.testing.assert_array_equal(two, none)
    np.testing.assert_array_equal(one, none)
    assert (np.diag(none) == 0).all()


def test_the_guard_is_needed_and_holds(rng):
    x = rng.uniform(size=(300, 500))
    own = np.diag(a1_knn.squares(x, x))
    assert (own < 0).any(), "else this says nothing"
    assert np.isfinite(a1_knn.distances(x, x)).all()
    assert np.diag(a1_knn.distances(x, x)).max() < 1e-5


def test_the_nearest_come_first_and_of_equals_the_first():
    d = np.array([[3.0, 1.0, 2.0, 1.0, 0.5]])
    assert a1_knn.nearest(d, 4).tolist() == [[4, 1, 3, 2]]


def test_the_majority_wins_and_of_equals_the_smallest_label():
    labels = np.array([[2, 1, 1], [2, 0, 1], [2, 2, 0]])
    assert a1_knn.votes(labels, 4).tolist() == [[0, 2, 1, 0], [1, 1, 1, 0], [1, 0, 2, 0]]
    d, y = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([3, 1, 1, 3])
    assert [int(a1_knn.predict_labels(d, y, k)[0]) for k in (1, 2, 3, 4)] == [3, 1, 1, 1]


def test_predictions_are_those_of_scikit_learn(digits):
    x, y = digits
    d = a1_knn.distances(x[500:], x[:500])
    for k in (1, 2, 5, 20):
        theirs = KNeighborsClassifier(k, algorithm="brute").fit(x[:500], y[:500]).predict(x[500:])
        assert (a1_knn.predict_labels(d, y[:500], k) != theirs).mean() <= 0.01  # theirs leaves equal distances open


def test_cross_validation_names_no_picture_by_itself(digits):
    x, y = digits
    x, y, ks = x[:100], y[:100], (1, 3)
    found = a1_knn.cross_validate(a1_knn.distances(x, x), y, ks, 5)
    assert found.shape == (2, 5)
    for row, k in enumerate(ks):
        for fold in range(5):  # once more, without indices into a matrix of all pairs
            held = np.arange(20 * fold, 20 * fold + 20)
            d = a1_knn.distances_two_loops(x[held], np.delete(x, held, axis=0))
            said = a1_knn.predict_labels(d, np.delete(y, held), k)
            assert found[row, fold] == pytest.approx(100 * np.mean(said == y[held]))
    # every picture twice: who may be his own neighbour, or a copy's, is always right
    noise = np.random.default_rng(0).uniform(size=(50, 4))
    label = np.arange(50) % 7
    pairs = a1_knn.distances(noise, noise)
    assert a1_knn.accuracies(label[a1_knn.nearest(pairs, 1)], label, (1,)) == [100]
    assert a1_knn.cross_validate(pairs, label, (1,), 5).mean() < 50


def test_what_leaves_l1_as_it_is(rng):
    x, y = rng.gamma(1, size=(250, 12)) * np.arange(1, 13), rng.integers(0, 3, 250)
    table = {(row["preprocessing"], row["distance"]): row for row in a1_knn.invariances(x, y, 50, rng)}
    assert len(table) == 14
    same = {"none", "subtract one mean", "subtract each pixel's mean", "divide by one standard deviation",
            "shuffle the pixels"}  # fmt: skip
    for (change, metric), row in table.items():
        if change in same or (change.startswith("rotate") and metric == "L2"):
            assert row["distances change by"] < 1e-9 and row["predictions changed"] == 0, row
        else:
            assert row["distances change by"] > 0.1 and row["predictions changed"] > 0, row


def test_the_ways_are_compared_honestly(rng):
    table, copies = a1_knn.compare_ways(rng.integers(0, 256, (60, 300)).astype(float), 5)
    assert [row["way"] for row in table] == ["two loops", "one loop", "no loop"]
    assert all(row["largest difference"] < 1e-9 for row in table)
    assert all(row["Frobenius difference, whole pixels"] == 0 for row in table)
    assert all(row["microseconds a pair"] > 0 for row in table)
    assert 0 <= copies["distance_to_a_copy"] < 1e-5


def test_contrast_falls_with_the_dimension(rng):
    dimensions, curves = a1_knn.contrasts(rng.uniform(size=(400, 300)), rng, points=400)
    assert dimensions == [3, 10, 30, 100, 300]
    assert (np.diff(curves["cube"]) < 0).all()
    assert 0.9 < curves["cube"][0] < 1 and curves["cube"][-1] < 0.3


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--train 4001", "--large-train"),
        ("--test 201", "--large-test"),
        ("--folds 1", "--folds 1"),
        ("--folds 1001", "--folds 1001"),
        ("--ks 5 801", "--ks 801"),
        ("--train 4 --ks 3 --folds 3", "--ks 3"),  # the largest fold leaves two
        ("--compared 201", "--compared"),
        ("--timed 1000", "--timed"),
    ],
)
def test_more_than_there_is_is_refused_before_the_run(flags, named, tmp_path):
    with pytest.raises(core.InputError, match=named):
        a1_knn.main(["--preset", "smoke", *flags.split(), "--runs", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
