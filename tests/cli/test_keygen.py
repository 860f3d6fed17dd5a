"""``efl keygen``, and the script of the same effect: what is written, what is refused."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from efl.cli import main
from efl.paillier import PrivateKey, PublicKey

phe = pytest.importorskip("phe")
SCRIPT = Path(__file__).resolve().parents[2] / "example/entropy_mnist/generate_paillier_keypair.py"
FINGERPRINT = re.compile(r"fingerprint: ((?:[0-9a-f]{4} ){7}[0-9a-f]{4})")


def keygen(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["keygen", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("keys")
    result = keygen("--bits", 2048, "--folder", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_both_files_are_one_pair_and_the_private_one_is_its_owners(made: tuple[Path, str]) -> None:
    folder, output = made
    assert sorted(os.listdir(folder)) == ["private_key.json", "public_key.json"]
    private, public = PrivateKey.load(folder / "private_key.json"), PublicKey.load(folder / "public_key.json")
    assert private.public == public and public.bits == 2048
    assert stat.S_IMODE((folder / "private_key.json").stat().st_mode) == 0o600
    found = FINGERPRINT.search(output)
    assert found and found.group(1) == public.fingerprint
    assert str(int(private._halves[0].prime)) not in output


@pytest.mark.parametrize("name", ["public_key.json", "private_key.json"])
def test_the_fingerprint_of_a_file_is_shown(made: tuple[Path, str], name: str) -> None:
    shown = keygen("--show", made[0] / name)
    assert shown.exit_code == 0 and FINGERPRINT.search(shown.output)
    assert FINGERPRINT.search(shown.output).group() == FINGERPRINT.search(made[1]).group()  # type: ignore[union-attr]


def test_what_is_no_key_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    shown = keygen("--show", tmp_path / "x.json")
    assert shown.exit_code == 2 and "no Paillier key file" in shown.output


@pytest.mark.parametrize("there", ["public_key.json", "private_key.json"])
def test_what_is_there_is_replaced_with_force_only(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    refused = keygen("--bits", 2048, "--folder", tmp_path)
    assert refused.exit_code == 2 and there in refused.output and "--force" in refused.output
    assert os.listdir(tmp_path) == [there] and (tmp_path / there).read_text() == "mine"
    assert keygen("--bits", 2048, "--folder", tmp_path, "--force").exit_code == 0
    assert PrivateKey.load(tmp_path / "private_key.json").public == PublicKey.load(tmp_path / "public_key.json")
    assert stat.S_IMODE((tmp_path / "private_key.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("bits", [1024, 2049, 100_000])
def test_sizes_that_no_key_has(tmp_path: Path, bits: int) -> None:
    refused = keygen("--bits", bits, "--folder", tmp_path)
    assert refused.exit_code == 2 and "2048 to 8192" in refused.output and not os.listdir(tmp_path)


def test_the_script_writes_into_the_working_folder(tmp_path: Path) -> None:
    run = [sys.executable, str(SCRIPT), "--bits", "2048", "--fast"]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "subgroup" in result.stdout, result.stderr
    again = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "--force" in again.stderr
    theirs = phe.PaillierPublicKey(int(PublicKey.load(tmp_path / "public_key.json").n)).encrypt(-2.5)
    ours = PrivateKey.load(tmp_path / "private_key.json")
    assert ours.decrypt(ours.public.from_phe([theirs])) == -2.5


def test_an_interrupted_one_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "efl.cli", "keygen", "--bits", "8192"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    time.sleep(3.0)  # a key of this size takes longer
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert os.listdir(tmp_path) == []
