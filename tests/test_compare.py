"""Runs side by side: every figure where it belongs, and no comparison that misleads in silence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from synthmed import compare
from synthmed.cli import app
from synthmed.errors import InputError, UsageError
from tests.report.test_page import HOSTILE, Seen, estimate
from tests.report.test_page import report as whole_report  # noqa: F401

RUNS = {"plain": (None, 0.1, 0.7), "eight": (8.0, 0.2, 0.6), "one": (1.0, 0.5, 0.5)}
"""Name to epsilon, mmd2_excess and membership_auc."""


@pytest.fixture
def runs(tmp_path: Path, whole_report: dict[str, Any]) -> list[Path]:  # noqa: F811
    out = []
    for name, (epsilon, excess, membership) in RUNS.items():
        report = copy.deepcopy(whole_report)
        report["privacy"] = None if epsilon is None else {"epsilon": epsilon}
        report["provenance"]["digests"] = {"dataset": "aa"}
        report["estimates"] = [
            estimate("mmd2_excess", "fidelity", value=excess, ci=[excess - 0.05, excess + 0.05]),
            estimate("mmd2_excess", "fidelity", value=0.9, slice="sex=F"),
            estimate("membership_auc", "membership", value=membership, ci=None, rules=[]),
        ]
        if name == "one":
            report["estimates"].append(estimate("auc_tstr", "utility", value=None, ci=None))
        out.append(written(tmp_path / name, report))
    return out


def written(run: Path, report: dict[str, Any]) -> Path:
    folder = run / "private" / "report"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return run


def change(run: Path, **fields: Any) -> None:
    file = run / "private" / "report" / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}), encoding="utf-8")


def test_every_figure_stands_under_its_run(runs: list[Path]) -> None:
    table = compare.compare(runs)
    assert [r["name"] for r in table["runs"]] == list(RUNS)
    assert [r["epsilon"] for r in table["runs"]] == ["no promise", "8", "1"]
    found = {e["name"]: e["of"] for e in table["estimates"]}
    assert [o["value"] for o in found["mmd2_excess"]] == [0.1, 0.2, 0.5]  # and no subgroup's
    assert found["auc_tstr"][:2] == [None, None] and found["auc_tstr"][2]["value"] is None
    head, *rows = compare.lines(table)
    assert head.split() == list(RUNS)
    by_name = {row.split("  ")[0]: row for row in rows}
    assert "0.2 [0.15, 0.25] pass" in by_name["mmd2_excess"]
    assert by_name["membership_auc"].split() == ["membership_auc", "0.7", "0.6", "0.5"]
    assert by_name["auc_tstr"].split() == ["auc_tstr", *[compare.NONE] * 3]
    columns = [head.index(name) for name in RUNS]
    assert [by_name["decision"].index("REVIEW", c) for c in columns] == columns


def test_plots_place_each_run_by_its_two_figures(runs: list[Path]) -> None:
    private, membership = compare.trades(compare.compare(runs))
    assert private["left_out"] == ["plain"]
    eight, one = private["points"]
    assert (eight["number"], one["number"]) == (2, 3)
    assert eight["x"] > one["x"] and eight["y"] < one["y"]
    for trade in (private, membership):
        for p in trade["points"]:
            epsilon, excess, auc = RUNS[p["name"]]
            across = epsilon if trade is private else auc
            low, high = trade["x"]
            assert p["x"] == pytest.approx(100 * (across - low) / (high - low), abs=0.01)
            low, high = trade["y"]
            assert p["y"] == pytest.approx(100 * (excess - low) / (high - low), abs=0.01)
            assert 5 < p["x"] < 95 and 5 < p["y"] < 95


def test_a_plot_says_which_way_is_better_in_what_unit_and_who_is_missing(
    runs: list[Path],
) -> None:
    for run, value in zip(runs, (0.6, 0.7, 0.8), strict=True):
        report = json.loads((run / "private/report/report.json").read_text())
        useful = estimate("auc_tstr", "utility", value=value, ci=None, better="higher", unit="AUC")
        others = [e for e in report["estimates"] if e["name"] != "auc_tstr"]
        change(run, estimates=[*others, useful])
    table = compare.compare(runs)
    private, membership, useful = compare.trades(table)
    assert [t["corner"] for t in (private, membership, useful)] == [
        "lower left", "lower left", "upper left",
    ]  # fmt: skip
    assert useful["up"].endswith("(AUC)") and "without a unit" in private["across"]
    text = compare.page(table)
    assert text.count("<strong>Better towards the lower left.</strong>") == 2
    (caption,) = [c for c in text.split("<figcaption>") if "have no epsilon" in c]
    assert ": plain." in caption.split("</figcaption>")[0]


def test_other_people_are_said_to_be_others(runs: list[Path]) -> None:
    assert compare.DIFFERENT not in compare.page(compare.compare(runs))
    change(runs[1], provenance={"digests": {"dataset": "bb"}})
    table = compare.compare(runs)
    assert not table["same_people"]
    assert compare.lines(table)[-1] == f"note: {compare.DIFFERENT}"
    assert compare.DIFFERENT in compare.page(table)
    for run in runs:
        change(run, provenance={"digests": {}})
    assert not compare.compare(runs)["same_people"]  # nobody knows


def test_the_page_needs_nothing_else_and_runs_nothing(runs: list[Path], tmp_path: Path) -> None:
    hostile = tmp_path / HOSTILE.replace("/", "")
    runs[0].rename(hostile)
    text = compare.page(compare.compare([hostile, *runs[1:]]))
    seen = Seen(text)
    assert not {tag for tag, _ in seen.tags} & {"script", "img", "link", "iframe", "form"}
    assert not any(str(a.get("href", "#"))[0] != "#" for _, a in seen.tags)
    ids = [a["id"] for _, a in seen.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert "default-src 'none'" in text


def test_the_command_and_its_errors(runs: list[Path], tmp_path: Path) -> None:
    run = CliRunner()
    done = run.invoke(app, ["compare", *map(str, runs), "--page", str(tmp_path / "page.html")])
    assert done.exit_code == 0 and "mmd2_excess" in done.stdout
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "page.html").stat().st_mode & 0o077 == 0
    told = json.loads(run.invoke(app, ["compare", *map(str, runs), "--json"]).stdout)
    assert told == json.loads(json.dumps(compare.compare(runs)))
    with pytest.raises(UsageError, match="one run alone"):
        compare.compare(runs[:1])
    with pytest.raises(UsageError, match="called plain"):
        compare.compare([runs[0], written(tmp_path / "b" / "plain", {})])
    for nothing in ("", "{", "[]"):
        file = tmp_path / "none" / "private" / "report" / "report.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(nothing)
        with pytest.raises(InputError, match="no report"):
            compare.compare([runs[0], tmp_path / "none"])
