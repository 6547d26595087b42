"""Planted identifiers must be found wherever they hide, and a clean release must pass."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import jinja2
import nibabel as nib
import numpy as np
import pytest

from synthmed.deid import scan as scanner
from synthmed.deid.needles import Needles
from synthmed.deid.scan import mentions, scan
from synthmed.report.mosaic import png

NAME = "Müller-Jane"
FORBIDDEN = ("Mueller-Jane", NAME, "Anna", "4711", "483920", "p0123456789abcdef")
SIDECAR = {"Description": "Synthetic image", "Synthetic": True, "SampleIndex": 0}
IMAGE = "sub-syn0001/anat/sub-syn0001_T1w.nii.gz"


def nifti(change: Callable[[nib.nifti1.Nifti1Image], None] = lambda image: None) -> bytes:
    voxels = np.random.default_rng(0).integers(0, 256, (12, 12, 12)).astype(np.uint8)
    image = nib.nifti1.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1]))
    change(image)
    return image.to_bytes()


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small clean release."""
    anat = tmp_path / "sub-syn0001" / "anat"
    anat.mkdir(parents=True)
    (tmp_path / IMAGE).write_bytes(zipped(nifti()))
    (anat / "sub-syn0001_T1w.json").write_text(json.dumps(SIDECAR))
    (tmp_path / "participants.tsv").write_text("participant_id\tage\nsub-syn0001\t61\n")
    (tmp_path / "README.md").write_text("Savannah, 0.4711, 47110 and a digest " + "face" * 16)
    picture = base64.b64encode(png(np.zeros((4, 4), np.uint8))).decode()
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.html").write_text(f'<img src="data:image/png;base64,{picture}">')
    return tmp_path


def kinds(folder: Path, forbidden: tuple[str, ...] = FORBIDDEN) -> set[str]:
    return {f.kind for f in scan(folder, forbidden=forbidden)}


def test_a_clean_release_passes(folder: Path) -> None:
    assert scan(folder, forbidden=(*FORBIDDEN, "face")) == []


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16-le", "utf-16-be", "utf-16"])
@pytest.mark.parametrize("name", [NAME, NAME.upper(), NAME.lower()])
def test_encodings_and_case(folder: Path, encoding: str, name: str) -> None:
    (folder / "README.md").write_bytes(f"a scan of {name}, 1970".encode(encoding))
    assert kinds(folder) == {"forbidden text"}


@pytest.mark.parametrize("name", ["Müller", "MÜLLER", "O'Sullivan", "O'Müller & Söhne"])
@pytest.mark.parametrize(
    "written",
    [
        lambda name: json.dumps({"by": name}),
        lambda name: jinja2.Environment(autoescape=True).from_string("{{ n }}").render(n=name),
        lambda name: html.escape(name),
        lambda name: html.escape(json.dumps(name)),
        lambda name: unicodedata.normalize("NFD", name),
        lambda name: unicodedata.normalize("NFC", name),
    ],
)
def test_what_json_html_and_file_systems_make_of_a_name(
    folder: Path, name: str, written: Callable[[str], str]
) -> None:
    (folder / "README.md").write_text(f"a scan of {written(name)}, 1970", encoding="utf-8")
    for form in ("NFC", "NFD"):
        assert kinds(folder, (unicodedata.normalize(form, name),)) == {"forbidden text"}


def test_numbers_of_the_samples_are_nobody_s(folder: Path) -> None:
    assert scan(folder, forbidden=("0001", "sub-syn0001")) == []
    (folder / "README.md").write_text("sub-syn0001 is like 0001")
    assert kinds(folder, ("0001",)) == {"forbidden text"}


def test_a_file_name_that_is_not_utf_8(folder: Path) -> None:
    name = os.fsdecode(b"sub-M\xfcller3")
    for content in (b"of sub-M\xfcller3.", "of sub-Müller3.".encode()):
        (folder / "README.md").write_bytes(content)
        assert kinds(folder, (name,)) == {"forbidden text"}


@pytest.mark.parametrize("text", ["anna", "ANNA_2", "(4711)", "id 4711.", "x483920"])
def test_short_names_are_found_as_words(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text)
    assert kinds(folder) == {"forbidden text"}


def test_a_string_across_two_chunks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthmed.deid.needles.CHUNK_BYTES", 16)
    needles = Needles([NAME])
    for before in range(40):
        assert needles.found_in(b"-" * before + NAME.encode() + b"-" * 9, shortest=4)
        assert not needles.found_in(b"-" * before + NAME.encode()[:-1] + b"#", shortest=4)


def test_voxels_that_spell_a_name(folder: Path) -> None:
    content = bytearray(nifti())
    content[900 : 900 + len(NAME.encode())] = NAME.encode()
    (folder / IMAGE).write_bytes(zipped(bytes(content)))
    assert kinds(folder) == {"forbidden text"}


@pytest.mark.parametrize("field", ["descrip", "aux_file", "db_name", "intent_name", "data_type"])
def test_nifti_text_fields(folder: Path, field: str) -> None:
    def plant(image: nib.nifti1.Nifti1Image) -> None:
        image.header[field] = b"Anna"

    (folder / IMAGE).write_bytes(zipped(nifti(plant)))
    assert kinds(folder) == {"NIfTI header", "forbidden text"}
    assert "NIfTI header" in kinds(folder, ())


