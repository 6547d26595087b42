"""The table of what a promise costs: every cell runs, and the figures are what they claim."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from synthmed.errors import SynthmedError
from tests.benchmarks import utility


def test_every_cell_is_a_config_that_holds(tmp_path: Path) -> None:
    for cohort in utility.COHORTS:
        for route in utility.ROUTES:
            for epsilon in utility.EPSILONS:
                if epsilon == "0" and route != "pretrained":
                    continue
                config = utility.configured(cohort, route, epsilon, tmp_path, 10)
                assert (config.privacy is None) == (epsilon in ("0", "inf"))
                if config.privacy is not None:
                    assert config.privacy.epsilon == float(epsilon)
                    assert config.privacy.init_is_public == (route == "pretrained")


def test_the_area_under_the_curve_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    truth = np.array(["a", "b"] * 30)
    scores = rng.random(60) + 0.3 * (truth == "b")
    a, b = scores[truth == "a"], scores[truth == "b"]
    pairs = float(np.mean(b[:, None] > a))
    both = np.stack([-scores, scores], 1)
    assert utility._auc(both, ["a", "b"], truth) == pytest.approx(pairs)
    assert utility._auc(np.stack([truth == "a", truth == "b"], 1), ["a", "b"], truth) == 1


def test_two_cells_are_made_once_and_the_page_gets_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utility, "apart", lambda step, *a: step(*a))
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path / "home"))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{utility.BEGIN}\n{utility.END}\nafter\n")
    words = ["--page", str(page), "--out", str(tmp_path / "out"), "--results", str(tmp_path / "r")]
    words += ["--cohorts", "phantoms", "--routes", "low", "--epsilons", "8", "inf"]
    words += ["--patients", "40", "--count", "12"]
    assert utility.main(words) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| low | 8 |" in text and "| low | inf |" in text
    file = tmp_path / "r" / "phantoms-low-8.json"
    result = json.loads(file.read_text())
    assert result["privacy"]["epsilon"] <= 8 and 0 <= result["auc_tstr"] <= 1
    before = file.stat().st_mtime_ns
    assert utility.main(words) == 0 and file.stat().st_mtime_ns == before
    file.write_text(json.dumps(result | {"asked": "something else"}))
    with pytest.raises(SynthmedError, match="made with other settings"):
        utility.main(words)
