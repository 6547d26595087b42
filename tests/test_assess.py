"""A cohort of any other tool, judged against real folders: what is decided, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import pandas as pd
import pytest
from conftest import Result

from synthmed.assess import MARK, shared_labels
from synthmed.places import is_run

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, phantoms: Any) -> Callable[..., Path]:
    """A cohort of other phantom patients, by seed."""
    place = tmp_path_factory.mktemp("others")

    def make(seed: int, n: int = 12) -> Path:
        out = place / f"seed{seed}"
        if not out.exists():
            phantoms.make_cohort(out, phantoms.Spec("bids", n, grid=32, seed=seed, broken=0))
        return out

    return make


def report_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "private/report/report.json").read_text())
    return content


@pytest.fixture(scope="module")
def with_holdout(
    tmp_path_factory: pytest.TempPathFactory,
    cohort: Path,
    folder: Callable[..., Path],
    synthmed: Cli,
) -> tuple[Path, Result]:
    """Fresh phantoms as the synthetic side, others held out; no config."""
    out = tmp_path_factory.mktemp("assess") / "out"
    result = synthmed("assess", cohort, folder(11), "--out", out, "--holdout", folder(13), "--json")
    return out, result


def test_with_a_holdout(with_holdout: tuple[Path, Result]) -> None:
    out, result = with_holdout
    assert result.code == 4, result.err
    told = result.json()
    assert told["decision"] == "REVIEW", "twelve held out are too few to pass, and nothing failed"
    assert told["cohort"] == str(out / "withheld")
    report = report_of(out)
    count = report["cohort"]
    assert (count["n_train"], count["n_holdout"]) == (24, 12)
    assert count["n_synthetic"] == len(
        (out / "private/sample/samples.jsonl").read_text().splitlines()
    )
    by_name = {e["name"]: e for e in report["estimates"]}
    assert by_name["copied_patients"]["value"] == 0
    assert by_name["mmd2"]["floor"] is not None
    assert "each participant_id is taken for a person of its own" in result.err


def test_no_volume_and_no_name_leaves(
    with_holdout: tuple[Path, Result], cohort: Path, folder: Callable[..., Path]
) -> None:
    out, _ = with_holdout
    leaving = [p for p in (out / "withheld").rglob("*") if p.is_file()]
    assert leaving
    assert {p.suffix for p in leaving} <= {".html", ".json", ".png", ""}
    assert not [p for p in leaving if ".nii" in p.name]
    persons = [
        p.name.removeprefix("sub-")
        for f in (cohort, folder(11), folder(13))
        for p in f.glob("sub-*")
    ]
    assert len(persons) >= 48
    for file in (p for p in out.rglob("*") if p.is_file() and not p.name.startswith("quarantine")):
        content = file.read_bytes()
        assert not [n for n in persons if n.encode() in content or n in file.name]


def edited(source: Path, out: Path, change: Callable[[list[dict[str, str]]], None]) -> Path:
    """A copy of a cohort with another participants.tsv."""
    shutil.copytree(source, out)
    file = out / "participants.tsv"
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    names = head.split("\t")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
    change(rows)
    text = [head, *("\t".join(r.values()) for r in rows)]
    file.write_text("\n".join(text) + "\n", encoding="utf-8")
    return out


def test_nothing_that_only_real_patients_show_is_told(
    cohort: Path, folder: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    """The youngest, the oldest and the one with a rare label: read, judged, and not printed."""

    def apart(rows: list[dict[str, str]]) -> None:
        # no share, coordinate or time of the pages is as large
        for row, age in zip(rows, ("-71932.5", "86417.5"), strict=False):
            row["age"] = age
        rows[2]["sex"] = "intersex"

    real = edited(cohort, tmp_path / "real", apart)
    out = tmp_path / "out"
    result = synthmed("assess", real, folder(11), "--out", out, "--holdout", folder(13), "-q")
    assert result.code == 4, result.err
    assert report_of(out)["cohort"]["n_train"] == 24, "nobody was refused for a label"
    leaving = [p for p in (out / "withheld").rglob("*") if p.suffix in (".html", ".json")]
    texts = [p.read_text(encoding="utf-8") for p in leaving]
    assert any("Condition age" in t for t in texts)
    own = ("71932", "71,932", "7.19e", "86417", "86,417", "8.64e", "intersex")
    for text in texts:
        assert not [x for x in own if x in text]
    told = json.loads((out / "withheld/report/report.json").read_text())["data"]["conditions"]
    samples = (out / "private/sample/samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(s)["labels"] for s in samples]
    ages = [r["age"] for r in rows]
    assert (told["age"]["low"], told["age"]["high"]) == (min(ages), max(ages))
    assert max(ages) <= 90
    assert set(told["sex"]["categories"]) == {r["sex"] for r in rows}


@pytest.mark.parametrize("side", ["real", "holdout"])
def test_names_of_the_sources_are_searched_for(
    side: str,
    cohort: Path,
    folder: Callable[..., Path],
    make_config: Callable[..., Path],
    synthmed: Cli,
    tmp_path: Path,
) -> None:
    """A person's name in a file's name, that a config then carries into the report."""
    real, holdout = tmp_path / "real", tmp_path / "holdout"
    shutil.copytree(cohort, real)
    shutil.copytree(folder(13), holdout)
    rules = [{"estimate": "copies", "at_most": 1000}]
    config = make_config(
        "judge", policy__rules=rules, governance__recipient="For the file of Okonkwo-Lindqvist"
    )
    args = ("assess", real, folder(11), "--config", config, "--holdout", holdout, "-q")
    assert synthmed(*args, "--out", tmp_path / "clean").code == 0
    named = {"real": real, "holdout": holdout}[side]
    (named / "okonkwo-lindqvist.txt").write_text("a letter")
    result = synthmed(*args, "--out", tmp_path / "out", "--json")
    assert result.json()["decision"] == "WITHHELD", result.err
    assert any("identifier scan" in r for r in report_of(tmp_path / "out")["reasons"])


@pytest.mark.parametrize("side", ["real", "holdout", "synthetic"])
def test_scans_that_could_not_be_read_leave_the_decision_open(
    side: str,
    cohort: Path,
    folder: Callable[..., Path],
    make_config: Callable[..., Path],
    synthmed: Cli,
    tmp_path: Path,
) -> None:
    """Copies may be among them, or patients whose copies the others are."""
    config = make_config("judge", policy__rules=[{"estimate": "copies", "at_most": 1000}])
    of = {"real": cohort, "holdout": folder(13), "synthetic": folder(11)}

    def unknown(rows: list[dict[str, str]]) -> None:
        rows[5]["sex"] = "neither declared nor known"

    clean = dict(of)
    of[side] = edited(of[side], tmp_path / side, unknown)
    for given, code in ((clean, 0), (of, 4)):
        out = tmp_path / f"out-{code}"
        args = ("--config", config, "--holdout", given["holdout"], "--out", out, "-q")
        result = synthmed("assess", given["real"], given["synthetic"], *args)
        assert result.code == code, result.err
    report = report_of(tmp_path / "out-4")
    assert report["decision"] == "REVIEW"
    assert [r.split(":")[0] for r in report["reasons"]] == ["scans that were not judged"]


def test_a_config_that_promises_privacy_is_refused(
    cohort: Path,
    folder: Callable[..., Path],
    make_config: Callable[..., Path],
    synthmed: Cli,
    tmp_path: Path,
) -> None:
    """Its report for others would state figures of people who were promised that none leaves."""
    promise = {"epsilon": 8, "sample_rate": 0.25, "patients": 20}
    config = make_config(
        "private",
        privacy=promise,
        data__patient="participant_id",
        data__view="grid",
        backbone__prior="standard",
    )
    out = tmp_path / "out"
    result = synthmed("assess", cohort, folder(11), "--config", config, "--out", out, "-q")
    assert result.code == 2 and "privacy promises" in result.err
    assert not out.exists()


def test_without_a_holdout_copies_are_still_decided(
    cohort: Path, make_config: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    """The real scans themselves as the synthetic ones: every one is a copy."""
    rules = [{"estimate": "copied_patients", "bound": "upper", "at_most": 0.05}]
    config = make_config("judge", policy__rules=rules)
    result = synthmed(
        "assess", cohort, cohort, "--out", tmp_path / "out", "--config", config, "-q", "--json"
    )
    assert result.code == 4, result.err
    assert result.json()["decision"] == "WITHHELD"
    report = report_of(tmp_path / "out")
    assert report["cohort"]["n_holdout"] == 0
    by_name = {e["name"]: e for e in report["estimates"]}
    assert by_name["copied_patients"]["value"] > 0.5
    assert by_name["membership_auc"]["value"] is None
    assert by_name["membership_auc"]["note"]


def test_others_are_no_copies_without_a_holdout(
    cohort: Path,
    folder: Callable[..., Path],
    make_config: Callable[..., Path],
    synthmed: Cli,
    tmp_path: Path,
) -> None:
    """The control of the test above: fresh people against the same real side; and exit 0."""
    rules = [{"estimate": "copied_patients", "bound": "value", "at_most": 0.05}]
    config = make_config("judge", policy__rules=rules)
    result = synthmed(
        "assess", cohort, folder(11), "--out", tmp_path / "out", "--config", config, "-q"
    )
    assert result.code == 0, result
    assert result.out.startswith("RELEASE\n")
    assert (tmp_path / "out/release").is_dir()


def test_a_person_on_both_sides_is_refused(
    cohort: Path, folder: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    holdout = tmp_path / "holdout"
    shutil.copytree(folder(13), holdout)
    person = sorted(p for p in cohort.glob("sub-*") if (p / "ses-01/anat").is_dir())[-1]
    shutil.copytree(person, holdout / person.name)
    table = (cohort / "participants.tsv").read_text().splitlines()
    with open(holdout / "participants.tsv", "a", encoding="utf-8") as handle:
        handle.writelines(r + "\n" for r in table if r.startswith(person.name + "\t"))
    out = tmp_path / "out"
    result = synthmed("assess", cohort, folder(11), "--out", out, "--holdout", holdout, "-q")
    assert result.code == 3, result
    assert "people are in REAL too" in result.err
    assert person.name not in result.err
    assert not (out / "private/ingest").exists()
    # what was refused left a mark: the next attempt may use the same folder
    again = synthmed("assess", cohort, folder(11), "--out", out, "--holdout", folder(13), "-q")
    assert again.code == 4, again.err


def test_what_an_assessment_leaves_when_it_fails_can_be_purged(
    cohort: Path, synthmed: Cli, tmp_path: Path
) -> None:
    """It has read patients by then: `forget` and `purge` have to know it."""
    (tmp_path / "nothing").mkdir()
    out = tmp_path / "out"
    assert synthmed("assess", cohort, tmp_path / "nothing", "--out", out, "-q").code == 3
    assert list((out / "private/ingest/volumes").iterdir())
    assert is_run(out)
    assert synthmed("purge", out, "--yes").code == 0
    assert not (out / "private/ingest").exists()


def test_a_cohort_that_names_patients_does_not_pass(
    cohort: Path, folder: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    """In a header alone, in a table, and in the name of a file."""
    real = listed(cohort, tmp_path / "real", lambda p, _: "train")
    table = real / "participants.tsv"
    table.write_text(table.read_text().replace("person0", "Quillfeather0"))
    synthetic = tmp_path / "synthetic"
    shutil.copytree(folder(11), synthetic)
    (file, *_) = sorted(synthetic.glob("sub-*/**/*_T1w.nii.gz"))
    image = nib.load(file)
    image.header["descrip"] = b"like Quillfeather03"
    nib.save(nib.Nifti1Image(image.dataobj, image.affine, image.header), file)
    out = tmp_path / "out"
    result = synthmed("assess", real, synthetic, "--out", out, "-q", "-v")
    assert result.code == 4, result.err
    assert "1 hold a name or a number of a patient" in result.out
    assert "Quillfeather" not in result.out + result.err
    assert report_of(out)["decision"] == "WITHHELD"
    (listing,) = out.rglob("naming.tsv")
    assert listing.is_relative_to(out / "private") and file.name in listing.read_text()


def listed(source: Path, out: Path, split: Callable[[int, int], str]) -> Path:
    """A flat cohort: a table with a column image, a patient for each pair of scans, and a split."""
    out.mkdir()
    rows = ["participant_id\tpatient\timage\tsplit"]
    for i, file in enumerate(sorted(source.glob("sub-*/ses-01/anat/*_T1w.nii.gz"))[:24]):
        shutil.copy(file, out / f"scan{i:02d}.nii.gz")
        rows.append(f"scan{i:02d}\tperson{i // 2:02d}\tscan{i:02d}.nii.gz\t{split(i // 2, i % 2)}")
    (out / "participants.tsv").write_text("\n".join(rows) + "\n")
    return out


def test_the_tables_split_says_who_was_trained_on(
    cohort: Path, folder: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    real = listed(cohort, tmp_path / "real", lambda p, _: "holdout" if p % 3 == 0 else "train")
    out = tmp_path / "out"
    result = synthmed("assess", real, folder(11), "--out", out)
    assert result.code in (0, 4), result.err
    assert "participant_id" not in result.err, "the table says who is one person"
    count = report_of(out)["cohort"]
    assert (count["n_patients"], count["n_train"], count["n_holdout"]) == (12, 8, 4)


def test_a_person_on_both_sides_of_the_table_is_refused(
    cohort: Path, folder: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    def both(person: int, scan: int) -> str:
        return "holdout" if person == 4 and scan == 1 else "train"

    real = listed(cohort, tmp_path / "real", both)
    result = synthmed("assess", real, folder(11), "--out", tmp_path / "out", "-q")
    assert result.code == 3, result
    assert "column split: patient p" in result.err
    assert "person04" not in result.err


def test_a_folder_of_something_else_is_left_alone(
    cohort: Path, folder: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    result = synthmed("assess", cohort, folder(11), "--out", tmp_path, "-q")
    assert result.code == 2
    assert "holds files that no assessment wrote" in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("side", ["real", "synthetic", "holdout"])
def test_a_side_that_is_not_there(
    side: str, cohort: Path, folder: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    sides = {"real": cohort, "synthetic": folder(11), "holdout": folder(13)}
    sides[side] = tmp_path / "nowhere"
    result = synthmed(
        "assess", sides["real"], sides["synthetic"], "--holdout", sides["holdout"],
        "--out", tmp_path / "out", "-q",
    )  # fmt: skip
    assert result.code == 3, result
    assert "no such folder" in result.err
    assert result.err.count("\n") <= 2


def test_a_second_assessment_replaces_the_first(
    cohort: Path,
    folder: Callable[..., Path],
    make_config: Callable[..., Path],
    synthmed: Cli,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    config = make_config("judge", policy__rules=[{"estimate": "copies", "at_most": 1000}])
    args = ("assess", cohort, folder(11), "--out", out, "--config", config, "-q")
    assert synthmed(*args).code == 0
    assert (out / MARK).is_file()
    first = (out / "release/report/report.json").read_bytes()
    assert synthmed(*args, "--seed", "0").code == 0
    assert (out / "release/report/report.json").read_bytes() == first


# --- what two tables share -----------------------------------------------------------------------


def tables(tmp_path: Path, real: str, synthetic: str) -> tuple[Path, Path]:
    out = []
    for name, text in (("real", real), ("synthetic", synthetic)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "participants.tsv").write_text(text)
        out.append(tmp_path / name)
    return out[0], out[1]


@pytest.mark.parametrize(
    ("said", "there"),
    [
        (lambda sex: sex, False),
        (lambda sex: "F", True),
        (str.lower, True),  # no word in common: else no condition, and nobody would ask
        (None, False),  # a cohort without the label has no such subgroups
    ],
    ids=["as they are", "one alone", "in another spelling", "no column"],
)
def test_a_category_that_is_not_shown_is_not_passed_over(
    cohort: Path,
    folder: Callable[..., Path],
    synthmed: Cli,
    tmp_path: Path,
    said: Callable[[str], str] | None,
    there: bool,
) -> None:
    others = tmp_path / "others"
    shutil.copytree(folder(11), others)
    table = pd.read_csv(others / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    if said is None:
        table = table.drop(columns="sex")
    else:
        table["sex"] = table["sex"].map(said)
    table.to_csv(others / "participants.tsv", sep="\t", index=False)
    out = tmp_path / "out"
    assert synthmed("assess", cohort, others, "--out", out, "-q").code == 4
    reasons = report_of(out)["reasons"]
    assert any(r.startswith("categories that are not shown: ") for r in reasons) is there
    # which one it is, is theirs alone
    shared = (out / "withheld/report/report.json").read_text()
    assert not there or '"sex=M"' not in shared


def test_shared_labels_are_few_words_or_many_numbers(tmp_path: Path) -> None:
    names = ["participant_id", "patient", "sex", "age", "site", "note", "only_here"]
    rows = [
        "\t".join([f"s{i}", f"p{i}", "FM"[i % 2], str(20 + i), "one", f"free text {i}", "x"])
        for i in range(15)
    ]
    real = "\t".join(names) + "\n" + "\n".join(rows) + "\n"
    synthetic = real.replace("only_here", "only_there").replace("p14", "n/a")
    found = shared_labels(tables(tmp_path, real, synthetic), None)
    assert found == {
        "sex": {"kind": "categorical", "categories": ["F", "M"]},
        "age": {"kind": "continuous", "low": 20.0, "high": 34.0, "unit": "years"},
    }


def test_labels_are_wide_enough_for_people_held_out_too(tmp_path: Path) -> None:
    """Otherwise they would be refused, and leave the decision open."""
    row = lambda i, age: f"s{i}\t{age}\t{'FM'[i % 2]}"  # noqa: E731
    head = "participant_id\tage\tsex\n"
    texts = [
        head + "\n".join(row(i, first + i) for i in range(15)) + "\n" for first in (30, 35, 20)
    ]
    texts[2] = texts[2].replace("\tF\n", "\tX\n", 1)
    (tmp_path / "holdout").mkdir()
    (tmp_path / "holdout/participants.tsv").write_text(texts[2])
    folders = [*tables(tmp_path, *texts[:2]), tmp_path / "holdout"]
    found = shared_labels(folders, None)
    assert (found["age"]["low"], found["age"]["high"]) == (20, 49)
    assert found["sex"]["categories"] == ["F", "M", "X"]
    assert shared_labels(folders[:2], None)["age"]["low"] == 30


def test_columns_that_name_people_or_have_nothing_in_common_are_no_labels(tmp_path: Path) -> None:
    real = "participant_id\tperson\tarm\n" + "".join(f"s{i}\tab\tx{i % 2}\n" for i in range(4))
    synthetic = "participant_id\tperson\tarm\n" + "".join(f"s{i}\tcd\ty{i % 2}\n" for i in range(4))
    assert shared_labels(tables(tmp_path, real, synthetic), None) == {}
    both = real.replace("ab", "ab", 2).replace("ab", "ba", 1)
    (tmp_path / "more").mkdir()
    again = tables(tmp_path / "more", both, both)
    assert set(shared_labels(again, None)) == {"person", "arm"}
    assert set(shared_labels(again, "person")) == {"arm"}
