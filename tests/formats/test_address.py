"""Addresses of a PACS: what is one, what is refused, and that no password is repeated or kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make
import pytest

from synthmed import configfile
from synthmed.errors import UsageError
from synthmed.formats.address import is_address, parse


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dicomweb://pacs.example.org", "https://pacs.example.org:443"),
        ("dicomweb://pacs.example.org/rs/", "https://pacs.example.org:443/rs"),
        ("dicomweb://10.0.0.7:8443/a/b-c/rs", "https://10.0.0.7:8443/a/b-c/rs"),
        ("dicomweb+http://localhost:8042/dicom-web", "http://localhost:8042/dicom-web"),
        ("dicomweb+http://[::1]:8042/rs", "http://[::1]:8042/rs"),
    ],
)
def test_dicomweb(text: str, said: str) -> None:
    found = parse(text)
    assert (found.url, found.protocol, str(found)) == (said, "dicomweb", text)
    assert found.tls == said.startswith("https")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dimse://ME@10.0.0.7:11112/ARCHIVE", ("ME", "10.0.0.7", 11112, "ARCHIVE", False)),
        ("dimse://pacs/ARCHIVE", ("SYNTHMED", "pacs", 104, "ARCHIVE", False)),
        ("dimses://MY%20AE@pacs/THE%20AE", ("MY AE", "pacs", 2762, "THE AE", True)),
    ],
)
def test_dimse(text: str, said: tuple[Any, ...]) -> None:
    found = parse(text)
    assert (found.calling, found.host, found.port, found.called, found.tls) == said


@pytest.mark.parametrize(
    ("host", "own"),
    [("localhost", True), ("127.0.0.1", True), ("127.8.0.1", True), ("[::1]", True),
     ("localhost.example.org", False), ("10.0.0.7", False), ("pacs", False)],
)  # fmt: skip
def test_loopback(host: str, own: bool) -> None:
    assert parse(f"dicomweb+http://{host}/rs").loopback is own


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://pacs/rs", "https is dicomweb"),
        ("http://pacs/rs", "http is dicomweb+http"),
        ("ftp://pacs/rs", "begins with one of"),
        ("dicomweb://", "no possible host"),
        ("dicomweb://pa cs/rs", "a blank"),
        ("dicomweb://pacs:99999/rs", "no possible host or port"),
        ("dicomweb://pacs:x/rs", "no possible host or port"),
        ("dicomweb://pacs/rs?PatientID=1", "no ? and no #"),
        ("dicomweb://pacs/a/../b", "path of the address"),
        ("dicomweb://pacs/a\nb", "a blank"),
        ("dimse://ME@pacs", "dimse://CALLING@HOST:PORT/CALLED"),
        ("dimse://ME@pacs/A/B/C\\D", "dimse://CALLING@HOST:PORT/CALLED"),
        ("dimse://ME@pacs/TOOLONGFORANAETITLE", "1 to 16 characters"),
        ("dimse://ME@pacs/%20%20", "1 to 16 characters"),
    ],
)
def test_what_is_none_is_a_fault_of_the_config(text: str, said: str) -> None:
    assert is_address(text)
    with pytest.raises(UsageError) as caught:
        configured(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["dicomweb://anna:hunter2@pacs/rs", "dicomweb://hunter2@pacs/rs", "dimse://ME:hunter2@pacs/A",
     "https://anna:hunter2@pacs/rs"],
)  # fmt: skip
def test_a_password_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        configured(text)
    assert "hunter2" not in str(caught.value)
    if not text.startswith("https"):
        assert "SYNTHMED_PACS_TOKEN" in str(caught.value)


def test_a_pacs_holds_no_nifti() -> None:
    with pytest.raises(UsageError, match="a PACS holds DICOM"):
        configured("dicomweb://pacs/rs", format="nifti")


def test_an_address_is_no_folder() -> None:
    config = configured("dicomweb://pacs/rs", table="~/labels.csv")
    assert configfile.source_folder(config) is None
    assert configfile.table_file(config) == Path("~/labels.csv").expanduser()
    assert configfile.source_folder(make.config(Path("/x"))) == Path("/x")


def configured(text: str, **data: Any) -> Any:
    tree = {
        "data": {"source": text, "grid": [16, 16, 16], **data},
        "backbone": {"name": "cvae"},
        "privacy": None,
        "train": {"max_steps": 1},
    }
    return configfile.validate(tree, "test")
