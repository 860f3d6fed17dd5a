"""``efl certs``: what it writes, for whom, and that the lines that it prints are complete."""

from __future__ import annotations

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509

from efl.cli import main
from efl.errors import ConfigError
from efl.settings import Settings
from efl.transport import Tls, tls


def certs(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["certs", *map(str, arguments)])


def party(folder: Path, peer_name: str) -> Tls:
    return Tls(*(str(folder / f"{name}.pem") for name in ("my_certs", "my_key", "peer_certs")), peer_name)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_each_party_gets_what_it_needs_and_nobody_elses_key(tmp_path: Path) -> None:
    out = tmp_path / "new" / "certs"
    assert certs("--out", out).exit_code == 0
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*.pem"))
    assert names == [
        "authority/my_key.pem", "authority/peer_certs.pem",
        "follower/my_certs.pem", "follower/my_key.pem", "follower/peer_certs.pem",
        "leader/my_certs.pem", "leader/my_key.pem", "leader/peer_certs.pem",
    ]  # fmt: skip
    for role, other in (("leader", "follower"), ("follower", "leader")):
        files = party(out / role, other)
        leaf = tls.load(files).leaf
        assert tls.names_in(leaf) == [role]
        assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).days == 90
        # A second opinion on the chain, with everything that the standard asks for.
        for purpose in ("sslserver", "sslclient"):
            command = [
                "openssl",
                "verify",
                "-x509_strict",
                "-purpose",
                purpose,
                "-CAfile",
                files.peer_certs,
                files.my_certs,
            ]
            assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.endswith(": OK\n")
    authority = x509.load_pem_x509_certificate((out / "authority" / "peer_certs.pem").read_bytes())
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    keys = {path.read_bytes() for path in out.rglob("my_key.pem")}
    assert len(keys) == 3


def test_keys_and_folders_are_their_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert certs("--out", tmp_path / "certs").exit_code == 0
    finally:
        os.umask(before)
    for folder in (tmp_path / "certs", *(tmp_path / "certs").iterdir()):
        assert mode(folder) == 0o700
    for key in (tmp_path / "certs").rglob("my_key.pem"):
        assert mode(key) == 0o600


def test_a_key_is_never_open_to_others_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, int] = {}
    really_open = os.open

    def watched(path, flags, mode=0o777, **more):
        made[Path(path).name] = mode
        assert flags & os.O_EXCL
        return really_open(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", watched)
    certs("--out", tmp_path / "certs")
    assert made["my_key.pem"] == 0o600


def test_what_is_there_is_not_overwritten_unasked(tmp_path: Path) -> None:
    key = tmp_path / "leader" / "my_key.pem"
    key.parent.mkdir()
    elsewhere = tmp_path / "elsewhere"
    key.symlink_to(elsewhere)  # not even followed
    result = certs("--out", tmp_path)
    assert result.exit_code == 2 and f"{key}: there already; --force overwrites" in result.output
    assert not elsewhere.exists() and sorted(tmp_path.iterdir()) == [key.parent]
    assert certs("--out", tmp_path, "--force").exit_code == 0
    assert not key.is_symlink() and not elsewhere.exists()
    first = key.read_bytes()
    assert certs("--out", tmp_path).exit_code == 2
    assert key.read_bytes() == first


@pytest.mark.parametrize("name", ["", "../leader", "a/b", "authority", "two words", "-a", "a..b", "x" * 64])
def test_names_that_cannot_stand_in_a_certificate(tmp_path: Path, name: str) -> None:
    result = certs("--out", tmp_path / "certs", "--name", name)
    assert result.exit_code == 2 and "expected a DNS name" in result.output
    assert not (tmp_path / "certs").exists()
    assert "expected each once" in certs("--out", tmp_path, "--name", "a", "--name", "a").output


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = certs("--out", tmp_path / "file" / "certs")
    assert result.exit_code == 2 and "cannot be written (Not a directory)" in result.output


def test_the_printed_lines_are_complete(tmp_path: Path) -> None:
    printed = certs("--out", tmp_path / "certs", "--days", 3).output
    lines = [shlex.split(line) for line in printed.splitlines() if line.startswith("  python ")]
    assert [line[1] for line in lines] == ["leader.py", "follower.py"]
    for line, role, other in zip(lines, ("leader", "follower"), ("follower", "leader")):
        settings = Settings.load(line[2:], {})
        assert settings.federal_role == role
        files = Tls(str(settings.my_certs), str(settings.my_key), str(settings.peer_certs), other)
        assert files == party(tmp_path / "certs" / role, other)
        tls.load(files)
    assert "valid for 3 days" in printed and "Whoever has the authority's key can be anybody" in printed


def test_parties_of_other_names_are_told_whom_to_expect(tmp_path: Path) -> None:
    printed = certs("--out", tmp_path / "c", "--name", "bank.example", "--name", "shop.example").output
    assert re.search(r"bank\.example/my_key\.pem .*--peer_name=shop\.example", printed)
    assert re.search(r"shop\.example/my_key\.pem .*--peer_name=bank\.example", printed)


def test_half_written_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from efl.cli.certs import write

    def full(*args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(ConfigError, match=r"x: cannot be written \(No space left on device\)"):
        write(tmp_path / "certs")
