"""Text drawn into pixels: seen where it is, nowhere else, and gone from what is written."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from scipy import ndimage

from synthmed.artifacts import Catalogue
from synthmed.deid import pixels
from synthmed.deid.clean import Options
from synthmed.deidentify import RECEIPT, deidentify
from synthmed.errors import InputError, UsageError
from synthmed.formats import stack
from synthmed.formats.nifti import canonical
from synthmed.formats.refusal import Refused, quiet
from synthmed.formats.volumes import volumes
from synthmed.stages.ingest import ingest

sys.path.insert(0, str(Path(__file__).parents[1] / "formats"))
import make

if importlib.util.find_spec("rapidocr_onnxruntime") is None:
    pytest.skip("needs synthmed[text]", allow_module_level=True)

ROWS, COLUMNS = 144, 160
NAME = "ULEIKA 17.04.61"
REAL = os.environ.get("SYNTHMED_REAL_DATA", "")
Plane = np.ndarray[Any, Any]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    with quiet():
        yield


def head(seed: int, shape: tuple[int, int] = (ROWS, COLUMNS)) -> Plane:
    """A slice of a head, roughly: skull, brain, noise; int16. (A dark ring would be a letter O.)"""
    rng = np.random.default_rng(seed)
    y, x = (np.linspace(-1, 1, n) for n in shape)
    out = np.zeros(shape)
    for size, value in ((0.85, 900), (0.78, 150), (0.72, 500), (0.5, 620)):
        high, wide = size * rng.uniform(0.85, 1, 2)
        off = rng.uniform(-0.05, 0.05, 2)
        disc = np.add.outer(((y - off[0]) / high) ** 2, ((x - off[1]) / wide) ** 2) < 1
        out[disc] = value
    out = ndimage.gaussian_filter(out, 1.5)  # a pixel holds several tissues
    return np.abs(out + rng.normal(0, 25, shape)).astype(np.int16)


def letters(text: str, font: str, size: int) -> Plane:
    """A text as ink, 0 to 1."""
    if font == "hershey":
        cv2 = pytest.importorskip("cv2", exc_type=ImportError)
        scale = size / 30
        (wide, high), under = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        ink = np.zeros((high + under + 2, wide + 2), np.uint8)
        place = (1, high + 1)
        cv2.putText(ink, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 1, cv2.LINE_AA)
        return ink / 255
    face = ImageFont.load_default(size)
    right, low = (int(v) + 2 for v in face.getbbox(text)[2:])
    picture = Picture.new("L", (right, low))
    ImageDraw.Draw(picture).text((1, 1), text, fill=255, font=face)
    return np.asarray(picture) / 255


def written(
    plane: Plane, at: tuple[int, int], text: str = NAME, font: str = "pillow", size: int = 14,
    ink: str = "white",
) -> Plane:  # fmt: skip
    """A slice with a text drawn into it: bright, dark, or grey in a black bar."""
    form = letters(text, font, size)
    out = plane.astype(np.float64)
    own = out[at[0] : at[0] + form.shape[0], at[1] : at[1] + form.shape[1]]
    assert own.shape == form.shape, "it does not fit"
    value = {"white": 1.3 * plane.max(), "black": 0, "bar": 0.6 * plane.max()}[ink]
    if ink == "bar":
        own[:] = 0
    own[:] = own * (1 - form) + value * form
    return out.round().astype(plane.dtype)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (64, 64), (256, 200)])
def test_clean_slices_raise_no_alarm(shape: tuple[int, int]) -> None:
    planes = np.stack([head(seed, shape) for seed in range(6)])
    assert not pixels.found(planes)
    same, mask = pixels.painted(planes)
    assert same is planes and not mask.any()
    noise = np.random.default_rng(0).integers(0, 4000, (2, *shape)).astype(np.int16)
    assert not pixels.found(noise) and not pixels.found(np.zeros((1, *shape), np.uint8))


@pytest.mark.parametrize("font", ["pillow", "hershey"])
@pytest.mark.parametrize("size", [12, 16, 22])
@pytest.mark.parametrize(("ink", "at"), [("white", (2, 3)), ("white", (60, 20)),
                                         ("black", (70, 20)), ("bar", (110, 8))])  # fmt: skip
def test_text_is_masked_and_all_else_stays(
    font: str, size: int, ink: str, at: tuple[int, int]
) -> None:
    text = NAME if size < 20 else NAME[:9]
    before = head(size)
    drawn = written(before, at, text, font, size, ink)
    clean, mask = pixels.painted(drawn[None])
    form = letters(text, font, size) > 0.5
    seen = np.zeros(before.shape, bool)
    seen[at[0] : at[0] + form.shape[0], at[1] : at[1] + form.shape[1]] = form
    assert seen.sum() > 50
    assert mask[0][seen].mean() >= 0.97
    np.testing.assert_array_equal(clean[~mask], drawn[None][~mask])
    assert (clean[mask] == drawn.min()).all()
    assert mask.mean() < 0.25
    assert not pixels.found(clean)


def block(
    plane: Plane, top: int, values: Sequence[int], size: int = 14
) -> tuple[Plane, list[Plane]]:
    """Lines of text one below the other, each in its own grey, cut off by the picture's edge.

    Returns the slice, and where the ink of each line is.
    """
    form = letters(NAME, "pillow", size)
    out, inks = plane.astype(np.float64), []
    for k, value in enumerate(values):
        first = top + k * (form.shape[0] + 2)
        rows = slice(first, min(first + form.shape[0], len(out)))
        columns = slice(8, 8 + form.shape[1])
        cut = form[: rows.stop - rows.start]
        out[rows, columns] = out[rows, columns] * (1 - cut) + value * cut
        ink = np.zeros(plane.shape, bool)
        ink[rows, columns] = cut > 0.5
        inks.append(ink)
    return out.round().astype(plane.dtype), inks


def test_a_line_between_two_others_and_one_cut_off_by_the_edge() -> None:
    """Neither is there for the network: the one has the ground's grey, the other three rows."""
    plane = np.full((ROWS, COLUMNS), 200, np.int16)
    step = letters(NAME, "pillow", 14).shape[0] + 2
    drawn, inks = block(plane, ROWS - 8 - 3 * step, (1200, 200, 1200, 1200))
    assert 0 < inks[3].any(axis=1).sum() <= 5
    _, mask = pixels.painted(drawn[None])
    for ink in inks:
        assert mask[0][ink].mean() >= 0.97
    assert not mask[0, : ROWS - 16 - 3 * step].any()


