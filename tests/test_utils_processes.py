import os
import signal
import sys

import pytest
import torch

from tests.forked import fork, needs_fork
from utils.errors import UserError
from utils.processes import Processes, joined

NAME = "wan_generate_video.py: "


@pytest.fixture(autouse=True)
def named(monkeypatch):
    monkeypatch.setattr(sys, "argv", [NAME[:-2]])


def working(trouble):
    """Return a main() of which all processes work together until there is trouble."""

    def main():
        with joined() as processes:
            for _ in range(3):
                processes.first(lambda: None)
            trouble(processes)
            while True:
                processes.first(lambda: None)

    return main


def error_in_the_last(processes):
    if not processes.is_first:
        raise UserError("a stray cosmic ray", "run again")


def error_in_all(processes):
    raise UserError("the latents are not finite")


def ctrl_c(processes):
    os.kill(os.getpid(), signal.SIGINT)


def kill_the_last(processes):
    if not processes.is_first:
        os.kill(os.getpid(), signal.SIGKILL)


@needs_fork
@pytest.mark.parametrize(
    ("trouble", "codes", "line"),
    [
        (error_in_the_last, [2, 2], "error: a stray cosmic ray. Run again."),
        (error_in_all, [2, 2], "error: the latents are not finite."),
        (ctrl_c, [130, 130], "interrupted; files already written are complete"),
    ],
)
def test_all_processes_end_with_one_line_and_one_exit_code(trouble, codes, line, tmp_path):
    assert fork(working(trouble), tmp_path, 2) == (codes, f"{NAME}{line}\n")


@needs_fork
def test_the_end_of_another_process_is_named(tmp_path):
    codes, said = fork(working(kill_the_last), tmp_path, 2)
    assert codes == [2, -signal.SIGKILL] and said.count("\n") == 1
    assert said.startswith(f"{NAME}error: another process of this run has ended or does not answer (")


@needs_fork
def test_a_fault_of_our_own_shows_where_once(tmp_path):
    codes, said = fork(working(lambda processes: 1 / 0), tmp_path, 2)
    assert codes == [1, 1] and said.count("ZeroDivisionError") == 1 and "Traceback" in said


@needs_fork
def test_what_the_first_process_makes_all_have_and_only_it_makes_and_logs(tmp_path):
    def main():
        with joined() as processes:
            made = []
            got = processes.first(lambda: made.append(1) or {"x": torch.arange(3), "rank": processes.rank})
            assert len(made) == (processes.rank == 0) and got["rank"] == 0 and got["x"].tolist() == [0, 1, 2]
            if processes.rank == 1:
                processes.leave()
            print(processes.rank, "of", processes.count)

    assert fork(main, tmp_path, 3)[0] == [0, 0, 0]


@needs_fork
def test_what_each_process_has_all_get_in_order(tmp_path):
    def main():
        with joined() as processes:
            got = processes.exchange({"rank": processes.rank, "x": torch.arange(1000 * processes.rank)})
            assert [(one["rank"], len(one["x"])) for one in got] == [(0, 0), (1, 1000), (2, 2000)]
            assert got[2]["x"].tolist() == list(range(2000))

    assert fork(main, tmp_path, 3) == ([0, 0, 0], "")
    assert Processes().exchange(5) == [5]


def test_one_process_is_alone_without_a_group(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGINT)
    with joined() as processes:
        assert (processes.rank, processes.count, processes.first(lambda: 5)) == (0, 1, 5)
        assert not torch.distributed.is_initialized() and signal.getsignal(signal.SIGINT) is before


def test_several_processes_have_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Processes().device(None) == torch.device("cuda")
    with pytest.raises(UserError, match="4 processes: there are 2 CUDA devices, one for each is needed. Start fewer."):
        Processes(1, 4).device(None)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.tensor(0.0))
    with pytest.raises(UserError, match="--device cuda:1: each of the 2 processes has a GPU of its own. Leave it out"):
        Processes(1, 2).device("cuda:1")
    assert Processes(1, 2).device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert Processes(1, 2).device("cuda") == torch.device("cuda:1") and set(chosen) == {1}
