"""Finds the blocks (TFRecord files) that a reader reads, and how each is compressed."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tensorflow.compat.v1 as tf

from efl._quiet import no_deprecation_warnings
from efl.errors import DataError

_ZLIB_SUFFIXES = (".zlib", ".zz")
# What lies beside records in real folders: manifests, notes, checksums, unfinished files.
_NOT_RECORDS = (".json", ".txt", ".md", ".csv", ".crc", ".tmp", ".log")
#: Compression of a block -> what TensorFlow's readers call it.
OPTIONS = {
    "": tf.io.TFRecordCompressionType.NONE,
    "GZIP": tf.io.TFRecordCompressionType.GZIP,
    "ZLIB": tf.io.TFRecordCompressionType.ZLIB,
}
_SNIFFED_BYTES = 1024
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Block:
    """One TFRecord file.

    Attributes:
      name: Its path relative to the reader's folder, with ``/``; what the parties call it.
      path: Where it lies on this machine.
      compression: ``""``, ``"GZIP"`` or ``"ZLIB"``.
      empty: Whether the file has no byte at all (a block without records).
    """

    name: str
    path: str
    compression: str = ""
    empty: bool = False


def find_blocks(base_dir: str, nodes: Sequence[str]) -> list[Block]:
    """Lists the blocks below a folder.

    Hidden names (first letter ``.`` or ``_``) and files that end in ``.json``, ``.txt``, ``.md``, ``.csv``,
    ``.crc``, ``.tmp`` or ``.log`` are left out; every other file is taken for records.

    Args:
      base_dir: The folder.
      nodes: Sub-folders of it to read; all of it when empty.

    Returns:
      The blocks, sorted by name.

    Raises:
      DataError: A folder is missing or unreadable, or there is no file in it.
    """
    folders = [os.path.join(base_dir, node) for node in nodes] or [base_dir]
    for folder in [base_dir, *folders]:
        if not tf.io.gfile.isdir(folder):
            raise DataError(f"{folder!r} is not a folder (in the working folder {os.getcwd()!r}). {_beside(folder)}")
    found = {name: path for folder in folders for name, path in _files_below(folder, base_dir)}
    if not found:
        raise DataError(
            f"no TFRecord file in {', '.join(map(repr, folders))}. {_beside(os.path.join(folders[0], '*'))}"
        )
    return [_block(name, found[name]) for name in sorted(found)]


def share_of(blocks: Sequence[Block], worker_idx: int, worker_num: int, base_dir: str) -> list[Block]:
    """Returns this worker's share: every ``worker_num``-th block, from number ``worker_idx`` on.

    Raises:
      DataError: The share is empty, or holds no byte.
    """
    share = list(blocks[worker_idx::worker_num])
    if not share:
        raise DataError(
            f"worker {worker_idx} of {worker_num} has nothing to read: {base_dir!r} holds only {len(blocks)} "
            f"file(s); write at least {worker_num}, or use fewer workers"
        )
    if all(block.empty for block in share):
        raise DataError(f"all {len(share)} file(s) to read in {base_dir!r} are empty: {shorten(b.name for b in share)}")
    return share


def shorten(names: Iterable[str]) -> str:
    """Returns the first names of many, for a message."""
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"


def first_damage(blocks: Iterable[Block], seconds: float) -> tuple[Block, int] | None:
    """Reads blocks until one breaks.

    Args:
      blocks: The blocks, likeliest first.
      seconds: When to give up.

    Returns:
      The first damaged block and the number of the record (from 0) at which it breaks, or ``None``.
    """
    give_up = time.monotonic() + seconds
    for block in blocks:
        row = 0
        try:
            with no_deprecation_warnings():
                records = tf.io.tf_record_iterator(block.path, tf.io.TFRecordOptions(OPTIONS[block.compression]))
            for _ in records:
                row += 1
                if not row % 4096 and time.monotonic() > give_up:
                    return None
        except tf.errors.OpError:
            return block, row
    return None


def _files_below(folder: str, base_dir: str) -> list[tuple[str, str]]:
    found = []
    for parent, folders, names in tf.io.gfile.walk(folder):
        folders[:] = [name for name in folders if name[0] not in "._"]
        for name in names:
            if name[0] not in "._" and not name.endswith(_NOT_RECORDS):
                path = os.path.join(parent, name)
                found.append((os.path.relpath(path, base_dir).replace(os.sep, "/"), path))
    return found


def _beside(folder: str) -> str:
    """Says what there is where something is missing."""
    parent = os.path.dirname(os.path.normpath(folder)) or "."
    if not tf.io.gfile.isdir(parent):
        return f"Its parent {parent!r} is missing too: check the path, or generate the data first"
    there = sorted(name for name in tf.io.gfile.listdir(parent) if name[0] not in ".")
    what = shorten(there) if there else "nothing"
    return f"In {parent!r} there is: {what}. Check the path, or generate the data first"


def _block(name: str, path: str) -> Block:
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            head = file.read(_SNIFFED_BYTES)
    except tf.errors.OpError as error:
        raise DataError(f"cannot read {path!r}: {error.message}") from error
    return Block(name, path, _sniff(head, name.lower().endswith(_ZLIB_SUFFIXES)), empty=not head)


def _sniff(head: bytes, named_zlib: bool) -> str:
    """Tells the compression from a file's first bytes, which say more than its name: gzip has a signature."""
    if head[:2] == b"\x1f\x8b":
        return "GZIP"
    if len(head) < 2 or head[0] & 0x0F != 8 or int.from_bytes(head[:2], "big") % 31:
        return ""
    if named_zlib:
        return "ZLIB"
    # A plain record of an unlucky length begins like zlib data: believe it only if it inflates to the beginning of
    # a record, whose length (8 bytes, little endian) is below 4 GiB.
    try:
        inflated = zlib.decompressobj().decompress(head, 16)
    except zlib.error:
        return ""
    return "ZLIB" if len(inflated) < 8 or inflated[4:8] == bytes(4) else ""
