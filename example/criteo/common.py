"""Command line of both programs in this folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import tensorflow.compat.v1 as tf

import efl

# TensorFlow calls its own version 1 API deprecated, once for every function that is used.
tf.logging.set_verbosity(tf.logging.ERROR)


def flags(doc: str | None) -> argparse.Namespace:
    """Reads this folder's own flags; ``--federal_role`` and the like are efl's and are left alone."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data_dir", type=Path, default=Path("."), help="where leader_train/ and so on lie (default: .)"
    )
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--train_step", type=int, default=20, help="training steps of an iteration (default: 20)")
    parser.add_argument(
        "--eval_step", type=int, default=50, help="batches of an evaluation, at most all test data (default: 50)"
    )
    parser.add_argument("--max_iter", type=int, help="iterations (default: until the training data ends)")
    parser.add_argument("--log_step", type=int, default=20)
    return parser.parse_known_args()[0]


def procedure(options: argparse.Namespace) -> efl.procedure_fn.Procedure:
    """Trains and evaluates by turns, as the flags say."""
    return efl.procedure_fn.train_and_evaluate(
        train_step=options.train_step, eval_step=options.eval_step, max_iter=options.max_iter
    )


def need(path: Path) -> Path:
    """Returns a path that ``generate_data.py`` has made; ends the program, saying so, if it has not."""
    if not path.exists():
        sys.exit(f"{path} is missing: run generate_data.py first, or point --data_dir at its --out")
    return path


def read_id_nums(options: argparse.Namespace) -> list[int]:
    """Reads the sizes of the embedding tables, which ``generate_data.py`` wrote."""
    return json.loads(need(options.data_dir / "id_nums.json").read_text())
