"""The last stage: one folder or the other, whole or not at all, and signatures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthmed.artifacts import ChannelInfo, Cohort, Dataset, Sample, Scan, Screened, ScreenedCohort
from synthmed.config import Config
from synthmed.configfile import validate
from synthmed.errors import UsageError
from synthmed.formats import nifti
from synthmed.formats.quarantine import Quarantine
from synthmed.formats.refusal import Refused
from synthmed.metrics.stats import clopper_pearson
from synthmed.report.mosaic import png
from synthmed.report.page import MAX_PAGE_BYTES
from synthmed.stages import lines
from synthmed.stages import release as stage
from synthmed.stages.identifiers import SourceNames
from synthmed.stages.lines import Elsewhere
from synthmed.store import Run
from synthmed.types import Decision, Estimate

N = 6
PATIENTS = [f"p{i:016x}" for i in range(8)]
RULE = {"estimate": "copied_patients", "bound": "upper", "at_most": 0.05}


START = {
    "weights": "ab" * 32,
    "backbone": "cvae",
    "title": "Phantoms",
    "modality": "T1w",
    "privacy": None,
    "init": None,
    "n_taken": 3,
    "n_fresh": 0,
}
"""The weights that a run started from, as an earlier version told of them."""


def estimate(high: float, value: float = 0.0, **fields: Any) -> Estimate:
    defaults: dict[str, Any] = {
        "name": "copied_patients",
        "group": "memorization",
        "n": 60,
        "better": "lower",
        "floor": 0.0,
        "ceiling": None,
        "method": "Clopper-Pearson.",
        "seed": 0,
    }
    return Estimate(value=value, ci=(0.0, high), **{**defaults, **fields})


PASSING, OPEN, FAILING = estimate(0.04), estimate(0.06), estimate(0.3, 0.1)
EXTRA = estimate(0.5, name="kid", group="fidelity")


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "data": {
            "source": "somewhere",
            "grid": [8, 8, 8],
            "conditions": {"sex": {"categories": ["F", "M"], "kind": "categorical"}},
        },
        "backbone": {"name": "cvae"},
        "privacy": None,
        "train": {"max_steps": 1},
        "policy": {"rules": [RULE]},
        "screen": {"max_dropped": 0.46},  # which six samples are enough to be sure of
    }
    return validate({**tree, **changes}, "test")


class House:
    """A run up to its evidence, in a folder of its own."""

    def __init__(self, path: Path) -> None:
        self.run = Run(path)
        rng = np.random.default_rng(0)
        folder = self.run.folder("cohort")
        folder.mkdir()
        samples = []
        for k in range(N):
            voxels = rng.integers(0, 1000, (8, 8, 8)).astype(np.int16)
            file = f"{k:06d}_T1w.nii.gz"
            nifti.write(folder / file, voxels, np.diag([2.0, 2, 2, 1]))
            samples.append(Sample(index=k, labels={"sex": "FM"[k % 2]}, files={"T1w": file}))
        lines = "".join(s.model_dump_json() + "\n" for s in samples)
        (folder / "samples.jsonl").write_text(lines)
        self.cohort = Cohort(folder, samples)
        outcome = [
            Screened(index=k, flagged=k == 0, gap=0.1, p=0.01, nearest=PATIENTS[k], similarity=0.9)
            for k in range(N)
        ]
        self.screened = ScreenedCohort(samples[1:], [folder] * (N - 1), outcome, ())
        self.real = Dataset(
            volumes=rng.random((8, 1, 8, 8, 8)).astype(np.float16),
            patients=np.array(PATIENTS),
            labels=[{"sex": "F"}] * 8,
            holdout=np.arange(8) >= 6,
            channels=[ChannelInfo("T1w")],
            affine=np.eye(4),
        )
        catalogue = self.run.folder("catalogue")
        catalogue.mkdir()
        scans = [
            Scan(
                scan=f"{p}-1",
                patient=p,
                session=1,
                channels={},
                shape=(8, 8, 8),
                spacing_mm=(2, 2, 2),
                orientation="RAS",
            )
            for p in PATIENTS
        ]
        (catalogue / "catalogue.jsonl").write_text(
            "".join(s.model_dump_json() + "\n" for s in scans)
        )
        quarantine = Quarantine()
        quarantine.add("Mustermann_Erika/image.nii.gz", Refused("unreadable", "Not a NIfTI."))
        quarantine.write(catalogue / "quarantine.tsv")

    def release(self, *evidence: Estimate, **fields: Any) -> Decision:
        facts = {
            "n_patients": 120,
            "n_scans": 120,
            "n_train": 60,
            "n_holdout": 60,
            "n_synthetic": N - 1,
            "n_dropped": fields.pop("n_dropped", 1),
            "digests": fields.pop("digests", {"model": "ab" * 32}),
            "versions": {"torch": "2.13.0"},
            "unknown": "ignored",
            "init": fields.pop("init", None),
        }
        given = fields.pop("config", config())
        fields.setdefault("real", self.real)
        doubts = {k: fields.pop(k) for k in ("digest", "audit_failed", "elsewhere") if k in fields}
        grounds = stage.Grounds(evidence, **doubts)
        fields.setdefault("names", SourceNames())
        return stage.release(self.run, given, grounds, self.screened, facts, **fields)

    @property
    def there(self) -> set[str]:
        return {n for n in ("release", "withheld") if (self.run.path / n).exists()}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "run")


def content(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize(
    ("evidence", "decision", "folder"),
    [
        (PASSING, "RELEASE", "release"),
        (OPEN, "REVIEW", "withheld"),
        (FAILING, "WITHHELD", "withheld"),
    ],
)
def test_exactly_one_folder(house: House, evidence: Estimate, decision: str, folder: str) -> None:
    assert house.release(evidence).decision == decision
    assert house.there == {folder}
    reports = [house.run.private / "report", house.run.path / folder / "report"]
    for path in reports:
        assert json.loads((path / "report.json").read_text())["decision"] == decision
        assert decision in (path / "report.html").read_text()
        assert (path / "report.html").stat().st_size < MAX_PAGE_BYTES
    house.release(FAILING if folder == "release" else PASSING)
    assert house.there == {"withheld" if folder == "release" else "release"}


def test_contents_and_sums(house: House) -> None:
    house.release(PASSING)
    files = content(house.run.path / "release")
    wanted = "dataset_description.json participants.tsv participants.json README.md .bidsignore"
    wanted += " report/report.html report/report.json MODEL_CARD.md DATASHEET.md croissant.json"
    assert set(wanted.split()) < set(files)
    assert "sub-syn0005/anat/sub-syn0005_T1w.nii.gz" in files
    sums = dict(reversed(line.split("  ")) for line in files["SHA256SUMS"].decode().splitlines())
    assert set(sums) == set(files) - {"SHA256SUMS"}
    assert all(hashlib.sha256(files[n]).hexdigest() == sums[n] for n in sums)
    modes = {p.stat().st_mode & 0o077 for p in (house.run.path / "release").rglob("*")}
    assert modes == {0}


def test_same_inputs_same_bytes(house: House, tmp_path: Path) -> None:
    house.release(PASSING, EXTRA)
    first = content(house.run.path / "release"), content(house.run.private / "report")
    house.release(PASSING, EXTRA)
    assert (content(house.run.path / "release"), content(house.run.private / "report")) == first
    other = House(tmp_path / "other")
    other.release(PASSING, EXTRA)
    assert content(other.run.path / "release") == first[0]


def test_schema_and_what_each_report_may_hold(house: House) -> None:
    house.release(PASSING, EXTRA)
    private = json.loads((house.run.private / "report/report.json").read_text())
    shared = json.loads((house.run.path / "release/report/report.json").read_text())
    for report in (private, shared):
        assert report["schema_version"] == 1
        assert report["privacy"] is None
        counts = ["n_patients", "n_scans", "n_train", "n_holdout", "n_synthetic", "n_dropped"]
        assert list(report["cohort"]) == counts
        for e in report["estimates"]:
            assert e["status"] in ("pass", "review", "fail", "inconclusive")
            assert {"value", "ci", "floor", "ceiling", "target", "slice", "method"} <= set(e)
    assert [e["name"] for e in private["estimates"]] == ["copied_patients", "kid"]
    assert [e["name"] for e in shared["estimates"]] == ["copied_patients"]
    assert {i["group"] for i in private["images"]} == {"synthetic", "train", "nearest"}
    assert {i["group"] for i in shared["images"]} == {"synthetic"}
    everything = b"".join(content(house.run.path / "release").values())
    assert not any(p.encode() in everything for p in PATIENTS)
    assert PATIENTS[0] in (house.run.private / "report/report.html").read_text()


@pytest.mark.parametrize("broken", ["export", "scan", "croissant", "write_report", "close"])
def test_a_death_midway_leaves_no_release(
    house: House, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    house.release(PASSING)
    with monkeypatch.context() as patch:
        patch.setattr(stage, broken, die)
        with pytest.raises(KeyboardInterrupt):
            house.release(PASSING)
        assert house.there == set()
        assert stage.standing(house.run, "") is None
    house.release(PASSING)
    assert house.there == {"release"}


def screened(house: House, flagged: int, dropped: int) -> ScreenedCohort:
    """The house's cohort with its first samples flagged, and the first of these dropped."""
    outcome = [
        s.model_copy(update={"flagged": i < flagged}) for i, s in enumerate(house.screened.screened)
    ]
    kept = house.cohort.samples[dropped:]
    return ScreenedCohort(kept, [house.cohort.path] * len(kept), outcome, ())