def test_dark_letters_in_dark_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a certain line, a window of brightness as narrow as the noise shows them."""

    def found(seed: int) -> float:
        noise = np.random.default_rng(seed).normal(0, 60, (ROWS, COLUMNS))
        plane = np.abs(noise).astype(np.int16) + 5
        plane[44 + letters(NAME, "pillow", 12).shape[0] + 2 :] = 900
        drawn, inks = block(plane, 44, (0, 0, 0), size=12)
        return float(pixels.painted(drawn[None])[1][0][inks[0]].mean())

    assert all(found(seed) >= 0.97 for seed in (1, 2, 3))
    monkeypatch.setattr(pixels, "CLOSER", ())
    assert not any(found(seed) >= 0.97 for seed in (1, 2, 3))


def test_text_in_some_slices_alone() -> None:
    """Slices without text in an image with text stay as they are."""
    planes = np.stack([head(k) for k in range(4)])
    planes[2] = written(planes[2], (4, 4))
    clean, mask = pixels.painted(planes)
    assert [bool(m.any()) for m in mask] == [False, False, True, False]
    np.testing.assert_array_equal(clean[[0, 1, 3]], planes[[0, 1, 3]])
    again, same = pixels.painted(planes)
    assert again.tobytes() == clean.tobytes() and same.tobytes() == mask.tobytes()


def test_what_cannot_be_painted_over_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "ROUNDS", 0)
    with pytest.raises(Refused) as caught:
        pixels.painted(written(head(0), (4, 4))[None])
    assert caught.value.code == "burned_in"


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make.series(tmp_path / "s", make.voxels(0), np.eye(4))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pixels._network.cache_clear()
    with pytest.raises(UsageError, match=r"'\.\[text\]'"):
        deidentify(tmp_path / "s", tmp_path / "t", Options(text="mask"), True)
    assert not (tmp_path / "t").exists()
    config = make.config(tmp_path / "s", text="quarantine")
    with pytest.raises(UsageError, match=r"'\.\[text\]'"):
        ingest(config, tmp_path)
    pixels._network.cache_clear()


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR", "SLA"])
@pytest.mark.parametrize("stored", [True, False])
def test_a_volume_however_it_lies(axes: str, stored: bool) -> None:
    """Text stands in rows and columns as stored; of NIfTI nobody knows which those are."""
    data = np.stack([head(k).T for k in range(5)], -1)  # (columns, rows, slices)
    data[..., 1] = written(data[..., 1].T, (4, 4)).T
    turn = nib.orientations.axcodes2ornt(tuple(axes))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for k, (axis, sign) in enumerate(turn):
        affine[int(axis), k] = sign * (1, 1, 3)[k]  # slices are thicker than pixels are wide
    image = canonical(data, affine)
    assert image.orientation == axes
    assert pixels.found_in_volume(image, stored)
    clean, any_text = pixels.painted_volume(image, stored)
    assert any_text and not pixels.found_in_volume(clean, stored)
    back = nib.orientations.apply_orientation(
        clean.data,
        nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn),
    )
    np.testing.assert_array_equal(back[..., [0, 2, 3, 4]], data[..., [0, 2, 3, 4]])
    changed = (back != data)[..., 1]
    assert changed.any() and not changed[:, 60:].any()
    np.testing.assert_array_equal(image.data, canonical(data, affine).data)  # left as it was


# --- through deidentify ---------------------------------------------------------------------------


def drawn_series(folder: Path, **elements: Any) -> Plane:
    """A series of three slices, one of them with text; (columns, rows, slices)."""
    data = np.stack([head(k).T for k in range(3)], -1)
    data[..., 1] = written(data[..., 1].T, (120, 10)).T
    make.series(folder, data, np.diag([-1.0, -1, 3, 1]), **elements)
    return data


@pytest.mark.parametrize("big", [False, True])
def test_deidentify_masks(tmp_path: Path, big: bool) -> None:
    data = drawn_series(tmp_path / "s")
    if big:  # all said to be without text: the search does not ask
        for file in (tmp_path / "s").iterdir():
            ds = pydicom.dcmread(file)
            ds.BurnedInAnnotation = "NO"
            ds.save_as(file)
    receipt = deidentify(tmp_path / "s", tmp_path / "t", Options(text="mask"), True)
    assert receipt["n_written"] == 3 and receipt["n_text_masked"] == 1
    assert "113101" in [m["code"] for m in receipt["methods"]]
    assert "does not find" in receipt["not_covered"]
    assert json.loads((tmp_path / "t" / RECEIPT).read_text())["n_text_masked"] == 1
    files = sorted((tmp_path / "t").rglob("*.dcm"), key=lambda f: pydicom.dcmread(f).InstanceNumber)
    for k, file in enumerate(files):
        ds = pydicom.dcmread(file)
        assert ds.BurnedInAnnotation == "NO"
        assert "113101" in [c.CodeValue for c in ds.DeidentificationMethodCodeSequence]
        plane, before = ds.pixel_array, data[..., k].T
        assert not pixels.found(plane[None])
        changed = plane != before
        assert changed.any() == (k == 1)
        assert not changed[:100].any()
    assert not list(tmp_path.glob("t-refused.tsv")) or "burned_in" not in (
        tmp_path / "t-refused.tsv"
    ).read_text(encoding="utf-8")


def test_deidentify_refuses(tmp_path: Path) -> None:
    drawn_series(tmp_path / "s")
    receipt = deidentify(tmp_path / "s", tmp_path / "t", Options(text="refuse"), True)
    assert receipt["n_written"] == 2 and receipt["refused"] == {"burned_in": 1}
    for file in (tmp_path / "t").rglob("*.dcm"):
        ds = pydicom.dcmread(file)
        assert ds.BurnedInAnnotation == "NO"
        assert "113101" not in [c.CodeValue for c in ds.DeidentificationMethodCodeSequence]


def test_deidentify_keeps_unless_asked(tmp_path: Path) -> None:
    drawn_series(tmp_path / "s")
    receipt = deidentify(tmp_path / "s", tmp_path / "t", quiet_progress=True)
    assert receipt["n_written"] == 3 and receipt["n_text_masked"] == 0
    assert "header does not say so" in receipt["not_covered"]
    assert all(
        "BurnedInAnnotation" not in pydicom.dcmread(f) for f in (tmp_path / "t").rglob("*.dcm")
    )


def test_a_header_that_says_so(tmp_path: Path) -> None:
    """Masked where the search finds it; refused where it does not."""
    drawn_series(tmp_path / "s", BurnedInAnnotation="YES")
    receipt = deidentify(tmp_path / "s", tmp_path / "t", Options(text="mask"), True)
    assert receipt["n_written"] == 1 and receipt["refused"] == {"burned_in": 2}
    with pytest.raises(InputError):
        deidentify(tmp_path / "s", tmp_path / "u", Options(text="refuse"), True)


@pytest.mark.parametrize("planar", [0, 1])
def test_colour(tmp_path: Path, planar: int) -> None:
    plane = (head(0) // 5).astype(np.uint8)
    colours = np.stack([plane, plane // 2, written(plane, (120, 10))])  # text in blue alone
    folder = make.series(tmp_path / "s", plane.T[..., None].astype(np.uint8), np.eye(4))
    (file,) = folder.iterdir()
    ds = pydicom.dcmread(file)
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", planar
    stored = colours if planar else np.moveaxis(colours, 0, -1)
    ds.PixelData = np.ascontiguousarray(stored).tobytes()
    ds.save_as(file)
    deidentify(tmp_path / "s", tmp_path / "t", Options(text="mask"), True)
    (made,) = (tmp_path / "t").rglob("*.dcm")
    after = np.moveaxis(pydicom.dcmread(made).pixel_array, -1, 0)
    np.testing.assert_array_equal(after[:, :100], colours[:, :100])
    # a letter that stands out in one colour shows a little in the others
    gone = after[2] != colours[2]
    assert gone.any()
    for colour in after:
        assert (colour[gone] == colour.min()).all()
    assert pixels.found(colours) and not pixels.found(after)


# --- through ingest -------------------------------------------------------------------------------


def source(folder: Path, form: str) -> Path:
    """Three people's scans, the second with text."""
    for k in range(3):
        data = np.stack([head(10 * k + z).T for z in range(5)], -1)
        if k == 1:
            data[..., 3] = written(data[..., 3].T, (120, 10)).T
        affine = np.diag([-1.0, -1, 3, 1])
        if form == "dicom":
            make.series(folder / f"s{k}", data, affine)
        else:
            folder.mkdir(exist_ok=True)
            nib.Nifti1Image(data, affine).to_filename(folder / f"s{k}.nii.gz")
    if form == "nifti":
        rows = [{"participant_id": f"s{k}", "image": f"s{k}.nii.gz"} for k in range(3)]
        make.table(folder / "participants.tsv", rows)
    return folder


