"""Tables and labels: whose scan it is, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest

from synthmed.config import Categorical, Continuous
from synthmed.errors import InputError, UsageError
from synthmed.formats import bids, tables
from synthmed.formats.listing import join, walk
from synthmed.formats.refusal import Refused

SEX = Categorical(categories=("F", "M"))
GRADE = Categorical(categories=("1", "2.5"))
AGE = Continuous(low=18, high=90, unit="years")
DOSE = Continuous(low=-1, high=1)


def label(name: str, text: str, condition: Any, comma: bool = False) -> object:
    try:
        return tables.labels({name: text}, {name: condition}, comma)[name]
    except Refused as reason:
        return reason.code


@pytest.mark.parametrize(
    ("name", "text", "condition", "expected"),
    [
        ("sex", "F", SEX, "F"),
        ("sex", "f", SEX, "label_unknown"),
        ("sex", "", SEX, "label_missing"),
        ("sex", "n/a", SEX, "label_missing"),
        ("grade", "1.0", GRADE, "1"),
        ("grade", "01", GRADE, "1"),
        ("grade", "2.50", GRADE, "2.5"),
        ("grade", "3", GRADE, "label_unknown"),
        ("age", "41.5", AGE, 41.5),
        ("age", "90", AGE, 90.0),
        ("age", "97", AGE, 90.0),
        ("age", "89+", AGE, 89.0),
        ("age", "12", AGE, "label_out_of_range"),
        ("age", "old", AGE, "label_unknown"),
        ("age", "nan", AGE, "label_missing"),
        ("age", "inf", AGE, "label_unknown"),
        ("duration", "95", AGE, 90.0),
        ("dose", "95", DOSE, "label_out_of_range"),
        ("dose", "-1e0", DOSE, -1.0),
    ],
)
def test_a_label(name: str, text: str, condition: Any, expected: object) -> None:
    assert label(name, text, condition) == expected


@pytest.mark.parametrize("text", ["", "n/a", "N/A", "nan"])
def test_what_is_missing_may_be_left_out(text: str) -> None:
    cells, declared = {"sex": text, "age": "41"}, {"sex": SEX, "age": AGE}
    assert tables.labels(cells, declared, keep_missing=True) == {"age": 41.0}
    assert tables.labels({"sex": "F"}, declared, keep_missing=True) == {"sex": "F"}
    with pytest.raises(Refused, match="label_missing"):
        tables.labels(cells, declared)


def test_a_category_may_be_spelt_like_a_missing_cell() -> None:
    gene = Categorical(categories=("nan", "wild"))
    assert tables.labels({"gene": "nan"}, {"gene": gene}, keep_missing=True) == {"gene": "nan"}


@pytest.mark.parametrize(
    ("text", "code"),
    [("X", "label_unknown"), ("old", "label_unknown"), ("7", "label_out_of_range")],
)
def test_what_is_there_and_wrong_is_refused_all_the_same(text: str, code: str) -> None:
    name, condition = ("sex", SEX) if text == "X" else ("age", AGE)
    with pytest.raises(Refused, match=code):
        tables.labels({name: text}, {name: condition}, keep_missing=True)


def test_a_refusal_does_not_quote_the_cell() -> None:
    with pytest.raises(Refused) as reason:
        tables.labels({"sex": "Jane Doe"}, {"sex": SEX})
    assert reason.value.explanation.endswith("Condition: sex; declared: F, M.")


def test_a_decimal_comma_counts_where_semicolons_separate(tmp_path: Path) -> None:
    path = make.table(tmp_path / "participants.csv", [{"id": "a", "dose": "0,25"}], ";")
    table = tables.read(walk(tmp_path), path.name)
    assert table.decimal_comma
    assert label("dose", table.rows[0]["dose"], DOSE, comma=True) == 0.25
    assert label("dose", "0,25", DOSE) == "label_unknown"


def test_a_table_is_read_as_it_is(tmp_path: Path) -> None:
    text = '\ufeffparticipant_id\t site \tnote\r\nsub-1\t A"x \t\r\n\r\nsub-2\tB\r\n'
    (tmp_path / "participants.tsv").write_bytes(text.encode())
    table = tables.read(walk(tmp_path), "participants.tsv")
    assert table.columns == ("participant_id", "site", "note")
    assert table.rows == (
        {"participant_id": "sub-1", "site": 'A"x', "note": ""},
        {"participant_id": "sub-2", "site": "B", "note": ""},
    )


@pytest.mark.parametrize(
    "content", [b"", b"a\ta\n1\t2\n", b"a\tb\n1\t2\t3\n", b"a\tb\n\xff\xfe\t1\n"]
)
def test_a_broken_table_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "participants.tsv").write_bytes(content)
    data = make.config(tmp_path).data
    found, refused = tables.participants(walk(tmp_path), data)
    assert not found
    assert refused["participants.tsv"].code == "table_unreadable"
    named = make.config(tmp_path, table="participants.tsv").data
    with pytest.raises(InputError, match=r"data\.table"):
        tables.participants(walk(tmp_path), named)


def test_a_missing_table_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.table"):
        tables.participants(walk(tmp_path), make.config(tmp_path, table="no.tsv").data)


@pytest.mark.parametrize(
    ("columns", "named", "expected"),
    [
        (("participant_id", "subject_group", "patient"), None, "patient"),
        (("participant_id", "subject_group"), None, "subject_group"),
        (("participant_id", "mrn"), None, "participant_id"),
        (("participant_id", "mrn"), "mrn", "mrn"),
    ],
)
def test_the_column_that_names_a_person(
    columns: tuple[str, ...], named: str | None, expected: str
) -> None:
    table = tables.Table("participants.tsv", columns, (), "")
    assert tables.person_column(table, make.config(Path("x"), patient=named).data) == expected


@pytest.mark.parametrize(
    "cell", ["../x.nii", "a/../../x.nii", "/etc/x.nii", "C:\\x.nii", "..\\x.nii"]
)
def test_a_path_does_not_lead_out(cell: str) -> None:
    with pytest.raises(Refused) as reason:
        join("", cell)
    assert reason.value.code == "outside_source"


def test_a_path_is_relative_to_its_table() -> None:
    assert join("site", "../other/./x.nii") == "other/x.nii"
    assert join("site", "images\\x.nii") == "site/images/x.nii"


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def scans(root: Path, **data: Any) -> list[tuple[str, str, object]]:
    """(person, session, path or reason) of each scan that is asked for."""
    config = make.config(root, **data).data
    listing = walk(root)
    found, _ = tables.participants(listing, config)
    wanted = bids.Reader(listing, config, found).wanted()
    return [
        (w.person, w.visit[1], f.code if isinstance(f, Refused) else f)
        for w in wanted
        for f in w.files.values()
    ]


def test_bids_with_and_without_sessions_and_prefix(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii",
        "sub-02/ses-b/anat/sub-02_ses-b_run-1_T1w.nii.gz",
        "sub-02/ses-b/anat/sub-02_ses-b_run-2_T1w.nii.gz",
        "derivatives/p/sub-01/anat/sub-01_T1w.nii.gz",
    )
    expected = [
        ("01", "", "sub-01/anat/sub-01_T1w.nii.gz"),
        ("02", "ses-a", "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii"),
        ("02", "ses-b", "sub-02/ses-b/anat/sub-02_ses-b_run-1_T1w.nii.gz"),
        ("02", "ses-b", "sub-02/ses-b/anat/sub-02_ses-b_run-2_T1w.nii.gz"),
    ]
    assert scans(tmp_path) == expected  # no table: the folders say who
    rows = [{"participant_id": "sub-01"}, {"participant_id": "02"}, {"participant_id": "03"}]
    make.table(tmp_path / "participants.tsv", rows)
    assert scans(tmp_path) == [*expected, ("03", "", "channel_missing")]


def test_labels_of_a_session(tmp_path: Path) -> None:
    touch(tmp_path, *(f"sub-1/ses-{s}/anat/sub-1_ses-{s}_T1w.nii" for s in "ab"))
    make.table(tmp_path / "participants.tsv", [{"participant_id": "sub-1", "sex": "F"}])
    rows = [{"session_id": f"ses-{s}", "age": a} for s, a in (("a", 40), ("b", 42))]
    make.table(tmp_path / "sub-1/sub-1_sessions.tsv", rows)
    config = make.config(tmp_path).data
    listing = walk(tmp_path)
    found, _ = tables.participants(listing, config)
    wanted = list(bids.Reader(listing, config, found).wanted())
    assert [(w.cells["sex"], w.cells["age"]) for w in wanted] == [("F", "40"), ("F", "42")]


def test_patterns_with_columns_sessions_and_wildcards(tmp_path: Path) -> None:
    touch(tmp_path, "sub-1/ses-a/x_T1w.nii", "seg/sub-1-ses-a-v2.nii", "sub-2/ses-a/x_T1w.nii")
    make.table(tmp_path / "participants.tsv", [{"participant_id": f"sub-{i}"} for i in (1, 2)])
    channels = {
        "T1w": "{participant_id}/{session_id}/*_T1w.nii",
        "mask": {"path": "seg/{participant_id}-{session_id}-*.nii", "labels": {"x": 1}},
    }
    assert scans(tmp_path, channels=channels) == [
        ("1", "ses-a", "sub-1/ses-a/x_T1w.nii"),
        ("1", "ses-a", "seg/sub-1-ses-a-v2.nii"),
        ("2", "ses-a", "sub-2/ses-a/x_T1w.nii"),
        ("2", "ses-a", "channel_missing"),
    ]
    touch(tmp_path, "seg/sub-1-ses-a-v3.nii")
    assert scans(tmp_path, channels=channels)[1][2] == "channel_missing"  # two match


def test_wildcards_in_a_table_are_text(tmp_path: Path) -> None:
    touch(tmp_path, "seg/a.nii", "seg/b.nii")
    make.table(
        tmp_path / "participants.tsv", [{"participant_id": "*"}, {"participant_id": "../seg/a"}]
    )
    found = scans(tmp_path, channels={"T1w": "seg/{participant_id}.nii"})
    assert {f for _, _, f in found} == {"channel_missing"}


@pytest.mark.parametrize("channel", ["scan", "x/{scan}.nii"])
def test_a_channel_of_an_unknown_column(tmp_path: Path, channel: str) -> None:
    make.table(tmp_path / "participants.tsv", [{"participant_id": "1"}])
    with pytest.raises(UsageError, match=r"data\.channels\.T1w.*no column scan.*participant_id"):
        scans(tmp_path, channels={"T1w": channel})


@pytest.mark.parametrize("group", ["control", "patient"])
@pytest.mark.parametrize("check", [tables.check_patient, tables.check_conditions])
def test_a_table_without_a_header_shows_nobody(
    tmp_path: Path, group: str, check: Callable[..., None]
) -> None:
    """Its first line is a patient, of whom an error says nothing."""
    rows = [f"Quillfeather{i}\tDr. Holloway\t{group}\timg/q{i}.nii" for i in range(3)]
    (tmp_path / "participants.tsv").write_text("\n".join(rows) + "\n")
    grade = {"kind": "categorical", "categories": ["1", "2"]}
    config = make.config(tmp_path, patient="code", conditions={"grade": grade})
    found, _ = tables.participants(walk(tmp_path), config.data)
    with pytest.raises(UsageError) as error:
        check(found, config.data)
    assert "4 columns without a usual name" in str(error.value)
    assert not {w for w in ("Quillfeather", "Holloway", "img") if w in str(error.value)}


def test_a_header_is_shown(tmp_path: Path) -> None:
    (tmp_path / "participants.tsv").write_text("subject\tAlter\tBild\nA1\t60\ta.nii\n")
    found, _ = tables.participants(walk(tmp_path), make.config(tmp_path).data)
    assert tables.columns(found) == "columns: Alter, Bild, subject"
    assert tables.columns([]) == "there is no table"
    assert tables.columns([], ["age"]) == "columns: age"