def test_nifti_extension(folder: Path) -> None:
    def plant(image: nib.nifti1.Nifti1Image) -> None:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"about someone"))

    (folder / IMAGE).write_bytes(zipped(nifti(plant)))
    assert kinds(folder) == {"NIfTI header"}


def test_gzip_header_and_damage(folder: Path) -> None:
    named = io.BytesIO()
    with gzip.GzipFile("scan_of_somebody.nii", "wb", fileobj=named, mtime=0) as handle:
        handle.write(nifti())
    (folder / IMAGE).write_bytes(named.getvalue())
    assert kinds(folder) == {"gzip header"}
    (folder / IMAGE).write_bytes(gzip.compress(nifti(), mtime=1_700_000_000))
    assert kinds(folder) == {"gzip header"}
    (folder / IMAGE).write_bytes(zipped(nifti())[:-20])
    assert kinds(folder) == {"damaged"}
    (folder / IMAGE).write_bytes(zipped(nifti()) + b"Anna")
    assert kinds(folder) == {"damaged"}


def test_a_gzip_bomb_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanner, "MAX_INFLATED_BYTES", 1000)
    assert kinds(folder) == {"too large"}


def test_pseudonyms_are_found_unlisted(folder: Path) -> None:
    (folder / "README.md").write_text("nearest is pfedcba9876543210.")
    found = scan(folder)
    assert [(f.path, f.kind) for f in found] == [("README.md", "pseudonym")]


@pytest.mark.parametrize("name", ["Anna.nii.gz", "sub-syn0001/Anna/x.json", "sub-01/a.json"])
def test_foreign_names_are_found_and_not_repeated(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"{}")
    found = [f for f in scan(folder) if f.kind == "file name"]
    assert found
    assert not any("Anna" in f.path or "sub-01" in f.path for f in found)


def test_a_file_in_another_subjects_folder_is_foreign(folder: Path) -> None:
    (folder / "sub-syn0001/anat/sub-syn0002_T1w.json").write_text(json.dumps(SIDECAR))
    assert kinds(folder) == {"file name"}


def test_a_link_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "DATASHEET.md").symlink_to(tmp_path_factory.mktemp("outside") / "nothing")
    assert kinds(folder) == {"link"}


@pytest.mark.parametrize(
    "content", ['{"PatientName": 1}', '{"Description": {"InstitutionName": 2}}']
)
def test_sidecar_keys(folder: Path, content: str) -> None:
    (folder / "sub-syn0001/anat/sub-syn0001_T1w.json").write_text(content)
    assert kinds(folder) == {"JSON key"}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("uid 1.2.840.113619.2.176.2025", "DICOM UID"),
        ("name DOE^JANE", "person name"),
        (" " * 128 + "DICM", "DICOM"),
    ],
)
def test_dicom_patterns(folder: Path, text: str, kind: str) -> None:
    (folder / "DATASHEET.md").write_text(text)
    assert kinds(folder) == {kind}


def test_text_chunk_of_an_embedded_picture(folder: Path) -> None:
    clean = png(np.zeros((4, 4), np.uint8))
    chunk = b"\x00\x00\x00\x04tEXtAnna\x00\x00\x00\x00"
    content = base64.b64encode(clean[:33] + chunk + clean[33:]).decode()
    (folder / "report/report.html").write_text(f"data:image/png;base64,{content}")
    assert kinds(folder) == {"PNG chunk"}


def test_mentions() -> None:
    assert mentions("signed for Anna", FORBIDDEN)
    assert mentions("see p00000000000000ff", ())
    assert not mentions("looked at every volume", FORBIDDEN)


def test_an_embedded_volume_is_unpacked(folder: Path) -> None:
    """What a page's viewer shows is searched like a file, and a clean one passes."""
    (folder / "report/viewer").mkdir()
    (folder / "report/viewer/synthetic-0001.nii.gz").write_bytes(zipped(nifti()))
    page = folder / "report/report.html"
    clean = page.read_text()

    def hold(volume: bytes) -> None:
        page.write_text(f'{clean}<script>["{base64.b64encode(volume).decode()}"]</script>')

    hold(zipped(nifti()))
    assert kinds(folder) == set()
    hold(zipped(nifti(lambda image: image.header.__setitem__("descrip", FORBIDDEN[0]))))
    assert kinds(folder) == {"NIfTI header", "forbidden text"}
    hold(zipped(nifti())[:-9])
    assert kinds(folder) == {"damaged"}
    (folder / "report/viewer/nearest-0001-train.nii.gz").write_bytes(zipped(nifti()))
    assert "file name" in kinds(folder)


def test_a_text_of_our_own_may_hold_a_word_of_the_list_and_nothing_else_may(folder: Path) -> None:
    viewer = "const Mueller-Jane = 'a name that a library uses';"
    page = folder / "report/report.html"
    page.write_text(page.read_text() + viewer)
    assert kinds(folder) == {"forbidden text"}
    assert scan(folder, forbidden=FORBIDDEN, own=[viewer.encode()]) == []
    page.write_text(page.read_text() + " Mueller-Jane")
    assert {f.kind for f in scan(folder, forbidden=FORBIDDEN, own=[viewer.encode()])} == {
        "forbidden text"
    }
