"""example/mnist/generate_data.py."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
from scipy import ndimage
from sklearn import datasets

from tests.example.conftest import EXAMPLE, load

generate_data = load(EXAMPLE / "mnist" / "generate_data.py")


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def _write_mnist(folder, zipped=False, dotted=False):
    """A tiny data set in MNIST's format; returns part -> (images, labels)."""
    rng = np.random.default_rng(0)
    parts = {}
    for part, prefix, count in (("train", "train", 7), ("test", "t10k", 3)):
        images, labels = rng.integers(0, 256, (count, 28, 28)), rng.integers(0, 10, count)
        parts[part] = images, labels
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            name = name.replace("-idx", ".idx") if dotted else name
            content = _idx(array)
            (folder / (name + (".gz" if zipped else ""))).write_bytes(gzip.compress(content) if zipped else content)
    return parts


@pytest.mark.parametrize(("zipped", "dotted"), [(False, False), (True, False), (False, True)])
def test_halves_of_idx_files_fit_together(tmp_path, read_records, zipped, dotted):
    parts = _write_mnist(tmp_path, zipped, dotted)
    out = tmp_path / "out"
    generate_data.main(["--data", str(tmp_path), "--out", str(out), "--blocks", "2"])
    seen = set()
    for part, (images, labels) in parts.items():
        leader, follower = (list(read_records(out / f"{role}_{part}")) for role in ("leader", "follower"))
        assert len(leader) == len(follower) == len(labels)
        for left, right, image, label in zip(leader, follower, images, labels):
            assert left["sample_id"] == right["sample_id"]
            assert left["label"] == right["label"] == [float(label)]
            halves = [np.reshape(half["feature"], (28, 14)) for half in (left, right)]
            np.testing.assert_array_equal(np.concatenate(halves, axis=1), image)
            seen.add(left["sample_id"][0])
    assert len(seen) == 10  # no id twice, in training or test


def test_both_parties_have_files_of_the_same_names_with_the_same_ids(tmp_path, read_records):
    generate_data.main(["--out", str(tmp_path), "--limit", "50", "--blocks", "3"])
    for part in ("train", "test"):
        files = [sorted(p.name for p in (tmp_path / f"{role}_{part}").iterdir()) for role in ("leader", "follower")]
        assert files[0] == files[1] == [f"part-0000{i}.tfrecord" for i in range(3)]
        ids = [[r["sample_id"] for r in read_records(tmp_path / f"{role}_{part}")] for role in ("leader", "follower")]
        assert ids[0] == ids[1] and len(ids[0]) == 50


def test_without_data_the_digits_are_enlarged(tmp_path, capsys, read_records):
    generate_data.main(["--out", str(tmp_path)])
    assert "scikit-learn's digits" in capsys.readouterr().out
    train, test = (list(read_records(tmp_path / f"leader_{part}")) for part in ("train", "test"))
    assert len(train) + len(test) == 1797 and 300 < len(test) < 400
    pixels = np.array([r["feature"] for r in train])
    assert pixels.shape[1] == 392 and pixels.min() == 0 and pixels.max() == 255
    labels = [r["label"][0] for r in train]
    assert set(labels) == set(range(10))
    digits = datasets.load_digits()
    assert labels[:4] == digits.target[:4].tolist() and labels[4] == digits.target[5]  # every fifth is for testing


def test_enlarging_is_linear_interpolation():
    small = datasets.load_digits().images[:20]
    large = generate_data.enlarge(small)
    assert large.shape == (20, 28, 28) and large.dtype == np.uint8
    expected = ndimage.zoom(small * (255 / 16), (1, 3.5, 3.5), order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(large, expected, atol=0.5001)  # rounded to whole grey values


def test_a_second_run_with_fewer_blocks_leaves_no_old_file(tmp_path, read_records):
    generate_data.main(["--out", str(tmp_path), "--limit", "20", "--blocks", "5"])
    generate_data.main(["--out", str(tmp_path), "--limit", "20", "--blocks", "2"])
    assert len(list(read_records(tmp_path / "leader_train"))) == 20


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-5], "its header states .* bytes follow"),
        (lambda content: content + b"x", "its header states .* bytes follow"),
        (lambda content: b"\x89PNG" + content, "not an IDX file of bytes"),
        (lambda content: content[:9], "ends within its header"),
        (lambda content: b"", "begins with nothing"),
        (lambda content: _idx(np.zeros((7, 27, 28))), "train images of shape"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    _write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SystemExit, match=f"generate_data.py: .*{message}"):
        generate_data.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_missing_file_is_named(tmp_path):
    _write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(SystemExit, match="holds none of t10k-labels-idx1-ubyte"):
        generate_data.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_damaged_gzip_is_refused(tmp_path):
    _write_mnist(tmp_path, zipped=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(SystemExit, match="generate_data.py: "):
        generate_data.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
