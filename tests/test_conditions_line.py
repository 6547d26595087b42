"""Every kind of condition through the whole line: none, some missing, masks drawn, masks given."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import Result
from scipy.ndimage import gaussian_filter

from synthmed import configfile
from synthmed.artifacts import Cohort, Dataset
from synthmed.conditions import Conditions
from synthmed.formats import synthetic
from synthmed.pipeline import Line
from synthmed.stages.prepare import conform_labels
from synthmed.store import Run

IMAGE = "{participant_id}/{session_id}/anat/*_T1w.nii.gz"
LABELS = "derivatives/labels/{participant_id}/{session_id}/anat/*_dseg.nii.gz"


def table(file: Path) -> list[dict[str, str]]:
    head, *rows = [line.split("\t") for line in file.read_text().splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def generate(
    synthmed: Callable[..., Result], config: Path, run: Path, *more: str, code: int = 0
) -> Result:
    result = synthmed("generate", config, "--run", run, "--device", "cpu", *more)
    assert result.code == code, result.err
    return result


# --- no condition --------------------------------------------------------------------------------


def test_without_conditions_the_line_ends_in_a_release(
    make_config: Callable[..., Path], synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = make_config("plain", data__conditions={}, train__augment={})
    generate(synthmed, config, run)
    assert json.loads((run / "private/model/model.json").read_text())["condition_width"] == 0
    rows = table(run / "release/participants.tsv")
    assert rows == [{"participant_id": f"sub-syn{k + 1:04d}"} for k in range(18)]
    report = json.loads((run / "private/report/report.json").read_text())
    names = {e["name"] for e in report["estimates"]}
    assert "mmd2" in names and "condition_accuracy" not in names
    assert report["data"]["conditions"] == {}
    assert "Synthetic scans" in (run / "release/report/report.html").read_text()
    files = [p.read_bytes() for p in (run / "release").rglob("*_T1w.nii.gz")]
    assert len(set(files)) == 18
    asked = generate(synthmed, config, run, "--label", "sex=F:2", code=2)
    assert "data.conditions declares none" in asked.err


# --- labels that are missing ---------------------------------------------------------------------


@pytest.fixture
def gappy(cohort: Path, tmp_path: Path) -> Path:
    """The cohort, in which five people have no age, three no diagnosis and one neither nor sex."""
    source = tmp_path / "source"
    shutil.copytree(cohort, source)
    rows = table(source / "participants.tsv")
    readable = {p.name.split("_")[0] for p in (source / "derivatives").rglob("*_dseg.nii.gz")}
    seen = [r for r in rows if r["participant_id"] in readable]
    for row in seen[:5]:
        row["age"] = "n/a"
    for row in seen[4:7]:
        row["diagnosis"] = ""
    seen[4]["sex"] = "n/a"
    lines = ["\t".join(r.values()) for r in ({k: k for k in rows[0]}, *rows)]
    (source / "participants.tsv").write_text("\n".join(lines) + "\n")
    return source


def test_scans_with_labels_missing_are_refused_unless_they_are_asked_for(
    make_config: Callable[..., Path], synthmed: Callable[..., Result], gappy: Path, tmp_path: Path
) -> None:
    strict = make_config("strict", data__source=str(gappy))
    kept = make_config("kept", data__source=str(gappy), data__missing_labels="keep")
    refused = synthmed("ingest", tmp_path / "strict", "--config", strict, "--json").json()
    assert refused["n_patients"] == 24 - 7
    assert refused["reasons"]["label_missing"] >= 7
    run = tmp_path / "run"
    result = generate(synthmed, kept, run)
    assert "kept with labels missing: " in result.err
    data = Dataset.open(run / "private/prepare")
    assert len(set(data.patients)) == 24
    without = {p: set(data.labels[i]) for i, p in enumerate(data.patients)}
    assert sorted(map(len, without.values())) == [0] + [2] * 6 + [3] * 17
    conditions = Conditions(configfile.load(kept).data.conditions)
    encoded = np.stack([conditions.encode(x) for x in data.labels])
    assert encoded.shape == (len(data.patients), 6)
    assert (encoded[:, 5] == 0).sum() == sum("age" not in x for x in data.labels) >= 5
    # what is asked of the model is complete, and so is what is released
    for row in table(run / "release/participants.tsv"):
        assert "n/a" not in row.values() and "" not in row.values()
    estimates = json.loads((run / "private/report/report.json").read_text())["estimates"]
    notes = {e["slice"]: e["note"] for e in estimates if e["name"] == "condition_accuracy"}
    assert "label not known of some" in notes["condition=age"]


# --- masks that the model draws ------------------------------------------------------------------


def test_images_are_drawn_with_their_masks(
    make_config: Callable[..., Path], synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    """Of five labels in the files two are declared: the export holds these and no other."""
    run = tmp_path / "run"
    labels = {"grey_matter": 4, "white_matter": 5}
    config = make_config(
        "joint", data__channels={"T1w": IMAGE, "tissue": {"path": LABELS, "labels": labels}}
    )
    generate(synthmed, config, run)
    data = Dataset.open(run / "private/prepare")
    assert [c.name for c in data.channels] == ["T1w", "tissue:grey_matter", "tissue:white_matter"]
    release = run / "release"
    found: set[int] = set()
    for k in range(18):
        stem = release / f"sub-syn{k + 1:04d}/anat/sub-syn{k + 1:04d}"
        image = nib.load(f"{stem}_T1w.nii.gz")
        mask = nib.load(f"{stem}_seg-tissue_dseg.nii.gz")
        assert np.array_equal(image.affine, mask.affine)
        assert image.shape == mask.shape
        values = np.unique(np.asarray(mask.dataobj))
        found |= set(values.tolist())
        assert "Synthetic segmentation" in Path(f"{stem}_seg-tissue_dseg.json").read_text()
        assert Path(f"{stem}_seg-tissue_dseg.tsv").read_text().splitlines()[2:] == [
            "4\tgrey_matter", "5\twhite_matter",
        ]  # fmt: skip
    assert found == {0, 4, 5}
    # decoded, a voxel belongs to one label at most, also where the model's own sums pass 1
    cohort = Cohort.open(run / "private/sample")
    volumes = synthetic.read(cohort.samples, [cohort.path] * 18, data.channels)
    assert volumes[:, 1:].sum(1).max() <= 1
    assert volumes[:, 1:].sum() > 0
    report = json.loads((release / "report/report.json").read_text())
    assert [m["label"] for m in report["data"]["masks"]] == ["grey_matter", "white_matter"]
    for picture in (release / "report/images").iterdir():
        assert picture.read_bytes()[25] == 2, "colours"
    assert "tissue: grey_matter" in (release / "report/report.html").read_text()
    assert no_bids_error(release)


def no_bids_error(folder: Path) -> bool:
    """Whether the reference validator finds no error; true where it is not installed."""
    here = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    tool = here or shutil.which("bids-validator-deno")
    if tool is None:
        return True
    done = subprocess.run(
        [tool, "--json", str(folder)], capture_output=True, check=False, timeout=60
    )
    issues = json.loads(done.stdout)["issues"]["issues"]
    return not [i for i in issues if i["severity"] == "error"]


# --- masks that the model is given ---------------------------------------------------------------


def balls(folder: Path, n: int) -> list[np.ndarray]:
    """Label maps of nobody: a brain-sized ball of grey (4) around one of white (5)."""
    folder.mkdir(parents=True)
    out = []
    for i in range(n):
        wave = gaussian_filter(np.random.default_rng(i).standard_normal((32, 32, 32)), 4)
        radius = np.linalg.norm(np.indices((32, 32, 32)) - 15.5, axis=0) + 60 * wave
        labels = np.select([radius < 6, radius < 10], [5, 4], 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(labels, np.diag([6.0, 6, 6, 1])), folder / f"{i:02d}.nii.gz")
        out.append(labels)
    return out


@pytest.fixture
def given_config(make_config: Callable[..., Path], tmp_path: Path) -> Path:
    labels = {"grey_matter": 4, "white_matter": 5}
    channels = {"tissue": {"path": LABELS, "labels": labels, "given": True}, "T1w": IMAGE}
    return make_config(
        "given",
        data__channels=channels,
        sample__masks=str(tmp_path / "masks"),
        train__augment={},
        train__max_steps=60,
        train__optimizer={"learning_rate": 5e-3},
        backbone={
            "name": "ddpm",
            "space": {"kind": "wavelet", "levels": 1},
            "prediction": "v",
            "widths": [16],
            "depth": 1,
            "sampler": {"name": "dpm_solver", "steps": 8},
            "ema": 0.9,
        },
    )


def test_images_are_drawn_for_given_masks(
    given_config: Path, synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    sources = balls(tmp_path / "masks", 5)
    run = tmp_path / "run"
    generate(synthmed, given_config, run)
    data = Dataset.open(run / "private/prepare")
    conformed = [
        conform_labels(m, np.diag([6.0, 6, 6, 1]), data.grid, data.affine) for m in sources
    ]
    release, used, images = run / "release", [], []
    for k in range(18):
        stem = release / f"sub-syn{k + 1:04d}/anat/sub-syn{k + 1:04d}"
        mask = np.asarray(nib.load(f"{stem}_seg-tissue_dseg.nii.gz").dataobj)
        used.append(next(i for i, m in enumerate(conformed) if np.array_equal(m, mask)))
        image = np.asarray(nib.load(f"{stem}_T1w.nii.gz").dataobj)
        images.append(image)
        told = json.loads(Path(f"{stem}_seg-tissue_dseg.json").read_text())
        assert "given, not generated" in told["Description"]
    # where the masks disagree, a sample is brighter if its own one is there: by a tenth at least of
    # what divides the places that all of them cover from those that none does
    covered = np.stack([conformed[i] > 0 for i in used])
    volumes, everywhere, nowhere = np.stack(images), covered.all(0), ~covered.any(0)
    differ = ~everywhere & ~nowhere
    there, absent = volumes[:, differ][covered[:, differ]], volumes[:, differ][~covered[:, differ]]
    contrast = volumes[:, everywhere].mean() - volumes[:, nowhere].mean()
    assert there.mean() - absent.mean() > 0.1 * contrast > 0
    # all of them in turn, and not in the order of their names
    assert set(used[:5]) == set(range(5)) and used[5:10] == used[:5] and used[:5] != [0, 1, 2, 3, 4]
    assert "drew the images for them" in (release / "README.md").read_text()
    assert "was given to the model" in (release / "DATASHEET.md").read_text()
    assert no_bids_error(release)
    report = json.loads((run / "private/report/report.json").read_text())
    assert report["data"]["given_masks"] == ["tissue"]

    # a sample is a function of model, seed, index and masks: more of them change none
    first = {p.name: p.read_bytes() for p in (run / "private/sample").glob("*.nii.gz")}
    generate(synthmed, given_config, run, "--count", "20")
    again = {p.name: p.read_bytes() for p in (run / "private/sample").glob("*.nii.gz")}
    assert len(again) == 40 and {k: again[k] for k in first} == first

    # a replacement is drawn for the mask, and with the labels, of what it replaces
    config = configfile.load(given_config)
    sampler = Line(Run(run), config).sampler(Run(run).require("model"), data)
    sampler.stand_in({21: 4})
    assert sampler.labels_of(21) == sampler.labels_of(4)
    batch = sampler.canonical_batch(1)
    assert np.array_equal(batch[21 - 16, 1:], sampler.canonical_batch(0)[4, 1:])
    assert not np.array_equal(batch[21 - 16, :1], sampler.canonical_batch(0)[4, :1])

    # where the masks are gone, what was drawn for them is still good; other masks, other samples
    (tmp_path / "masks").rename(tmp_path / "gone")
    assert generate(synthmed, given_config, run, "--count", "20").err.count("(unchanged)") == 7
    balls(tmp_path / "masks", 3)
    generate(synthmed, given_config, run, "--count", "20")
    fewer = {p.name: p.read_bytes() for p in (run / "private/sample").glob("*_tissue.nii.gz")}
    assert len(set(fewer.values())) == 3


def test_what_a_killed_run_drew_for_other_masks_is_drawn_again(
    given_config: Path, synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    balls(tmp_path / "masks", 3)
    run = tmp_path / "run"
    for stage in ("ingest", "prepare", "train"):
        assert synthmed(stage, run, "--config", given_config).code == 0
    partial = run / "private/sample.partial"
    partial.mkdir()
    (partial / "syn-000000_T1w.nii.gz").write_bytes(b"drawn for another mask")
    (partial / ".inputs.json").write_text('{"model": "the same", "masks": "another"}')
    assert synthmed("sample", run).code == 0
    assert nib.load(run / "private/sample/syn-000000_T1w.nii.gz").shape == (16, 16, 16)


@pytest.mark.parametrize("whose", ["a patient's", "with other labels"])
def test_masks_that_may_not_be_used_are_found_before_training(
    given_config: Path, synthmed: Callable[..., Result], cohort: Path, tmp_path: Path, whose: str
) -> None:
    balls(tmp_path / "masks", 2)
    if whose == "a patient's":
        # the file as it lies in the hospital, its undeclared labels taken out
        file = sorted((cohort / "derivatives").rglob("*_dseg.nii.gz"))[5]
        image = nib.load(file)
        values = np.asarray(image.dataobj)
        kept = np.where(np.isin(values, (4, 5)), values, 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(kept, image.affine), tmp_path / "masks" / file.name)
        said, who = "is the tissue mask of patient p", file.name.split("_")[0].removeprefix("sub-")
    else:
        nib.save(
            nib.Nifti1Image(np.full((9, 9, 9), 3, np.uint8), np.eye(4)),
            tmp_path / "masks/x.nii.gz",
        )
        said, who = "holds the value 3", "x.nii.gz"
    result = generate(synthmed, given_config, tmp_path / "run", code=3)
    assert f"mask 3 of 3, in the order of file names, {said}" in result.err
    assert who not in result.err
    assert not (tmp_path / "run/private/model").exists()


def test_masks_are_named_on_the_command_line(
    given_config: Path, synthmed: Callable[..., Result], tmp_path: Path
) -> None:
    result = synthmed("generate", given_config, "--run", tmp_path / "r", "--dry-run")
    assert result.code == 0
    nowhere = tmp_path / "nowhere"
    result = synthmed("generate", given_config, "--run", tmp_path / "r", "--masks", nowhere)
    assert result.code == 3
    assert f"sample.masks {nowhere}: no such folder" in result.err
