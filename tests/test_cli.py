"""The command line: exit codes, one or two lines a fault, JSON, and a disk that fills up."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REVIEW, ROOT, WITHHELD, Finished, Result, command, environment

from synthmed import configfile
from synthmed.cli import parse_labels
from synthmed.errors import InputError, UsageError
from synthmed.pipeline import begin
from synthmed.store import FOLDER, Run

Cli = Callable[..., Result]


def refused(result: Result, code: int, *said: str) -> None:
    """A fault is one or two lines on stderr and nothing on stdout."""
    assert result.code == code, result
    assert result.out == ""
    lines = result.err.rstrip("\n").split("\n")
    assert 1 <= len(lines) <= 2, result.err
    assert "Traceback" not in result.err
    for text in said:
        assert text in result.err


# --- what a user gets wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            [
                *("check", "quickstart", "--set"),
                "policy.rules=[{estimate: mmd_2, at_most: 1, required: false}]",
            ],
            ["mmd_2: no estimate is called so", "mmd2_excess"],
        ),
        (
            [
                *("plan", "quickstart", "--set"),
                "policy.rules=[{estimate: kid, slice: worst subgoup, at_most: 1, required: false}]",
            ],
            ["kid [worst subgoup]: this config makes no such part", "diagnosis=atrophy"],
        ),
        (["generate", "no-such.yaml"], ["config no-such.yaml: no such file", "quickstart"]),
        (["generate"], ["Missing argument"]),
        (["generate", "TINY", "--run", ""], ["an argument: is empty", "variable"]),
        (["generate", "TINY", "--run="], ["--run: is empty", "variable"]),
        (["assess", "real", " ", "--out", "place"], ["an argument: is empty"]),
        (["frobnicate"], ["frobnicate"]),
        (["generate", "quickstart", "--frobnicate"], ["--frobnicate"]),
        (["generate", "quickstart", "--count", "0"], ["--count"]),
        (["generate", "quickstart", "--count", "many"], ["--count"]),
        (["generate", "quickstart", "--seed", "-1"], ["--seed"]),
        (["generate", "quickstart", "--set", "trian.max_steps=3"], ["trian: unknown", "train?"]),
        (["generate", "quickstart", "--set", "x"], ["--set x: expected a.b=value"]),
        (["generate", "TINY", "--label", "sex"], ["--label sex: expected KEY=VALUE:COUNT"]),
        (["generate", "TINY", "--label", "sex=F:0"], ["--label sex=F:0: expected"]),
        (["generate", "TINY", "--label", "sex=X:3"], ["not a category; known: F, M"]),
        (["generate", "TINY", "--label", "height=tall:3"], ["no such categorical"]),
        (["generate", "TINY", "--label", "sex=F:900"], ["asks for 900", "--count"]),
        (["train", "no-such-run"], ["run no-such-run: not begun yet", "--config"]),
        (["release", "no-such-run"], ["run no-such-run: not begun yet", "--config"]),
        (["release", "x", "--sign", "me"], ["--sign and --reason go together"]),
        (["report", "no-such-run"], ["no run in this folder"]),
        (["list", "frobs"], ["list frobs: unknown", "backbones"]),
        (["check", "quickstart", "--set", "privacy.epsilon=-1"], ["privacy.epsilon"]),
        (["assess", "a", "b"], ["--out"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_usage(
    args: list[str],
    said: list[str],
    make_config: Callable[..., Path],
    synthmed: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(make_config()) if a == "TINY" else a for a in args]
    refused(synthmed(*words), 2, *said)
    assert list(tmp_path.iterdir()) == [], "a command that was refused leaves nothing"


def test_an_unknown_device(make_config: Callable[..., Path], synthmed: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = synthmed("generate", make_config(), "--run", run, "--device", "tpu")
    refused(result, 2, "--device tpu: unknown", "auto, cpu or cuda")
    assert not run.exists()


def test_a_network_that_is_not_there_is_told_before_anything_is_made(
    make_config: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    network = {"kind": "network", "name": "net", "file": str(tmp_path / "net.pt")}
    features = json.dumps([{**network, "sha256": "0" * 64}])
    words = ("--run", tmp_path / "run", "--device", "cpu", "--set", f"evaluate.features={features}")
    refused(
        synthmed("generate", make_config(), *words), 2, "evaluate.features, network net",
        "net.pt cannot be read",
    )  # fmt: skip
    assert not (tmp_path / "run/private/ingest").exists()


def people(cohort: Path, folder: Path, n: int) -> Path:
    """The first n patients of the cohort, with their table."""
    persons = sorted(p.name for p in cohort.glob("sub-*") if p.is_dir())[:n]
    for name in persons:
        shutil.copytree(cohort / name, folder / name)
    rows = (cohort / "participants.tsv").read_text().splitlines()
    kept = [rows[0], *(r for r in rows[1:] if r.split("\t")[0] in persons)]
    (folder / "participants.tsv").write_text("\n".join(kept) + "\n")
    return folder


class TestInput:
    """Folders that cannot be used, and what is said of them."""

    @pytest.fixture
    def given(
        self, make_config: Callable[..., Path], synthmed: Cli, tmp_path: Path
    ) -> Callable[..., Result]:
        def call(source: Path | str, **changes: Any) -> Result:
            config = make_config("input", **changes)
            return synthmed(
                "generate", config, "--run", tmp_path / "run", "--input", source, "-q",
                "--device", "cpu",
            )  # fmt: skip

        return call

    def test_no_such_folder(self, given: Callable[..., Result], tmp_path: Path) -> None:
        refused(given(tmp_path / "nowhere"), 3, "data.source", "nowhere: no such folder", "--input")

    def test_a_file(self, given: Callable[..., Result], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        refused(given(tmp_path / "file"), 3, "a file, expected a folder")

    def test_an_empty_folder(self, given: Callable[..., Result], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        refused(given(tmp_path / "empty"), 3, "the folder is empty")

    def test_a_folder_of_text(self, given: Callable[..., Result], tmp_path: Path) -> None:
        folder = tmp_path / "notes"
        folder.mkdir()
        for i in range(3):
            (folder / f"note{i}.txt").write_text("nothing to see")
        result = given(folder)
        refused(result, 3, "no usable scan in 3 files", "quarantine.tsv")
        listed = (tmp_path / "run/private/ingest/quarantine.tsv").read_text()
        assert all(f"note{i}.txt" in listed for i in range(3))

    def test_fewer_than_ten_and_then_the_right_folder(
        self, given: Callable[..., Result], cohort: Path, tmp_path: Path
    ) -> None:
        """The run that was refused stands in the way of nothing."""
        (tmp_path / "few").mkdir()
        refused(given(people(cohort, tmp_path / "few", 4), data__holdout=0.2), 3, "at least 10")
        assert (tmp_path / "run/private/ingest/quarantine.tsv").is_file()
        result = given(cohort)
        assert result.code == 0, result.err

    def test_a_label_that_no_table_has(self, given: Callable[..., Result], cohort: Path) -> None:
        result = given(
            cohort, data__conditions__handed={"kind": "categorical", "categories": ["L", "R"]}
        )
        refused(result, 2, "handed")

    def test_the_run_inside_the_source(
        self, make_config: Callable[..., Path], cohort: Path, synthmed: Cli, tmp_path: Path
    ) -> None:
        (tmp_path / "own").mkdir()
        source = people(cohort, tmp_path / "own", 3)
        config = make_config("inside", data__source=str(source))
        result = synthmed("generate", config, "--run", source / "run", "-q", "--device", "cpu")
        refused(result, 2, "inside data.source", "--run")


# --- going on ------------------------------------------------------------------------------------


def model_manifest(run: Path) -> bytes:
    return (run / "private/model/manifest.json").read_bytes()


def test_a_changed_config_names_what_is_stale(copied: Finished, synthmed: Cli) -> None:
    before = model_manifest(copied.path), (copied.path / "config.yaml").read_bytes()
    args = ("generate", copied.config, "--run", copied.path, "--device", "cpu", "-q")
    change = ("--set", "train.batch_patients=5")
    refused(
        synthmed(*args, *change), 2,
        "stale: train, sample, screen, evaluate, release", "--overwrite",
    )  # fmt: skip
    assert (model_manifest(copied.path), (copied.path / "config.yaml").read_bytes()) == before
    assert (copied.path / "release").is_dir()

    result = synthmed(*args, *change, "--overwrite")
    assert result.code == 0, result.err
    assert model_manifest(copied.path) != before[0]
    assert "batch_patients: 5" in (copied.path / "config.yaml").read_text()


def test_a_larger_count_keeps_the_model_and_the_samples(copied: Finished, synthmed: Cli) -> None:
    before = model_manifest(copied.path)
    few = {p.name: p.read_bytes() for p in (copied.path / "private/sample").glob("*.nii.gz")}
    stamp = (copied.path / "private/model/weights.safetensors").stat().st_mtime_ns
    result = synthmed(
        "generate", copied.config, "--run", copied.path, "--count", "21", "--device", "cpu"
    )
    assert result.code == 0, result.err
    assert model_manifest(copied.path) == before
    assert (copied.path / "private/model/weights.safetensors").stat().st_mtime_ns == stamp
    many = {p.name: p.read_bytes() for p in (copied.path / "private/sample").glob("*.nii.gz")}
    assert (len(few), len(many)) == (18, 21)
    assert [k for k in few if few[k] != many[k]] == []
    assert len(list((copied.path / "release").rglob("*_T1w.nii.gz"))) == 21


def test_a_count_does_not_smuggle_in_another_policy(copied: Finished, synthmed: Cli) -> None:
    result = synthmed(
        "generate", copied.config, "--run", copied.path, "--count", "21", "-q",
        "--set", "policy.rules=[{estimate: copies, at_most: 1000}]",
    )  # fmt: skip
    refused(result, 2, "the config has changed", "release", "--overwrite")


def test_overwrite_repairs_an_altered_artifact(
    copied: Finished, finished: Finished, synthmed: Cli, bytes_of: Callable[..., dict[str, bytes]]
) -> None:
    (copied.path / "private/sample/samples.jsonl").write_text("{}\n")
    args = ("generate", copied.config, "--run", copied.path, "--device", "cpu", "-q")
    refused(synthmed(*args), 3, "samples.jsonl: missing or altered", "--overwrite")
    result = synthmed(*args, "--overwrite")
    assert result.code == 0, result.err
    assert bytes_of(copied.path) == bytes_of(finished.path)


def test_a_run_of_another_version_is_named_and_replaced(
    copied: Finished, finished: Finished, synthmed: Cli, bytes_of: Callable[..., dict[str, bytes]]
) -> None:
    with open(copied.path / "config.yaml", "a", encoding="utf-8") as handle:
        handle.write("from_the_future: 1\n")
    args = ("generate", copied.config, "--run", copied.path, "--device", "cpu", "-q")
    refused(synthmed(*args), 2, "not one this version can read", "--overwrite")
    assert (copied.path / "release").is_dir()
    result = synthmed(*args, "--overwrite")
    assert result.code == 0, result.err
    assert bytes_of(copied.path) == bytes_of(finished.path)


def test_a_dry_run_writes_nothing(
    finished: Finished, make_config: Callable[..., Path], synthmed: Cli, tmp_path: Path
) -> None:
    result = synthmed("generate", make_config(), "--run", tmp_path / "new", "--dry-run", "--json")
    assert result.code == 0
    assert set(result.json()["stages"].values()) == {"to do"}
    assert not (tmp_path / "new").exists()

    def seen() -> dict[str, tuple[int, int]]:
        files = sorted(finished.path.rglob("*"))
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}

    before = seen()
    result = synthmed(
        "generate",
        finished.config,
        "--run",
        finished.path,
        "--dry-run",
        "--set",
        "train.max_steps=9",
    )
    assert result.code == 0
    assert seen() == before
    shown = dict(line.split(maxsplit=1) for line in result.out.splitlines()[1:])
    assert shown["ingest"] == shown["prepare"] == "done"
    assert shown["train"].startswith("stale")
    assert shown["release"] == "to do"


def test_a_run_in_use(finished: Finished, synthmed: Cli) -> None:
    with Run(finished.path).lock():
        result = synthmed("generate", finished.config, "--run", finished.path, "--device", "cpu")
    refused(result, 5, "in use by another process")


# --- decisions -----------------------------------------------------------------------------------


def decide(copied: Finished, synthmed: Cli, rules: list[dict[str, Any]], *more: str) -> Result:
    """The finished run under another policy."""
    return synthmed(
        "generate", copied.config, "--run", copied.path, "--overwrite", "--device", "cpu", "-q",
        "--set", f"policy.rules={json.dumps(rules)}", *more,
    )  # fmt: skip


def test_review_is_signed_and_stays_signed(copied: Finished, synthmed: Cli) -> None:
    result = decide(copied, synthmed, REVIEW)
    assert result.code == 4
    assert result.out.startswith("REVIEW\n")
    assert (copied.path / "withheld").is_dir()
    assert not (copied.path / "release").exists()
    before = model_manifest(copied.path)

    sign = ("release", copied.path, "--sign", "J. Doe", "--reason", "phantoms only")
    result = synthmed(*sign, "-q")
    assert result.code == 0, result.err
    assert (copied.path / "release").is_dir()
    assert not (copied.path / "withheld").exists()
    report = json.loads((copied.path / "release/report/report.json").read_text())
    assert (report["signature"]["name"], report["decision"]) == ("J. Doe", "REVIEW")
    assert model_manifest(copied.path) == before
    refused(synthmed(*sign, "-q"), 2, "released already")
    assert synthmed("release", copied.path, "-q").code == 0, "stays signed"


def test_what_nobody_has_read_cannot_be_signed(copied: Finished, synthmed: Cli) -> None:
    decide(copied, synthmed, REVIEW)
    shutil.rmtree(copied.path / "private/report")
    sign = ("release", copied.path, "--sign", "J. Doe", "--reason", "phantoms only", "-q")
    refused(synthmed(*sign), 2, "nobody has read it")
    assert (copied.path / "withheld").is_dir() and not (copied.path / "release").exists()
    assert synthmed(*sign).code == 0, "now somebody can have read it"


def test_a_stricter_policy_takes_the_release_away_before_it_is_stored(
    copied: Finished, synthmed: Cli
) -> None:
    """Whatever stops the command between the two, no release stands under a policy it misses."""
    config = configfile.load(copied.path / "config.yaml", ["policy.rules=" + json.dumps(WITHHELD)])
    assert (copied.path / "release").is_dir()
    begin(Run(copied.path), config, overwrite=True)
    assert not any((copied.path / n).exists() for n in ("release", "withheld", "private/report"))
    assert synthmed("release", copied.path, "-q").code == 4


def test_artifacts_of_two_runs_make_no_release(
    copied: Finished, synthmed: Cli, tmp_path: Path
) -> None:
    """As after half a copy: a cohort beside the evidence of another one."""
    other = tmp_path / "other"
    shutil.copytree(copied.path, other)
    again = synthmed(
        "generate", copied.config, "--run", other, "--set", "sample.seed=5", "--device", "cpu", "-q"
    )
    assert again.code in (0, 4), again.err
    for name in ("sample", "screen"):
        shutil.rmtree(copied.path / "private" / name)
        shutil.copytree(other / "private" / name, copied.path / "private" / name)
    for name in ("release", "private/report"):
        shutil.rmtree(copied.path / name)
    refused(synthmed("release", copied.path, "-q"), 2, "of another config, or of other input")
    assert not any((copied.path / n).exists() for n in ("release", "withheld"))


def test_names_that_cannot_be_searched_for_leave_the_decision_open(
    copied: Finished, synthmed: Cli, tmp_path: Path
) -> None:
    """The source is not there when the release is built anew."""
    shutil.rmtree(copied.path / "release")
    file = copied.path / "config.yaml"
    source = configfile.load(file).data.source
    assert str(source) in file.read_text()
    moved = synthmed("release", copied.path, "-q")
    assert moved.code == 0
    shutil.rmtree(copied.path / "release")
    Path(source).rename(tmp_path / "elsewhere")
    try:
        result = synthmed("release", copied.path, "-q")
    finally:
        (tmp_path / "elsewhere").rename(source)
    assert result.code == 4 and "not all of its names were searched for" in result.out


def test_withheld_cannot_be_signed(copied: Finished, synthmed: Cli) -> None:
    result = decide(copied, synthmed, WITHHELD, "--json")
    assert result.code == 4
    told = result.json()
    assert told["decision"] == "WITHHELD"
    assert told["reasons"][0].startswith("authenticity")
    assert told["cohort"] == str(copied.path / "withheld")
    result = synthmed("release", copied.path, "--sign", "J. Doe", "--reason", "in a hurry", "-q")
    refused(result, 2, "WITHHELD cannot be signed away")
    assert not (copied.path / "release").exists()


def test_a_signature_names_no_patient(copied: Finished, synthmed: Cli, cohort: Path) -> None:
    decide(copied, synthmed, REVIEW)
    catalogue = (copied.path / "private/ingest/catalogue.jsonl").read_text().splitlines()
    patient = json.loads(catalogue[0])["patient"]
    result = synthmed(
        "release", copied.path, "--sign", "J. Doe", "--reason", f"except {patient}", "-q"
    )
    refused(result, 2, "identifier of the source")
    assert patient not in result.err


# --- the other commands --------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(copied: Finished, synthmed: Cli) -> None:
    result = synthmed("generate", copied.config, "--run", copied.path, "--json", "--device", "cpu")
    assert result.code == 0
    told = result.json()
    assert set(told) == {"decision", "reasons", "cohort", "report"}
    assert Path(told["report"]).is_file()
    assert result.err.count("\n") == 7, "progress goes to stderr"
    assert synthmed("train", copied.path, "--json", "-q").json()["steps"] == [5]


def test_verbose_prints_every_line_of_the_policy(copied: Finished, synthmed: Cli) -> None:
    result = synthmed("generate", copied.config, "--run", copied.path, "-v", "-q")
    assert "[pass] copies_shipped" in result.out
    assert "[pass] identifier scan" in result.out


def test_check_prints_a_config_that_is_the_same(
    synthmed: Cli, make_config: Callable[..., Path], tmp_path: Path
) -> None:
    result = synthmed("check", make_config(), "--set", "seed=9")
    assert result.code == 0
    (tmp_path / "resolved.yaml").write_text(result.out)
    assert synthmed("check", tmp_path / "resolved.yaml").out == result.out
    assert synthmed("check", tmp_path / "resolved.yaml", "--json").json()["seed"] == 9


@pytest.mark.parametrize("what", ["backbones", "metrics", "exporters", "configs"])
def test_list_describes_every_member(what: str, synthmed: Cli) -> None:
    table = synthmed("list", what, "--json").json()
    assert set(table) == {what}
    assert table[what]
    text = synthmed("list", what).out
    for name, sentence in table[what].items():
        assert name in text
        assert len(sentence) > 15, f"{name} says nothing about itself"
    everything = synthmed("list", "--json").json()
    assert everything[what] == table[what]


def test_doctor(synthmed: Cli) -> None:
    facts = synthmed("doctor", "--json").json()
    assert {"torch", "python", "cores", "device", "disk", "home"} <= set(facts)
    assert "python" in synthmed("doctor").out


def test_plan_foresees_the_run(finished: Finished, synthmed: Cli, cohort: Path) -> None:
    """Its figures against the run that was made of the same config."""
    quickstart = ("--set", f"policy.rules={json.dumps(FIDELITY)}")
    facts = synthmed("plan", finished.config, *quickstart, "--json", "-q", "--device", "cpu").json()
    made = json.loads((finished.path / "private/report/report.json").read_text())
    for name in ("n_patients", "n_scans", "n_train", "n_holdout"):
        assert facts[name] == made["cohort"][name], name
    model = json.loads(model_manifest(finished.path))["facts"]
    assert (facts["n_parameters"], facts["steps"]) == (model["n_parameters"], 5)
    assert facts["n_quarantined"] == 29
    assert facts["shape"]["median"] == [32, 32, 32]
    assert facts["spacing_mm"]["median"] == [6, 6, 6]
    assert sum(facts["labels"]["diagnosis"].values()) == 24
    rows = (cohort / "participants.tsv").read_text().splitlines()
    ages = [float(r.split("\t")[rows[0].split("\t").index("age")]) for r in rows[1:]]
    assert facts["labels"]["age"]["min"] >= min(ages)
    # six held out: every line on quality stays open, those on copies do not
    quality = {e["name"] for e in made["estimates"] if e["group"] in ("fidelity", "utility")}
    assert set(facts["cannot_pass"]) == {r["estimate"] for r in FIDELITY} & quality
    text = synthmed("plan", finished.config, *quickstart, "-q", "--device", "cpu").out
    assert "expect REVIEW at best" in text
    assert "; 27 files not asked for" in text
    assert re.search(r"refused +2 \(", text)


FIDELITY = [
    {"estimate": name, "at_most": 1}
    for name in ("mmd2", "mmd2_excess", "coverage", "recall", "condition_accuracy")
] + [{"estimate": name, "at_most": 1} for name in ("copied_patients", "authenticity")]


def test_plan_keeps_nothing(
    finished: Finished, synthmed: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(tmp_path)
    assert synthmed("plan", finished.config, "-q", "--device", "cpu").code == 0
    assert list(tmp_path.iterdir()) == []


def test_report_rebuilds_the_pages(copied: Finished, synthmed: Cli) -> None:
    pages = [copied.path / p / "report.html" for p in ("private/report", "release/report")]
    before = [p.read_bytes() for p in pages]
    for page in pages:
        page.unlink()
    result = synthmed("report", copied.path)
    assert result.code == 0, result.err
    assert [p.read_bytes() for p in pages] == before
    assert str(pages[0]) in result.out


def test_help_is_quick_and_imports_no_library() -> None:
    """Half a second of CPU is what a person waits for; the margin is for a busy machine."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command("--help"), capture_output=True, text=True, env=environment(), check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        assert "generate" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.8
    loaded = subprocess.run(
        [
            sys.executable, "-c",
            "import sys\nfrom synthmed import cli\n"
            "cli.guarded(lambda: cli.app(['--help'], standalone_mode=False))\n"
            "print(*sys.modules)",
        ],
        capture_output=True, text=True, env=environment(), check=True,
    ).stdout.split()  # fmt: skip
    assert "typer" in loaded
    assert not {"torch", "numpy", "pydantic", "yaml", "nibabel"} & set(loaded)