def test_too_many_flagged_is_withheld(house: House) -> None:
    house.screened = screened(house, flagged=2, dropped=2)
    assert house.release(PASSING).decision == "RELEASE"
    house.screened = screened(house, flagged=3, dropped=3)
    decision = house.release(PASSING)
    assert decision.decision == "WITHHELD"
    assert decision.reasons[0].startswith("flagged samples: 3 of 6 samples")


@pytest.mark.parametrize(
    ("limit", "enough"), [(0.46, 6), (0.05, 72), (0.0, 72), (0.02, 72), (1, 1)]
)
def test_few_samples_do_not_tell_a_model_that_copies_no_one(
    house: House, limit: float, enough: int
) -> None:
    """None of n: the model may copy so often that it would show none among n in 2.5 % of cases."""
    asked = config(screen={"max_dropped": limit})
    assert lines.enough_samples(asked) == enough
    reached = max(limit, lines.RESOLVED)
    assert clopper_pearson(0, enough)[1] <= reached
    assert enough == 1 or clopper_pearson(0, enough - 1)[1] > reached
    house.screened = screened(house, flagged=0, dropped=0)
    decision = house.release(PASSING, config=asked)
    assert decision.decision == ("RELEASE" if enough <= 6 else "REVIEW")
    if enough > 6:
        (reason,) = decision.reasons
        assert reason.startswith("flagged samples: 0 of 6 samples copy a patient, within")
        assert f"fewer than {enough} samples are too few" in reason


