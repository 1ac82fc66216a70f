"""The launcher of local clusters: what each process is told, and what happens when one of them ends, badly or well."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from course.core import InputError
from models.scale import cluster

TASK = """
import json, os, signal, sys, time
from pathlib import Path
config = json.loads(os.environ["TF_CONFIG"])
job, index = config["task"]["type"], config["task"]["index"]
here = Path(sys.argv[1])
name = f"{job}-{index}"
starts = len(list(here.glob(f"{name}.start.*")))
(here / f"{name}.start.{starts}").write_text(os.environ["TF_CONFIG"])


def wait_for(*patterns):
    while not all(list(here.glob(pattern)) for pattern in patterns):
        time.sleep(0.01)


"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """`cluster.launch` of a module whose processes note each start in `tmp_path` and then run the code given."""
    monkeypatch.setattr(cluster, "GRACE", 2.0)

    def launched(code, workers, **options):
        (tmp_path / "toy_task.py").write_text(TASK + textwrap.dedent(code))
        own = options.pop("environment", {})

        def environment(job, index):
            return {"PYTHONPATH": str(tmp_path)} | (own(job, index) if callable(own) else own)

        return cluster.launch("toy_task", [tmp_path], workers, log_folder=tmp_path / "logs", environment=environment,
                              **{"limit": 60, **options})  # fmt: skip

    return launched


def starts(folder, task):
    """TF_CONFIG of each start of a task, in order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{task}.start.*"))]


