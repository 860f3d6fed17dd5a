"""Splits a click log between two parties: numbers and label to the leader, categories to the follower.

Writes TFRecord files to ``leader_train/``, ``follower_train/``, ``leader_test/`` and ``follower_test/``:
files of the same names on both sides, whose records are in the same order. The records:

    leader    sample_id  int64      follower  sample_id  int64
              dense      10 floats            feature0 ... feature20  strings
              label      int64, 0 or 1

and ``id_nums.json``, the number of different values of each of the 21 string features: the sizes of the
follower's embedding tables.

``--data`` reads the Criteo format: label, 13 integers (I1-I13), 26 categories (C1-C26), tab or comma
separated, with or without a header, gzipped or not. It is read twice as a stream (Kaggle's file has 45
million rows) and never held in memory. Columns of which 30 % or more are missing in Criteo's log are left
out: I1, I10, I12, C19, C20, C22, C25, C26. A missing number becomes the column's mean, which is 0 after
standardization; a missing category is a category of its own, "missing". Means, deviations and counts are
those of the training rows alone.

Without ``--data`` the breast cancer data that come with scikit-learn stand in: 569 real patients, not clicks,
brought into the same shape (10 means as the numbers; the other measurements, in tenths of their range, as
categories), so that the programs can be tried on a machine without a network.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

KEPT_NUMBERS = [2, 3, 4, 5, 6, 7, 8, 9, 11, 13]
KEPT_CATEGORIES = [*range(1, 19), 21, 23, 24]
MISSING = "missing"
# Where the data have no test part, every tenth row is one.
TEST_EVERY = 10

_FIELDS = 1 + 13 + 26


class Row(NamedTuple):
    """One impression: its label (0 or 1), 10 numbers (NaN: missing) and 21 categories."""

    label: int
    numbers: list[float]
    categories: list[str]


# Reads everything from the beginning: ("train" or "test", row).
Source = Callable[[], Iterator[tuple[str, Row]]]


class Statistics:
    """What the training rows say: means and deviations of the numbers, distinct categories.

    Args:
      most_ids: Different values of a category are counted up to here, which bounds the memory.
    """

    def __init__(self, most_ids: int) -> None:
        self._most_ids = most_ids
        self._present = np.zeros(len(KEPT_NUMBERS))
        self._mean = np.zeros(len(KEPT_NUMBERS))
        self._squares = np.zeros(len(KEPT_NUMBERS))
        self._ids: list[set[str]] = [set() for _ in KEPT_CATEGORIES]
        self._chunk: list[list[float]] = []

    def add(self, row: Row) -> None:
        """Counts one row."""
        self._chunk.append(row.numbers)
        if len(self._chunk) == 4096:
            self._merge()
        for seen, value in zip(self._ids, row.categories):
            if len(seen) < self._most_ids:
                seen.add(value)

    def _merge(self) -> None:
        """Adds the chunk's moments (Chan et al., 1979); a plain sum of squares would cancel."""
        chunk, self._chunk = np.array(self._chunk).reshape(-1, len(KEPT_NUMBERS)), []
        there = ~np.isnan(chunk)
        present = there.sum(0)
        mean = np.where(there, chunk, 0).sum(0) / np.maximum(present, 1)
        squares = np.where(there, (chunk - mean) ** 2, 0).sum(0)
        total = np.maximum(self._present + present, 1)
        step = mean - self._mean
        self._squares += squares + step**2 * self._present * present / total
        self._mean += step * present / total
        self._present += present

    def standardize(self, numbers: list[float]) -> np.ndarray:
        """Returns ``(x - mean) / deviation``: 0 where missing, ``x - mean`` where a column never varies."""
        if self._chunk:
            self._merge()
        deviation = np.sqrt(self._squares / np.maximum(self._present, 1))
        scores = (np.array(numbers) - self._mean) / np.where(deviation > 0, deviation, 1)
        return np.nan_to_num(scores, nan=0.0)

    @property
    def id_nums(self) -> list[int]:
        """Different values of each category, at least 1."""
        return [max(len(seen), 1) for seen in self._ids]


