"""Pseudonyms: one key, made once, readable by its owner alone, and recoverable from nothing."""

from __future__ import annotations

import multiprocessing
import stat
import unicodedata
from pathlib import Path

import pytest

from synthmed.deid.pseudonyms import KEY_FILE, Pseudonyms
from synthmed.errors import ResourceError, UsageError
from synthmed.store import home as home_of


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_key_is_made_once_and_is_private(home: Path) -> None:
    first = Pseudonyms.load()
    assert Pseudonyms.load() == first
    key = home / KEY_FILE
    assert len(key.read_bytes()) == 32
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert [p.name for p in home.iterdir()] == [KEY_FILE]


def test_a_key_that_others_can_read_is_closed(home: Path) -> None:
    Pseudonyms.load()
    (home / KEY_FILE).chmod(0o644)
    Pseudonyms.load()
    assert stat.S_IMODE((home / KEY_FILE).stat().st_mode) == 0o600


def _key(_: int) -> bytes:
    return Pseudonyms.load().key


def test_processes_that_start_together_agree(home: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        keys = set(pool.map(_key, range(8), chunksize=1))
    assert keys == {(home / KEY_FILE).read_bytes()}


def test_a_damaged_key_is_never_replaced(home: Path) -> None:
    Pseudonyms.load()
    (home / KEY_FILE).write_bytes(b"short")
    with pytest.raises(ResourceError, match="5 bytes, expected 32"):
        Pseudonyms.load()
    assert (home / KEY_FILE).read_bytes() == b"short"


def test_names_depend_on_identity_and_key_and_show_neither() -> None:
    ours, theirs = Pseudonyms(bytes(32)), Pseudonyms(bytes([1] * 32))
    name = ours.patient("Jane Doe")
    assert name == ours.patient("Jane Doe")
    assert name[0] == "p"
    assert len(name) == 17
    int(name[1:], 16)
    assert len({name, ours.patient("Jane Doe "), theirs.patient("Jane Doe")}) == 3
    assert ours.digest("patient", "x") != ours.digest("source", "x")
    assert "00" not in repr(ours)
    assert ours.scan(name, 1) == f"{name}_s01"
    assert ours.scan(name, 12, 3) == f"{name}_s12_r03"


def test_accents_stored_as_one_sign_or_two_are_one_person() -> None:
    names = Pseudonyms(bytes(32))
    one, two = (unicodedata.normalize(form, "Müller-Ångström") for form in ("NFC", "NFD"))
    assert one != two and names.patient(one) == names.patient(two)
    assert names.patient("Müller") != names.patient("Muller")


@pytest.mark.parametrize("given", ["~/own", "$HOME/own"])
def test_the_home_is_one_place_wherever_the_call_is_made(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SYNTHMED_HOME", given.replace("$HOME", str(tmp_path)))
    assert home_of() == tmp_path / "own"
    monkeypatch.setenv("SYNTHMED_HOME", "own")
    with pytest.raises(UsageError, match="is no absolute path"):
        home_of()


def test_a_published_example_of_the_hash() -> None:
    """RFC 4231 case 2 has another key length, so the oracle is the definition of HMAC itself."""
    from hashlib import sha256

    key = bytes(range(32))
    inner = bytes(b ^ 0x36 for b in key.ljust(64, b"\0"))
    outer = bytes(b ^ 0x5C for b in key.ljust(64, b"\0"))
    expected = sha256(outer + sha256(inner + b"patient\0x").digest()).hexdigest()
    assert Pseudonyms(key).digest("patient", "x") == expected
