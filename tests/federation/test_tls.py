"""A federated run with certificates: the weights of one process, and each wrong file told before the data is read."""

import os
from pathlib import Path

import pytest

from efl.cli.certs import write
from tests.federation.harness import assert_same_weights, run_both
from tests.federation.problem import load
from tests.federation.test_ends import both
from tests.federation.test_parity import joint, whole

FILES = {
    "my_certs": "EFL_MY_CERTS_FILENAME",
    "my_key": "EFL_MY_KEY_FILENAME",
    "peer_certs": "EFL_PEER_CERTS_FILENAME",
}
BY_ARGUMENT = "efl.FederalModel(**{n: f'certs/{ROLE}/{n}.pem' for n in ('my_certs', 'my_key', 'peer_certs')})"
BY_ENVIRONMENT = "(os.environ.update({v: f'certs/{ROLE}/{n}.pem' for n, v in FILES.items()}), efl.FederalModel())[1]"


@pytest.mark.parametrize("made", [BY_ARGUMENT, BY_ENVIRONMENT], ids=["argument", "environment"])
def test_a_run_with_certificates_ends_with_the_weights_of_one_process(tmp_path: Path, made: str) -> None:
    write(tmp_path / "certs")
    code = both("train()", {"rows": 48, "epochs": 1}, {"rows": 48, "epochs": 1})
    code = f"import os\nFILES = {FILES!r}\n" + code.replace("efl.FederalModel()", made)
    assert made in code
    run_both(tmp_path, code, code)
    got = {**load(tmp_path / "leader.npz"), **load(tmp_path / "follower.npz")}
    assert_same_weights(got, joint(whole, steps=3))


def test_a_run_with_anothers_certificate_ends_both_in_words(tmp_path: Path) -> None:
    write(tmp_path / "certs", ["leader", "follower", "other"])
    os.rename(tmp_path / "certs" / "follower", tmp_path / "certs" / "gone")
    os.rename(tmp_path / "certs" / "other", tmp_path / "certs" / "follower")
    code = both("train()", {"rows": 48, "epochs": 1}, {"rows": 48, "epochs": 1}).replace(
        "efl.FederalModel()", BY_ARGUMENT
    )
    results = run_both(tmp_path, code, code, args=["--connect_timeout=4"], expect=(1, 1))
    why = "its certificate carries the names ['other'], expected 'follower' (peer_name)"
    assert "TlsError: the leader at " in results["follower"].output and why in results["follower"].output
    assert "PeerLost: the leader listened on" in results["leader"].output and why in results["leader"].output