@pytest.mark.parametrize("form", ["dicom", "nifti"])
def test_ingest(tmp_path: Path, form: str) -> None:
    folder = source(tmp_path / "source", form)
    facts, volumes = {}, {}
    for text in ("keep", "mask", "quarantine"):
        target = tmp_path / text
        target.mkdir()
        facts[text] = ingest(make.config(folder, text=text), target, min_patients=1)
        catalogue = Catalogue.open(target)
        (channel,) = {c for s in catalogue.scans for c in s.channels}
        volumes[text] = {
            s.scan: np.asarray(nib.load(catalogue.file(s, channel)).dataobj)
            for s in catalogue.scans
        }
    assert [facts[t]["text"] for t in facts] == list(facts)
    assert [facts[t]["n_text_masked"] for t in facts] == [0, 1, 0]
    assert [facts[t]["n_scans"] for t in facts] == [3, 3, 2]
    assert set(facts["quarantine"]["reasons"]) == {"burned_in"}
    (hit,) = set(volumes["keep"]) - set(volumes["quarantine"])
    for name, before in volumes["keep"].items():
        after = volumes["mask"][name]
        changed = before != after
        assert changed.any() == (name == hit)
        # one slice of five, and there the half with the text alone; rows run against Y
        assert changed.any((0, 1)).sum() == (name == hit) and not changed[:, ROWS // 2 :].any()
        assert not pixels.found(np.moveaxis(after, 2, 0).transpose(0, 2, 1))
    assert pixels.found(np.moveaxis(volumes["keep"][hit], 2, 0).transpose(0, 2, 1))
    for file in (tmp_path / "mask").rglob("*"):
        assert not file.is_file() or b"ULEIKA" not in file.read_bytes()


def test_ingest_believes_a_header_that_says_so(tmp_path: Path) -> None:
    """Whatever `data.text` is; painted over, where the search finds it."""
    folder = source(tmp_path / "source", "dicom")
    for path in folder.rglob("IM*"):
        ds = pydicom.dcmread(path)
        ds.BurnedInAnnotation = "YES"  # of all three, and text is in one of them
        ds.save_as(path)
    facts = {}
    for text in ("keep", "quarantine", "mask"):
        target = tmp_path / text
        target.mkdir()
        if text == "mask":
            facts[text] = ingest(make.config(folder, text=text), target, min_patients=1)
            continue
        with pytest.raises(InputError, match="burned_in 15"):
            ingest(make.config(folder, text=text), target, min_patients=1)
    assert facts["mask"]["n_scans"] == facts["mask"]["n_text_masked"] == 1
    assert facts["mask"]["reasons"] == {"burned_in": 10}


# --- real slices ----------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.skipif(not REAL, reason="SYNTHMED_REAL_DATA is not set")
def test_identities_drawn_into_real_slices(tmp_path: Path) -> None:
    """A few of TCIA's pseudo-PHI, through files; the benchmark takes them all."""
    (tmp_path / "s").mkdir()
    chosen = sorted(Path(REAL, "dicom/phi/abdomen_siemens_14").glob("*.dcm"))[3::3]
    for path in chosen:
        (tmp_path / "s" / path.name).symlink_to(path)
    copies = tmp_path / "copies"
    copies.mkdir()
    for k, path in enumerate(chosen):
        (copies / f"{k}.dcm").write_bytes(path.read_bytes())
        assert pixels.found(pydicom.dcmread(path).pixel_array[None])
    receipt = deidentify(copies, tmp_path / "t", Options(text="mask"), True)
    assert receipt["n_text_masked"] == len(chosen) == receipt["n_written"]
    for file in (tmp_path / "t").rglob("*.dcm"):
        assert not pixels.found(pydicom.dcmread(file).pixel_array[None])


@pytest.mark.real_data
@pytest.mark.skipif(not REAL, reason="SYNTHMED_REAL_DATA is not set")
def test_real_slices_without_text() -> None:
    slices, _, where = make.headers(Path(REAL, "dicom/vendors/dcm_qa_nih/In/20180918GE/mr_0005"))
    some = [stack.read(v.slices, where) for v in volumes(slices)[:2]]
    assert sum(image.data.shape[2] for image in some) >= 20
    assert not any(pixels.found_in_volume(image, stored=True) for image in some)
