"""Command line and results, the same for all programs in this folder."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf
from generate_data import positive

import efl

# TensorFlow calls its own version 1 API deprecated, once for every function that is used.
tf.logging.set_verbosity(tf.logging.ERROR)


def flags(doc: str | None, **more: dict[str, Any]) -> argparse.Namespace:
    """Reads this folder's own flags; ``--federal_role`` and the like are efl's and are left alone.

    Args:
      doc: What ``--help`` begins with.
      **more: Further flags: name and the arguments of argparse's ``add_argument``.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", default=".", help="where leader_train/ and so on lie (default: .)")
    parser.add_argument("--batch_size", type=positive, default=256)
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--max_step", type=positive, help="training steps at most (default: to the end of the data)")
    parser.add_argument(
        "--eval_every", type=positive, metavar="N", help="evaluate every N steps (default: once, at the end)"
    )
    parser.add_argument("--log_step", type=positive, default=10)
    parser.add_argument("--save", type=Path, metavar="DIR", help="write NAME.npz (weights) and NAME.json (log) to DIR")
    parser.add_argument("--snapshot", type=positive, metavar="N", help="with --save: also the weights after N steps")
    for name, how in more.items():
        parser.add_argument(f"--{name}", **how)
    return parser.parse_known_args()[0]


def procedure(options: argparse.Namespace) -> efl.procedure_fn.Procedure:
    """Trains as the flags say and evaluates at the end, or every ``--eval_every`` steps."""
    train_step, iterations = options.max_step, None if options.max_step is None else 1
    if options.eval_every is not None:
        train_step = options.eval_every
        iterations = None if options.max_step is None else math.ceil(options.max_step / options.eval_every)
    return efl.procedure_fn.train_and_evaluate(train_step=train_step, max_iter=iterations)


class Snapshot(tf.train.SessionRunHook):
    """Writes all trained weights to a file after a number of training steps."""

    def __init__(self, steps: int, path: Path) -> None:
        self._left, self._path = steps, path

    def begin(self) -> None:
        self._weights = {variable.op.name: variable for variable in tf.trainable_variables()}

    def after_run(self, context: tf.train.SessionRunContext, values: tf.train.SessionRunValues) -> None:
        self._left -= 1
        if self._left == 0:
            np.savez(self._path, **context.session.run(self._weights))


def snapshots(options: argparse.Namespace, name: str) -> list[Snapshot]:
    """The hook that ``--snapshot`` asks for."""
    if options.save is None or options.snapshot is None:
        return []
    options.save.mkdir(parents=True, exist_ok=True)
    return [Snapshot(options.snapshot, options.save / f"{name}-{options.snapshot}.npz")]


def save(model: efl.Model, folder: Path | None, name: str) -> None:
    """Writes weights and log to ``folder``, if one is given, and prints the last evaluation."""
    evaluations = [entry for entry in model.history if entry["mode"] == "eval"]
    if evaluations:
        last = evaluations[-1]
        print(f"{name}: accuracy {last['accuracy']:.4f} on the test images after {last['step']} training steps")
    else:
        print(f"{name}: no step was taken: the lines above say why")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / f"{name}.npz", **model.get_weights())
        if evaluations:  # else the log is that of the run that did the work, if it was saved
            (folder / f"{name}.json").write_text(json.dumps(model.history, default=float))
