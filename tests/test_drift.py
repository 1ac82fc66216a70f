"""The drift monitor: its measures against values worked by hand, its noise floor against simulation, its verdicts."""

import json
import threading

import numpy as np
import pytest
from tensorflow.core.example.example_pb2 import Example
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from course.core import InputError
from serving import drift, pipeline
from serving.server import request_log, tensors

# --- measures --------------------------------------------------------------------------------------------------------


def test_jensen_shannon_is_0_for_the_same_1_for_the_disjoint_and_the_formula_between():
    assert drift.jensen_shannon([1, 2, 3], [2, 4, 6]) == pytest.approx(0, abs=1e-12)
    assert drift.jensen_shannon([1, 0], [0, 5]) == pytest.approx(1)
    # P = (1, 0), Q = (1/2, 1/2): H(3/4, 1/4) - (0 + 1) / 2
    expected = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)) - 0.5
    assert drift.jensen_shannon([1, 0], [1, 1]) == pytest.approx(expected)
    rows = drift.jensen_shannon([[1, 0], [1, 1]], [[1, 1], [1, 1]])
    assert rows == pytest.approx([expected, 0])


def test_l_infinity_is_the_largest_difference_of_shares():
    assert drift.l_infinity([5, 3, 2], [50, 40, 10]) == pytest.approx(0.1)
    assert drift.l_infinity([4, 0], [0, 9]) == 1


@pytest.mark.parametrize("measure", ["jensen_shannon", "l_infinity"])
def test_the_noise_floor_is_passed_by_one_sample_in_a_thousand(measure):
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    rng = np.random.default_rng(1)
    floor = drift.noise_floor(5000 * shares, 120, measure)
    asked, trained = rng.multinomial(120, shares, 40_000), rng.multinomial(5000, shares, 40_000)
    above = (drift.MEASURES[measure](asked, trained) > floor).mean()
    assert 0.0003 < above < 0.003  # 4,000 draws place the 99.9 % quantile no better


def test_the_noise_floor_of_l_infinity_is_the_binomials():
    # two classes alike and a reference beyond doubt: |X/n - 1/2| with X binomial(400, 1/2), 99.9 % within 3.29 sigma
    floor = drift.noise_floor([10**7, 10**7], 400, "l_infinity")
    assert floor == pytest.approx(3.29 * 0.5 / 20, abs=0.006)  # X is whole: steps of 0.0025


def test_from_the_number_needed_on_the_floor_is_below_the_threshold():
    reference = (900, 800, 700, 100)
    for measure, threshold in (("jensen_shannon", 0.05), ("l_infinity", 0.1)):
        needed = drift.examples_needed(reference, measure, threshold)
        assert needed > drift.FEW
        assert drift.noise_floor(reference, needed, measure) < threshold
        assert drift.noise_floor(reference, int(0.9 * needed), measure) > threshold
    assert drift.examples_needed((30, 30), "l_infinity", 0.1) is None  # the reference itself is that uncertain
    for threshold in np.linspace(0.05, 0.3, 26):  # small numbers, large ones, and a floor that hovers about it
        needed = drift.examples_needed((300, 300), "l_infinity", threshold)
        assert needed is None or drift.noise_floor((300, 300), needed, "l_infinity") < threshold
    assert drift.examples_needed((300, 300), "l_infinity", 0.05) is None
    assert drift.examples_needed((300, 300), "l_infinity", 0.25) in range(40, 60)
    assert drift.examples_needed((9000,), "l_infinity", 0.1) == drift.FEW  # one category: chance has no say


# --- statistics ------------------------------------------------------------------------------------------------------


def test_a_numeric_histogram_has_open_ends_and_a_place_for_no_number():
    found = drift.numeric([-5, 0, 0.5, 1, 7, np.inf, np.nan], [0, 1])
    assert found == {"edges": [0.0, 1.0], "counts": [1, 2, 3, 1]}


