"""Greedy batching: what has arrived while a run was under way goes into the next one.

Nothing waits for company.  A request that finds its lane idle starts at once, so a single client sees no delay; under
load the runs themselves are the waiting time, and batches grow by it.
"""

import asyncio
import collections
import math
import threading
import time
from dataclasses import dataclass

import numpy as np

from serving.server.status import StatusError

_LONG_RUN = 0.005  # seconds; shorter runs of a lane follow one another: side by side they would only be smaller
_SHORT_RUN = 0.001  # seconds; a lone request that takes less runs where it is: waking a thread costs a fifth of this


@dataclass(slots=True, eq=False)
class Task:
    """One request: its arrays by alias, its number of rows, and the future of its event loop."""

    inputs: dict[str, np.ndarray]
    rows: int
    future: asyncio.Future
    places: int  # that it takes up in the queue; none once it has left


class Lane:
    """Tasks that may share a run: one signature, one choice of outputs, equal types and trailing sizes."""

    __slots__ = ("outputs", "running", "signature", "tasks")

    def __init__(self, signature, outputs):
        self.signature = signature
        self.outputs = outputs
        self.tasks = collections.deque()
        self.running = 0


class Batcher:
    """Runs one loaded model on the threads of `pool`, so that no event loop ever does.

    `settings` gives enabled, max_batch_size, max_enqueued_batches, allowed_batch_sizes, num_batch_threads;
    `observe(microseconds)` is told how long each run took.
    """

    def __init__(self, model, pool, settings, observe=lambda microseconds: None):
        self._model = model
        self._pool = pool
        self._settings = settings
        self._observe = observe
        self._lanes = {}
        self._waiting = 0  # rows
        self._seconds = 0.0  # that the last run of any lane took
        self._pace = {}  # signature name -> (bytes of input, seconds) of its last run
        self._lock = threading.Condition()  # notified when the last lane has run empty

    async def run(self, signature, inputs, outputs):
        """Run the model on `inputs`, perhaps together with other requests; returns this request's arrays by alias."""
        rows = self._rows(signature, inputs)
        task = Task(inputs, rows, asyncio.get_running_loop().create_future(), max(rows, 1))
        key = object()  # a lane of its own
        if task.rows:
            key = (
                signature.name,
                outputs,
                *((alias, value.dtype, value.shape[1:], value.ndim) for alias, value in inputs.items()),
            )
        with self._lock:
            if self._waiting >= self._settings.max_batch_size * self._settings.max_enqueued_batches:
                raise StatusError(
                    "RESOURCE_EXHAUSTED",
                    f"The queue is full: {self._waiting} rows are waiting. "
                    "Try again later, or raise max_enqueued_batches",
                )
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = Lane(signature, outputs)
            lane.tasks.append(task)
            self._waiting += task.places
            starts = lane.running < (self._settings.num_batch_threads if self._seconds > _LONG_RUN else 1)
            lane.running += starts
        if starts and self._is_short(signature, inputs):
            asyncio.get_running_loop().call_soon(self._start, key, lane)
        elif starts:
            self._pool.submit(self._drain, key, lane)
        try:
            return await task.future
        except asyncio.CancelledError:  # its client has gone, or its deadline has passed: its place is free at once
            with self._lock:
                if task.places:
                    self._leave(task)
                    task.inputs = None  # it stays in its lane until its turn comes
            raise

    def _leave(self, task):
        self._waiting -= task.places
        task.places = 0

    def _is_short(self, signature, inputs):
        """Whether a run on `inputs` may be expected to end before a thread would have begun it.

        The last run of the signature tells, in proportion to the size of its input.  How long strings take (pictures,
        text) does not follow from their size, nor does a run with loops.
        """
        if signature.name not in self._model.steady or any(value.dtype == np.object_ for value in inputs.values()):
            return False
        size, seconds = self._pace.get(signature.name, (1, math.inf))
        return seconds * max(1, _size(inputs) / size) < _SHORT_RUN

    def _start(self, key, lane):
        """Run a lane's only request on the event loop; with others about, which it might wait for, on a thread."""
        if len(lane.tasks) == 1 and len(self._lanes) == 1:
            self._drain(key, lane)
        else:
            self._pool.submit(self._drain, key, lane)

    def wait_idle(self, timeout):
        """Wait until nothing runs, runs that nobody waits for any more included."""
        with self._lock:
            self._lock.wait_for(lambda: not self._lanes, timeout)

    def _rows(self, signature, inputs):
        """The number of rows where the request may share a run, or 0."""
        if not self._settings.enabled or not signature.row_wise:
            return 0
        sizes = {value.shape[0] if value.ndim else 0 for value in inputs.values()}
        return sizes.pop() if len(sizes) == 1 else 0

    def _drain(self, key, lane):
        """Run one batch of a lane, then queue up again behind the other lanes if more has arrived."""
        tasks = self._take(lane)
        if tasks:
            self._settle(tasks, self._execute(lane, tasks))
        with self._lock:
            more = bool(lane.tasks)
            if not more:
                lane.running -= 1
                if not lane.running:
                    self._lanes.pop(key, None)
                    if not self._lanes:
                        self._lock.notify_all()
        if more:
            self._pool.submit(self._drain, key, lane)

    def _take(self, lane):
        """Take waiting tasks up to the largest batch; a task larger than that runs alone."""
        taken, rows = [], 0
        with self._lock:
            while lane.tasks and (not taken or rows + lane.tasks[0].rows <= self._settings.max_batch_size):
                task = lane.tasks.popleft()
                self._leave(task)
                if not task.future.cancelled():
                    taken.append(task)
                    rows += task.rows
        return taken

    def _execute(self, lane, tasks):
        """The outcome of each task: its outputs, or the exception that its request fails with."""
        if len(tasks) > 1:
            try:
                return self._run_together(lane, tasks)
            except Exception:  # one bad row fails the whole run: find out whose it was
                return [outcome for task in tasks for outcome in self._execute(lane, [task])]
        (task,) = tasks
        try:
            return [self._run(lane, self._padded(task.inputs, task.rows), task.rows)]
        except Exception as error:
            return [error]

    def _run_together(self, lane, tasks):
        rows = sum(task.rows for task in tasks)
        inputs = {alias: np.concatenate([task.inputs[alias] for task in tasks]) for alias in tasks[0].inputs}
        outputs = self._run(lane, self._padded(inputs, rows), rows)
        if any(not value.ndim or len(value) != rows for value in outputs.values()):
            raise StatusError("INTERNAL", "the model does not give one row of output for each row of input")
        ends = np.cumsum([task.rows for task in tasks]).tolist()
        return [
            {alias: value[end - task.rows : end] for alias, value in outputs.items()}
            for task, end in zip(tasks, ends, strict=True)
        ]

    def _padded(self, inputs, rows):
        """Repeat the last row up to the next allowed batch size."""
        size = next((size for size in self._settings.allowed_batch_sizes if size >= rows), rows) if rows else 0
        if size == rows:
            return inputs
        return {
            alias: np.concatenate([value, np.repeat(value[-1:], size - rows, axis=0)])
            for alias, value in inputs.items()
        }

    def _run(self, lane, inputs, rows):
        start = time.perf_counter()
        outputs = self._model.run(lane.signature, inputs, lane.outputs)
        self._seconds = time.perf_counter() - start
        self._pace[lane.signature.name] = _size(inputs), self._seconds
        self._observe(self._seconds * 1e6)
        given = len(next(iter(inputs.values()))) if rows else 0
        if given != rows:  # padded
            outputs = {
                alias: value[:rows] if value.ndim and len(value) == given else value for alias, value in outputs.items()
            }
        return outputs

    @staticmethod
    def _settle(tasks, outcomes):
        """Hand the outcomes over, waking each event loop once."""
        loops = collections.defaultdict(list)
        for task, outcome in zip(tasks, outcomes, strict=True):
            loops[task.future.get_loop()].append((task.future, outcome))
        for loop, settled in loops.items():
            try:
                loop.call_soon_threadsafe(_resolve, settled)
            except RuntimeError:  # the loop has closed: nobody waits any more
                continue


def _size(inputs):
    return max(1, sum(value.nbytes for value in inputs.values()))


def _resolve(settled):
    for future, outcome in settled:
        if future.done():
            continue
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