def test_patients_who_may_be_one_person_ask_for_a_person(house: House) -> None:
    house.screened = replace(house.screened, under_two_names=[(PATIENTS[1], PATIENTS[3])])
    decision = house.release(PASSING)
    assert decision.decision == "REVIEW"
    (reason,) = decision.reasons
    assert reason.startswith("patients under two names: some may be one person")
    report = json.loads((house.run.path / "private/report/report.json").read_text())
    assert report["under_two_names"] == [[PATIENTS[1], PATIENTS[3]]]
    page = (house.run.path / "private/report/report.html").read_text(encoding="utf-8")
    assert f"{PATIENTS[1]} and {PATIENTS[3]}" in page
    shared = (house.run.path / "withheld/report/report.json").read_text()
    assert json.loads(shared)["under_two_names"] is None and PATIENTS[1] not in shared


def test_a_screen_that_did_not_ask_for_two_names_does_not_pass(house: House) -> None:
    house.screened = replace(house.screened, under_two_names=None)
    decision = house.release(PASSING)
    assert decision.decision == "REVIEW"
    assert decision.reasons[0].startswith("patients under two names: was not asked")


def test_a_copy_that_would_ship_is_withheld(house: House) -> None:
    """As where the filter is off, or the cohort is another tool's and nothing can be dropped."""
    house.screened = screened(house, flagged=1, dropped=0)
    decision = house.release(PASSING)
    assert decision.decision == "WITHHELD"
    assert decision.reasons == ["flagged samples that ship: 1; the screen did not drop them."]


def test_a_replacement_that_is_a_copy_is_withheld(house: House) -> None:
    last = house.screened.screened[-1]
    again = [last.model_copy(update={"flagged": True})]
    house.screened = replace(house.screened, replaced=again)
    decision = house.release(PASSING)
    assert decision.decision == "WITHHELD"
    assert decision.reasons == ["flagged samples that ship: 1; the screen did not drop them."]


