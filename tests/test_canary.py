"""Canary, promotion and roll back on a real server process, while clients ask it."""

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from course.core import InputError
from course.core.export import write_warmup
from serving import canary, pipeline
from serving.client import Client, ServingError
from serving.server import spawn, warmup
from tests import serving_models


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Graphs to push: y = 0.5 x + 2 and + 3, and one that takes strings."""
    folder = tmp_path_factory.mktemp("graphs")
    serving_models.save_graph(folder / "good", serving_models.half_plus(2.0))
    serving_models.save_graph(folder / "other", serving_models.half_plus(3.0))
    serving_models.save_graph(folder / "strings", serving_models.identity({"x": "string"}, {"x": "y"}))
    shutil.copytree(folder / "good", folder / "broken")
    (folder / "broken" / "saved_model.pb").write_bytes(b"no graph")
    return folder


@pytest.fixture
def push(graphs, tmp_path):
    """push(graph, version): as a pusher does it, into the base folder, which is returned."""

    def push(graph, version):
        made = tmp_path / "made" / str(version)
        shutil.copytree(graphs / graph, made)
        pipeline.push(made, tmp_path / "m")
        return tmp_path / "m"

    return push


@pytest.fixture
def place(push, tmp_path):
    """A server process that serves version 1 of `m` and polls its models.config, which logs every request."""
    base = push("good", 1)
    config = tmp_path / "models.config"
    config.write_text(pipeline.models_config({"m": base, "absent": tmp_path / "absent"}, {"m": tmp_path / "log" / "m"}))
    (tmp_path / "absent").mkdir()
    with spawn(
        "m", model_config_file=config, file_system_poll_wait_seconds=0.1, model_config_file_poll_wait_seconds=0.1,
        max_num_load_retries=0,
    ) as server:  # fmt: skip
        server.wait_available(1)
        yield canary.Place(str(config), server.url, timeout=20)


@pytest.fixture
def requests_file(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps({"instances": [float(x)]}) + "\n" for x in range(150)))
    return path


def served(place):
    """Versions that serve, and what the labels name, asked of the server."""
    with Client(place.url, model="m") as client:
        labels = {}
        for label in (canary.STABLE, canary.CANARY):
            with contextlib.suppress(ServingError):
                labels[label] = client.version_of(label)
        return client.available(), labels


@contextlib.contextmanager
def clients(place, labels):
    """Ask without pause meanwhile, a thread a label (None: no label); yields the answers and the failures."""
    answers, failures, stop = {label: [] for label in labels}, [], threading.Event()

    def ask(label):
        with Client(place.url, model="m") as client:
            while not stop.is_set():
                try:
                    answers[label] += client.predict([4.0], label=label)
                except ServingError as error:
                    failures.append((label, str(error)))

    threads = [threading.Thread(target=ask, args=(label,)) for label in labels]
    for thread in threads:
        thread.start()
    try:
        yield answers, failures
    finally:
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()


def run(base, place, requests_file, *more):
    """The command; returns its verdict."""
    newest = pipeline.versions(base)[-1]
    words = ["canary", str(base), "--config", place.config, "--url", place.url, "--requests", str(requests_file)]
    pipeline.main([*words, "--timeout", str(place.timeout), *more])
    return json.loads((base.parent / f"canary-m-{newest}.json").read_text())


# a laptop's latencies are no part of these tests
ANY_LATENCY = ("--max-slowdown", "100", "--max-tail", "100")


def test_a_good_canary_is_promoted_and_a_bad_one_rolled_back_and_no_request_fails(place, push, requests_file, capsys):
    base = push("good", 2)
    with clients(place, [None]) as (answers, failures):
        verdict = run(base, place, requests_file, "--stable", "1", *ANY_LATENCY)
    assert failures == []
    assert set(answers[None]) == {4.0}
    assert (verdict["verdict"], verdict["reasons"]) == ("PROMOTED", [])
    assert verdict["stable"]["requests"] == verdict["canary"]["requests"] == verdict["pairs"] == 150
    assert verdict["disagreement"] == 0
    assert served(place) == ([2], {"stable": 2, "canary": 2})
    assert pipeline.versions(base) == [1, 2]  # the folder stays: there is a way back
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("PROMOTED: 150 pairs of answers, 0 failed, 0 differ (")
    assert "  canary: version 2, 150 requests, 0 errors, p50 " in "\n".join(out)

    push("other", 3)  # another answer to everything
    with clients(place, [None, "stable", "canary"]) as (answers, failures):
        verdict = run(base, place, requests_file, *ANY_LATENCY)
    assert failures == []
    assert set(answers["stable"]) == {4.0}  # clients of the stable label never saw it
    assert set(answers["canary"]) == {4.0, 5.0}
    assert verdict["verdict"] == "ROLLED_BACK"
    assert verdict["versions"] == {"stable": 2, "canary": 3}
    assert verdict["reasons"] == ["1.000 of 150 answers differ (0.1 may)"]
    assert served(place) == ([2], {"stable": 2, "canary": 2})
    assert pipeline.versions(base) == [1, 2]
    assert pipeline.withdrawn(base).keys() == {3}

    push("strings", 4)  # takes no numbers
    with clients(place, ["stable"]) as (answers, failures):
        verdict = run(base, place, requests_file, *ANY_LATENCY)
    assert failures == []
    assert verdict["verdict"] == "ROLLED_BACK"
    assert verdict["canary"]["errors"] == verdict["pairs"] == 100  # not sent to the end: it is certain before
    assert "100 of 100 requests that stable answers fail (0 may): 400" in verdict["reasons"][0]

    push("broken", 5)  # cannot be loaded
    with clients(place, ["stable", None]) as (answers, failures):
        verdict = run(base, place, requests_file, *ANY_LATENCY)
    assert failures == []
    assert verdict["verdict"] == "ROLLED_BACK"
    assert "could not be loaded" in verdict["reasons"][0]
    assert served(place) == ([2], {"stable": 2, "canary": 2})
    assert pipeline.withdrawn(base).keys() == {3, 4, 5}

    config = text_format.Parse(Path(place.config).read_text(), ModelServerConfig())
    entry, other = config.model_config_list.config
    assert list(entry.model_version_policy.specific.versions) == [2]
    assert entry.logging_config.sampling_config.sampling_rate == 1  # the rest of the file is as it was
    assert other.name == "absent"

    # after a promotion the way back goes by the config, which pins the versions
    with clients(place, ["stable", "canary", None]) as (answers, failures):
        pipeline.main(["roll-back", str(base), "--config", place.config, "--url", place.url])
    assert failures == []
    assert capsys.readouterr().out.splitlines()[-1] == f"{base}: version 2 is withdrawn; 1 serves at {place.url}"
    assert served(place) == ([1], {"stable": 1, "canary": 1})
    assert pipeline.versions(base) == [1]
    with pytest.raises(InputError, match="none to roll back to"):
        pipeline.main(["roll-back", str(base), "--config", place.config, "--url", place.url])
    assert served(place) == ([1], {"stable": 1, "canary": 1})


def test_logged_requests_are_what_is_compared_and_too_few_move_nothing(place, push, tmp_path):
    with spawn("m", model_config_file=place.config, file_system_poll_wait_seconds=0.1) as server:
        server.wait_available(1)
        place = canary.Place(place.config, server.url, server.grpc_target, timeout=20)
        with Client(server.url, model="m") as client:
            for x in [*range(60), *range(10)]:
                client.predict([float(x)])
        push("good", 2)
        base = push("other", 3)
        words = [
            "--config",
            place.config,
            "--url",
            place.url,
            "--grpc",
            place.grpc,
            "--log",
            str(tmp_path / "log" / "m"),
        ]
        log = ["canary", str(base), *words, "--stable", "1", *ANY_LATENCY]
        pipeline.main([*log, "--candidate", "2"])
        verdict = json.loads((tmp_path / "canary-m-2.json").read_text())
        assert verdict["verdict"] == "TOO_FEW_REQUESTS"
        assert verdict["reasons"] == ["60 of 100 requests"]  # distinct ones
        assert served(place) == ([1, 2], {"stable": 1, "canary": 2})  # both serve on, until there is a verdict

        def ask():
            with Client(server.url, model="m") as client:
                for x in range(1000, 1080):
                    client.predict([float(x)], label="stable")

        asking = threading.Timer(0.5, ask)
        asking.start()
        # as they arrive; for longer than 80 answers may take on a machine with other things to do
        pipeline.main([*log, "--candidate", "2", "--seconds", "8"])
        asking.join()
        verdict = json.loads((tmp_path / "canary-m-2.json").read_text())
        assert (verdict["verdict"], verdict["pairs"]) == ("PROMOTED", 140)  # and not what it had sent itself
        assert served(place) == ([2], {"stable": 2, "canary": 2})


def test_a_server_that_does_not_read_the_file_is_told_and_the_file_is_as_it_was(push, requests_file, tmp_path):
    base = push("good", 1)
    push("good", 2)
    config = tmp_path / "models.config"
    config.write_text(pipeline.models_config({"m": base}))
    before = config.read_text()
    with spawn("m", model_config_file=config) as server:
        server.wait_available(2)
        deaf = canary.Place(str(config), server.url, timeout=1)
        with pytest.raises(InputError, match=r"is as it was.*version 1 is missing \(does it poll models.config"):
            run(base, deaf, requests_file)
        assert config.read_text() == before
        assert pipeline.versions(base) == [1, 2]
        with pytest.raises(InputError, match="no server answers"):
            run(base, canary.Place(str(config), "http://127.0.0.1:9", timeout=1), requests_file)
        assert config.read_text() == before


def test_a_candidate_is_not_withdrawn_for_another_versions_failure(place, push, requests_file):
    push("broken", 2)
    before = Path(place.config).read_text()
    base = push("good", 3)
    with pytest.raises(InputError, match=r"is as it was.*version 2 could not be loaded"):
        run(base, place, requests_file, "--stable", "2")
    base = push("broken", 4)  # nor where it is broken too: that is not known yet
    with pytest.raises(InputError, match=r"is as it was.*could not be loaded"):
        run(base, place, requests_file, "--stable", "2")
    assert Path(place.config).read_text() == before
    assert pipeline.versions(base) == [1, 2, 3, 4]
    assert pipeline.withdrawn(base) == {}


def test_a_candidate_that_loads_for_too_long_is_withdrawn_and_the_verdict_says_so(
    place, push, requests_file, graphs, tmp_path
):
    slow = graphs / "slow"
    serving_models.save_graph(slow, serving_models.sleeper)
    (slow / warmup.FILE).parent.mkdir()
    write_warmup(slow / warmup.FILE, "m", {"serving_default": {"x": np.float32([[7.0]])}})  # seconds
    canary.apply(place, tmp_path / "m", {1}, {})
    base = push("slow", 2)
    verdict = run(base, place, requests_file, "--timeout", "3")
    assert verdict["verdict"] == "ROLLED_BACK"
    assert verdict["reasons"] == ["DEADLINE_EXCEEDED: version 2 has not been loaded within 3 s"]
    assert pipeline.versions(base) == [1]
    assert pipeline.withdrawn(base).keys() == {2}


def test_a_verdict_is_kept_where_the_server_has_gone_meanwhile(place, push, requests_file, monkeypatch):
    def gone(*words):
        raise ServingError("UNAVAILABLE", "no server answers")

    base = push("good", 2)
    monkeypatch.setattr(canary, "finish", gone)
    with pytest.raises(InputError, match="run it again or, where the candidate ends the server, take it back with"):
        run(base, place, requests_file, *ANY_LATENCY)
    verdict = json.loads((base.parent / "canary-m-2.json").read_text())
    assert verdict["verdict"] == "PROMOTED"
    assert verdict["versions"] == {"stable": 1, "canary": 2}


def test_a_roll_back_that_the_server_cannot_follow_withdraws_nothing(place, push):
    base = push("good", 2)
    canary.apply(place, base, {2}, {})
    with Client(place.url, model="m") as client:
        start = time.monotonic()
        with pytest.raises(InputError, match=r"version 2 is not withdrawn: .* serves nothing.* not 1; .*give --config"):
            pipeline.main(["roll-back", str(base), "--url", place.url])
        assert time.monotonic() - start < 30  # of 60: nothing was on its way
        assert pipeline.versions(base) == [1, 2]
        assert pipeline.withdrawn(base) == {}
        serving_models.wait_for(lambda: client.available() == [2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --config"),
        (["--config", "CONFIG"], "give --url"),
        (["--config", "CONFIG", "--url", "http://127.0.0.1:9"], "give --requests FILE or --log PREFIX"),
        (["--config", "CONFIG", "--url", "http://127.0.0.1:9", "--log", "x"], "--log goes with --grpc"),
        (["--config", "nowhere", "--url", "http://127.0.0.1:9", "--requests", "FILE"], "cannot read nowhere"),
        (["--config", "CONFIG", "--url", "http://127.0.0.1:9", "--requests", "nowhere"], "cannot read the requests"),
        (["--config", "CONFIG", "--url", "http://127.0.0.1:9", "--requests", "CONFIG"], "does not hold predict bodies"),
        (["--config", "CONFIG", "--url", "http://127.0.0.1:9", "--requests", "FILE", "--stable", "9"], "no version 9"),
        (["--config", "CONFIG", "--url", "http://127.0.0.1:9", "--requests", "FILE", "--stable", "2"], "already"),
        (["--config", "CONFIG", "--url", "http://x", "--requests", "FILE", "--model", "n"], "has no entry for n"),
    ],
)
def test_what_a_canary_cannot_use_is_one_line(words, said, push, requests_file, tmp_path):
    base = push("good", 1)
    push("good", 2)
    (tmp_path / "models.config").write_text(pipeline.models_config({"m": base}))
    files = {"CONFIG": str(tmp_path / "models.config"), "FILE": str(requests_file)}
    with pytest.raises(InputError, match=said):
        pipeline.main(["canary", str(base), *(files.get(word, word) for word in words)])
    assert pipeline.versions(base) == [1, 2]


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(stable, candidate, count, **limits):
    """`canary.compare` of two functions of a request."""
    asked = {canary.STABLE: stable, canary.CANARY: candidate}
    return canary.compare(lambda x, label: asked[label](x), range(count), canary.Options(**limits))


def same(x):
    return {"y": np.float32([[x % 3 == 0, x % 3 != 0]])}


def test_a_slow_candidate_is_found_and_noise_is_not():
    def slow(x):
        time.sleep(0.006)
        return same(x)

    def quick(x):
        time.sleep(0.001)
        return same(x)

    verdict = compare(quick, slow, 120)
    assert verdict["verdict"] == "ROLLED_BACK"
    assert "its p50 latency is" in verdict["reasons"][0]
    assert verdict["canary"]["p50_ratio"] > 1.5
    assert compare(quick, quick, 120)["verdict"] == "PROMOTED"


def test_a_share_of_other_decisions_counts_beyond_chance_only():
    def differs(every):
        return lambda x: same(x + 1) if x % every == 0 else same(x)

    # same(x) and same(x + 1) decide differently for two x of three
    assert compare(same, differs(9), 900, max_slowdown=100, max_tail=100)["verdict"] == "PROMOTED"
    verdict = compare(same, differs(2), 900, max_slowdown=100, max_tail=100)
    assert verdict["reasons"] == [f"{verdict['disagreement']:.3f} of 900 answers differ (0.1 may)"]
    few = compare(same, differs(4), 12, least=10, max_slowdown=100, max_tail=100)
    assert few["disagreement"] == pytest.approx(2 / 12)
    assert few["verdict"] == "PROMOTED"  # by Wilson's interval the share may be as low as 0.047


def test_requests_that_the_stable_version_refuses_too_are_not_held_against_the_candidate():
    def refuses(x):
        if x % 2:
            raise ServingError(400, "odd")
        return same(x)

    verdict = compare(refuses, refuses, 240, max_slowdown=100, max_tail=100)
    assert (verdict["verdict"], verdict["pairs"], verdict["canary"]["errors"]) == ("PROMOTED", 120, 120)
    assert compare(refuses, refuses, 100)["verdict"] == "TOO_FEW_REQUESTS"


def test_answers_agree_by_their_text_else_their_largest_score_else_their_numbers():
    labels = {"label": np.array(["a"]), "score": np.float32([[0.9, 0.1]])}
    assert canary.agree(labels, labels | {"score": np.float32([[0.1, 0.9]])})
    assert not canary.agree(labels, labels | {"label": np.array(["b"])})
    assert canary.agree({"p": np.float32([[0.9, 0.1]])}, {"p": np.float32([[0.6, 0.4]])})
    assert not canary.agree({"p": np.float32([[0.9, 0.1]])}, {"p": np.float32([[0.4, 0.6]])})
    assert canary.agree({"y": np.float32([1.0])}, {"y": np.float32([1.0005])})
    assert not canary.agree({"y": np.float32([1.0])}, {"y": np.float32([1.01])})
    assert not canary.agree({"y": np.float32([1.0])}, {"z": np.float32([1.0])})
    assert not canary.agree({"y": np.zeros(2)}, {"y": np.zeros(3)})


def test_a_sample_request_is_taken_a_row_at_a_time(tmp_path):
    path = tmp_path / "sample_request.json"
    path.write_text(json.dumps({"signature_name": "s", "instances": [1, 2]}, indent=1))
    assert canary._bodies(path) == [
        {"signature_name": "s", "instances": [1]},
        {"signature_name": "s", "instances": [2]},
    ]
    path.write_text(json.dumps({"inputs": {"x": [1, 2]}}))
    assert canary._bodies(path) == [{"inputs": {"x": [1, 2]}}]
