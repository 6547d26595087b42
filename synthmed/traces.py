"""What a run has of some people: where it names them, who trained its model, what came of it.

Nothing is changed here, and nothing is locked: another process may be at work in the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthmed.store import Manifest, Run

BEGUN = ".forgetting"
"""In RUN/private while people are taken out of it; it says of `ALL`, or of `ROWS` alone."""
ALL, ROWS = "all", "rows"
PSEUDONYM = re.compile(r"p[0-9a-f]{16}(?![0-9a-f])")
_NO_TEXT = (".nii.gz", ".npy", ".png", ".safetensors")
"""Files that hold voxels or weights: they are named by a pseudonym, or name nobody."""


@dataclass
class Seen:
    """What one run has of the people.

    Args:
        parts: which of its folders name them, with who is named there.
        n_scans: their scans in the catalogue.
        trained: those of them that its model was trained on.
        model: what it says of itself, if there is one.
        releases: what was made of it.
    """

    run: Run
    parts: Mapping[str, set[str]]
    n_scans: int
    trained: set[str]
    model: Manifest | None
    releases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def people(self) -> set[str]:
        """All that it names."""
        return set().union(*self.parts.values())

    @property
    def begun(self) -> str | None:
        """What an earlier call was taking out when it was cut off."""
        file = self.run.private / BEGUN
        return file.read_text() if file.exists() else None

    @property
    def n_trained_on(self) -> int | None:
        """How many of them the model was trained on; where it is marked already, of all so far."""
        if self.model is None:
            return None
        marked = int(self.model.facts.get("n_forgotten", 0))
        return len(self.trained) or (marked if self.begun else 0)

    @property
    def extent(self) -> str:
        """`ROWS` where nothing was made of them and quarantine.tsv alone names them, else `ALL`."""
        rows_alone = set(self.parts) <= {"ingest"} and not self.n_scans
        return ROWS if rows_alone and self.begun != ALL else ALL


def look(run: Run, people: Collection[str]) -> Seen:
    """What a run has of some people."""
    parts: dict[str, set[str]] = {}
    roots = [*run.private.iterdir(), run.path / "withheld"]
    for root in roots:
        if root.exists() and (here := named(root, people)):
            parts[root.name] = here
    own = [scan for scan in catalogue(run) if scan["patient"] in people]
    model = run.manifest("model")
    listed = {scan["patient"] for scan in own} | parts.get("model", set())
    taught = trained_on(run, model) if model else set()
    trained = listed if taught is None else set(people) & taught
    seen = Seen(run, parts, len(own), trained, model)
    if seen.extent == ALL:
        seen.releases = [r for n in ("release", "withheld") if (r := _release(run, n))]
    return seen


def named(root: Path, people: Collection[str]) -> set[str]:
    """Which of the people a file or folder names, in a path or in its text."""
    found: set[str] = set()
    for path in [root, *sorted(root.rglob("*"))]:
        texts = [path.name]
        if path.is_file() and not path.name.endswith(_NO_TEXT):
            texts.append(path.read_bytes().decode("latin-1"))
        found |= {p for text in texts for p in PSEUDONYM.findall(text)} & set(people)
    return found


def catalogue(run: Run) -> list[dict[str, Any]]:
    """The scans of a run's catalogue, as they stand in it; none where it has none."""
    file = run.folder("catalogue") / "catalogue.jsonl"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines()]


def trained_on(run: Run, model: Manifest) -> set[str] | None:
    """Whom a model was trained on, but those forgotten since; None where nothing says it."""
    if "trained_on" in model.facts:
        return set(model.facts["trained_on"])
    dataset = run.manifest("dataset")
    if dataset is None or dataset.digest() != model.inputs.get("dataset"):
        return None
    index = json.loads((run.folder("dataset") / "dataset.json").read_bytes())
    return {scan["patient"] for scan in index["scans"] if scan["split"] == "train"}


def weights(run: Run) -> str | None:
    """SHA-256 of a run's weights, as other runs name what they started from."""
    model = run.manifest("model")
    return model.files.get("weights.safetensors") if model else None


def start(run: Run) -> set[str]:
    """The weights that a run's model started from, and those that these started from."""
    model = run.manifest("model")
    init, found = model.facts.get("init") if model else None, set()
    while init:
        found.add(init["weights"])
        init = init.get("init")
    return found


def account(run: Run) -> str | None:
    """The ledger's number of a private run."""
    model = run.manifest("model")
    privacy = model.facts.get("privacy") if model else None
    return privacy["lifetime"]["run"] if privacy else None


def _release(run: Run, name: str) -> dict[str, Any] | None:
    """What a release says of itself; the day is that of the run's log."""
    file = run.path / name / "report/report.json"
    if not file.is_file():
        return None
    report = json.loads(file.read_text(encoding="utf-8"))
    events = run.logged("signed") if report["signature"] else run.logged("release")
    return {
        "folder": name,
        "decision": report["decision"],
        "signed": report["signature"] is not None,
        "when": events[-1]["time"][:10] if events else None,
        "recipient": report["data"]["governance"]["recipient"],
    }