def test_replacements_that_were_not_screened_ask_for_a_person(house: House) -> None:
    house.screened = replace(house.screened, replaced=None)
    decision = house.release(PASSING)
    assert decision.decision == "REVIEW"
    assert decision.reasons[0].startswith("flagged samples that ship: an earlier version")


@pytest.mark.parametrize("of_subgroup", [False, True])
def test_a_policy_that_does_not_ask_about_copies_is_for_a_person(
    house: House, of_subgroup: bool
) -> None:
    """Of everybody: copies of a few are not made up for by none of others."""
    rules: list[dict[str, Any]] = [{"estimate": "kid", "at_most": 1}]
    found = [PASSING, EXTRA]
    if of_subgroup:
        rules.append({"estimate": "copied_patients", "slice": "sex=F", "at_most": 1})
        found.append(PASSING.model_copy(update={"slice": "sex=F"}))
    decision = house.release(*found, config=config(policy={"rules": rules}))
    assert decision.decision == "REVIEW"
    assert "copied_patients: the policy has no line about copies." in decision.reasons


def test_an_altered_release_is_neither_sealed_again_nor_taken_for_done(house: House) -> None:
    house.release(PASSING)
    assert stage.standing(house.run, "") is not None
    (house.run.path / "release/SMITH_JOHN.nii.gz").write_bytes(b"somebody")
    with pytest.raises(UsageError, match="changed since it was built"):
        stage.rebuild(house.run)
    assert stage.standing(house.run, "") is None


def plant_pseudonym(house: House) -> Estimate:
    return estimate(0.04, note=f"nearest is {PATIENTS[3]}")


def plant_quarantined(house: House) -> Estimate:
    return estimate(0.04, note="as in mustermann_erika")


@pytest.mark.parametrize("plant", [plant_pseudonym, plant_quarantined])
def test_an_identifier_blocks_the_release(house: House, plant: Callable[[House], Estimate]) -> None:
    decision = house.release(plant(house))
    assert decision.decision == "WITHHELD"
    assert decision.reasons[0].startswith("identifier scan: ")
    assert house.there == {"withheld"}
    assert "WITHHELD" in (house.run.path / "withheld/README.md").read_text()
    private = json.loads((house.run.private / "report/report.json").read_text())
    assert "report/report.json" in {f["path"] for f in private["identifier_scan"]["findings"]}


def test_names_of_the_source_block_the_release_and_common_words_do_not(house: House) -> None:
    note = estimate(0.04, note="like case_0815_b")
    for names in ({"people": {"case_0815_b"}}, {"files": {"case_0815_b"}}):
        of_source = SourceNames(**{k: frozenset(v) for k, v in names.items()})
        assert house.release(note, names=of_source).decision == "WITHHELD"
    common = frozenset(("image", "train", "T1w", "asks", "nothing", "sampled"))
    for of_source in (SourceNames(people=common), SourceNames(files=common)):
        assert house.release(PASSING, names=of_source).decision == "RELEASE"


