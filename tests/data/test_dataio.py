"""DataIO as a user uses it: what is read, in which order, and in which type."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from efl.data import DataIO
from efl.errors import ConfigError, DataError, ModelError
from tests.data.records import example, write, write_ids


def id_reader(folder: Path, batch_size: int = 4, **options: Any) -> DataIO:
    reader = DataIO(str(folder), batch_size, options.pop("worker_idx", 0), options.pop("worker_num", 1), **options)
    reader.fixedlen_feature("id", 1, tf.int64)
    return reader


def drain(sess: tf.Session, tensor: Any, limit: int = 1000) -> list[Any]:
    """Runs a tensor to the end of the data."""
    batches = []
    for _ in range(limit):
        try:
            batches.append(sess.run(tensor))
        except tf.errors.OutOfRangeError:
            return batches
    raise AssertionError("the data does not end")


def read_ids(reader: DataIO) -> list[list[int]]:
    ids = reader.read()["id"]
    with tf.Session() as sess:
        sess.run(tf.global_variables_initializer())
        reader.initialize_iter(sess)
        return [batch.ravel().tolist() for batch in drain(sess, ids)]


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def test_batches_run_across_files_and_the_last_one_is_short(tmp_path: Path) -> None:
    write_ids(tmp_path, [3, 5, 2])
    assert read_ids(id_reader(tmp_path)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_drop_remainder_leaves_out_the_short_batch_and_fixes_the_shape(tmp_path: Path) -> None:
    write_ids(tmp_path, [3, 5, 2])
    reader = id_reader(tmp_path, drop_remainder=True)
    assert read_ids(reader) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    open_end = id_reader(tmp_path, name="other").read()["id"].shape.as_list()
    fixed = id_reader(tmp_path, name="third", drop_remainder=True).read()["id"].shape.as_list()
    assert (open_end, fixed) == ([None, 1], [4, 1])


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_epochs_are_one_stream_as_repeat_then_batch(tmp_path: Path, prefetch: int) -> None:
    ids = write_ids(tmp_path, [3, 0, 4])
    expected = tf.data.Dataset.from_tensor_slices(ids).repeat(3).batch(4)
    element = tf.data.make_one_shot_iterator(expected).get_next()
    with tf.Session() as sess:
        want = [batch.tolist() for batch in drain(sess, element)]
    assert read_ids(id_reader(tmp_path, num_epochs=3, prefetch=prefetch)) == want


def test_file_nodes_choose_sub_folders_and_all_are_read_without_any(tmp_path: Path) -> None:
    write_ids(tmp_path, [2, 2, 2, 2], ["b/x", "a/y", "c/deep/z", "top"])
    assert flat(read_ids(id_reader(tmp_path))) == [2, 3, 0, 1, 4, 5, 6, 7]  # a/y, b/x, c/deep/z, top
    one = id_reader(tmp_path, name="one")
    one.add_file_node("c")
    assert flat(read_ids(one)) == [4, 5]
    two = id_reader(tmp_path, name="two")
    two.add_file_nodes(["c/", "./b"])
    assert flat(read_ids(two)) == [0, 1, 4, 5]  # sorted by path, not by the order of the calls


def test_hidden_files_and_notes_are_passed_over(tmp_path: Path) -> None:
    write_ids(tmp_path, [2])
    for name in (".hidden", "_SUCCESS", "manifest.json", "README.md"):
        (tmp_path / name).write_text("no record")
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary" / "x.tfrecord").write_text("no record")
    assert read_ids(id_reader(tmp_path)) == [[0, 1]]


def test_workers_share_the_files(tmp_path: Path) -> None:
    write_ids(tmp_path, [2, 2, 2])
    assert flat(read_ids(id_reader(tmp_path, worker_idx=0, worker_num=2))) == [0, 1, 4, 5]
    assert flat(read_ids(id_reader(tmp_path, worker_idx=1, worker_num=2, name="second"))) == [2, 3]


@pytest.mark.parametrize(
    ("name", "compression"),
    [
        ("x.tfrecord", ""), ("x.gz", "GZIP"), ("x.zlib", "ZLIB"), ("x.zz", "ZLIB"),
        ("x.tfrecord", "GZIP"), ("x.tfrecord", "ZLIB"), ("x.gz", ""),
    ],
)  # fmt: skip
def test_compression_is_told_by_content(tmp_path: Path, name: str, compression: str) -> None:
    write(tmp_path / name, [example({"id": i}) for i in range(5)], compression)
    assert read_ids(id_reader(tmp_path)) == [[0, 1, 2, 3], [4]]


@pytest.mark.parametrize("second", [0x01, 0x5E, 0x9C, 0xDA])
def test_a_plain_file_that_begins_like_zlib_is_read_as_plain(tmp_path: Path, second: int) -> None:
    # The length of the first record is the file's first bytes: make it a zlib header.
    length = 0x78 + 256 * second
    bare = len(example({"id": 7, "pad": b""}))
    pad = length - bare
    while len(example({"id": 7, "pad": b"x" * pad})) > length:
        pad -= 1
    record = example({"id": 7, "pad": b"x" * pad})
    path = write(tmp_path / "x", [record])
    assert path.read_bytes()[:2] == bytes([0x78, second])
    assert read_ids(id_reader(tmp_path)) == [[7]]


def test_fixed_and_varying_features_of_all_dtypes(tmp_path: Path) -> None:
    rows = [
        {"i": [1, 2], "f": [0.5, -1.5], "s": [b"a", b"bc"], "flag": [0, 1], "tags": ["u", "v"]},
        {"i": [3, 300], "f": [2.5, 3.5], "s": [b"", b"\xff"], "flag": [1, 1], "tags": []},
        {"i": [5, 6], "f": [4.5, 5.5], "s": [b"e", b"f"], "flag": [0, 0], "tags": ["w"]},
    ]
    rows[1].pop("tags")  # missing: no value
    write(tmp_path / "x", [example(row) for row in rows])
    reader = DataIO(str(tmp_path), 3, 0, 1)
    for name, dtype in (("i", tf.int64), ("f", tf.float32), ("flag", tf.bool), ("s", tf.string)):
        reader.fixedlen_feature(name, 2, dtype)
    reader.varlen_feature("tags", tf.string)
    features = reader.read()
    assert list(features) == ["i", "f", "flag", "s", "tags"]
    for name, dtype in (("i", tf.int32), ("f", tf.float64)):
        other = DataIO(str(tmp_path), 3, 0, 1, name=f"cast_{name}")
        other.fixedlen_feature(name, 2, dtype)
        other.varlen_feature("flag", tf.uint8)
        cast = other.read()
        assert cast[name].dtype == dtype
        assert cast["flag"].dtype == tf.uint8
        with tf.Session() as sess:
            other.initialize_iter(sess)
            got = sess.run(cast)
        np.testing.assert_array_equal(got[name], np.array([row[name] for row in rows]))
        np.testing.assert_array_equal(got["flag"].values, [0, 1, 1, 1, 0, 0])
    assert features["flag"].dtype == tf.bool
    assert isinstance(features["tags"], tf.SparseTensor)
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        got = sess.run(dict(features))
    np.testing.assert_array_equal(got["flag"], [[False, True], [True, True], [False, False]])
    np.testing.assert_array_equal(got["s"], [[b"a", b"bc"], [b"", b"\xff"], [b"e", b"f"]])
    np.testing.assert_array_equal(got["f"], np.array([row["f"] for row in rows], np.float32))
    assert got["tags"].indices.tolist() == [[0, 0], [0, 1], [2, 0]]
    assert got["tags"].values.tolist() == [b"u", b"v", b"w"]
    assert got["tags"].dense_shape.tolist() == [3, 2]


def test_float16_and_the_default_dtype_of_varying_features(tmp_path: Path) -> None:
    write(tmp_path / "x", [example({"h": [0.1], "n": [4, 5]})])
    reader = DataIO(str(tmp_path), 1, 0, 1)
    reader.fixedlen_feature("h", 1, tf.float16)
    reader.varlen_feature("n")
    features = reader.read()
    with tf.Session() as sess:
        reader.initialize_iter(sess)
        got = sess.run(dict(features))
    assert got["h"].dtype == np.float16
    assert got["h"][0, 0] == np.float16(np.float32(0.1))
    assert got["n"].values.dtype == np.int64


def test_every_row_knows_its_block_and_number(tmp_path: Path) -> None:
    write_ids(tmp_path, [3, 2, 4])
    for shuffle in (False, True):
        features = id_reader(tmp_path, num_epochs=2, shuffle=shuffle, name=f"r{shuffle}").read()
        reader = tf.get_collection("efl_readers")[-1]
        start = {"part-0.tfrecord": 0, "part-1.tfrecord": 3, "part-2.tfrecord": 5}
        with tf.Session() as sess:
            reader.initialize_iter(sess)
            batches = drain(sess, [features["id"], features.origin.block, features.origin.row])
        for ids, block, row in batches:
            names = [features.origin.blocks[b] for b in block]
            assert ids.ravel().tolist() == [start[n] + r for n, r in zip(names, row)]


def test_init_dataset_gives_the_same_batches_to_an_iterator_of_ones_own(tmp_path: Path) -> None:
    write_ids(tmp_path, [3, 4])
    dataset = id_reader(tmp_path, num_epochs=2).init_dataset()
    element = tf.data.make_one_shot_iterator(dataset).get_next()
    with tf.Session() as sess:
        batches = drain(sess, element)
    assert [b["id"].ravel().tolist() for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 0], [1, 2, 3, 4], [5, 6]]


def test_hook_starts_the_reader_in_a_monitored_session(tmp_path: Path) -> None:
    write_ids(tmp_path, [3])
    reader = id_reader(tmp_path, 2)
    ids = reader.read()["id"]
    with tf.train.MonitoredSession(hooks=[reader.get_hook()]) as sess:
        assert sess.run(ids).tolist() == [[0], [1]]
        assert sess.run(ids).tolist() == [[2]]


def test_readers_are_found_by_their_scope(tmp_path: Path) -> None:
    from efl import _task_scope as task_scope

    write_ids(tmp_path, [1])
    with task_scope.task_scope(task_scope.MODE.EVAL, "ctr"):
        reader = id_reader(tmp_path)
        reader.read()
    assert tf.get_collection("efl_readers") == [reader]
    assert reader.scope == task_scope.TaskScope(task_scope.MODE.EVAL, "ctr")
    assert [v.op.name for v in tf.global_variables()] == ["efl_reader/eval-ctr/dataio/position"]
    assert not tf.trainable_variables()


def open_files() -> set[str]:
    links = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.add(os.path.basename(os.readlink(f"/proc/self/fd/{entry}")))
        except OSError:
            continue
    return links


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_reading_goes_on_between_steps_only_with_prefetch(tmp_path: Path) -> None:
    # Each file is one batch of records much larger than the read buffer, so that it stays open while being read.
    for part in range(3):
        write(tmp_path / f"part-{part}", [example({"id": i, "pad": b"x" * 400_000}) for i in range(4)])

    def opened_by_itself(prefetch: int) -> bool:
        reader = id_reader(tmp_path, 3, prefetch=prefetch, name=f"ahead{prefetch}")
        ids = reader.read()["id"]
        with tf.Session() as sess:
            reader.initialize_iter(sess)
            sess.run(ids)
            give_up = time.monotonic() + (20 if prefetch else 0.5)
            while time.monotonic() < give_up:
                if "part-1" in open_files():
                    return True
                time.sleep(0.01)
        return False

    assert opened_by_itself(prefetch=1)
    assert not opened_by_itself(prefetch=0)


def test_a_second_reader_of_the_same_name_is_refused(tmp_path: Path) -> None:
    write_ids(tmp_path, [1])
    id_reader(tmp_path).read()
    with pytest.raises(ConfigError, match=r"has another reader named 'dataio'.*give each its own name="):
        id_reader(tmp_path).read()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected an integer of at least 1"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"worker_num": 0}, "worker_num=0"),
        ({"worker_idx": -1}, "worker_idx=-1"),
        ({"worker_idx": 2, "worker_num": 2}, "worker_idx=2, worker_num=2: workers are numbered from 0 to 1"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"num_epochs": None}, "num_epochs=None"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"save_interval": 0}, "save_interval=0"),
        ({"seed": -1}, "seed=-1"),
        ({"name": "a/b"}, "reader name='a/b'"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    settings = {"batch_size": 1, "worker_idx": 0, "worker_num": 1, **options}
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        DataIO(str(tmp_path), **settings)


def test_bad_features_are_refused(tmp_path: Path) -> None:
    reader = DataIO(str(tmp_path), 1, 0, 1)
    with pytest.raises(ConfigError, match=r"no feature is declared"):
        reader.read()
    reader.fixedlen_feature("x", 1)
    with pytest.raises(ConfigError, match=r"'x' is declared twice"):
        reader.varlen_feature("x")
    with pytest.raises(ConfigError, match=r"dim=0: expected a positive integer"):
        reader.fixedlen_feature("y", 0)
    with pytest.raises(ConfigError, match=r"use varlen_feature"):
        reader.fixedlen_feature("y", None)  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ConfigError, match=r"dtype=complex64: a record holds strings, integers and floats"):
        reader.fixedlen_feature("y", 1, tf.complex64)
    with pytest.raises(ConfigError, match=r"feature name ''"):
        reader.varlen_feature("")


def test_calls_out_of_order_are_refused(tmp_path: Path) -> None:
    write_ids(tmp_path, [1])
    reader = id_reader(tmp_path)
    with tf.Session() as sess, pytest.raises(ModelError, match=r"call read\(\) first"):
        reader.initialize_iter(sess)
    reader.read()
    for call in (reader.read, lambda: reader.fixedlen_feature("y", 1), lambda: reader.add_file_node("y")):
        with pytest.raises(ModelError, match=r"read.. was called already"):
            call()


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "leader_train").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"leader_trian' is not a folder.*there is: 'leader_train/?', 'notes.txt'"):
        id_reader(tmp_path / "leader_trian").read()
    with pytest.raises(DataError, match=r"Its parent .* is missing too"):
        id_reader(tmp_path / "no" / "such").read()
    with pytest.raises(DataError, match=r"no TFRecord file in .*leader_train'. In .* there is: nothing"):
        id_reader(tmp_path / "leader_train").read()
    reader = id_reader(tmp_path)
    reader.add_file_node("leader_test")
    with pytest.raises(DataError, match=r"leader_test' is not a folder"):
        reader.read()
    write_ids(tmp_path, [1, 1])
    with pytest.raises(DataError, match=r"worker 2 of 3 has nothing to read: .* holds only 2 file\(s\)"):
        id_reader(tmp_path, worker_idx=2, worker_num=3).read()
    (tmp_path / "leader_train" / "a").touch()
    with pytest.raises(DataError, match=r"all 1 file\(s\) .* are empty: 'a'"):
        id_reader(tmp_path / "leader_train").read()


@pytest.mark.parametrize("node", ["", "/etc", "../x", "a/../../x"])
def test_file_nodes_stay_inside_the_folder(tmp_path: Path, node: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a sub-folder"):
        id_reader(tmp_path).add_file_node(node)


def test_file_nodes_are_a_list_without_repetition(tmp_path: Path) -> None:
    reader = id_reader(tmp_path)
    with pytest.raises(ConfigError, match=r"expected a list"):
        reader.add_file_nodes("ab")
    with pytest.raises(ConfigError, match=r"'a' is added twice"):
        reader.add_file_nodes(["a", "a/"])
