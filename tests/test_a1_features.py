"""Assignment 1, features: gradients, histograms and hues by hand and against scikit-image; the comparison's pieces."""

import numpy as np
import pytest
from skimage.color import rgb2hsv
from skimage.feature import hog as skimage_hog

from course import a1_features as features
from course.core import data
from models.numpy_net import linear


@pytest.fixture
def rng():
    return np.random.default_rng(8)


@pytest.fixture
def pictures(rng):
    return rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)


def ramp(angle, side=16):
    """A grey picture that brightens in the direction of `angle` degrees, x to the right and y down [1, side, side]."""
    down, right = np.mgrid[:side, :side] / side
    turned = np.deg2rad(angle)
    return (0.1 * (right * np.cos(turned) + down * np.sin(turned))).astype(np.float32)[None]


@pytest.mark.parametrize("angle", [0, 30, 90, 135, 170])
def test_the_angle_is_the_way_in_which_brightness_rises(angle):
    magnitude, found = features.oriented_gradients(ramp(angle))
    inside = found[0, 1:-1, 1:-1]
    np.testing.assert_allclose(np.minimum(abs(inside - angle), 180 - abs(inside - angle)), 0, atol=0.01)
    np.testing.assert_allclose(magnitude[0, 1:-1, 1:-1], 2 * 0.1 / 16, rtol=1e-4)  # two pixels apart
    # along the left border only the change downwards counts
    np.testing.assert_allclose(magnitude[0, 1:-1, 0], 2 * 0.1 / 16 * np.sin(np.deg2rad(angle)), atol=1e-6)


def test_opposite_directions_are_one_orientation():
    there, back = (features.oriented_gradients(ramp(angle))[1][0, 1:-1, 1:-1] for angle in (40, 220))
    np.testing.assert_allclose(there, back, atol=0.01)
    assert (there < 180).all()


def test_histograms_by_hand():
    values = np.array([[[0.0, 0.3, 0.6, 0.99], [0.49, 0.5, 0.1, 0.2]]])  # a picture of 2 rows and 4 columns
    weights = np.array([[[1.0, 2, 4, 8], [16, 32, 64, 128]]])
    table = features.histograms(values, 2, 2)
    np.testing.assert_array_equal(table, [[[[3 / 4, 1 / 4], [2 / 4, 2 / 4]]]])
    table = features.histograms(values, 2, 2, weights)
    np.testing.assert_array_equal(table, [[[[19 / 4, 32 / 4], [192 / 4, 12 / 4]]]])


def test_histograms_leave_out_what_no_whole_cell_covers(rng):
    values = rng.random((3, 28, 30)).astype(np.float32)
    table = features.histograms(values, 5, 8)
    assert table.shape == (3, 3, 3, 5)
    np.testing.assert_array_equal(table, features.histograms(values[:, :24, :24], 5, 8))
    np.testing.assert_allclose(table.sum(axis=-1), 1, atol=1e-6)
    for n, row, column in np.ndindex(3, 3, 3):
        cell = values[n, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        expected = np.histogram(cell, bins=5, range=(0, 1))[0] / 64
        np.testing.assert_allclose(table[n, row, column], expected, atol=1e-7)


@pytest.mark.parametrize(("cell", "orientations"), [(8, 9), (4, 9), (8, 6)])
@pytest.mark.parametrize("grey", [False, True])
def test_hog_is_that_of_scikit_image(pictures, cell, orientations, grey):
    x = pictures[..., :1] if grey else pictures
    size = (cell, cell)
    for image, ours in zip(features.grey(x), features.hog(x, cell, orientations, blocks=True), strict=True):
        theirs = skimage_hog(image, orientations, size, (2, 2), block_norm="L2-Hys")
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_cells_alone_are_those_of_scikit_image_up_to_its_normalisation(pictures):
    for image, ours in zip(features.grey(pictures), features.hog(pictures), strict=True):
        theirs = skimage_hog(image, 9, (8, 8), (1, 1), block_norm="L1").reshape(16, 9)
        cells = ours.reshape(16, 9)
        np.testing.assert_allclose(cells / cells.sum(axis=1, keepdims=True), theirs, atol=2e-4)  # it adds an epsilon
        assert cells.sum(axis=1).min() > 0.05


def test_brightness_is_by_the_weights_of_bt_709():
    x = np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]]], dtype=np.uint8)
    np.testing.assert_allclose(features.grey(x)[0, 0], [0.2125, 0.7154, 0.0721, 1], atol=1e-6)