def alive(pid):
    """Whether the process runs: one that has ended and was not yet waited for does not."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_each_process_is_told_its_part_of_one_cluster(launch, tmp_path, capfd):
    done = launch("print('this is', name, os.environ.get('MINE'))", 3, environment=lambda job, i: {"MINE": f"{job}{i}"})
    told = [starts(tmp_path, f"worker-{i}") for i in range(3)]
    assert [len(one) for one in told] == [1, 1, 1]
    (first, *others) = (one[0]["cluster"] for one in told)
    assert all(other == first for other in others)
    assert [one[0]["task"] for one in told] == [{"type": "worker", "index": i} for i in range(3)]
    assert len(set(first["worker"])) == 3
    assert all(re.fullmatch(r"localhost:\d+", address) for address in first["worker"])
    assert done.restarts == 0 and done.seconds > 0
    assert done.logs["worker", 2].read_text() == "this is worker-2 worker2\n"
    assert capfd.readouterr().out == "this is worker-0 worker0\n"  # of the others only the log


def test_a_killed_worker_takes_all_with_it_and_all_start_again_on_other_ports(launch, tmp_path, capsys):
    done = launch(
        """
        if not starts:
            wait_for("worker-0.start.0")
            if index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        """,
        2,
    )
    assert done.restarts == 1
    old, new = zip(*(starts(tmp_path, f"worker-{i}") for i in range(2)), strict=True)
    assert old[0]["cluster"] == old[1]["cluster"] != new[0]["cluster"] == new[1]["cluster"]
    assert "worker 1 (SIGKILL) died: all start again (1 of 3)" in capsys.readouterr().out


def test_a_worker_killed_from_outside(launch, tmp_path):
    def meanwhile(processes):
        if not starts(tmp_path, "worker-0")[1:] and starts(tmp_path, "worker-1"):
            os.kill(processes["worker", 1].pid, signal.SIGTERM)

    done = launch("time.sleep(0.0 if starts else 60)", 2, meanwhile=meanwhile)
    assert done.restarts >= 1


def test_those_that_fail_because_another_was_killed_are_not_the_cause(launch, tmp_path):
    """A collective fails in the survivors within milliseconds, with an exit status of their own."""
    done = launch(
        """
        flag = here / "killed"
        if not starts:
            if index == 1:
                wait_for("worker-0.start.0")
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            while not flag.exists():
                time.sleep(0.001)
            sys.exit("the others are gone")
        """,
        2,
    )
    assert done.restarts == 1


def test_an_error_of_a_worker_is_told_and_not_tried_again(launch, tmp_path):
    with pytest.raises(
        InputError, match=r"worker 1 ended with status 2: error: no such data \(all of it in .*worker-1"
    ):
        launch("if index: print('error: no such data'); sys.exit(2)\ntime.sleep(60)", 2)
    assert len(starts(tmp_path, "worker-1")) == 1


def test_a_worker_that_dies_every_time_is_given_up(launch, tmp_path):
    with pytest.raises(InputError, match=r"worker 0 \(SIGSEGV\) died, after 2 restarts"):
        launch("os.kill(os.getpid(), signal.SIGSEGV)", 1, restarts=2)
    assert len(starts(tmp_path, "worker-0")) == 3


def test_a_launch_that_hangs_is_given_up_and_leaves_nobody(launch):
    pids = set()
    with pytest.raises(InputError, match="has not ended within 1 s"):
        launch("time.sleep(60)", 2, limit=1, meanwhile=lambda running: pids.update(p.pid for p in running.values()))
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_ctrl_c_ends_all_even_one_that_does_not_listen(launch, monkeypatch):
    monkeypatch.setattr(cluster, "GRACE", 0.5)
    pids = []

    def meanwhile(processes):
        if all("deaf" in Path(log).read_text() for log in logs(processes)):
            pids.extend(process.pid for process in processes.values())
            raise KeyboardInterrupt

    def logs(processes):
        return [f"/proc/{process.pid}/fd/1" for process in processes.values()]

    with pytest.raises(KeyboardInterrupt):
        launch("signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)", 2,
               meanwhile=meanwhile)  # fmt: skip
    assert len(pids) == 2 and not any(alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to end children with their parent")
def test_a_launcher_that_is_killed_leaves_nobody_behind(tmp_path):
    (tmp_path / "toy_task.py").write_text(TASK + "(here / f'{name}.pid').write_text(str(os.getpid()))\ntime.sleep(60)")
    code = f"from models.scale import cluster\ncluster.launch('toy_task', [{str(tmp_path)!r}], 2, log_folder=" \
           f"{str(tmp_path / 'logs')!r}, environment={{'PYTHONPATH': {str(tmp_path)!r}}})"  # fmt: skip
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=cluster.ROOT)
    until = time.monotonic() + 60
    while len(pids := list(tmp_path.glob("*.pid"))) < 2 or not all(path.read_text() for path in pids):
        assert launcher.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    while any(alive(int(path.read_text())) for path in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_beside_parameter_servers_a_dead_worker_starts_alone_where_it_was(launch, tmp_path):
    done = launch(
        """
        if job == "chief":
            wait_for("worker-1.start.1", "worker-0.start.0", "ps-0.start.0")
            sys.exit()
        if name == "worker-1" and not starts:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        """,
        2,
        parameter_servers=1,
    )
    assert done.restarts == 1
    old, new = starts(tmp_path, "worker-1")
    assert old == new
    assert [len(starts(tmp_path, task)) for task in ("chief-0", "worker-0", "ps-0")] == [1, 1, 1]
    assert {job: len(where) for job, where in old["cluster"].items()} == {"chief": 1, "worker": 2, "ps": 1}


def test_a_dead_parameter_server_takes_all_with_it(launch, tmp_path):
    done = launch(
        """
        if job == "chief":
            time.sleep(0.0 if starts else 60)
            sys.exit()
        if job == "ps" and not starts:
            wait_for("chief-0.start.0")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
        """,
        1,
        parameter_servers=1,
    )
    assert done.restarts == 1
    assert [len(starts(tmp_path, task)) for task in ("chief-0", "ps-0")] == [2, 2]


def test_a_parameter_server_that_ends_by_itself_is_an_error(launch):
    with pytest.raises(InputError, match="ps 0 ended with status 0: it wrote nothing"):
        launch("time.sleep(0.0 if job == 'ps' else 60)", 1, parameter_servers=1)
