"""Reading in threads beside whoever uses what is read: in order, a bounded number of results ahead, none forever."""

import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Last = TypeVar("Last")
# Reads a job: is given what to call whenever it has got on, yields results and returns a last one, which is small.
Read = Callable[[Job, Callable[[], None]], Generator[Result, None, Last]]
_NOTHING_YET = object()
_LONG = 3600.0  # seconds; how long to wait at a time where there is no limit
_PATIENCE = 2.0  # seconds for threads to end in, when nobody wants their results any more


class _NotWantedError(Exception):
    """Nobody wants the results of a reading any more."""


class Ahead(Generic[Job, Result, Last]):
    """Iterates over (job, what read(job) yields or returns), for all jobs in order; threads read ahead.

    workers: how many threads (default: CPU cores - 1). Each of them holds one result that has not been taken, or more
    where fewer than `batch` would be there together, and makes one more. A reading that has not got on for `timeout`
    seconds is given up with late(job) as its last result; its thread, which nothing can stop, gets a successor and does
    not keep the process from ending. The other threads end when the iterator is closed. waited: seconds that the user
    of the results has waited for them.
    """

    def __init__(
        self,
        read: Read,
        jobs: Iterable[Job],
        late: Callable[[Job], Last],
        workers: int | None = None,
        timeout: float | None = None,
        batch: int = 1,
    ):
        self.read, self.late, self.timeout = read, late, timeout
        self.jobs, self.taking = iter(jobs), threading.Lock()
        self.workers = workers or max(1, (os.cpu_count() or 2) - 1)
        self.depth = -(-batch // self.workers)
        self.tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()  # in order; None: a thread finds no more
        self.threads: list[tuple[threading.Thread, threading.Semaphore]] = []
        self.stopped = False
        self.waited = 0.0

    def __iter__(self) -> Iterator[tuple[Job, Result | Last]]:
        for _ in range(self.workers):
            self._start()
        try:
            reading = self.workers
            while reading:
                task = self._next(self.tasks, _LONG)
                if task is None:
                    reading -= 1
                elif task is not _NOTHING_YET:
                    yield from self._results(task)
        finally:
            self.stopped = True
            for _, slots in self.threads:
                slots.release()
            # Python would end threads in the midst of a decoder, which not all of those survive.
            end = time.monotonic() + _PATIENCE
            for thread, _ in self.threads:
                thread.join(max(0.0, end - time.monotonic()))

    def _results(self, task: "_Task") -> Iterator[tuple[Job, Result | Last]]:
        while True:
            left = _LONG if self.timeout is None else task.got_on + self.timeout - time.monotonic()
            answer = self._next(task.answers, max(left, 0.001))
            if answer is not _NOTHING_YET:
                if answer.error:
                    raise answer.error
                if not answer.is_last:
                    task.slots.release()
                yield task.job, answer.result
                if answer.is_last:
                    return
            elif self.timeout is not None and time.monotonic() - task.got_on >= self.timeout:
                task.given_up = True
                self.threads = [(thread, slots) for thread, slots in self.threads if slots is not task.slots]
                self._start()
                yield task.job, self.late(task.job)
                return

    def _next(self, answers: queue.SimpleQueue, seconds: float) -> Any:
        start = time.perf_counter()
        try:
            return answers.get(timeout=seconds)
        except queue.Empty:
            return _NOTHING_YET
        finally:
            self.waited += time.perf_counter() - start

    def _start(self) -> None:
        slots = threading.Semaphore(self.depth)
        self.threads.append((threading.Thread(target=self._work, args=[slots], name="read ahead", daemon=True), slots))
        self.threads[-1][0].start()

    def _work(self, slots: threading.Semaphore) -> None:
        while not self.stopped:
            with self.taking:
                task = _Task(slots)
                try:
                    task.job = next(self.jobs)
                except StopIteration:
                    self.tasks.put(None)
                    return
                except BaseException as error:
                    task.answers.put(_Answer(error=error))
                    self.tasks.put(task)
                    return
                self.tasks.put(task)
            try:
                self._read(task)
            except BaseException as error:
                task.answers.put(_Answer(error=error))
            if task.given_up:
                return

    def _read(self, task: "_Task") -> None:
        def step() -> None:
            if self.stopped or task.given_up:
                raise _NotWantedError
            task.got_on = time.monotonic()

        results = self.read(task.job, step)
        while True:
            try:
                answer = _Answer(next(results))
            except StopIteration as end:
                task.answers.put(_Answer(end.value, is_last=True))
                return
            task.slots.acquire()
            if self.stopped or task.given_up:
                return
            task.got_on = time.monotonic()
            task.answers.put(answer)
            del answer  # or it would be held while the next one is made


@dataclass(frozen=True)
class _Answer:
    """What a thread has to say of its job."""

    result: Any = None
    is_last: bool = False
    error: BaseException | None = None


class _Task:
    """A job that a thread reads."""

    def __init__(self, slots: threading.Semaphore):
        self.slots, self.job, self.given_up = slots, None, False
        self.answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self.got_on = time.monotonic()  # when it was last known to get on
