"""``efl keygen``, and the script of the same effect: what is written, what is refused."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from efl.cli import main
from efl.paillier import PrivateKey, PublicKey
from efl.paillier.private_key import DEFAULT_BITS

phe = pytest.importorskip("phe")
SCRIPT = Path(__file__).resolve().parents[2] / "example/entropy_mnist/generate_paillier_keypair.py"
FINGERPRINT = re.compile(r"fingerprint: ((?:[0-9a-f]{4} ){7}[0-9a-f]{4})")


def keygen(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["keygen", *map(str, arguments)])


def python(code: str, *arguments: str, folder: Path, **more) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-c", code, *arguments]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=120, **more)


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
    secret = json.loads((folder / "private_key.json").read_text())["p"]
    assert secret not in output and str(int(private._halves[0].prime)) not in output
    assert f"{folder / 'public_key.json'}: give it to the leader" in output
    assert f"{folder / 'private_key.json'}: keep it here" in output


def test_the_default_is_the_librarys() -> None:
    assert f"[default: {DEFAULT_BITS}]" in keygen("--help").output


def test_the_private_key_is_its_owners_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert keygen("--bits", 2048, "--folder", tmp_path).exit_code == 0
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    assert modes == {"private_key.json": 0o600, "public_key.json": 0o644}


def test_phe_reads_both_files_and_each_decrypts_what_the_other_encrypted(made: tuple[Path, str]) -> None:
    folder = made[0]
    pheutil = "import sys; from phe.command_line import cli; sys.argv[0] = 'pheutil'; cli()"
    encrypted = python(pheutil, "encrypt", "public_key.json", "--", "-2.5", folder=folder, check=True).stdout
    private = PrivateKey.load(folder / "private_key.json")
    fields = json.loads(encrypted)
    theirs = phe.EncryptedNumber(phe.PaillierPublicKey(int(private.public.n)), int(fields["v"]), int(fields["e"]))
    assert private.decrypt(private.public.from_phe([theirs])) == -2.5
    (ours,) = PublicKey.load(folder / "public_key.json").encrypt_residues([-42])
    number = json.dumps({"v": str(ours), "e": 0})
    decrypted = python(pheutil, "decrypt", "private_key.json", "-", folder=folder, input=number, check=True)
    assert decrypted.stdout.strip() == "-42"


@pytest.mark.parametrize("kind", ["public", "private"])
def test_size_kind_and_fingerprint_of_a_file_are_shown(made: tuple[Path, str], kind: str) -> None:
    file = made[0] / f"{kind}_key.json"
    shown = keygen("--show", file)
    fingerprint = PublicKey.load(made[0] / "public_key.json").fingerprint
    assert shown.exit_code == 0
    assert shown.output == f"{file}: {kind} key of 2048 bits, masks by short exponents, fingerprint: {fingerprint}\n"
    assert f"public key of 2048 bits, masks by short exponents, fingerprint: {fingerprint}\n" in made[1]


def test_a_damaged_key_is_not_shown(made: tuple[Path, str], tmp_path: Path) -> None:
    for name, spoilt in (("public_key.json", "n"), ("private_key.json", "p")):
        fields = json.loads((made[0] / name).read_text())
        fields[spoilt] = "!"
        (tmp_path / name).write_text(json.dumps(fields))
        shown = keygen("--show", tmp_path / name)
        assert shown.exit_code == 2 and f"{spoilt!r} is missing or no number" in shown.output


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


def test_all_that_is_there_is_named_and_a_link_that_leads_nowhere_counts(tmp_path: Path) -> None:
    private, public = tmp_path / "private_key.json", tmp_path / "public_key.json"
    public.symlink_to(tmp_path / "elsewhere")
    assert f"{public}: there already" in keygen("--bits", 2048, "--folder", tmp_path).output
    assert os.listdir(tmp_path) == ["public_key.json"]
    private.touch()
    assert f"{public} and {private}: there already" in keygen("--bits", 2048, "--folder", tmp_path).output
    assert keygen("--bits", 2048, "--folder", tmp_path, "--force").exit_code == 0
    assert not public.is_symlink() and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("before", [False, True])
def test_an_end_between_the_two_files_leaves_no_pair_that_does_not_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    arguments = ["--bits", 2048, "--folder", tmp_path]
    if before:
        keygen(*arguments)
        arguments.append("--force")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(PublicKey, "save", interrupted)
        assert keygen(*arguments).exit_code == 1
    assert os.listdir(tmp_path) == ["private_key.json"]
    again = keygen("--bits", 2048, "--folder", tmp_path)
    assert again.exit_code == 2 and "private_key.json: there already" in again.output


def test_of_two_calls_at_once_one_pair_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_generate = PrivateKey.generate

    def slow(*arguments: int) -> PrivateKey:
        monkeypatch.undo()
        assert keygen("--bits", 2048, "--folder", tmp_path).exit_code == 0
        return really_generate(*arguments)

    monkeypatch.setattr(PrivateKey, "generate", slow)
    late = keygen("--bits", 2048, "--folder", tmp_path)
    assert late.exit_code == 2 and "private_key.json: there is a file already" in late.output
    assert PrivateKey.load(tmp_path / "private_key.json").public == PublicKey.load(tmp_path / "public_key.json")


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "public_key.json").mkdir()
    result = keygen("--bits", 2048, "--folder", tmp_path, "--force")
    assert result.exit_code == 2 and "public_key.json: cannot be replaced (" in result.output
    assert os.listdir(tmp_path) == ["public_key.json"]
    (tmp_path / "full").mkdir()
    result = python(
        "from efl.cli import main; main()", "keygen", "--bits", "2048", folder=tmp_path / "full",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )  # fmt: skip
    assert result.returncode == 2 and "private_key.json: the key cannot be written (File too large)" in result.stderr
    assert os.listdir(tmp_path / "full") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = keygen("--bits", 2048, "--folder", tmp_path)
    assert result.exit_code == 2 and "private_key.json: the key cannot be written (Permission denied)" in result.output
    assert os.listdir(tmp_path) == []


def test_a_folder_is_made_where_there_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "keys"
    assert keygen("--bits", 2048, "--folder", folder).exit_code == 0
    assert sorted(os.listdir(folder)) == ["private_key.json", "public_key.json"]
    (tmp_path / "file").write_text("")
    result = keygen("--folder", tmp_path / "file" / "keys")
    assert result.exit_code == 2 and "keys: cannot be made (Not a directory): give another --folder" in result.output


@pytest.mark.parametrize("bits", [1024, 2049, 100_000])
def test_sizes_that_no_key_has(tmp_path: Path, bits: int) -> None:
    refused = keygen("--bits", bits, "--folder", tmp_path)
    assert refused.exit_code == 2 and "2048 to 8192" in refused.output and not os.listdir(tmp_path)


def test_without_gmpy2_the_other_commands_work_and_this_one_names_the_extra(tmp_path: Path) -> None:
    code = "import sys; sys.modules['gmpy2'] = None; from efl.cli import main; main()"
    for arguments in (["--help"], ["keygen", "--help"]):
        assert python(code, *arguments, folder=tmp_path).returncode == 0
    (tmp_path / "some.json").touch()
    for arguments in (["keygen"], ["keygen", "--show", "some.json"]):
        result = python(code, *arguments, folder=tmp_path)
        assert result.returncode == 2 and "keys need gmpy2, of the extra 'privacy': pip install" in result.stderr
    loaded = "import sys, efl.cli; sys.exit(str({'gmpy2', 'tensorflow'} & sys.modules.keys() or ''))"
    assert python(loaded, folder=tmp_path).stderr.strip() == ""


def test_the_script_writes_into_the_working_folder(tmp_path: Path) -> None:
    run = [sys.executable, str(SCRIPT), "--bits", "2048", "--fast"]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "masks from a subgroup" in result.stdout, result.stderr
    first = PublicKey.load(tmp_path / "public_key.json")
    assert first.kind == "subgroup"
    again = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "--force" in again.stderr
    assert PrivateKey.load(tmp_path / "private_key.json").public == first
    assert subprocess.run([*run, "--force"], cwd=tmp_path, capture_output=True, timeout=120).returncode == 0
    second = PublicKey.load(tmp_path / "public_key.json")
    assert PrivateKey.load(tmp_path / "private_key.json").public == second != first


def test_an_interrupted_one_leaves_nothing(tmp_path: Path) -> None:
    # A search for primes that never ends, so that the signal comes in the middle of it.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a job of a shell's may lack
        "from efl.cli import main; from efl.paillier import primes\n"
        "primes._fit = lambda *_: print('at work', flush=True)\n"
        "main(['keygen', '--bits', '2048'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20)
    assert process.returncode == 1 and told.strip() == "Aborted!"
    assert os.listdir(tmp_path) == []
