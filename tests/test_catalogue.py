"""The catalogue: reading units and results from files, and `python -m course` on top of it."""

import io
import json
import shutil
import time

import pytest
from rich.console import Console

from course import __main__ as command
from course.core import InputError, catalogue, report
from tests import support

HEADER = support.SOURCE.split('"""')[1]


@pytest.fixture
def unit(tmp_path):
    return catalogue.read_unit(support.write_unit(tmp_path))


@pytest.fixture
def published(tmp_path, unit):
    """Results folder with a record of two seeds of the small unit."""
    for seed in (0, 1):
        support.write_run(tmp_path / "runs", seed)
    report.publish(unit, "cpu", tmp_path / "runs", tmp_path / "results")
    return tmp_path / "results"


# --- headers and units -----------------------------------------------------------------------------------------------


def test_header_fields_keep_their_lines():
    header = catalogue.parse_header(HEADER)
    assert header["title"] == "Day 90 - Small Lesson"
    assert header["claim"] == "Three lines show the shape of three hundred."
    assert header["shapes"] == "image [B,28,28,1] -> hidden [B,20]\n-> logits [B,10]"
    assert header["departs"] == "1. Adam, the paper gives no schedule\n2. no decoder"
    assert list(header) == ["title", "claim", *(field.lower() for field in catalogue.FIELDS)]


def test_header_may_be_followed_by_prose_and_its_title_may_hold_a_dash():
    header = catalogue.parse_header(HEADER.replace("Small Lesson", "Self - Made Lesson") + "\nMore: prose.\n")
    assert header["title"] == "Day 90 - Self - Made Lesson"
    assert header["departs"].endswith("no decoder")


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("Day 90 - Small Lesson: three", "Day 90, Small Lesson: three", "first line must read"),
        ("Small Lesson: three", "Small Lesson three", "first line must read"),
        ("Task:      classify digits\n", "", "lacks Task:"),
        ("Task:      classify", "Aim:       classify", "'Aim:' stands there but the fields are Paper, Task"),
        ("Task:      classify", "Paper:     classify", "'Paper:' stands there more than once"),
        ("           -> logits", "-> logits", "neither 'Key:   text' nor the indented continuation"),
    ],
)
def test_header_faults_are_named(before, after, complaint):
    assert before in HEADER
    with pytest.raises(InputError, match=complaint) as caught:
        catalogue.parse_header(HEADER.replace(before, after), "course/day90.py")
    assert str(caught.value).startswith("course/day90.py: ")


def test_header_of_nothing():
    with pytest.raises(InputError, match="first line"):
        catalogue.parse_header(None)


def test_read_unit(unit):
    assert (unit.name, unit.group) == ("day90_small_lesson", "Advent, days 1 to 30")
    assert unit.presets["smoke"] == {"epochs": 1}
    assert unit.reference["test_error"][:2] == (0.25, "%")
    assert unit.outline.Config().epochs == 50
    assert unit.offers == ["exercises", "export"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"smoke": {"epochs": 1}', '"smoke": {"epochs": FEW}'),
        ('"smoke": {"epochs": 1}', '"smoke": {"epochs": }'),
    ],
)
def test_read_unit_names_the_file_it_cannot_read(tmp_path, before, after):
    path = support.write_unit(tmp_path)
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(InputError, match=r"day90_small_lesson\.py: Config, PRESETS and REFERENCE must be readable"):
        _ = catalogue.read_unit(path).presets


def test_a_module_of_no_group_is_no_unit(tmp_path):
    with pytest.raises(InputError, match="begins as in"):
        catalogue.read_unit(support.write_unit(tmp_path, "notes"))


def test_units_come_in_the_order_of_the_course(tmp_path):
    names = [
        "day02_b",
        "day10_c",
        "a1_knn",
        "a1_two_layer_net",
        "a1_features",
        "a2_dropout",
        "a0_new",
        "a2_x",
        "cup1_x",
        "vse_x",
        "idea_x",
        "hw1_cars",
    ]
    for name in reversed(names):
        support.write_unit(tmp_path, name)
    support.write_unit(tmp_path, "__init__")
    assert [unit.name for unit in catalogue.units(tmp_path)] == names


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("day21_capsnet", "day21_capsnet"),
        ("day21", "day21_capsnet"),
        ("course.day21_capsnet", "day21_capsnet"),
        ("course/day21_capsnet.py", "day21_capsnet"),
        ("a1_svm", "a1_svm"),  # although it begins the next one's name
    ],
)
def test_find(tmp_path, wanted, found):
    for name in ("day21_capsnet", "day22_compression", "a1_svm", "a1_svm_plus"):
        support.write_unit(tmp_path, name)
    assert catalogue.find(wanted, catalogue.units(tmp_path)).name == found


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ("dya21", "there is no unit 'dya21': did you mean day21_capsnet, day22_compression?"),
        ("capsnte", "there is no unit 'capsnte': did you mean day21_capsnet?"),
        ("qqqq", "there is no unit 'qqqq': `python -m course` lists them"),
        ("day2", "'day2' fits several units: did you mean day21_capsnet, day22_compression?"),
    ],
)
def test_find_tells_near_names(tmp_path, wanted, answer):
    for name in ("day21_capsnet", "day22_compression", "a1_svm"):
        support.write_unit(tmp_path, name)
    with pytest.raises(InputError) as caught:
        catalogue.find(wanted, catalogue.units(tmp_path))
    assert str(caught.value) == answer


