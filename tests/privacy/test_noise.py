"""Noise: Gaussian, secret, the same for the same release and for no other; the ledger forgets nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from efl.errors import CheckpointError, ConfigError
from efl.privacy._vector import one_vector, parts_of
from efl.privacy.noise import Ledger, Phase, Releases, Seed, gaussian, ledger, stream
from efl.privacy.noise.ahead import Ahead

KEY = bytes(range(32))
RELEASE = {"step": 3, "group": "train", "clip": 2.0, "noise_multiplier": 1.5, "rows": 8}


def releases() -> Releases:
    return Releases(Seed(KEY), Ledger.in_memory())


# ---- the stream


def test_variates_are_standard_normal() -> None:
    stats = pytest.importorskip("scipy.stats")  # comes with dp-accounting
    z = gaussian(KEY, 2_000_001)
    assert z.shape == (2_000_001,) and z.dtype == np.float64
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / z.size)
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96 / z.size)
    assert stats.kstest(z[:200_000], "norm").pvalue > 1e-4
    tail = (abs(z) > 4).sum()
    assert abs(tail - z.size * 2 * stats.norm.sf(4)) < 4 * np.sqrt(z.size * 2 * stats.norm.sf(4))
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4 / np.sqrt(z.size)
    half = z.size // 2
    assert abs(np.corrcoef(z[:half] ** 2, z[half : 2 * half] ** 2)[0, 1]) < 4 / np.sqrt(half)


def test_no_layer_of_the_ziggurat_has_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = pytest.importorskip("scipy.stats")
    layers = stream._layers()
    ends = np.array([0.0, *sorted(layers.inner)[1:], np.inf])
    # Of one area, and the last one closes.
    areas = 2.0**63 * layers.widths * layers.rises
    np.testing.assert_allclose(areas, areas[0], rtol=1e-11)
    assert len(areas) == 1024 and areas.sum() > np.sqrt(np.pi / 2)

    def chance(z: np.ndarray) -> float:
        """Of so many in each of the outermost layers, were z normal; much of what is in them is at their rims."""
        found, expected = np.histogram(abs(z), ends)[0][-40:], 2 * z.size * -np.diff(stats.norm.sf(ends))[-40:]
        return float(stats.chi2.sf(((found - expected) ** 2 / expected).sum(), len(found)))

    z = gaussian(KEY, 10_000_000)
    tail = abs(z[abs(z) > layers.end])
    assert chance(z) > 1e-4
    assert stats.kstest(tail, lambda x: 1 - stats.norm.sf(x) / stats.norm.sf(layers.end)).pvalue > 1e-4
    assert abs((z > layers.end).sum() - len(tail) / 2) < 4 * np.sqrt(len(tail)) / 2
    monkeypatch.setattr(stream._Ziggurat, "_settled", lambda self, values, places: values)
    assert chance(gaussian(KEY, 10_000_000)) < 1e-10


@pytest.mark.parametrize("count", [0, 1, 2, 131_071, 131_072, 131_073])
def test_any_count_and_always_the_same(count: int) -> None:
    assert gaussian(KEY, count).shape == (count,)
    np.testing.assert_array_equal(gaussian(KEY, count), gaussian(KEY, count))


# ---- releases


def test_noise_has_the_deviation_of_clip_times_multiplier() -> None:
    values = np.full(200_000, 7.0, np.float32)
    out = releases().noised(values, **RELEASE)
    assert out.dtype == np.float32
    assert abs((out - values).std() - 3.0) < 0.03


def test_the_same_release_has_the_same_noise_and_is_counted_once() -> None:
    made, values = releases(), np.arange(1000, dtype=np.float32)
    first = made.noised(values, **RELEASE)
    np.testing.assert_array_equal(made.noised(values.copy(), **RELEASE), first)
    terms = {"group": "train", "clip": 2.0, "noise_multiplier": 1.5}
    step = RELEASE["step"]
    (phase,) = made.ledger.phases()
    once = (step, step, 1)
    assert phase == Phase(terms, 1, 8, 8, {1: 1}, {2: 1}, 0, step, step, (once,), (once, once))


@pytest.mark.parametrize(
    "change",
    [{"step": 4}, {"group": "x"}, {"clip": 2.1}, {"noise_multiplier": 1.4}, {"rows": 9}, "value", "dtype", "seed"],
)
def test_any_change_draws_fresh_noise(change: object) -> None:
    """The attack: a peer has us repeat a step with another activation, and subtracts the two answers."""
    values = np.zeros(100_000, np.float32)
    made = releases()
    first = made.noised(values, **RELEASE)
    what, again = dict(RELEASE), values.copy()
    if isinstance(change, dict):
        what.update(change)
    elif change == "value":
        again[-1] = np.nextafter(np.float32(0), np.float32(1))  # the smallest change there is
    elif change == "dtype":
        again = again.astype(np.float64)
    else:
        made = Releases(Seed(KEY[::-1]), made.ledger)
    second = made.noised(again, **what)
    deviations = what["clip"] * what["noise_multiplier"], 3.0
    assert abs((second - first).std() / np.hypot(*deviations) - 1) < 0.02
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    assert sum(phase.releases for phase in made.ledger.phases()) == 2


def test_a_replay_after_a_restart_has_the_same_noise_and_nothing_else_has(tmp_path: Path) -> None:
    values = [np.full(1000, float(step), np.float32) for step in range(4)]
    answers = []
    for _ in range(2):
        made = Releases(Seed.load_or_create(tmp_path / "seed")[0], Ledger(tmp_path / "ledger"))
        answers.append([made.noised(v, **{**RELEASE, "step": step}) for step, v in enumerate(values)])
        answers[-1].append(made.noised(values[0] + len(answers), **{**RELEASE, "step": 0}))
        made.ledger.close()
    for first, again in zip(answers[0][:4], answers[1][:4], strict=True):
        np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(answers[0][4], answers[1][4])[0, 1]) < 0.2
    assert [p.releases for p in Ledger(tmp_path / "ledger").phases()] == [6]


def test_what_is_drawn_ahead_is_what_would_be_drawn() -> None:
    """Groups of two sizes by turns, then another order: every release has noise of its own, of the right deviation."""
    made = releases()
    seen = []
    for step in range(12):
        groups = [("a", 5000), ("b", 300)] if step < 8 else [("b", 300), ("b2", 5000), ("a", 4000)]
        for group, size in groups:
            out = made.noised(np.zeros(size, np.float32), **{**RELEASE, "step": step, "group": group})
            assert abs(out.std() / 3.0 - 1) < 0.2
            seen.append(out[:300])
    correlations = np.corrcoef(np.stack(seen)) - np.eye(len(seen))
    assert abs(correlations).max() < 0.35


def test_small_draws_are_made_several_in_a_row_each_from_its_own_key() -> None:
    def key_of(stream: bytes, number: int) -> bytes:
        return hashlib.sha256(stream + bytes([number])).digest()

    ahead, keys = Ahead(key_of), []
    for step in range(20):
        for group, size in ("a", 300), ("b", 50):
            size += 7 * (step == 11)  # as a last batch has: what was foreseen does not fit
            drawn = ahead.next()
            foreseen = ahead._ready.get(drawn[1], (0, None))[0]
            if step not in (0, 1, 11, 12):  # where it learns
                assert foreseen == size
            keys.append(key_of(*drawn))
            np.testing.assert_array_equal(ahead.take(drawn, size, group), gaussian(keys[-1], size))
            assert foreseen == size or not ahead._ready
            ahead.begin(group)
    assert len(set(keys)) == 40 and len(ahead._ready) > 1


def test_a_large_draw_is_made_alone() -> None:
    ahead = Ahead(lambda stream, number: KEY)
    for _ in range(3):
        ahead.take(ahead.next(), 700_000, "a")
        ahead.begin("a")
    assert len(ahead._ready) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_draws_noise_of_its_own() -> None:
    made = releases()
    made.noised(np.zeros(4, np.float32), **RELEASE)
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, made.noised(np.ones(4, np.float32), **RELEASE).tobytes())
        os._exit(0)
    os.wait()
    theirs = np.frombuffer(os.read(reading, 64), np.float32)
    assert not np.allclose(theirs, made.noised(np.ones(4, np.float32), **RELEASE))


def test_no_multiplier_no_noise_and_the_ledger_shows_it() -> None:
    made, values = releases(), np.arange(5, dtype=np.float32)
    np.testing.assert_array_equal(made.noised(values, **{**RELEASE, "noise_multiplier": 0.0}), values)
    assert made.ledger.phases()[0].terms["noise_multiplier"] == 0.0


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise for float16 \(train\): expected float32 or float64"):
        releases().noised(np.zeros(3, np.float16), **RELEASE)


def test_what_is_released_together_is_one_vector_and_comes_apart_again() -> None:
    held = [np.arange(6, dtype=np.float64).reshape(2, 3), np.array(7.0), np.empty((0, 4)), np.arange(2.0)]
    vector = one_vector(held)
    np.testing.assert_array_equal(vector, [0, 1, 2, 3, 4, 5, 7, 0, 1])
    for part, array in zip(parts_of(vector, held), held, strict=True):
        np.testing.assert_array_equal(part, array)
        assert np.shares_memory(part, vector) == (array.size > 0)
    vector[:] = 0
    assert held[1] == 7.0  # what was handed over stays as it is: it is the graph's
    assert one_vector([]).size == 0


# ---- the seed


def test_a_seed_is_kept_where_only_its_owner_reads_it(tmp_path: Path) -> None:
    seed, is_new = Seed.load_or_create(tmp_path / "seed")
    assert is_new and (tmp_path / "seed").stat().st_mode & 0o777 == 0o600
    again, is_new = Seed.load_or_create(tmp_path / "seed")
    assert not is_new and again.key(b"x") == seed.key(b"x")
    assert Seed.fresh().key(b"x") != seed.key(b"x")
    assert os.listdir(tmp_path) == ["seed"]


def test_a_seed_shows_itself_nowhere(tmp_path: Path) -> None:
    secret = bytes(range(100, 132))
    seed = Seed(secret)
    assert all(text == "Seed(<secret>)" for text in (repr(seed), str(seed), f"{seed}"))
    with pytest.raises(TypeError, match="is not pickled"):
        pickle.dumps(seed)
    made = Releases(seed, Ledger(tmp_path / "ledger"))
    made.noised(np.zeros(4, np.float32), **RELEASE)
    made.ledger.close()
    assert all(secret not in path.read_bytes() for path in (tmp_path / "ledger").iterdir())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.chmod(0o644), r"can be read by others \(mode 644\).*chmod 600"),
        (lambda p: p.write_bytes(b"short"), "has 5 bytes, expected 32: delete it"),
        (lambda p: (p.rename(p.with_name("other")), p.symlink_to(p.with_name("other"))), "expected a regular file"),
    ],
)
def test_a_seed_that_cannot_be_trusted(tmp_path: Path, spoil: object, message: str) -> None:
    path = tmp_path / "seed"
    Seed.load_or_create(path)
    spoil(path)
    with pytest.raises(ConfigError, match=message):
        Seed.load_or_create(path)


# ---- the ledger


def test_phases_are_counted_across_openings_and_no_rollback_rewinds_them(tmp_path: Path) -> None:
    for opening in range(2):
        held = Ledger(tmp_path / "ledger")
        for step in range(5):
            # The second opening takes steps 0 to 4 again: the first three identically.
            digest = bytes([step, 0 if step < 3 else opening]) + bytes(14)
            drawn = bytes([opening]) + bytes(15), step
            given = held.enter({"group": "a", "sigma": 1.0}, step, 8 + step, digest, drawn)
            assert given == (drawn if step >= 3 else (bytes(16), step))
        held.enter({"group": "b", "sigma": float(opening)}, 5, 1, bytes([99, opening]) + bytes(14), drawn)
        held.close()
    counted = [(p.terms["group"], p.releases, p.rows, p.all_rows) for p in Ledger(tmp_path / "ledger").phases()]
    assert counted == [("a", 7, 12, 8 + 9 + 10 + 11 + 12), ("b", 1, 1, 1), ("b", 1, 1, 1)]
    often = [(dict(p.often), dict(p.tried)) for p in Ledger(tmp_path / "ledger").phases()]
    assert often == [({1: 3, 2: 2}, {2: 5}), ({1: 1}, {1: 1}), ({1: 1}, {1: 1})]


def test_nothing_released_is_missing_after_kill_9(tmp_path: Path) -> None:
    program = f"""
        import sys, numpy as np
        from pathlib import Path
        from efl.privacy.noise import Ledger, Releases, Seed
        made = Releases(Seed.fresh(), Ledger(Path({str(tmp_path / "ledger")!r})))
        for step in range(10**6):
            made.noised(np.zeros(4, np.float32), step=step, group="g", clip=1.0, noise_multiplier=1.0, rows=1)
            print(step, flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 1500:  # beyond one reservation
            break
    process.send_signal(signal.SIGKILL)
    left = process.stdout.read().splitlines()
    released = 1 + int(([line.strip(), *left])[-1])
    process.wait()
    counted = sum(phase.releases for phase in Ledger(tmp_path / "ledger").phases())
    assert released <= counted <= released + 1


def test_after_a_crash_of_the_machine_what_was_reserved_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = Ledger(tmp_path / "ledger")
    for step in range(3):
        held.enter({"group": "a"}, step, 8, step.to_bytes(16, "little"), (bytes(16), step))
    monkeypatch.setattr(ledger, "_BOOT_ID", tmp_path / "another")
    (tmp_path / "another").write_text("11111111-2222-3333-4444-555555555555\n")
    for _ in range(2):  # that is settled once
        assert [(p.releases, p.all_rows) for p in Ledger(tmp_path / "ledger").phases()] == [(1000, 8000)]
    assert caplog.text.count("the machine went down with up to 997 releases not yet on disk") == 1


def test_after_a_crash_before_the_first_release_was_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Ledger(tmp_path / "ledger")
    held.enter({"group": "a"}, 0, 8, bytes(16), (bytes(16), 0))
    path = tmp_path / "ledger" / "releases"
    os.truncate(path, path.stat().st_size // 2)  # the reservation is there, the release is not
    (tmp_path / "another").write_text("11111111-2222-3333-4444-555555555555\n")
    monkeypatch.setattr(ledger, "_BOOT_ID", tmp_path / "another")
    assert [(p.terms, p.releases) for p in Ledger(tmp_path / "ledger").phases()] == [({"group": "a"}, 1000)]


def test_a_ledger_that_was_closed_counts_what_was_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Ledger(tmp_path / "ledger")
    held.enter({"group": "a"}, 0, 8, bytes(16), (bytes(16), 0))
    held.close()
    (tmp_path / "another").write_text("11111111-2222-3333-4444-555555555555\n")
    monkeypatch.setattr(ledger, "_BOOT_ID", tmp_path / "another")
    assert [p.releases for p in Ledger(tmp_path / "ledger").phases()] == [1]


def test_a_torn_record_counts_and_damage_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = Ledger(tmp_path / "ledger")
    for step in range(3):
        held.enter({"group": "a"}, step, 8, step.to_bytes(16, "little"), (bytes(16), step))
    path = tmp_path / "ledger" / "releases"
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    for _ in range(2):
        assert [p.releases for p in Ledger(tmp_path / "ledger").phases()] == [1000]
    assert caplog.text.count("its last record is torn") == 1
    path.write_bytes(data[:140] + bytes([data[140] ^ 1]) + data[141:])
    with pytest.raises(CheckpointError, match=r"releases, record 2: damaged, so nobody knows what was released"):
        Ledger(tmp_path / "ledger")


def test_what_cannot_be_entered_is_not_released(tmp_path: Path) -> None:
    made = Releases(Seed(KEY), Ledger(tmp_path / "ledger"))
    os.close(made.ledger._file)
    made.ledger._file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(
        CheckpointError, match=r"cannot be written \(No space left on device\), so nothing may be released"
    ):
        made.noised(np.zeros(4, np.float32), **RELEASE)
    assert made.ledger.phases() == []
