"""What a person sees: lines on standard output, notices on standard error, progress with rate and time left.

On a terminal progress is a bar; elsewhere (a log file, CI) one line every 30 seconds and one at the end. Only rank 0
prints.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from infalign.runtime.distributed import is_main

LINE_EVERY_SECONDS = 30.0


def say(text: str = "") -> None:
    """Print a line on rank 0."""
    if is_main():
        print(text, flush=True)


def quiet_libraries() -> None:
    """Telemetry off, and none of the libraries' start-up chatter; a user's own settings win."""
    for name, value in {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRACKIO_TELEMETRY": "0",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says on every CPU which kernel it lacks
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|torch)\..*")


WARNING = "warning:"
"""What a notice begins with."""


def notice(text: str) -> None:
    """Print a warning line that says what to do, on rank 0, to standard error."""
    if is_main():
        print(f"{WARNING} {text}", file=sys.stderr, flush=True)


class Progress:
    """Progress over `total` units of work, as a context manager; `advance(k)` after each piece.

    Args:
        title: what is being done, e.g. "calibrate: sampling"; empty for silence.
        total: units in all.
        unit: the unit's name, e.g. "samples".
        done: units that an earlier run has left finished (they count, but not into the rate).
    """

    def __init__(self, title: str, total: int, unit: str = "it", done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._first, self._start, self._last = done, time.monotonic(), time.monotonic()
        self._bar: tqdm | None = None

    def __enter__(self) -> Progress:
        if is_main() and self.title and sys.stderr.isatty() and self.total > self.done:
            self._bar = tqdm(desc=self.title, total=self.total, unit=f" {self.unit}", initial=self.done, leave=False)
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more units are done; `note` is shown beside the bar."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self.title and self.done < self.total and time.monotonic() - self._last > LINE_EVERY_SECONDS:
            self._last = time.monotonic()
            say(f"  {self.line()}{'  ' + note if note else ''}")

    def line(self) -> str:
        """One line of progress: how far, how fast, how long still."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._first) / seconds
        left = f", {clock((self.total - self.done) / rate)} left" if rate > 0 else ""
        return f"{self.title}: {self.done}/{self.total} {self.unit}, {rate:.3g}/s{left}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        worked = self.done - self._first
        if error is None and worked and self.title:
            seconds = time.monotonic() - self._start
            say(f"  {self.title}: {worked} {self.unit} in {clock(seconds)} ({worked / max(seconds, 1e-9):.3g}/s)")


def clock(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> clock(4.2), clock(75), clock(7300)
    ('4.2s', '1m15s', '2h01m')
    """
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