def test_version_and_bare_call(synthmed: Cli) -> None:
    assert synthmed("--version").out.startswith("synthmed ")
    bare = synthmed()
    assert bare.code == 2 and bare.err == ""


def test_labels_on_the_command_line() -> None:
    assert parse_labels(["a=b:c:2", "a=d:1", "e=f:3"]) == {"a": {"b:c": 2, "d": 1}, "e": {"f": 3}}
    with pytest.raises(UsageError, match="asked for twice"):
        parse_labels(["a=b:2", "a=b:3"])
    with pytest.raises(UsageError, match="expected KEY=VALUE:COUNT"):
        parse_labels([f"a=b:{'9' * 5000}"])


def test_a_page_that_cannot_be_written(
    finished: Finished, copied: Finished, synthmed: Cli, tmp_path: Path
) -> None:
    for page in (tmp_path / "nowhere/page.html", tmp_path):
        refused(
            synthmed("compare", finished.path, copied.path, "--page", page), 2, "cannot be written"
        )


def test_deidentify_needs_a_folder(synthmed: Cli, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file/below"):
        refused(synthmed("deidentify", tmp_path / "source", target), 2, "is a file")


def test_what_nobody_foresaw_is_one_line_without_data(copied: Finished, synthmed: Cli) -> None:
    """The message of an unforeseen error may quote a patient: neither terminal nor log has it."""
    evidence = copied.path / "private/evaluate"
    (evidence / "estimates.jsonl").write_bytes(b"secret-name" + b" " * (1 << 20))
    (copied.path / "private/report/decision.json").unlink()
    manifest = json.loads((evidence / "manifest.json").read_text())
    del manifest["files"]["estimates.jsonl"]
    (evidence / "manifest.json").write_text(json.dumps(manifest))
    result = synthmed("release", copied.path, "-q")
    refused(result, 1, "internal error: ", "log.jsonl")
    log = (copied.path / "log.jsonl").read_text()
    assert "internal_error" in log.splitlines()[-1]
    assert "secret-name" not in log + result.err


# --- a disk that fills up ------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Callable[[int], None]]:
    """A file system of `kib` KiB at `folder`; yields what changes its size."""
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("a file system of its own cannot be mounted here (needs root)")

    def resize(kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(
    finished: Finished,
    synthmed: Cli,
    tmp_path: Path,
    bytes_of: Callable[..., dict[str, bytes]],
) -> None:
    """Each attempt has a little more room; what is whole stays, nothing half is taken for it."""
    with small_disk(tmp_path / "disk", 16) as resize:
        run = tmp_path / "disk/run"
        stopped_in = set()
        for kib in [16, 600, 1000, *range(1250, 6000, 250), *range(6000, 30_000, 1000)]:
            resize(kib)
            result = synthmed("generate", finished.config, "--run", run, "--device", "cpu", "-q")
            if result.code == 0:
                break
            refused(result, 5)
            for kind in FOLDER:
                with contextlib.suppress(FileNotFoundError):
                    assert Run(run).load(kind) is None or bytes_of(
                        run, (FOLDER[kind],)
                    ).items() <= (bytes_of(finished.path).items())
            stopped_in.add(sum((run / "private" / f).is_dir() for f in FOLDER.values()))
        assert result.code == 0
        assert len(stopped_in) >= 3, "the disk was full in several stages"
        assert bytes_of(run) == bytes_of(finished.path)


def test_a_file_that_may_not_grow(
    copied: Finished,
    finished: Finished,
    spawn: Cli,
    synthmed: Cli,
    bytes_of: Callable[..., dict[str, bytes]],
) -> None:
    """As a full disk, where none can be mounted: the checkpoint exceeds what a file may hold."""
    Run(copied.path).discard("model")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = spawn("train", copied.path, "--device", "cpu", "-q", preexec_fn=limit)
    refused(result, 5, "may not grow")
    with pytest.raises((InputError, AssertionError)):
        assert Run(copied.path).load("model")
    result = synthmed("generate", copied.config, "--run", copied.path, "--device", "cpu", "-q")
    assert result.code == 0, result.err
    assert bytes_of(copied.path) == bytes_of(finished.path)


def test_it_is_run_from_this_checkout() -> None:
    """Tests of an installed copy would say nothing of this one."""
    import synthmed as package

    assert Path(package.__file__).is_relative_to(ROOT)