def test_hue_by_hand():
    colours = {(255, 0, 0): 0, (255, 255, 0): 1 / 6, (0, 255, 0): 2 / 6, (0, 255, 255): 3 / 6, (0, 0, 255): 4 / 6,
               (255, 0, 255): 5 / 6, (128, 128, 128): 0, (0, 0, 0): 0, (255, 128, 0): 128 / 255 / 6}  # fmt: skip
    x = np.array([list(colours)], dtype=np.uint8)[None]
    hue, saturation = features.hue_and_saturation(x)
    np.testing.assert_allclose(hue[0, 0], list(colours.values()), atol=1e-6)
    np.testing.assert_allclose(saturation[0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 1], atol=1e-6)


def test_hue_and_saturation_are_those_of_scikit_image(pictures):
    pictures[0, :4] = pictures[0, :4, :, :1]  # some grey
    pictures[1, :4, :, 1] = pictures[1, :4, :, 0]  # and ties
    hue, saturation = features.hue_and_saturation(pictures)
    theirs = rgb2hsv(pictures)
    apart = np.abs(hue - theirs[..., 0])
    assert np.minimum(apart, 1 - apart).max() < 1e-6
    np.testing.assert_allclose(saturation, theirs[..., 1], atol=1e-6)
    assert (hue >= 0).all() and (hue < 1).all()


def test_colours_of_a_picture_half_red_half_blue():
    x = np.zeros((1, 8, 8, 3), np.uint8)
    x[:, :, :4, 0] = 255
    x[:, :, 4:, 2] = 255
    np.testing.assert_allclose(features.colours(x, 6), [[0.5, 0, 0, 0, 0.5, 0]])
    quarters = features.colours(x, 6, regions=2, weighted=True).reshape(4, 6)
    np.testing.assert_allclose(quarters.argmax(axis=1), [0, 4, 0, 4])
    np.testing.assert_allclose(quarters.sum(axis=1), 1)


def test_weighted_colours_do_not_count_grey():
    x = np.full((1, 4, 4, 3), 90, np.uint8)
    assert features.colours(x, 3)[0].tolist() == [1, 0, 0]
    assert features.colours(x, 3, weighted=True)[0].tolist() == [0, 0, 0]


def test_grey_pictures_have_a_histogram_of_brightness():
    x = np.repeat(np.array([0, 60, 130, 255], np.uint8), 4).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(features.colours(x, 4), [[0.5, 0, 0.25, 0.25]])


def test_extract_features_joins_them_whatever_the_chunk(pictures):
    functions = [features.hog, features.colours, features.thumbnail]
    x = features.extract_features(pictures, functions)
    assert x.shape == (6, 144 + 10 + 48) and x.dtype == np.float32
    np.testing.assert_array_equal(x, features.extract_features(pictures, functions, chunk=4))
    np.testing.assert_array_equal(x[:, 144:154], features.colours(pictures))


def test_the_assignment_has_155_numbers_a_picture(pictures):
    inputs = features.inputs(features.Config())
    x = linear.prepare(features.extract_features(pictures, inputs["features"]), scale=True)[0]
    assert x.shape == (6, 155) and (x[:, -1] == 1).all()
    np.testing.assert_allclose(x[:, :-1].mean(axis=0), 0, atol=1e-5)
    spread = x[:, :-1].std(axis=0)
    np.testing.assert_allclose(spread[spread > 0], 1, atol=1e-3)


def test_a_wide_bin_is_the_sum_of_its_narrow_ones(pictures):
    narrow = features.hog(pictures, orientations=36).reshape(6, 16, 9, 4).sum(axis=-1).reshape(6, -1)
    wide = features.hog(pictures)
    assert (np.abs(narrow - wide) > 1e-5).mean() < 0.02  # but for angles on a boundary, which rounding may put aside
    few = features.colours(pictures, 300).reshape(6, 10, 30).sum(axis=-1)
    np.testing.assert_allclose(few, features.colours(pictures, 10), atol=3 / 1024)


def test_nearer_to_the_wrong_counts_errors_only():
    x, y = np.array([[0.0], [0.2], [1.0], [1.2]]), np.array([0, 0, 1, 1])  # means 0.1 and 1.1
    x_test, y_test = np.array([[0.9], [0.2], [0.3], [1.0]]), np.array([0, 0, 1, 1])
    said = np.array([1, 1, 0, 1])  # wrong: 0.9 of class 0 and 0.2 of class 0 taken for 1; 0.3 of class 1 taken for 0
    assert features.nearer_to_the_wrong(x, y, x_test, y_test, said) == pytest.approx(200 / 3)


def test_edges_tell_clothes_apart():
    images = data.three_way(data.load("fashion_mnist_12k"), 1_500, 500, 500)
    cfg = features.Config(steps=200)
    x = features.standardised(images, features.inputs(cfg)["features"])
    w, found = features.fit_linear(linear.svm, x, images, cfg, 0.01, 0.1)
    assert w.shape == (x[0].shape[1], 10)
    assert found["validation"] > 70 and found["train"] > 70