# --- results ---------------------------------------------------------------------------------------------------------


def test_recorded(tmp_path, published):
    assert catalogue.recorded("day91_other", published) == {}
    record = catalogue.recorded("day90_small_lesson", published)["cpu"]
    assert catalogue.headline(record) == ["test_error", "parameters", "check"]
    (published / "day90_small_lesson.json").write_text('{"unit": ')
    with pytest.raises(InputError, match="is damaged"):
        catalogue.recorded("day90_small_lesson", published)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.98346], "0.9835"),
        ([7850, 7850], "7,850"),
        ([1.0, 2.0, 3.0], "2.0 ± 1.0"),
        ([98.31, 98.45], "98.380 ± 0.099"),
        ([1000.0, 1400.0], "1,200 ± 283"),
        ([1e-9, 3e-9], "2.00e-09 ± 1.4e-09"),
        ([1.0, None], "not finite"),
        ([0.5, 0.5], "0.5"),
        ([12345.6], "12,346"),
        ([-1.5e9], "-1.5e+09"),
    ],
)
def test_number(values, text):
    assert catalogue.number(report.summary({str(i): value for i, value in enumerate(values)})) == text


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"name": "MNIST"}, True),
        ({"name": "fashion_mnist"}, False),
        ({"synthetic": True}, False),
        ({"stand_in_for": "svhn"}, False),
        ({"note": "5,000 of 60,000 training images"}, False),
    ],
)
def test_a_reference_stands_only_beside_the_same_data(unit, changes, same):
    record = {"metrics": {"test_error": {}}, "data": support.DATA | changes}
    assert bool(catalogue.comparable(unit, record)) is same
    record["data"] = {"noise": {"name": "noise", "synthetic": True}, "digits": record["data"]}
    assert bool(catalogue.comparable(unit, record)) is same
    record["metrics"] = {"other": {}}
    assert catalogue.comparable(unit, record) == {}


@pytest.mark.parametrize(
    ("name", "source", "same"),
    [
        ("cifar10", "He et al. 2016, Table 6, CIFAR-10", True),
        ("fashion_mnist", "Xiao et al. 2017, Fashion-MNIST", True),
        ("mnist", "LeCun's table of MNIST results: 2-layer NN", True),
        ("mnist", "Xiao et al. 2017, Fashion-MNIST", False),
        ("mnist_5k", "Sabour et al. 2017, Table 1, MNIST", False),
        ("cifar10", "Smith 2017, CIFAR-100", False),
        ("mnist", "Sabour et al. 2017, MultiMNIST", False),
    ],
)
def test_a_data_set_is_known_by_its_name_as_a_word(unit, name, source, same):
    unit.reference["test_error"] = (0.25, "%", source)
    record = {"metrics": {"test_error": {}}, "data": support.DATA | {"name": name}}
    assert bool(catalogue.comparable(unit, record)) is same


def test_data_line_says_what_is_made_and_what_stands_in():
    data = [support.DATA, {"name": "xor", "synthetic": True}, {"name": "mnist_5k", "stand_in_for": "svhn"}]
    assert catalogue.data_line({"data": data}) == (
        "mnist, 60,000 to train on; xor (synthetic); mnist_5k, in place of svhn"
    )
    assert catalogue.data_line({"data": None}) == ""
    copy = {"name": "cifar10", "train": 50_000, "note": "re-encoded as JPEG"}
    assert catalogue.data_line({"data": copy}) == "cifar10 (re-encoded as JPEG), 50,000 to train on"


@pytest.mark.parametrize(("seconds", "text"), [(48.2, "48 s"), (720.0, "12 min"), (11520.0, "3.2 h")])
def test_duration(seconds, text):
    assert catalogue.duration({"seconds": {"mean": seconds}}) == text


def test_badge_opens_the_notebook_of_the_repository():
    organisation = catalogue.REPOSITORY.removeprefix("github.com/")
    address = f"https://colab.research.google.com/github/{organisation}/blob/main/colab/notebooks/day90_x.ipynb"
    assert address in catalogue.colab_badge("day90_x")


# --- the command -----------------------------------------------------------------------------------------------------


