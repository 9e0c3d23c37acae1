"""The log of a run: complete lines, kept logs of earlier runs, and a run that goes on in the very same file."""

import json
import shutil

import pytest

from modules.run_log import RunLog, log_path, read_log, report_path
from tests.test_modules_trainer import trainer  # noqa: F401
from utils.errors import Stopped

TIMES = ("time", "seconds", "memory_gb")


def lines(path):
    """Return the lines of a log without what no two runs share: times and memory."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def test_lines_are_json_whatever_the_numbers(tmp_path):
    log = RunLog(log_path(tmp_path, "name"))
    log.begin()
    log.write("step", 1, loss=float("nan"), rates=(1e-4, float("inf")), words="ä\n")
    log.write("validation", 1, loss=0.5)
    assert [line["kind"] for line in read_log(log.path)] == ["step", "validation"]  # before it is closed
    first = next(read_log(log.path))
    assert first["loss"] is None and first["rates"] == [1e-4, None] and first["words"] == "ä\n"
    assert log.lines == 2


def test_the_log_and_report_of_an_earlier_run_are_kept(tmp_path):
    path = log_path(tmp_path, "name")
    for number in range(3):
        log = RunLog(path)
        log.begin()
        log.write("start", 0, number=number)
        log.close()
        report_path(path).write_text(str(number))
    assert [line["number"] for line in read_log(path)] == [2]
    kept = tmp_path.glob("name_log_2*.jsonl")  # of the same second, or two
    assert sorted(next(read_log(log))["number"] for log in kept) == [0, 1]
    assert sorted(report.read_text() for report in tmp_path.glob("name_report_2*.html")) == ["0", "1"]


@pytest.mark.parametrize("told", [True, False])
def test_a_log_goes_on_after_the_lines_of_the_state_and_keeps_the_others_aside(tmp_path, told):
    log = RunLog(log_path(tmp_path, "name"))
    log.begin()
    for step in range(5):
        log.write("step", step)
    log.close()
    with open(log.path, "ab") as file:
        file.write(b'{"kind": "step", "st')  # a process was killed
    again = RunLog(log.path)
    again.go_on(4 if told else None, 3)
    again.write("step", 4, more=True)
    assert [line["step"] for line in read_log(log.path)] == [0, 1, 2, 3, 4]
    assert "more" in list(read_log(log.path))[-1] and again.lines == 5
    assert [line["step"] for line in read_log(tmp_path / "name_log_cut.jsonl")] == [4]


@pytest.mark.parametrize(
    ("options", "last", "how"),
    [
        ("--max_train_steps 9 --save_every_n_steps 3 --save_state", 5, "killed"),
        ("--max_train_epochs 2 --save_every_n_epochs 1 --save_state --gradient_accumulation_steps 2", 6, "failed"),
        ("--max_train_steps 9 --save_every_n_steps 3 --save_state", 5, "stopped"),
        ("--max_train_steps 9 --save_every_n_steps 5 --save_state", 5, "stopped"),
    ],
)
def test_the_log_of_a_run_that_ended_and_goes_on_is_that_of_an_undisturbed_one(
    trainer,  # noqa: F811
    tmp_path,
    options,
    last,
    how,
):
    folders = [tmp_path / name / "out" for name in ("straight", "again")]
    options = f"{options} --learning_rate 1e-3 --network_dropout 0.1"
    trainer(f"{options} --output_dir {folders[0].as_posix()}").run()
    run = trainer(f"{options} --output_dir {folders[1].as_posix()}")
    step = run.record.step

    def end(number, *values, **more):
        step(number, *values, **more)
        if number == last and how == "stopped":
            run.stop.number = 15
        elif number == last:
            raise MemoryError("too little")

    run.record.step = end
    if how == "killed":  # nothing is noted, and the end of a line is lost
        run.record.fail = lambda *arguments: run.record.log.close()
    with pytest.raises(Stopped if how == "stopped" else MemoryError):
        run.run()
    path = folders[1] / "name_log.jsonl"
    end = list(read_log(path))[-1]
    if how == "killed":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        assert (end["kind"], end.get("error")) == ("stop", "too little" if how == "failed" else None)
    resumed = trainer(f"{options} --output_dir {folders[1].as_posix()} --resume latest")
    assert 0 < resumed.step < last or how == "stopped"
    resumed.run()
    straight, again = (lines(folder / "name_log.jsonl") for folder in folders)
    assert straight == again
    assert [line["step"] for line in straight if line["kind"] == "step"] == list(range(1, run.plan.total_steps + 1))
    assert {line["kind"] for line in straight} == {"start", "step", "epoch", "save", "end"}


def test_a_resumed_run_with_other_settings_says_so_in_its_log(trainer, tmp_path):  # noqa: F811
    folder = tmp_path / "out"
    options = f"--learning_rate 1e-3 --save_state_on_train_end --output_dir {folder.as_posix()}"
    trainer(f"{options} --max_train_steps 2").run()
    trainer(f"{options} --max_train_steps 3 --resume latest").run()
    starts = [line for line in lines(folder / "name_log.jsonl") if line["kind"] == "start"]
    assert [(line["step"], line["total_steps"]) for line in starts] == [(0, 2), (2, 3)]
    assert starts[1]["settings"]["max_train_steps"] == {"value": 3, "changed": True}
    shutil.rmtree(folder)