def test_signing_a_review(house: House) -> None:
    house.release(OPEN)
    before = content(house.run.path / "withheld")
    stage.sign(house.run, config(), " Dr. Weiss ", "Looked at all volumes.")
    assert house.there == {"release"}
    after = content(house.run.path / "release")
    assert {n for n in after if after[n] != before.get(n)} == {
        "README.md",
        "SHA256SUMS",
        "report/report.html",
        "report/report.json",
    }
    report = json.loads(after["report/report.json"])
    assert report["decision"] == "REVIEW"
    assert report["signature"]["name"] == "Dr. Weiss"
    assert b"Dr. Weiss" in after["README.md"]
    assert b"Dr. Weiss" in after["report/report.html"]
    record = json.loads((house.run.private / "signed.json").read_text())
    assert record["reason"] == "Looked at all volumes."
    assert record["when"]
    assert "Dr. Weiss" in (house.run.path / "log.jsonl").read_text()
    private = json.loads((house.run.private / "report/report.json").read_text())
    assert private["signature"] == report["signature"]
    for line in after["SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(after[name]).hexdigest() == digest


def test_a_signature_holds_for_the_same_report_alone(house: House) -> None:
    house.release(OPEN)
    stage.sign(house.run, config(), "W", "Seen.")
    signed = content(house.run.path / "release")
    assert house.release(OPEN).decision == "REVIEW"
    assert content(house.run.path / "release") == signed
    house.release(estimate(0.07))
    assert house.there == {"withheld"}


def test_what_cannot_be_signed(house: House) -> None:
    with pytest.raises(UsageError, match="no decision yet"):
        stage.sign(house.run, config(), "W", "Seen.")
    house.release(FAILING)
    with pytest.raises(UsageError, match="WITHHELD cannot be signed away"):
        stage.sign(house.run, config(), "W", "Seen.")
    assert house.there == {"withheld"}
    house.release(PASSING)
    with pytest.raises(UsageError, match="released already"):
        stage.sign(house.run, config(), "W", "Seen.")
    house.release(OPEN)
    with pytest.raises(UsageError, match="both must say something"):
        stage.sign(house.run, config(), "W", "  ")
    for reason in (f"seen {PATIENTS[0]}", "file Mustermann_Erika is gone"):
        with pytest.raises(UsageError, match="holds an identifier"):
            stage.sign(house.run, config(), "W", reason)
    (house.run.path / "withheld/participants.tsv").write_text("altered")
    with pytest.raises(UsageError, match="changed since it was built"):
        stage.sign(house.run, config(), "W", "Seen.")
    assert house.there == {"withheld"}


@pytest.mark.parametrize("told", ["--sign", "--reason"])
def test_a_signature_names_nothing_of_the_source(house: House, tmp_path: Path, told: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rows = ["participant_id\tsex\timage", "Okonkwo-0002\tF\tscan_0815.nii.gz"]
    (source / "participants.tsv").write_text("\n".join(rows) + "\n")
    (source / "scan_0815.nii.gz").write_bytes(b"")
    data = {**config().data.model_dump(mode="json"), "source": str(source)}
    house.release(OPEN)
    for named in ("okonkwo-0002", "scan_0815"):
        said = {"--sign": "W", "--reason": "Seen.", told: f"compared with {named}"}
        with pytest.raises(UsageError, match="holds an identifier"):
            stage.sign(house.run, config(data=data), said["--sign"], said["--reason"])
    assert house.there == {"withheld"}
    stage.sign(house.run, config(data=data), "W", "compared with a female participant")


def test_a_signature_does_not_hold_for_another_cohort(house: House) -> None:
    """Also where no figure tells the two apart, as with few metrics and no copies in either."""
    house.release(OPEN)
    stage.sign(house.run, config(), "W", "Seen.")
    house.release(OPEN, digests={"model": "ab" * 32, "cohort": "cd" * 32})
    assert house.there == {"withheld"}


@pytest.mark.parametrize(
    ("doubt", "decision", "said"),
    [
        ({"audit_failed": True}, "WITHHELD", "audit of the promise"),
        ({"elsewhere": Elsewhere(3, 0, 0, True)}, "REVIEW", "scans that were not judged"),
        ({"elsewhere": Elsewhere(0, 1, 0, True)}, "WITHHELD", "names in the synthetic files"),
        ({"elsewhere": Elsewhere(0, 0, 1, True)}, "REVIEW", "names in the synthetic files"),
        ({"elsewhere": Elsewhere(0, 0, 0, False)}, "REVIEW", "names in the synthetic files"),
        ({"elsewhere": Elsewhere(0, 0, 0, True, True)}, "REVIEW", "categories that are not shown"),
        ({"init": START | {"knew_held_out": True}}, "REVIEW", "weights to start from"),
        ({"init": START | {"knew_held_out": None}}, "REVIEW", "weights to start from"),
        ({"init": START}, "REVIEW", "weights to start from"),
        ({"names": SourceNames(complete=False)}, "REVIEW", "identifier scan"),
    ],
)
def test_what_no_estimate_knows_of_decides_too(
    house: House, doubt: dict[str, Any], decision: str, said: str
) -> None:
    found = house.release(PASSING, **doubt)
    assert found.decision == decision and found.reasons[0].startswith(f"{said}: ")
    assert house.there == {"withheld"}


def test_weights_that_knew_nobody_held_out_have_a_line_that_passes(house: House) -> None:
    decision = house.release(PASSING, init=START | {"knew_held_out": False})
    assert decision.decision == "RELEASE"
    (line,) = [v for v in decision.verdicts if v.estimate == "weights to start from"]
    assert line.status == "pass"


@pytest.mark.parametrize("evidence", [PASSING, OPEN])
def test_a_folder_that_was_moved_is_not_taken_for_decided(house: House, evidence: Estimate) -> None:
    house.release(evidence, digest="a")
    (name,) = house.there
    (other,) = {"release", "withheld"} - {name}
    (house.run.path / name).rename(house.run.path / other)
    assert stage.standing(house.run, "a") is None


def test_standing(house: House) -> None:
    assert stage.standing(house.run, "a") is None
    decision = house.release(OPEN, digest="a")
    assert stage.standing(house.run, "a") == decision
    assert stage.standing(house.run, "b") is None
    stage.sign(house.run, config(), "W", "Seen.")
    assert stage.standing(house.run, "a") == decision


def test_rebuild_gives_the_same_pages(house: House) -> None:
    with pytest.raises(UsageError, match="no report yet"):
        stage.rebuild(house.run)
    house.release(PASSING)
    first = content(house.run.path / "release"), content(house.run.private / "report")
    for page in house.run.path.rglob("report.html"):
        page.write_text("")
    assert len(stage.rebuild(house.run)) == 2
    assert (content(house.run.path / "release"), content(house.run.private / "report")) == first


def test_differential_privacy_is_not_passed_over_in_silence(house: House) -> None:
    promise = {"epsilon": 8, "sample_rate": 0.5, "patients": 20}
    data = {"source": "x", "grid": [8, 8, 8], "spacing_mm": [1, 1, 1], "view": "grid"}
    data |= {"patient": "patient"}
    with pytest.raises(UsageError, match="nothing says that the model keeps it"):
        house.release(PASSING, config=config(privacy=promise, data=data))
    assert house.there == set()


def test_without_real_scans_the_report_has_none(house: House) -> None:
    house.release(PASSING, real=None)
    report = json.loads((house.run.private / "report/report.json").read_text())
    assert {i["group"] for i in report["images"]} == {"synthetic"}


def test_a_cohort_made_elsewhere_gets_a_report_alone(house: House) -> None:
    house.release(OPEN, with_volumes=False)
    files = content(house.run.path / "withheld")
    others = {n for n in files if not n.startswith("report/images/")}
    assert others == {"SHA256SUMS", "report/report.html", "report/report.json"}
    assert json.loads(files["report/report.json"])["data"]["backbone"] is None
    assert b"cvae" not in files["report/report.html"]
    stage.sign(house.run, config(), "W", "Seen.")
    assert b"Seen." in content(house.run.path / "release")["report/report.html"]


def test_croissant_is_valid(house: House) -> None:
    croissant = pytest.importorskip("mlcroissant")
    house.release(PASSING)
    file = house.run.path / "release/croissant.json"
    dataset = croissant.Dataset(jsonld=file)
    assert not dataset.metadata.issues.errors
    records = list(dataset.records("participants"))
    assert len(records) == N - 1
    assert records[0]["participants/participant_id"] == b"sub-syn0001"


def test_what_the_model_shows_of_itself_never_leaves(house: House) -> None:
    folder = house.run.folder("model") / "examination"
    folder.mkdir(parents=True)
    (folder / "figures.json").write_text(json.dumps({"canary_figure": 28.5}))
    (folder / "remarks.json").write_text(json.dumps(["Canary remark."]))
    (folder / "latents.tsv").write_text("unit\tcanary_column\n1\t0.25\n")
    picture = png(np.arange(64, dtype=np.uint8).reshape(8, 8))
    (folder / "latents.png").write_bytes(picture)
    (folder / "captions.json").write_text(json.dumps({"latents": "Canary caption."}))
    house.release(OPEN)
    private = content(house.run.private / "report")
    assert private["images/model-latents.png"] == picture
    report = json.loads(private["report.json"])
    assert report["examination"] == {
        "figures": {"canary_figure": 28.5},
        "remarks": ["Canary remark."],
        "tables": [
            {"name": "latents", "columns": ["unit", "canary_column"], "rows": [["1", "0.25"]]}
        ],
    }
    for word in (b"canary_figure", b"canary column", b"Canary caption.", b"Canary remark."):
        assert word in private["report.html"]
    for file in content(house.run.path / "withheld").values():
        assert picture not in file
        assert b"anary" not in file
