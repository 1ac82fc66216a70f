"""The benchmark against Stable-Baselines3: what is measured of ours, which round counts, and what is refused."""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from course import day18_ppo as day18
from course.core import InputError
from models.rl import benchmark, returns


def test_a_turn_of_dqn_does_the_work_that_was_asked_for():
    settings = benchmark.SETTINGS["dqn"] | {"warmup": 32, "turn": 128, "capacity": 2_000, "threads": 1}
    parameters, turn = benchmark.dqn(settings)
    # three convolutions and two dense layers of Mnih et al., biases included, six actions
    assert parameters == 8_224 + 32_832 + 36_928 + (3_136 * 512 + 512) + (512 * 6 + 6)
    first, second = turn(), turn()
    assert (first["steps"], first["updates"]) == (128, (128 - 32) // 4)
    assert (second["steps"], second["updates"]) == (128, 128 // 4)
    assert second["seconds"] > 0


def test_a_turn_of_ppo_leaves_out_the_update_that_compiles():
    settings = benchmark.SETTINGS["ppo"] | {"steps": 64, "epochs": 2, "turn": 512, "threads": 1}
    parameters, turn = benchmark.ppo(settings)
    assert parameters == 2 * (17 * 64 + 64 + 64 * 64 + 64) + (64 * 6 + 6) + 6 + (64 + 1)
    done = turn()
    assert (done["steps"], done["updates"]) == (512, 512 // 64 * 2)
    assert 0 < done["seconds"] < 60


def test_the_round_with_the_median_ratio_counts_against_the_fastest_rival():
    rates = {"ours": [30.0, 20.0, 40.0], "loop": [10.0, 10.0, 10.0], "processes": [5.0, 5.0, 90.0],
             "one thread": [9.0, 9.0, 9.0]}  # fmt: skip
    ratio, spread = benchmark.against("dqn", rates)
    assert ratio.value == 3
    assert spread == [2, 3, 4]
    assert ratio.met
    assert "(loop)" in ratio.over
    missed, _ = benchmark.against("ppo", {name: [10.0] for name in rates})
    assert not missed.met


def test_a_record_becomes_a_table(tmp_path, monkeypatch, capsys):
    rates = {"ours": [30.0, 20.0, 40.0], "loop": [10.0] * 3, "processes": [5.0] * 3, "one thread": [9.0] * 3}
    versions = [{"tensorflow": "2", "keras": "3"}, {"stable_baselines3": "4", "torch": "5"}]
    monkeypatch.setattr(benchmark, "measure", lambda task, options: (rates, versions))
    path = tmp_path / "record.json"
    benchmark.main(["--tasks", "dqn", "--rounds", "3", "--sb3", sys.executable, "--record", str(path)])
    table = benchmark.markdown(json.loads(path.read_text())).splitlines()
    assert "TensorFlow 2, Keras 3; Stable-Baselines3 4, PyTorch 5. `python -m models.rl.benchmark" in table[0]
    assert table[2] == "| task, steps/s | ours | loop | processes | one thread | ratio | of the rounds | bound | |"
    assert table[4:] == ["| DQN, ALE/Pong-v5 | 30 | 10 | 5 | 9 | 3.00 | 2.00 to 4.00 | >= 1.3 | met |"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "sarsa"], "there is no sarsa: choose from dqn, ppo"),
        (["--rounds", "4"], "give an odd number"),
        (["--sb3", "nowhere/python"], "make rl-benchmark builds it"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        benchmark.main(words)


def test_an_interpreter_without_stable_baselines3_is_one_line():
    with pytest.raises(InputError, match=r"does not run with .*make rl-benchmark"), \
         benchmark.theirs(sys.executable, "ppo", benchmark.SETTINGS["ppo"] | {"threads": 1}):  # fmt: skip
        pass


def test_the_worker_imports_nothing_of_this_project():
    source = Path(benchmark.__file__).with_name("sb3_worker.py").read_text()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert "stable_baselines3" in names
    assert not {name.partition(".")[0] for name in names} & {"course", "models", "serving", "compression"}


# --- what was learned, beside theirs ---------------------------------------------------------------------------------


def test_the_interval_of_a_difference_is_welchs():
    first, second = [10.0, 12.0, 14.0], [1.0, 2.0, 6.0]
    error = np.sqrt(4 / 3 + 7 / 3)
    freedom = (4 / 3 + 7 / 3) ** 2 / ((4 / 3) ** 2 / 2 + (7 / 3) ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * error
    assert returns.difference(first, second) == pytest.approx([9 - half, 9 + half])
    assert returns.difference([1.0], second) is None


def test_trainings_are_compared_task_by_task_and_resumed(tmp_path, monkeypatch, capsys):
    calls = []
    unit = SimpleNamespace(MUJOCO=day18.MUJOCO, trial=lambda run, label, env, *rest: calls.append(label) or
                           {"mean": {"HalfCheetah-v5": 5.0, "Hopper-v5": 7.0}[env]})  # fmt: skip
    monkeypatch.setattr(returns, "importlib", SimpleNamespace(import_module=lambda name: unit))
    theirs = {"mean": 6.0, "steps": 4_096, "versions": {"stable_baselines3": "3", "torch": "2"}}
    monkeypatch.setattr(returns, "rival", lambda cfg, recipe, env, seed: calls.append((env, seed)) or theirs)
    words = ["--sb3", sys.executable, "--runs", str(tmp_path), "--trials", "2"]
    with pytest.raises(SystemExit) as ended:
        returns.main(words)
    assert ended.value.code == 1
    assert sorted(map(str, calls)) == sorted(map(str, [
        *((env, seed) for env in ("HalfCheetah-v5", "Hopper-v5") for seed in (0, 100)),
        *(f"{env}-{seed}" for env in ("HalfCheetah-v5", "Hopper-v5") for seed in (0, 100))]))  # fmt: skip
    said = capsys.readouterr()
    assert "missed: HalfCheetah-v5: less learned" in said.err
    assert "Hopper" not in said.err
    (folder,) = (tmp_path / "rl_returns").iterdir()
    record = json.loads((folder / "result.json").read_text())
    assert record["metrics"]["Hopper-v5, ours"] == 7
    assert record["rival"] == {"stable_baselines3": "3", "torch": "2"}
    table = returns.markdown(record).splitlines()
    assert table[0].endswith(f"PyTorch 2. `{record['command']}`")
    assert table[4:6] == ["| HalfCheetah-v5 | ours | 4,096 | 5 | 5, 5 | -1 to -1 | **less** |",
                          "| HalfCheetah-v5 | Stable-Baselines3 | 4,096 | 6 | 6, 6 | 1 to 1 |  |"]  # fmt: skip
    assert table[6].endswith("| no less |")


def test_a_rival_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="make rl-benchmark"):
        returns.main(["--sb3", "nowhere/python", "--runs", str(tmp_path)])
