"""The thread that decodes: takes waiting requests of like settings together, and survives what fails.

The queue is bounded; a request that its caller has given up is dropped, in the middle of its decoding too.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from infalign.generation.openai import Misread
from infalign.runtime.console import notice
from infalign.serving.engine import Engine, Outcome, Setting
from infalign.serving.metrics import Metrics
from infalign.types import InputError, Prompt, RewardError

logger = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many requests wait as may."""


@dataclass
class Job:
    """One request: `prompts` (with distinct keys) to decode alike, and the outcomes in their order to come.

    `gone`: nobody waits for it any more, so that it is let go of in the middle.
    """

    setting: Setting
    prompts: tuple[Prompt, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    result: Future[list[Outcome]] = field(default_factory=Future)
    gone: bool = False

    @property
    def keys(self) -> set[str]:
        """Of the prompts."""
        return {prompt.key for prompt in self.prompts}


class Worker:
    """Decodes jobs in a thread of its own, in the order of their arrival.

    Args:
        engine: decodes.
        max_queue: jobs that may wait.
        metrics: counts.

    Attributes:
        failing: what failed in the last batch ("backend", "decoding", "reward", "internal"), None when it went well.
    """

    def __init__(self, engine: Engine, *, max_queue: int, metrics: Metrics) -> None:
        self.engine, self.max_queue, self.metrics = engine, max_queue, metrics
        self.failing: str | None = None
        self._waiting: deque[Job] = deque()
        self._running = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="infalign-decoding", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Take up no more work; wait so many seconds for what is under way. What waits is cancelled."""
        with self._changed:
            self._stopping = True
            for job in self._waiting:
                job.result.cancel()
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(timeout)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFullError: `max_queue` jobs wait.
        """
        with self._changed:
            if self._live() >= self.max_queue:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def gauges(self) -> dict[str, int]:
        """How many jobs wait, and how many are being decoded."""
        with self._changed:
            return {"queue_length": self._live(), "in_progress": self._running}

    @property
    def alive(self) -> bool:
        """Whether it works."""
        return self._thread.is_alive() and not self._stopping

    def _live(self) -> int:
        """Drop what has been given up; how many jobs are left."""
        self._waiting = deque(job for job in self._waiting if not job.result.cancelled())
        return len(self._waiting)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._waiting)
                if self._stopping:
                    return
                jobs = self._take()
                self._running = len(jobs)
            if jobs:
                self._decode(jobs)
            with self._changed:
                self._running = 0

    def _take(self) -> list[Job]:
        """The oldest job, and all that wait and fit to it: like settings, other prompts, within the tokens of a batch.

        A job is started here, so that it can't be given up any more.
        """
        taken: list[Job] = []
        left: deque[Job] = deque()
        keys: set[str] = set()
        room = self.engine.tokens_per_batch
        for job in self._waiting:
            cost = self.engine.cost(job.setting, [len(ids) for ids in job.prompt_ids])
            fits = not taken or (job.setting == taken[0].setting and cost <= room and not keys & job.keys)
            if not fits:
                left.append(job)
            elif job.result.set_running_or_notify_cancel():
                taken.append(job)
                keys |= job.keys
                room -= cost
        self._waiting = left
        return taken

    def _decode(self, jobs: list[Job]) -> None:
        """Decode jobs together; when that fails for what one of them may have brought, each alone."""
        try:
            self._deliver(jobs)
            self.failing = None
        except (RewardError, Misread) as error:
            if len(jobs) > 1:
                for job in jobs:
                    if not job.result.done():
                        self._decode([job])
            else:
                notice(f"a request failed: {error}")
                self._fail(jobs, error, "reward" if isinstance(error, RewardError) else "backend")
        except InputError as error:
            notice(f"a request failed: {error}")
            self._fail(jobs, error, "backend" if self.engine.remote else "decoding")
        except Exception as error:  # a request may fail, the server goes on; the log has the traceback
            logger.exception("a request failed")
            self._fail(jobs, error, "internal")

    def _deliver(self, jobs: list[Job]) -> None:
        """Decode, and hand every job its outcomes as soon as it has them all."""
        prompts = [prompt for job in jobs for prompt in job.prompts]
        prompt_ids = [ids for job in jobs for ids in job.prompt_ids]
        found: dict[str, Outcome] = {}
        job_of = {key: job for job in jobs for key in job.keys}
        for batch in self.engine.decode(jobs[0].setting, prompts, prompt_ids, lambda key: job_of[key].gone):
            found |= batch
            self.metrics.batches.inc()
            for outcome in batch.values():
                self.metrics.candidates.inc(len(outcome.decoded.candidates))
                self.metrics.tokens.labels("completion").inc(outcome.tokens)
                self.metrics.reward_calls.inc(outcome.reward_calls)
                self.metrics.unscored.inc(int(np.isnan(outcome.decoded.rewards_N).sum()))
            for job in jobs:
                if not job.result.done() and job.keys <= found.keys():
                    job.result.set_result([found[prompt.key] for prompt in job.prompts])

    def _fail(self, jobs: list[Job], error: Exception, cause: str) -> None:
        self.failing = cause
        self.metrics.failures.labels(cause).inc()
        for job in jobs:
            if not job.result.done():
                job.result.set_exception(error)
