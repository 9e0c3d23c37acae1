import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator

import pytest

from modules.read_ahead import Ahead
from tests.conftest import ROOT


def counting(jobs: int, results: int, started: list, lock: threading.Lock) -> Callable:
    """Return a reading of so many results a job, each noted before it is there, and "end" as the last."""

    def read(job: int, step: Callable[[], None]) -> Generator[tuple[int, int], None, str]:
        for result in range(results):
            with lock:
                started.append((job, result))
            yield job, result
        return "end"

    return read


@pytest.mark.parametrize(("workers", "batch"), [(1, 1), (3, 1), (2, 6)])
def test_results_come_in_order_and_no_more_are_made_than_there_is_room_for(workers, batch):
    started, lock = [], threading.Lock()
    ahead = Ahead(counting(12, 5, started, lock), range(12), lambda job: None, workers, batch=batch)
    taken = []
    for job, result in ahead:
        taken.append((job, result))
        time.sleep(0.002)
        # A thread holds a result of its own, or a part of a batch, and makes one more.
        clips = sum(result != "end" for _, result in taken)
        assert len(started) - clips <= workers * (-(-batch // workers) + 1)
    assert taken == [(job, result) for job in range(12) for result in [*((job, i) for i in range(5)), "end"]]


def test_while_a_result_is_used_the_next_job_is_read():
    read_second = threading.Event()

    def read(job: int, step: Callable[[], None]) -> Generator[int, None, None]:
        if job == 1:
            read_second.set()
        yield job

    for job, result in Ahead(read, range(2), lambda job: None, workers=1):
        if result == 0:
            assert read_second.wait(10), job


def test_a_reading_that_hangs_is_given_up_and_the_others_are_not_kept_waiting():
    forever = threading.Event()

    def read(job: int, step: Callable[[], None]) -> Generator[int, None, str]:
        if job in (1, 2):
            forever.wait()
        yield job
        return "end"

    start = time.monotonic()
    got = list(Ahead(read, range(5), lambda job: f"{job} is late", workers=2, timeout=0.5))
    assert got == [
        (0, 0),
        (0, "end"),
        (1, "1 is late"),
        (2, "2 is late"),
        *((j, r) for j in (3, 4) for r in (j, "end")),
    ]
    assert time.monotonic() - start < 5
    forever.set()


def test_a_long_reading_that_gets_on_is_not_given_up():
    def read(job: int, step: Callable[[], None]) -> Generator[int, None, None]:
        for _ in range(10):
            time.sleep(0.1)
            step()
        yield job

    assert list(Ahead(read, [7], lambda job: "late", timeout=0.5)) == [(7, 7), (7, None)]


def test_waiting_for_the_user_of_the_results_is_no_hanging():
    got = []
    for _, result in Ahead(counting(2, 3, [], threading.Lock()), range(2), lambda job: "late", 1, timeout=0.2):
        time.sleep(0.3)
        got.append(result)
    assert "late" not in got and len(got) == 8


def test_a_fault_in_a_thread_is_raised_in_its_turn():
    def read(job: int, step: Callable[[], None]) -> Generator[int, None, None]:
        yield job // (2 - job)

    taken = []
    with pytest.raises(ZeroDivisionError):
        for _, result in Ahead(read, range(9), lambda job: None, workers=3):
            taken.append(result)
    assert taken == [0, None, 1, None]


def test_threads_end_when_nobody_wants_their_results_any_more():
    def read(job: int, step: Callable[[], None]) -> Generator[int, None, None]:
        yield job
        while True:
            step()
            time.sleep(0.01)

    before = threading.active_count()
    results = iter(Ahead(read, range(9), lambda job: None, workers=3))
    assert next(results) == (0, 0) and threading.active_count() == before + 3
    results.close()
    assert threading.active_count() == before


def test_what_the_user_has_waited_is_counted():
    def read(job: int, step: Callable[[], None]) -> Generator[int, None, None]:
        time.sleep(0.2)
        yield job

    ahead = Ahead(read, range(3), lambda job: None, workers=1)
    assert len(list(ahead)) == 6 and 0.5 < ahead.waited < 5


def test_a_thread_that_hangs_does_not_keep_the_process_alive():
    code = (
        "import threading; from modules.read_ahead import Ahead\n"
        "def read(job, step): threading.Event().wait(); yield job\n"
        "print(list(Ahead(read, [1], lambda job: 'late', timeout=0.2)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[(1, 'late')]\n" and done.returncode == 0
