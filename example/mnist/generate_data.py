"""Splits handwritten digits between two parties: the leader gets every image's left half, the follower its
right half.

Writes TFRecord files to ``leader_train/``, ``follower_train/``, ``leader_test/`` and ``follower_test/``:
files of the same names on both sides, whose records are in the same order. A record holds

    sample_id  int64      the same on both sides
    feature    14*28 floats, row by row, raw grey values 0 to 255
    label      float      the digit, 0 to 9, on both sides

With ``--data DIR`` the images are MNIST's, from its four IDX files, gzipped or not. Without it they are the
1797 digits that come with scikit-learn, enlarged from 8x8 to 28x28: real handwriting, and no network is
needed.
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np

SIDE = 28
# The digits in scikit-learn are ordered by writer; every fifth one is for testing.
DIGITS_TEST_SHARE = 5

_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def positive(text: str) -> int:
    """The type of flags that count something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of bytes, the format of the MNIST distribution.

    Args:
      path: The file, gzipped if its name ends in ``.gz``.

    Returns:
      uint8 array of the shape that the file's header states.

    Raises:
      ValueError: It is no IDX file of bytes, or is shorter or longer than its header states.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        content = file.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an IDX file of bytes (it begins with {content[:4].hex() or 'nothing'})")
    rank = content[3]
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(f"{path}: ends within its header")
    shape = struct.unpack(f">{rank}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{path}: its header states {shape}, but {len(content) - header} bytes follow")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads one part of MNIST.

    Args:
      folder: Where the IDX files lie.
      part: ``"train"`` or ``"test"``.

    Returns:
      Images ``[n, 28, 28]`` and labels ``[n]``, uint8.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is damaged, or images and labels do not belong together.
    """
    arrays = []
    for name in _IDX_FILES[part]:
        # Some distributions write train-images.idx3-ubyte.
        names = [n + gz for n in (name, name.replace("-idx", ".idx")) for gz in ("", ".gz")]
        found = [folder / n for n in names if (folder / n).is_file()]
        if not found:
            raise FileNotFoundError(f"{folder}: holds none of {', '.join(names)}")
        arrays.append(read_idx(found[0]))
    images, labels = arrays
    if images.shape != (len(labels), SIDE, SIDE) or labels.ndim != 1:
        raise ValueError(f"{folder}: {part} images of shape {images.shape} and labels of shape {labels.shape}")
    return images, labels


def load_digits(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns one part of scikit-learn's digits, as images ``[n, 28, 28]`` (uint8) and labels ``[n]``."""
    from sklearn import datasets

    digits = datasets.load_digits()
    for_test = np.arange(len(digits.target)) % DIGITS_TEST_SHARE == DIGITS_TEST_SHARE - 1
    chosen = for_test if part == "test" else ~for_test
    return enlarge(digits.images[chosen]), digits.target[chosen].astype(np.uint8)


def enlarge(images: np.ndarray) -> np.ndarray:
    """Enlarges images ``[n, 8, 8]`` of 0 to 16 to ``[n, 28, 28]`` uint8 of 0 to 255, linearly."""
    size = images.shape[1]
    # Column i of this matrix says how much of every old pixel the new pixel i takes.
    places = (np.arange(SIDE) + 0.5) * size / SIDE - 0.5
    matrix = np.stack([np.interp(places, np.arange(size), row) for row in np.eye(size)])
    return np.rint(matrix.T @ (images * (255 / 16)) @ matrix).astype(np.uint8)


def write_records(folder: Path, ids: np.ndarray, features: np.ndarray, labels: np.ndarray, blocks: int) -> None:
    """Writes one party's records to ``folder/part-00000.tfrecord`` and so on; older parts there are removed.

    Args:
      folder: Made if it does not exist.
      ids: ``[n]`` integers.
      features: ``[n, ...]``, flattened row by row and written as floats.
      labels: ``[n]``, written as floats.
      blocks: Number of files; consecutive records share a file.
    """
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part-*.tfrecord"):
        old.unlink()
    features = features.reshape(len(ids), -1).astype(np.float32)
    for block, rows in enumerate(np.array_split(np.arange(len(ids)), blocks)):
        with tf.io.TFRecordWriter(str(folder / f"part-{block:05d}.tfrecord")) as writer:
            for row in rows:
                example = tf.train.Example()
                column = example.features.feature
                column["sample_id"].int64_list.value.append(int(ids[row]))
                column["feature"].float_list.value.extend(features[row])
                column["label"].float_list.value.append(float(labels[row]))
                writer.write(example.SerializeToString())


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with MNIST's IDX files")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder to write to (default: .)")
    parser.add_argument("--blocks", type=int, default=4, help="files per folder (default: 4)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N training and N test images")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's notes on the machine are of no use here
    if options.blocks < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--blocks and --limit must be at least 1")

    next_id = 0
    for part in ("train", "test"):
        if options.data is None:
            source, (images, labels) = "scikit-learn's digits, enlarged to 28x28", load_digits(part)
        else:
            try:
                source, (images, labels) = f"MNIST from {options.data}", load_mnist(options.data, part)
            except (OSError, EOFError, ValueError) as error:
                sys.exit(f"generate_data.py: {error}")
        images, labels = images[: options.limit], labels[: options.limit]
        ids = np.arange(next_id, next_id + len(labels))
        next_id += len(labels)
        for role, half in (("leader", images[:, :, : SIDE // 2]), ("follower", images[:, :, SIDE // 2 :])):
            write_records(options.out / f"{role}_{part}", ids, half, labels, options.blocks)
        print(f"{part}: {len(labels)} images of {source} -> {options.out}/{{leader,follower}}_{part}")


if __name__ == "__main__":
    main()
