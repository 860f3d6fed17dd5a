"""Log lines, history, progress bar and TensorBoard summaries of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf
from rich.progress import Progress

from efl._program import Program
from efl._task_scope import MODE
from efl.hooks.console import console, progress_bar

_log = logging.getLogger("efl")


class Reporter:
    """Reports the steps of one ``fit``.

    Args:
      role: Shown in every line.
      log_step: Steps between two lines.
      history: Gets one dict per line.
      read: Reads tensors between steps.
      global_step: Tells the number of training steps so far.
      log_dir: Folder of the TensorBoard summaries, or None.
    """

    def __init__(
        self,
        role: str,
        log_step: int,
        history: list[dict[str, Any]],
        read: Callable[[dict[str, tf.Tensor]], dict[str, Any]],
        global_step: Callable[[], int],
        log_dir: str | None,
    ) -> None:
        self.role = role
        self.log_step = log_step
        self.history = history
        self.read = read
        self.global_step = global_step
        self.console = console()
        self._writers: dict[str, Any] = {}
        self._log_dir = log_dir

    def stage(self, program: Program, total: int | None, done: int) -> StageReport:
        """Begins the report of one stage that goes on after ``done`` of ``total`` steps."""
        return StageReport(self, program, total, done)

    def write(self, mode: str, task: str | None, step: int, values: dict[str, float]) -> None:
        """Writes values for TensorBoard; train and eval go into two runs, so that curves of one name overlay."""
        if self._log_dir is None:
            return
        writer = self._writers.get(mode)
        if writer is None:
            writer = self._writers[mode] = tf.summary.FileWriter(f"{self._log_dir}/{mode}")
        prefix = "" if task is None else f"{task}/"
        summary = tf.Summary(value=[tf.Summary.Value(tag=prefix + name, simple_value=v) for name, v in values.items()])
        writer.add_summary(summary, step)

    def close(self) -> None:
        """Flushes the summaries."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


class StageReport:
    """The report of one stage; made by ``Reporter.stage``."""

    def __init__(self, reporter: Reporter, program: Program, total: int | None, done: int) -> None:
        self._reporter = reporter
        self._program = program
        self._mode = program.scope.mode or MODE.TRAIN
        self._has_loss = program.loss is not None
        self._names = [m.name for m in program.metrics.values() if m.in_step]
        self._read_after = program.read_after
        self._steps = done
        self._reported = done
        self._since = time.monotonic()
        self._waited: float | None = None
        self._values: Sequence[Any] = ()
        self._bar: Progress | None = progress_bar(reporter.console)
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(str(program.scope), total=total, completed=done)

    def step(self, values: Sequence[Any], waited: float | None) -> None:
        """One step is done: what was fetched in it, and the seconds it waited for the peer, None without one."""
        self._steps += 1
        if waited is not None:
            self._waited = waited + (self._waited or 0.0)
        self._values = values
        if self._bar is not None:
            self._bar.update(self._task, completed=self._steps)
        if self._steps % self._reporter.log_step == 0:
            self._emit()

    def stop(self) -> None:
        """Takes the progress bar away, whatever ended the steps."""
        if self._bar is not None:
            self._bar.stop()

    def end(self) -> None:
        """The stage is over; reports steps that were not reported yet."""
        if self._steps > self._reported:
            self._emit()

    def _emit(self) -> None:
        now = time.monotonic()
        count = self._steps - self._reported
        pace = {"steps_per_second": count / max(now - self._since, 1e-9)}
        if self._waited is not None:
            pace["wait_ms"] = self._waited / count * 1000
        values = [_number(v) for v in self._values]
        loss = values.pop(0) if self._has_loss else None
        numbers = dict(zip(self._names, values))
        numbers.update({name: _number(v) for name, v in self._reporter.read(self._read_after).items()})
        ordered = {m: numbers[m] for m in self._program.metrics}
        step = self._reporter.global_step()
        scope = self._program.scope
        row: dict[str, Any] = {
            "role": self._reporter.role,
            "mode": self._mode.value,
            "task": scope.task,
            "step": step,
        }
        if self._mode is MODE.EVAL:
            row["batches"] = self._steps
        row.update({"loss": loss, **ordered, **pace})
        self._reporter.history.append(row)
        _log.info(
            "%s",
            " ".join(f"{_LABELS.get(k, k)}={_show(v)}" for k, v in row.items() if k != "task" or v is not None),
        )
        chart = {**({} if loss is None else {"loss": loss}), **ordered, **pace}
        self._reporter.write(
            self._mode.value, scope.task, step, {k: v for k, v in chart.items() if isinstance(v, float)}
        )
        self._reported, self._waited, self._since = self._steps, None, time.monotonic()


_LABELS = {"steps_per_second": "steps/s"}


def _number(value: Any) -> Any:
    array = np.asarray(value)
    return float(array) if array.size == 1 and array.dtype.kind in "fiub" else array.tolist()


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"[{'x'.join(map(str, np.shape(value)))}]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