def read_rows(path: Path, limit: int | None = None) -> Iterator[Row]:
    """Reads a file in the Criteo format, row by row.

    Args:
      path: The file, gzipped if its name ends in ``.gz``.
      limit: End after this many rows.

    Yields:
      The rows with a label.

    Raises:
      ValueError: A row has not 40 fields, or a field is no number; names file and line.
    """
    separator, read = None, 0
    for line, text in enumerate(_lines(path), 1):
        if limit is not None and read >= limit:
            return
        if separator is None:
            separator = "\t" if "\t" in text else ","
            if text.startswith("label"):
                continue
        fields = text.rstrip("\r\n").split(separator)
        if len(fields) != _FIELDS:
            raise ValueError(f"{path}, line {line}: {len(fields)} fields, expected {_FIELDS} (label, I1-I13, C1-C26)")
        try:
            label = float(fields[0])
            numbers = [float(fields[i]) if fields[i] else math.nan for i in KEPT_NUMBERS]
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
        if label not in (0, 1) or any(math.isinf(x) for x in numbers):
            raise ValueError(f"{path}, line {line}: a label other than 0 and 1, or an infinite number")
        yield Row(int(label), numbers, [fields[13 + i] or MISSING for i in KEPT_CATEGORIES])
        read += 1


def _lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text in the Criteo format: it holds bytes that are no UTF-8") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None


def find_files(data: Path) -> tuple[Path, Path | None]:
    """Returns the training file and, if the folder has one with labels, the test file.

    Args:
      data: A file, or a folder that holds one named ``train.txt``, ``*train*`` or, alone, anything; in a folder only
        names that end in ``.txt``, ``.csv`` or ``.tsv``, with ``.gz`` or without, are looked at.

    Raises:
      FileNotFoundError: There is nothing to read.
    """
    if not data.exists():
        raise FileNotFoundError(f"{data} does not exist")
    if data.is_file():
        return data, None
    ends = [end + gz for end in (".txt", ".csv", ".tsv") for gz in ("", ".gz")]
    tables = sorted(p for p in data.iterdir() if p.name.endswith(tuple(ends)) and p.is_file())
    trains = [p for p in tables if p.name.startswith("train.txt")] or [p for p in tables if "train" in p.name]
    if not trains:
        readable = [p for p in tables if not p.name.lower().startswith(("readme", "license"))]
        if len(readable) != 1:
            raise FileNotFoundError(
                f"{data}: expected train.txt, a *train* file, or one single file whose name ends in {', '.join(ends)}; "
                "--data may also name the file itself"
            )
        return readable[0], None
    test = trains[0].with_name(trains[0].name.replace("train", "test"))
    # Kaggle's test.txt has no labels: it is of no use here.
    return trains[0], test if test.is_file() and _has_labels(test) else None


def _has_labels(path: Path) -> bool:
    with contextlib.suppress(ValueError):
        return next(read_rows(path, limit=1), None) is not None
    return False


def criteo(data: Path, limit: int | None) -> tuple[str, Source]:
    """Returns what is read, and a function that reads it."""
    train, test = find_files(data)
    if test is None:
        return f"{train}, every {TEST_EVERY}th row for testing", lambda: split(read_rows(train, limit))

    def both() -> Iterator[tuple[str, Row]]:
        yield from (("train", row) for row in read_rows(train, limit))
        yield from (("test", row) for row in read_rows(test, limit))

    return f"{train} and {test}", both


