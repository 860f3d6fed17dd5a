"""Encrypted layers through deaths: shares are of one another again, and the run ends as it would have, to noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from efl.paillier import PrivateKey
from tests.faults.runs import TRAIN, Death, Federation, program, write_data

SGD = "tf.train.GradientDescentOptimizer(0.05)"
FIRST = "lambda shape, dtype=tf.float32, partition_info=None: tf.constant(start_value('hetero', shape))"
LAYERS = {
    "dense": (
        f"EncryptPassiveDense(m.communicator, 5, 5, 'public_key.json', 5, 0.05, {FIRST}, momentum=0.5)",
        "EncryptActiveDense(m.communicator, 5, 'public_key.json', 'private_key.json', 5, 0.05, momentum=0.5)",
    ),
    "concat": (
        f"EncryptPassiveLayer(m.communicator, 5, 5, 'public_key.json', 0.05, {FIRST})",
        "EncryptActiveLayer(m.communicator, 5, 'public_key.json', 'private_key.json', 0.05)",
    ),
}
SHARES = """
raw = model.session.raw_session()
NAMES = "hetero/share", "hetero/tag", "hetero/velocity"
with raw.graph.as_default():
    shares = raw.run({v.op.name: v for v in tf.global_variables() if v.op.name in NAMES})
np.savez(f"{ROLE}.npz", **model.get_weights(), **shares)
"""


def script(kind: str) -> str:
    passive, active = LAYERS[kind]
    text = program(TRAIN, SGD, save=3)
    text = text.replace('m.send("own", own, require_grad=training)', f"own = efl.privacy.{active}(own)")
    joined = f"h = efl.privacy.{passive}(dense(s['x'], 4, 5, 'own', tf.nn.relu))\n    h = within(h, mode)"
    start, end = text.index("    other = tf.reshape("), text.index("    logits =")
    text = text[:start] + f"    {joined}\n" + text[end:]
    width = 5 if kind == "dense" else 10
    text = text.replace('dense(h, 10, 3, "top")', f'dense(h, {width}, 3, "top")')
    return text.replace('np.savez(f"{ROLE}.npz", **model.get_weights())', SHARES)


@pytest.fixture(scope="module")
def pair() -> PrivateKey:
    return PrivateKey.generate(2048)


def run(folder: Path, pair: PrivateKey, kind: str, deaths: dict[str, list[Death]]) -> dict[str, np.ndarray]:
    """Weights of both, with the shared ones put together."""
    folder.mkdir()
    write_data(folder)
    pair.save(folder / "private_key.json")
    pair.public.save(folder / "public_key.json")
    federation = Federation(folder, script(kind))
    federation.run(deaths)
    assert sum(federation.starts.values()) == 2 + sum(map(len, deaths.values())), federation.told()
    held = {}
    for role in ("leader", "follower"):
        with np.load(folder / f"{role}.npz") as file:
            held.update({f"{role}/{name}": file[name] for name in file.files})
    assert np.array_equal(held.pop("leader/hetero/tag"), held.pop("follower/hetero/tag"))
    whole = {}
    for name in ("share", "velocity") if kind == "dense" else ("share",):
        one, two = held.pop(f"leader/hetero/{name}"), held.pop(f"follower/hetero/{name}")
        assert np.abs(one).max() > 1 << 55  # a share of its own, and no weights
        whole[f"hetero/{name}"] = (one + two) * 2.0**-16
    return {**held, **whole}


@pytest.mark.parametrize("kind", ["dense", pytest.param("concat", marks=pytest.mark.full)])
def test_deaths_leave_the_run_as_it_was(tmp_path: Path, pair: PrivateKey, kind: str) -> None:
    expected = run(tmp_path / "undisturbed", pair, kind, {})
    deaths = {
        "leader": [Death("after", "train", 5), Death("within", "train", 11)],
        "follower": [Death("sent", "train", 8), Death("saving", "train", 15)],
    }
    got = run(tmp_path / "disturbed", pair, kind, deaths)
    assert set(got) == set(expected)
    for name, value in expected.items():
        # A step's noise is 2.4e-4 in Z, and moves a weight by far less.
        np.testing.assert_allclose(got[name], value, atol=1e-3, rtol=0, err_msg=name)