def test_catalogue_answers_in_a_second_without_the_heavy_libraries():
    code = (
        "import runpy, sys; sys.argv = ['course']; runpy.run_module('course', run_name='__main__', alter_sys=True); "
        "print('loaded:', *sorted({'tensorflow', 'keras', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done, _ = support.python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    done, seconds = support.python("-m", "course")
    assert done.returncode == 0, done.stderr
    assert seconds < 1.0


def test_a_whole_course_of_76_recorded_units_is_shown_in_half_a_second(tmp_path, published):
    longest = max(catalogue.COURSE.glob("[a-z]*.py"), key=lambda path: path.stat().st_size)
    course = tmp_path / "course"
    course.mkdir()
    for number in range(76):
        (course / f"idea_{number:02d}.py").write_text(longest.read_text())
        shutil.copy(published / "day90_small_lesson.json", published / f"idea_{number:02d}.json")
    seconds = []
    for _ in range(3):  # the best of three: others may want the processor
        began, screen = time.process_time(), io.StringIO()
        command.show_course(Console(width=120, file=screen), catalogue.units(course), published)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.5
    assert screen.getvalue().count("± 0.71 %") == 76


def test_catalogue_when_piped():
    done, _ = support.python("-m", "course")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= command.PIPED
    for unit in catalogue.units():
        assert unit.name in done.stdout


def test_catalogue_where_the_terminal_has_no_plus_minus_sign():
    done, _ = support.python("-m", "course", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


def test_misspelt_unit_is_one_line_and_status_2():
    done, _ = support.python("-m", "course", "dya01")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no unit 'dya01': ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_course_table_fits_and_shows_the_record(unit, published, width):
    screen = io.StringIO()
    command.show_course(Console(width=width, file=screen), [unit], published)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(screen.getvalue().split())
    for part in ("day90_small_lesson", "test_error 1.50 ± 0.71", "cpu, 2 seeds, 2 min", "parameters 7,850"):
        assert part in text
    assert "last" not in text  # the fourth metric is not of the headline


def test_course_table_says_where_nothing_is_recorded(unit, tmp_path):
    screen = io.StringIO()
    command.show_course(Console(width=120, file=screen), [unit], tmp_path)
    assert "none recorded" in screen.getvalue()


def test_unit_page(unit, published):
    screen = io.StringIO()
    command.show_unit(Console(width=100, file=screen), unit, published)
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "Day 90 - Small Lesson",
        "A Title",
        "epochs=5",
        "none",
        "1.50 ± 0.71 %",
        "0.25 %",
        "Table 1, MNIST",
        "mnist, 60,000 to train on",
        "a processor, 2 cores",
        "python -m course.day90_small_lesson --preset cpu --seed 0",
        "course/results/day90_small_lesson-curves.png",
        "python -m course.core.report replay day90_small_lesson",
    ):
        assert part in text, part


def test_unit_page_leaves_out_the_reference_of_other_data(unit, published):
    path = published / "day90_small_lesson.json"
    content = json.loads(path.read_text())
    content["presets"]["cpu"]["data"]["name"] = "fashion_mnist"
    path.write_text(json.dumps(content))
    screen = io.StringIO()
    command.show_unit(Console(width=100, file=screen), unit, published)
    assert "Table 1" not in screen.getvalue()


def test_a_blank_unit_has_its_exercises_to_do():
    text = catalogue.blank(support.SOURCE)
    assert "return x / 2" not in text and "return x / 2" in support.SOURCE
    assert len(text.splitlines()) == len(support.SOURCE.splitlines())  # one line of answer, one of error
    space = {"__name__": "blank"}
    exec(compile(text.replace("from course import core", ""), "blank", "exec"), space)
    with pytest.raises(NotImplementedError, match="exercise: halve x"):
        space["half"](2)


def test_a_task_of_two_lines_is_kept_whole():
    task = ["    # exercise: halve x,", "    # and add one"]
    text = "\n".join(["def f(x):", *task, "    x /= 2", "    # why", "    return x + 1", "    # end exercise", ""])
    assert catalogue.blank(text).splitlines() == [
        "def f(x):",
        *task,
        '    raise NotImplementedError("exercise: halve x,")',
        "    # end exercise",
    ]


@pytest.mark.parametrize("unit", [u for u in catalogue.units() if "exercises" in u.offers], ids=lambda unit: unit.name)
def test_every_blank_unit_is_a_program(unit):
    text = catalogue.blank(unit.source)
    compile(text, unit.name, "exec")
    assert text.count("raise NotImplementedError(") == unit.source.count("# exercise: ")
    assert len(text) < len(unit.source)


def test_blank_on_the_command_line():
    done, _ = support.python("-m", "course", "day01", "--blank")
    assert (done.returncode, done.stderr) == (0, "")
    day01 = catalogue.find("day01", catalogue.units())
    assert done.stdout == catalogue.blank(day01.source)
    for words, said in ((["--blank"], "--blank needs a unit"), (["day25", "--blank"], "marks no exercises")):
        done, _ = support.python("-m", "course", *words)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and said in done.stderr and len(done.stderr.splitlines()) == 1
