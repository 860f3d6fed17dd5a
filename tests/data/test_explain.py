"""Records that cannot be read end in a message that names file, record and cure."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf

from efl.data import DataIO, _whole
from efl.errors import DataError
from tests.data.records import example, write, write_ids
from tests.data.test_dataio import drain, flat, id_reader, read_ids


def failure(reader: DataIO, cached: bool = False) -> tuple[Exception, DataError | None]:
    """Reads until it fails; ``cached``: through a callable, whose errors know no op."""
    ids = next(iter(reader.read().values()))
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        step = sess.make_callable(ids) if cached else (lambda: sess.run(ids))

        def steps() -> None:
            for _ in range(100):
                step()

        with pytest.raises((tf.errors.OpError, UnicodeDecodeError)) as caught:
            steps()
        return caught.value, reader.explain(caught.value)


def message(reader: DataIO, cached: bool = False) -> str:
    explained = failure(reader, cached)[1]
    assert isinstance(explained, DataError)
    return str(explained)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_missing_feature_is_named_with_its_record(tmp_path: Path, shuffle: bool, cached: bool) -> None:
    write_ids(tmp_path, [6, 3])
    write(tmp_path / "part-1.tfrecord", [example({"id": 1}), example({"other": 2}), example({"id": 3})])
    said = message(id_reader(tmp_path, num_epochs=3, shuffle=shuffle), cached)
    assert said == (
        f"run/dataio ({tmp_path}): record 1 of {str(tmp_path / 'part-1.tfrecord')!r} has no feature 'id', declared as "
        "fixedlen_feature('id', 1, tf.int64)"
    )


def test_a_wrong_dim_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x", [example({"id": 1, "v": [1.0, 2.0]}), example({"id": 1, "v": [1.0]})])
    reader = id_reader(tmp_path)
    reader.fixedlen_feature("v", 2, tf.float64)
    said = message(reader)
    assert "record 1 of" in said
    assert "holds 1 value(s) of feature 'v', declared as fixedlen_feature('v', 2, tf.float64)" in said
    assert "varlen_feature" in said


@pytest.mark.parametrize(
    ("stored", "dtype", "actual"),
    [([1], tf.float32, "int64"), ([1.5], tf.int32, "float"), (["a"], tf.int64, "string"), ([2], tf.string, "int64")],
)
@pytest.mark.parametrize("fixed", [True, False])
def test_a_wrong_dtype_is_named(tmp_path: Path, stored: Any, dtype: Any, actual: str, fixed: bool) -> None:
    write(tmp_path / "x", [example({"v": stored})])
    reader = DataIO(str(tmp_path), 2, 0, 1)
    if fixed:
        reader.fixedlen_feature("v", 1, dtype)
    else:
        reader.varlen_feature("v", dtype)
    said = message(reader)
    assert f"record 0 of {str(tmp_path / 'x')!r} holds {actual} values of feature 'v', declared as" in said
    assert f"tf.{dtype.name})" in said


@pytest.mark.parametrize("cached", [False, True])
def test_a_truncated_file_is_named_with_its_record(tmp_path: Path, cached: bool) -> None:
    write_ids(tmp_path, [8, 8, 8])
    path = tmp_path / "part-1.tfrecord"
    path.write_bytes(path.read_bytes()[:-3])
    said = message(id_reader(tmp_path), cached)
    assert f"cannot read record 7 of {str(path)!r}: it is damaged or cut off. Write the file again" in said


@pytest.mark.parametrize("left", [1, 7, 8, 11])
def test_a_file_cut_in_the_head_of_a_record_is_named(tmp_path: Path, left: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("efl.data._whole._READ_BYTES", 100)
    write_ids(tmp_path, [8, 8])
    path = tmp_path / "part-1.tfrecord"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 8 * 5 + left])  # five records, and a little of the sixth
    assert f"cannot read {str(path)!r} to its end: it is cut off" in message(id_reader(tmp_path, batch_size=2))


@pytest.mark.parametrize("read_bytes", [1, 7, 100, 1 << 20])
def test_a_whole_file_is_found_whole(tmp_path: Path, read_bytes: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("efl.data._whole._READ_BYTES", read_bytes)
    write_ids(tmp_path, [5, 1])
    (tmp_path / "part-0-none").write_bytes(b"")
    assert len(flat(read_ids(id_reader(tmp_path, num_epochs=2)))) == 12


def test_a_damaged_record_is_named_in_a_shuffled_order_too(tmp_path: Path) -> None:
    write_ids(tmp_path, [8, 8, 8])
    path = tmp_path / "part-2.tfrecord"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(bytes(data))
    assert f"cannot read record 4 of {str(path)!r}" in message(id_reader(tmp_path, shuffle=True))


def test_a_cut_off_gzip_file_is_named(tmp_path: Path) -> None:
    write_ids(tmp_path, [8])
    plain = (tmp_path / "part-0.tfrecord").read_bytes()
    (tmp_path / "part-1.gz").write_bytes(gzip.compress(plain)[:-40])
    assert str(tmp_path / "part-1.gz") in message(id_reader(tmp_path))


def cut_between_records(path: Path, compression: str, rows: int) -> Path:
    """Writes a file of ``rows`` records and cuts it so that what can be inflated of it ends between two records."""
    plain = write(path.with_suffix(".plain"), [example({"id": i}) for i in range(rows)])
    data, squeeze = plain.read_bytes(), zlib.compressobj(wbits=31 if compression == "GZIP" else 15)
    plain.unlink()
    size = len(data) // rows
    half = squeeze.compress(data[: size * (rows // 2)]) + squeeze.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(half)
    return path


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("compression", ["GZIP", "ZLIB"])
def test_a_compressed_file_cut_between_two_records_is_named(
    tmp_path: Path, compression: str, shuffle: bool, cached: bool
) -> None:
    write_ids(tmp_path, [8])
    path = cut_between_records(tmp_path / "part-1.zlib", compression, 20)
    said = message(id_reader(tmp_path, batch_size=2, shuffle=shuffle), cached)
    assert said == (
        f"run/dataio ({tmp_path}): cannot read {str(path)!r} to its end: it is cut off, though its last record is "
        "whole. Write the file again, or move it away"
    )


@pytest.mark.parametrize("members", [1, 2])
def test_whole_compressed_files_are_inflated_to_their_end_once(tmp_path: Path, members: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("efl.data._whole._READ_BYTES", 100)
    monkeypatch.setattr("efl.data._whole._INFLATED_BYTES", 64)
    plain = write(tmp_path / "x", [example({"id": i}) for i in range(30)])
    (tmp_path / "part-0.gz").write_bytes(gzip.compress(plain.read_bytes()) * members)
    plain.unlink()
    before = _whole._walk.cache_info().misses
    assert flat(read_ids(id_reader(tmp_path, batch_size=7, num_epochs=3))) == [*range(30)] * 3 * members
    assert _whole._walk.cache_info().misses == before + 1


def test_other_datasets_of_a_reader_find_the_cut_too(tmp_path: Path) -> None:
    cut_between_records(tmp_path / "part-1.zlib", "GZIP", 20)
    batch = tf.data.make_one_shot_iterator(id_reader(tmp_path).init_dataset()).get_next()
    with tf.Session() as sess, pytest.raises(tf.errors.UnknownError, match="it is cut off, though its last record is"):
        drain(sess, batch)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("label,feature\n" * 20)
    said = message(id_reader(tmp_path))
    assert f"cannot read record 0 of {str(tmp_path / 'notes')!r}: it is no TFRecord file" in said


@pytest.mark.parametrize("record", [b"garbage", b"\xffgarbage"])  # the second breaks TensorFlow's own message
def test_a_record_that_is_no_example_says_so(tmp_path: Path, record: bytes) -> None:
    write(tmp_path / "x", [record])
    assert "a record is not a serialised tf.train.Example" in message(id_reader(tmp_path))


def test_a_file_that_disappears_is_named(tmp_path: Path) -> None:
    write_ids(tmp_path, [2, 2])
    reader = id_reader(tmp_path)
    ids = reader.read()["id"]
    (tmp_path / "part-1.tfrecord").unlink()
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        with pytest.raises(tf.errors.NotFoundError) as caught:
            sess.run(ids)
    assert f"{tmp_path / 'part-1.tfrecord'} is gone" in str(reader.explain(caught.value))


def test_errors_of_others_and_the_end_are_not_explained(tmp_path: Path) -> None:
    write_ids(tmp_path, [2])
    write_ids(tmp_path / "bad", [2])
    healthy, damaged = id_reader(tmp_path / "bad", name="dataio"), id_reader(tmp_path, name="dataio_2")
    end, explained = failure(healthy)
    assert isinstance(end, tf.errors.OutOfRangeError)
    assert explained is None
    (tmp_path / "part-0.tfrecord").write_text("not a record at all")
    error, explained = failure(damaged)
    assert explained is not None
    assert healthy.explain(error) is None
    with tf.Session() as sess, pytest.raises(tf.errors.InvalidArgumentError) as caught:
        sess.run(tf.debugging.Assert(tf.constant(False), ["mine"]))
    assert healthy.explain(caught.value) is None
    assert damaged.explain(caught.value) is None
    assert DataIO(str(tmp_path), 1, 0, 1).explain(error) is None