def test_training_falls_between_its_own_edges_in_tenths():
    values = np.arange(1000.0)
    entry = drift.summarise({"x": values})["x"]
    assert entry["counts"] == [0, *[100] * 10, 0, 0]
    assert drift.numeric([-1, 999, 999.5], entry["edges"])["counts"] == [1, *[0] * 9, 1, 1, 0]
    assert drift.summarise({"x": np.full(5, 28)})["x"]["counts"] == [0, 5, 0, 0]
    assert drift.summarise({"x": ["a", "b", "a"]}) == {"x": {"counts": {"a": 2, "b": 1}}}
    assert drift.summarise({"x": [1, 2, 3]}, {"x": [2]})["x"] == {"edges": [2.0], "counts": [1, 2, 0]}


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def version_folder(base, features, labels=(), schema=None):
    """A version with the statistics of `features`, as far as the monitor reads one."""
    assets = base / "3" / "assets.extra"
    assets.mkdir(parents=True)
    statistics = {"examples": 1, "features": drift.summarise(features)}
    (assets / drift.STATISTICS).write_text(json.dumps(statistics))
    (assets / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    if schema is not None:
        (assets / drift.SCHEMA).write_text(json.dumps(schema))
    return base / "3"


def predict_log(inputs, outputs, version=3, model="m", seconds=1000):
    log = PredictionLog()
    log.log_metadata.model_spec.name, log.log_metadata.model_spec.version.value = model, version
    log.log_metadata.timestamp_secs = seconds
    for arrays, fields in ((inputs, log.predict_log.request.inputs), (outputs, log.predict_log.response.outputs)):
        for alias, value in arrays.items():
            tensors.to_content(np.asarray(value), fields[alias])
    return log


def test_numbers_of_any_model_are_watched_by_column(tmp_path, rng):
    trained = rng.normal(size=(5000, 2)).astype(np.float32)
    version = version_folder(tmp_path, drift.columns("x", trained) | {"y": trained[:, 0]})

    def verdict(rows):
        logs = [predict_log({"x": part, "unknown": part}, {"y": part[:, 0]}) for part in np.split(rows, 10)]
        return drift.monitor(version, logs)

    same = verdict(rng.normal(size=(500, 2)).astype(np.float32))
    assert same["verdict"] == "NO_DRIFT"
    assert same["features"].keys() == {"x[0]", "x[1]", "y"}
    assert [entry["examples"] for entry in same["features"].values()] == [500] * 3
    moved = verdict(rng.normal(size=(500, 2)).astype(np.float32) + np.float32([0, 2]))
    assert moved["verdict"] == "DRIFT"
    assert [entry["alarm"] for entry in moved["features"].values()] == [False, True, False]
    assert moved["says"] == "DRIFT: in x[1], by 10 logged requests"
    assert "ALARM" in moved["features"]["x[1]"]["says"]
    absent = verdict(np.full((500, 2), np.nan, np.float32))
    assert all(entry["alarm"] for entry in absent["features"].values())


def test_few_requests_ring_for_what_chance_does_not_do_and_say_nothing_otherwise(tmp_path, rng):
    trained = rng.normal(size=5000)
    version = version_folder(tmp_path, {"x": trained})

    def verdict(values):
        return drift.monitor(version, [predict_log({"x": np.float32([value])}, {}) for value in values])

    assert verdict(rng.normal(size=40))["verdict"] == "TOO_FEW_REQUESTS"
    needed = verdict([])["features"]["x"]["needed"]
    assert verdict(rng.normal(size=needed))["verdict"] == "NO_DRIFT"
    assert verdict(rng.normal(size=40) + 5)["verdict"] == "DRIFT"
    assert verdict(rng.normal(size=drift.FEW - 1) + 5)["verdict"] == "TOO_FEW_REQUESTS"
    assert verdict([])["features"]["x"]["says"] == "x: not in the requests"


def test_an_alarm_on_undrifted_traffic_is_rare(tmp_path, rng):
    """Samples of training's own distribution, at a size where the floor is just above the threshold."""
    version = version_folder(tmp_path, {"x": rng.normal(size=5000)})
    rings = 0
    for _ in range(60):
        logs = [predict_log({"x": rng.normal(size=60).astype(np.float32)}, {})]
        rings += drift.monitor(version, logs)["verdict"] == "DRIFT"
    assert rings <= 1  # 0.06 are to be expected


def test_answers_are_watched_as_labels_as_scores_and_as_classifications(tmp_path):
    version = version_folder(tmp_path, {drift.PREDICTED: ["cat"] * 500 + ["dog"] * 500}, labels=["cat", "dog"])
    scores = np.float32([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    by_score = drift.measure(predict_log({}, {"probabilities": scores}), {drift.PREDICTED}, ["cat", "dog"])
    assert by_score == {drift.PREDICTED: ["cat", "dog", "cat"]}
    classified = PredictionLog()
    for name, score in (("cat", 0.1), ("dog", 0.9)):
        if not classified.classify_log.response.result.classifications:
            classified.classify_log.response.result.classifications.add()
        classified.classify_log.response.result.classifications[0].classes.add(label=name, score=score)
    assert drift.measure(classified, {drift.PREDICTED}, []) == {drift.PREDICTED: ["dog"]}
    half = [predict_log({}, {"label": np.array([b"cat", b"dog"], object)}) for _ in range(200)]
    assert drift.monitor(version, half)["verdict"] == "NO_DRIFT"
    owls = [predict_log({}, {"label": np.array([b"owl"], object)}) for _ in range(200)]
    entry = drift.monitor(version, half + owls)["features"][drift.PREDICTED]
    assert entry["alarm"] is True
    assert entry["l_infinity"] == pytest.approx(1 / 3)
    assert entry["bins"] == ["cat", "dog", "owl"]


def test_features_of_tf_examples_are_watched_by_name(tmp_path, rng):
    version = version_folder(tmp_path, {"age": rng.normal(40, 9, 4000), "town": ["a", "b"] * 2000})
    logs = []
    for i in range(600):
        log, example = PredictionLog(), Example()
        example.features.feature["age"].float_list.value.append(rng.normal(70, 9))
        example.features.feature["town"].bytes_list.value.append(b"ab"[i % 2 : i % 2 + 1])
        log.regress_log.request.input.example_list.examples.append(example)
        logs.append(log)
    found = drift.monitor(version, logs)["features"]
    assert (found["age"]["alarm"], found["town"]["alarm"]) == (True, False)


def test_a_schemas_thresholds_count_and_a_broken_one_is_one_line(tmp_path, rng):
    schema = {"drift": {"x": {"measure": "jensen_shannon", "threshold": 0.9}}}
    version = version_folder(tmp_path, {"x": rng.normal(size=5000)}, schema=schema)
    logs = [predict_log({"x": rng.normal(size=500).astype(np.float32) + 2}, {})]
    entry = drift.monitor(version, logs)["features"]["x"]
    assert 0.1 < entry["jensen_shannon"] < 0.9
    assert entry["alarm"] is False
    (version / "assets.extra" / drift.SCHEMA).write_text('{"drift": {"x": {"measure": "chi2", "threshold": 1}}}')
    with pytest.raises(InputError, match="drift of x needs a measure and"):
        drift.monitor(version, logs)
    wrong = '{"drift": {"x": {"measure": "l_infinity", "threshold": "a"}}}'
    for damage in ("{", "[]", '{"drift": []}', '{"drift": {"x": 1}}', wrong):
        (version / "assets.extra" / drift.SCHEMA).write_text(damage)
        with pytest.raises(InputError, match=r"schema\.json is damaged"):
            drift.monitor(version, logs)
    (version / "assets.extra" / drift.SCHEMA).unlink()
    (version / "assets.extra" / drift.STATISTICS).unlink()
    with pytest.raises(InputError, match=r"statistics\.json is missing"):
        drift.monitor(version, logs)


# --- pictures --------------------------------------------------------------------------------------------------------


def png(pixels):
    import cv2

    return cv2.imencode(".png", pixels.astype(np.uint8))[1].tobytes()


def noise(rng, count, low, high):
    """Grey pictures of noise, each about one brightness between `low` and `high`."""
    levels = rng.uniform(low, high, count)
    return [np.clip(rng.normal(level, 10, (8, 12)), 0, 255).astype(np.uint8) for level in levels]


def picture_version(rng, base):
    trained = noise(rng, 2000, 80, 200)
    features = {
        "brightness": [float(pixels.mean()) for pixels in trained], "side": [8] * 2000, "channels": ["1"] * 2000,
        "format": ["png"] * 2000, drift.PIXELS: [float(pixels.mean()) for pixels in trained],
    }  # fmt: skip
    return version_folder(base, features)


def test_image_files_and_pixels_are_looked_into(tmp_path, rng):
    version = picture_version(rng, tmp_path)
    files = [png(pixels) for pixels in noise(rng, 300, 80, 200)]
    logs = [predict_log({"image_bytes": np.array([content], object)}, {}) for content in files]
    bright = np.stack(noise(rng, 300, 180, 250))[..., None]
    logs.append(predict_log({"pixels": bright}, {}))
    found = drift.monitor(version, logs)["features"]
    assert {name: entry["alarm"] for name, entry in found.items()} == {
        "brightness": False, "side": False, "channels": False, "format": False, drift.PIXELS: True,
    }  # fmt: skip
    import cv2

    colour = [cv2.imencode(".jpg", rng.integers(0, 255, (20, 20, 3)))[1].tobytes() for _ in range(200)]
    logs = [predict_log({"image_bytes": np.array(colour, object)}, {})]
    found = drift.monitor(version, logs)["features"]
    assert all(found[name]["alarm"] for name in ("side", "channels", "format"))
    assert found["format"]["bins"] == ["jpeg", "png"]


def test_a_picture_that_comes_again_counts_once(tmp_path, rng):
    version = picture_version(rng, tmp_path)
    files = [png(pixels) for pixels in noise(rng, 200, 80, 200)]
    again = [png(noise(rng, 1, 20, 20)[0])] * 500
    logs = [predict_log({"image_bytes": np.array([content], object)}, {}) for content in files + again]
    entry = drift.monitor(version, logs)["features"]["brightness"]
    assert (entry["examples"], entry["alarm"]) == (201, False)


def test_a_picture_that_cannot_be_read_does_not_have_its_batch_counted_again(tmp_path, rng):
    version = picture_version(rng, tmp_path)
    batch = np.array([*map(png, noise(rng, 20, 80, 200)), b"no picture"], object)
    found = drift.monitor(version, [predict_log({"image_bytes": batch}, {})] * 3)["features"]
    assert found["brightness"]["examples"] == found["side"]["examples"] == 20


def test_rows_are_told_apart_by_alias_shape_and_every_input():
    def new(seen, **inputs):
        return drift._new_rows({alias: np.asarray(value) for alias, value in inputs.items()}, seen).tolist()

    words, seen = np.array([[b"ab", b"c"], [b"a", b"bc"], [b"ab", b"c"]], object), set()
    assert new(seen, words=words) == [True, True, False]
    assert new(seen, other=words[:1]) == [True]
    assert new(seen, words=words[:1, :, None]) == [True]
    assert new(seen, x=np.zeros((1, 4)), y=[1]) == [True]
    assert new(seen, y=[1], x=np.zeros((1, 4))) == [False]
    assert new(seen, x=np.zeros((1, 2, 2)), y=[1]) == [True]
    assert new(seen, x=np.zeros((1, 4), np.int64), y=[1]) == [True]
    assert new(seen, x=0.0) == new(seen, x=[1, 2], y=[1]) == new(seen) == []


# --- waiting for the log ---------------------------------------------------------------------------------------------


def test_requests_are_waited_for_until_all_are_in_the_log(tmp_path, rng):
    version, prefix = version_folder(tmp_path, {"x": rng.normal(size=5000)}), tmp_path / "log"
    write_log(prefix, [predict_log({"x": [9.0]}, {}, seconds=1), predict_log({"x": [9.0]}, {}, version=2)])
    logs = [predict_log({"x": rng.normal(size=100).astype(np.float32)}, {}) for _ in range(6)]
    late = threading.Timer(0.5, write_log, (prefix, logs[3:]))
    late.start()
    write_log(prefix, logs[:3])
    verdict = drift.watch(version, prefix, "m", count=6, since=1000)
    late.join()
    assert verdict["says"] == "NO_DRIFT: 1 of 1 features judged, by 6 logged requests"


def test_requests_that_never_reach_the_log_are_told_of(tmp_path, rng):
    version, prefix = version_folder(tmp_path, {"x": rng.normal(size=5000)}), tmp_path / "log"
    lost = "that were sent are not in the log"
    verdict = drift.watch(version, prefix, "m", count=1200, since=1000, timeout=0.1)
    assert verdict["says"] == f"TOO_FEW_REQUESTS: 0 of 1 features judged, by 0 logged requests; 1,200 {lost}"
    write_log(prefix, [predict_log({"x": rng.normal(size=500).astype(np.float32)}, {})] * 2)
    verdict = drift.watch(version, prefix, "m", count=3, since=1000, timeout=0.1)
    assert verdict["says"] == f"NO_DRIFT: 1 of 1 features judged, by 2 logged requests; 1 {lost}"
    (version / "assets.extra" / drift.STATISTICS).unlink()
    with pytest.raises(InputError, match=r"statistics\.json is missing"):  # at once, not when the time is up
        drift.watch(version, prefix, "m", count=2, since=1000, timeout=600)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, rng):
    version_folder(tmp_path / "m", {"x": rng.normal(size=5000)})
    return tmp_path / "m"


def write_log(prefix, logs):
    shards = request_log.Shards(prefix)
    for log in logs:
        shards.write(log.SerializeToString())
    shards.close()


def test_the_command_prints_a_line_a_feature_and_leaves_a_verdict_and_a_figure(base, capsys, rng):
    prefix = base.parent / "log"
    old = [predict_log({"x": rng.normal(9, 1, 100).astype(np.float32)}, {}, version=2)]
    before = [predict_log({"x": rng.normal(9, 1, 100).astype(np.float32)}, {}, seconds=1)] * 5
    write_log(prefix, old + before + [predict_log({"x": rng.normal(size=200).astype(np.float32)}, {})] * 2)
    pipeline.main(["drift", str(base), "--log", str(prefix), "--last", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("  x: Jensen-Shannon divergence 0.0")
    assert lines[0].endswith("no alarm")
    assert lines[1] == f"NO_DRIFT: 1 of 1 features judged, by 2 logged requests ({prefix}.drift.json)"
    pipeline.main(["drift", str(base), "--log", str(prefix), "--output", str(base.parent / "verdict.json")])
    verdict = json.loads((base.parent / "verdict.json").read_text())
    assert (verdict["verdict"], verdict["version"], verdict["records"]) == ("DRIFT", 3, 7)
    assert (verdict["first"], verdict["last"]) == (1, 1000)
    assert (base.parent / "verdict.png").stat().st_size > 5000


def test_what_the_command_cannot_use_is_one_line(base):
    prefix = base.parent / "log"
    with pytest.raises(InputError, match="say where the requests are logged"):
        pipeline.main(["drift", str(base)])
    with pytest.raises(InputError, match="no request is logged at"):
        pipeline.main(["drift", str(base), "--log", str(prefix)])
    write_log(prefix, [predict_log({"x": [1.0]}, {}, version=1), predict_log({"x": [1.0]}, {}, version=3, model="n")])
    with pytest.raises(InputError, match=r"several models \(m, n\): name one with --model"):
        pipeline.main(["drift", str(base), "--log", str(prefix)])
    with pytest.raises(InputError, match=r"no request that version 3 answered .*\(versions in it: 1\)"):
        pipeline.main(["drift", str(base), "--log", str(prefix), "--model", "m"])
    with pytest.raises(InputError, match="no pushed version"):
        pipeline.main(["drift", str(base.parent / "typo"), "--log", str(prefix)])
    with pytest.raises(InputError, match="give one folder, not 2"):
        pipeline.main(["drift", str(base), str(base), "--log", str(prefix)])
