"""example/criteo/generate_data.py."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.example.conftest import EXAMPLE, load

generate_data = load(EXAMPLE / "criteo" / "generate_data.py")

NUMBERS = [2, 3, 4, 5, 6, 7, 8, 9, 11, 13]
CATEGORIES = [*range(1, 19), 21, 23, 24]


def _rows(count, seed=0, missing=0.2):
    """Random rows of 40 texts in Criteo's format."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        numbers = [str(rng.integers(0, 50 * i)) for i in range(1, 14)]
        categories = [f"{rng.integers(0, 3 + i):08x}" for i in range(26)]
        fields = ["" if rng.random() < missing else text for text in numbers + categories]
        rows.append([str(rng.integers(0, 2)), *fields])
    return rows


def _text(rows, separator="\t"):
    return "".join(separator.join(row) + "\n" for row in rows)


def _generate(data, out, *more):
    generate_data.main(["--data", str(data), "--out", str(out), *more])


def _both(read_records, out, part):
    return [list(read_records(out / f"{role}_{part}")) for role in ("leader", "follower")]


def test_columns_statistics_and_counts(tmp_path, read_records):
    rows = _rows(200)
    file = tmp_path / "train.txt"
    file.write_text(_text(rows))
    _generate(file, tmp_path)

    train = [row for i, row in enumerate(rows) if i % 10 != 9]
    test = [row for i, row in enumerate(rows) if i % 10 == 9]
    dense = np.array([[float(row[i]) if row[i] else np.nan for i in NUMBERS] for row in train])
    mean, deviation = np.nanmean(dense, axis=0), np.nanstd(dense, axis=0)
    for part, expected in (("train", train), ("test", test)):
        leader, follower = _both(read_records, tmp_path, part)
        assert len(leader) == len(follower) == len(expected)
        for left, right, row in zip(leader, follower, expected):
            assert left["sample_id"] == right["sample_id"]
            assert set(left) == {"sample_id", "dense", "label"} and left["label"] == [int(row[0])]
            scores = [(float(row[i]) - m) / d if row[i] else 0 for i, m, d in zip(NUMBERS, mean, deviation)]
            np.testing.assert_allclose(left["dense"], scores, rtol=1e-5, atol=1e-6)
            values = [right[f"feature{i}"] for i in range(21)]
            assert values == [[(row[13 + i] or "missing").encode()] for i in CATEGORIES]
            assert len(right) == 22

    distinct = [len({row[13 + i] for row in train}) for i in CATEGORIES]
    assert json.loads((tmp_path / "id_nums.json").read_text()) == distinct


def test_statistics_of_many_chunks_are_those_of_all_rows():
    rng = np.random.default_rng(0)
    numbers = rng.normal(1e6, 3.0, (10_000, 10))  # large beside their deviation: a plain sum of squares would cancel
    numbers[rng.random(numbers.shape) < 0.3] = np.nan
    statistics = generate_data.Statistics(10)
    for row in numbers:
        statistics.add(generate_data.Row(0, row.tolist(), []))
    probe = numbers[0]
    expected = np.nan_to_num((probe - np.nanmean(numbers, axis=0)) / np.nanstd(numbers, axis=0))
    np.testing.assert_allclose(statistics.standardize(probe.tolist()), expected, rtol=1e-7)


def test_a_column_that_never_varies_becomes_0():
    statistics = generate_data.Statistics(10)
    for _ in range(3):
        statistics.add(generate_data.Row(0, [5.0] * 9 + [float("nan")], []))
    assert statistics.standardize([5.0] * 10).tolist() == [0.0] * 9 + [5.0]


@pytest.mark.parametrize("kind", ["comma", "header", "gzip", "crlf"])
def test_other_spellings_of_the_format_give_the_same_records(tmp_path, read_records, kind):
    rows = _rows(40)
    plain, other = tmp_path / "plain.txt", tmp_path / "other.csv"
    plain.write_text(_text(rows))
    header = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    if kind == "gzip":
        other = tmp_path / "other.txt.gz"
        other.write_bytes(gzip.compress(_text(rows).encode()))
    elif kind == "crlf":
        other.write_bytes(_text(rows).replace("\n", "\r\n").encode())
    else:
        other.write_text(_text([header, *rows] if kind == "header" else rows, ","))
    _generate(plain, tmp_path / "a")
    _generate(other, tmp_path / "b")
    for part in ("train", "test"):
        assert _both(read_records, tmp_path / "a", part) == _both(read_records, tmp_path / "b", part)


