"""Functions called in processes of their own, of which any may die."""

import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

START = (
    'a process could not start, see above: a script must call this under `if __name__ == "__main__":`, for it is '
    "imported by every process; or use jobs=1"
)


class Died(Exception):
    """A process ended before it gave a result."""


class Pool(Generic[T]):
    """Processes that call one function again and again; none of them outlives the block.

    They are made by spawning, so the function and its arguments must be importable there, and begin with the first
    call. One that dies is replaced. Ctrl-C is left to the caller's process. Where that is killed they end by
    themselves, after the call they are in.

    Args:
        function: called with each task's arguments.
        count: of processes, in [1, inf).
        threads: of torch in each of them.
    """

    def __init__(self, function: Callable[..., T], count: int, threads: int) -> None:
        self._function, self._count, self._threads = function, count, threads
        self._free: list[_Worker] = []
        self._busy: dict[Connection, tuple[_Worker, int]] = {}

    def __call__(self, tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, T | Died]]:
        """The number of a task and its result, or why there is none, as they come.

        Raises:
            RuntimeError: a process cannot start.
            Exception: whatever pickling a task raises.
        """
        waiting = [(i, pickle.dumps(task)) for i, task in enumerate(tasks)][::-1]
        while waiting or self._busy:
            while waiting and len(self._busy) < self._count:
                worker = self._free.pop() if self._free else _Worker(self._function, self._threads)
                self._busy[worker.connection] = worker, waiting[-1][0]
                worker.send(waiting.pop()[1])
            for connection in wait(list(self._busy)):
                worker, i = self._busy[connection]  # type: ignore[index]
                try:
                    result: T | Died = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    if not worker.ready:
                        raise RuntimeError(START) from None
                    result = Died(f"its process ended with exit code {worker.process.exitcode}")
                else:
                    if not worker.ready:  # this was its greeting
                        worker.ready = True
                        continue
                    self._free.append(worker)
                del self._busy[worker.connection]
                yield i, result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as every:
            for worker in (*self._free, *(worker for worker, _ in self._busy.values())):
                every.callback(worker.end)
        self._free, self._busy = [], {}


class _Worker:
    """A process and the connection to it."""

    def __init__(self, function: Callable[..., Any], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.ready = False
        # Not a daemon: it may have children, such as the workers of a DataLoader.
        self.process: BaseProcess = context.Process(target=_serve, args=(there, function, threads))
        with _ignoring_interrupts():
            self.process.start()
        there.close()  # so that its end is seen here

    def send(self, task: bytes) -> None:
        with suppress(OSError):  # it has died, which reading from it will tell
            self.connection.send_bytes(task)

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """A block in which Ctrl-C does nothing; and nothing in a process that begins in it, ever."""
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, function: Callable[..., Any], threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    with suppress(EOFError, OSError):  # nobody is there any more
        connection.send(None)
        while True:
            task = connection.recv_bytes()
            try:
                result = function(*pickle.loads(task))
            except Exception as error:  # what the task is made of may not be importable here
                result = Died(f"{type(error).__name__}: {error}")
            connection.send(result)