def split(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Yields (part, row); every tenth row is for testing."""
    for number, row in enumerate(rows, 1):
        yield ("train" if number % TEST_EVERY else "test"), row


def breast_cancer(limit: int | None) -> tuple[str, Source]:
    """Returns scikit-learn's breast cancer data in the shape of a click log, like :func:`criteo`."""
    from sklearn import datasets

    bunch = datasets.load_breast_cancer()
    # Columns 0-9 are means, 10-19 standard errors, 20-29 the worst of each measurement.
    others = bunch.data[:, 10:]
    low, high = others.min(0), others.max(0)
    tenths = np.minimum((others - low) / (high - low) * 10, 9).astype(int)
    rows = []
    for label, numbers, bins in zip(bunch.target, bunch.data[:, :10], tenths):
        categories = [str(b) for b in bins]
        categories.append(f"{bins[10]}x{bins[17]}")  # the 21st: worst radius by worst concave points
        rows.append(Row(int(label), numbers.tolist(), categories))
    rows = rows[:limit]
    return "scikit-learn's breast cancer data (no click log; give --data for Criteo)", lambda: split(rows)


class PartWriter:
    """Writes both parties' records of one part, row by row; older files of the part are removed.

    Args:
      out: Holds the folders ``leader_PART`` and ``follower_PART``.
      part: ``"train"`` or ``"test"``.
      count: How many rows there will be.
      blocks: How many files per folder they go to.
      first_id: ``sample_id`` of the first row.
      statistics: Of the training rows.
    """

    def __init__(self, out: Path, part: str, count: int, blocks: int, first_id: int, statistics: Statistics) -> None:
        self._folders = [out / f"{role}_{part}" for role in ("leader", "follower")]
        for folder in self._folders:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("part-*.tfrecord"):
                old.unlink()
        self._first_id, self._statistics = first_id, statistics
        self._ends = [(block + 1) * count // blocks for block in range(blocks)]
        self._index = self._block = 0
        self._open()

    def _open(self) -> None:
        import tensorflow as tf

        name = f"part-{self._block:05d}.tfrecord"
        self._files = [tf.io.TFRecordWriter(str(folder / name)) for folder in self._folders]

    def write(self, row: Row) -> None:
        """Writes the next row."""
        import tensorflow as tf

        while self._index == self._ends[self._block]:
            self.close()
            self._block += 1
            self._open()
        leader, follower = tf.train.Example(), tf.train.Example()
        for example in (leader, follower):
            example.features.feature["sample_id"].int64_list.value.append(self._first_id + self._index)
        column = leader.features.feature
        column["label"].int64_list.value.append(row.label)
        column["dense"].float_list.value.extend(self._statistics.standardize(row.numbers))
        column = follower.features.feature
        for i, value in enumerate(row.categories):
            column[f"feature{i}"].bytes_list.value.append(value.encode())
        for file, example in zip(self._files, (leader, follower)):
            file.write(example.SerializeToString())
        self._index += 1

    def close(self) -> None:
        """Closes the files of the block."""
        for file in self._files:
            file.close()


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="a file in the Criteo format, or a folder with one")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder to write to (default: .)")
    parser.add_argument("--blocks", type=int, default=4, help="files per folder (default: 4)")
    parser.add_argument("--limit", type=int, metavar="N", help="read at most N rows of a file")
    parser.add_argument(
        "--max_ids", type=int, default=100_000, metavar="N",
        help="upper limit of every number in id_nums.json, bounds memory and tables (default: 100000)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's notes on the machine are of no use here
    if options.blocks < 1 or options.max_ids < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--blocks, --limit and --max_ids must be at least 1")

    try:
        name, source = breast_cancer(options.limit) if options.data is None else criteo(options.data, options.limit)
        print(f"reading {name}")
        statistics, counts = Statistics(options.max_ids), {"train": 0, "test": 0}
        for part, row in source():
            counts[part] += 1
            if part == "train":
                statistics.add(row)
        if not all(counts.values()):
            raise ValueError(f"{name}: {counts['train']} rows to train on and {counts['test']} to test on")
        writers = {
            part: PartWriter(options.out, part, counts[part], options.blocks, first_id, statistics)
            for part, first_id in (("train", 0), ("test", counts["train"]))
        }
        for part, row in source():
            writers[part].write(row)
        for part, writer in writers.items():
            writer.close()
            print(f"{part}: {counts[part]} rows -> {options.out}/{{leader,follower}}_{part}")
    except (OSError, ValueError) as error:
        sys.exit(f"generate_data.py: {error}")
    (options.out / "id_nums.json").write_text(json.dumps(statistics.id_nums) + "\n")
    print(f"id_nums.json: {statistics.id_nums}")


if __name__ == "__main__":
    main()
