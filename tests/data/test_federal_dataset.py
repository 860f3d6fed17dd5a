"""FederalDataset: records with their block and number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorflow.compat.v1 as tf

from efl.data import FederalDataset
from efl.errors import ConfigError
from tests.data.records import write
from tests.data.test_dataio import drain


def elements(dataset: tf.data.Dataset) -> list[Any]:
    element = tf.data.make_one_shot_iterator(dataset).get_next()
    with tf.Session() as sess:
        return [tuple(getattr(v, "tolist", lambda v=v: v)() for v in e) for e in drain(sess, element)]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [str(write(tmp_path / name, [name.encode() + b"%d" % i for i in range(3)])) for name in ("a", "b")]


def test_every_record_comes_with_its_block_and_number(files: list[str]) -> None:
    a, b = (name.encode() for name in files)
    want = [(b"a0", a, 0), (b"a1", a, 1), (b"a2", a, 2), (b"b0", b, 0), (b"b1", b, 1), (b"b2", b, 2)]
    assert elements(FederalDataset(files)) == want


def test_the_first_block_begins_at_the_sample_index(files: list[str]) -> None:
    got = elements(FederalDataset(files, block_ids=["x", "y"], sample_index=2))
    assert got == [(b"a2", b"x", 2), (b"b0", b"y", 0), (b"b1", b"y", 1), (b"b2", b"y", 2)]
    assert elements(FederalDataset(files, ["x", "y"], sample_index=7))[0] == (b"b0", b"y", 0)


def test_it_is_a_dataset(files: list[str]) -> None:
    dataset = FederalDataset(files[0], "block")
    assert isinstance(dataset, tf.data.Dataset)
    assert [spec.dtype for spec in dataset.element_spec] == [tf.string, tf.string, tf.int64]
    batches = dataset.map(lambda record, block, index: (block, index)).repeat(2).batch(4)
    assert [b[1] for b in elements(batches)] == [[0, 1, 2, 0], [1, 2]]
    element = FederalDataset(files).make_one_shot_iterator().get_next()  # the v1 method too
    with tf.Session() as sess:
        assert sess.run(element)[0] == b"a0"


def test_tensors_are_accepted_and_fed(files: list[str]) -> None:
    names, index = tf.placeholder(tf.string, [None]), tf.placeholder(tf.int32, [])
    iterator = tf.data.make_initializable_iterator(FederalDataset(names, names, index))
    element = iterator.get_next()
    with tf.Session() as sess:
        sess.run(iterator.initializer, {names: files[1:], index: 1})
        assert [e[0] for e in drain(sess, element)] == [b"b1", b"b2"]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    for kind in ("GZIP", "ZLIB"):
        path = write(tmp_path / kind, [b"r"], kind)
        assert elements(FederalDataset([str(path)], [kind], compression_type=kind, buffer_size=64)) == [
            (b"r", kind.encode(), 0)
        ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filenames": []}, "filenames=.*: expected at least one string"),
        ({"filenames": [3]}, "filenames=.*expected at least one string"),
        ({"filenames": ["a", "b"], "block_ids": ["x"]}, "1 block_ids for 2 filenames"),
        ({"filenames": ["a"], "sample_index": -1}, "sample_index=-1"),
        ({"filenames": ["a"], "compression_type": "gz"}, "compression_type='gz': expected one of"),
        ({"filenames": ["a"], "buffer_size": 0}, "buffer_size=0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FederalDataset(**arguments)


def test_filenames_of_another_type_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected strings of rank 0 or 1, got int32"):
        FederalDataset(tf.constant([1]))