def test_a_folder_with_a_labelled_test_file_uses_it(tmp_path, read_records):
    (tmp_path / "some_train.csv").write_text(_text(_rows(30)))
    (tmp_path / "some_test.csv").write_text(_text(_rows(5, seed=1)))
    _generate(tmp_path, tmp_path / "out")
    assert [len(_both(read_records, tmp_path / "out", part)[0]) for part in ("train", "test")] == [30, 5]


def test_kaggles_test_file_without_labels_is_left_alone(tmp_path, read_records):
    (tmp_path / "train.txt").write_text(_text(_rows(30)))
    (tmp_path / "test.txt").write_text(_text([row[1:] for row in _rows(5)]))
    _generate(tmp_path, tmp_path / "out")
    assert [len(_both(read_records, tmp_path / "out", part)[0]) for part in ("train", "test")] == [27, 3]


def test_limits_bound_rows_and_tables(tmp_path, read_records):
    (tmp_path / "train.txt").write_text(_text(_rows(100)))
    _generate(tmp_path, tmp_path / "out", "--limit", "50", "--max_ids", "4")
    assert len(_both(read_records, tmp_path / "out", "train")[0]) == 45
    assert max(json.loads((tmp_path / "out" / "id_nums.json").read_text())) == 4


def test_blocks_have_the_same_names_and_rows_on_both_sides(tmp_path, read_records):
    (tmp_path / "train.txt").write_text(_text(_rows(50)))
    _generate(tmp_path, tmp_path / "out", "--blocks", "3")
    for part in ("train", "test"):
        leader, follower = (tmp_path / "out" / f"{role}_{part}" for role in ("leader", "follower"))
        names = sorted(p.name for p in leader.iterdir())
        assert names == sorted(p.name for p in follower.iterdir()) and len(names) == 3
        assert [r["sample_id"] for r in read_records(leader)] == [r["sample_id"] for r in read_records(follower)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row[:-1], r"line 3: 39 fields, expected 40"),
        (lambda row: [*row[:2], "many", *row[3:]], r"line 3: could not convert string to float: 'many'"),
        (lambda row: ["2", *row[1:]], r"line 3: a label other than 0 and 1"),
        (lambda row: [*row[:2], "inf", *row[3:]], r"line 3: .* infinite"),
    ],
)
def test_a_bad_row_is_named(tmp_path, spoil, message):
    rows = _rows(10)
    rows[2] = spoil(rows[2])
    (tmp_path / "train.txt").write_text(_text(rows))
    with pytest.raises(SystemExit, match=f"generate_data.py: .*train.txt, {message}"):
        _generate(tmp_path, tmp_path / "out")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "train.txt").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(SystemExit, match="no text in the Criteo format"):
        _generate(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("zipped", "message"), [(True, "no text in the Criteo format"), (False, "Not a gzipped file")])
def test_a_zipped_file_that_is_no_table_is_named(tmp_path, zipped, message):
    content = bytes(range(256))
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(SystemExit, match=f"generate_data.py: .*train.txt.gz: {message}"):
        _generate(tmp_path, tmp_path / "out")


def test_nothing_to_read_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="generate_data.py: .*nowhere does not exist$"):
        _generate(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(SystemExit, match="expected train.txt"):
        _generate(tmp_path, tmp_path / "out")
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "train.tar.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"\x00\x00\x08\xff"))
    with pytest.raises(SystemExit, match="expected train.txt, .*--data may also name the file itself"):
        _generate(tmp_path, tmp_path / "out")
    (tmp_path / "train.txt").write_text(_text(_rows(5)))  # too few for a test row
    with pytest.raises(SystemExit, match="5 rows to train on and 0 to test on"):
        _generate(tmp_path, tmp_path / "out")


def test_without_data_a_real_data_set_of_the_same_shape(tmp_path, capsys, read_records):
    generate_data.main(["--out", str(tmp_path)])
    assert "breast cancer" in capsys.readouterr().out
    leader, follower = _both(read_records, tmp_path, "train")
    assert len(leader) == len(follower) == 513
    assert len(leader[0]["dense"]) == 10 and len(follower[0]) == 22
    dense = np.array([r["dense"] for r in leader])
    np.testing.assert_allclose(dense.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(dense.std(0), 1, atol=1e-5)


@pytest.mark.skipif("EFL_TEST_DATA" not in os.environ, reason="EFL_TEST_DATA names no folder with real data")
def test_the_columns_left_out_are_those_that_criteo_mostly_lacks():
    file, _ = generate_data.find_files(Path(os.environ["EFL_TEST_DATA"]) / "criteo")
    rows = [line.rstrip("\n").split("\t") for line in file.read_text().splitlines()]
    missing = np.mean([[field == "" for field in row] for row in rows], axis=0)
    kept = {0, *NUMBERS, *(13 + i for i in CATEGORIES)}
    assert {i for i, share in enumerate(missing) if share < 0.3} == kept
