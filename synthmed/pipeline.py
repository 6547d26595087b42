"""The line: scans in, a cohort that someone can sign for out. Read this file first.

    source -ingest-> Catalogue -prepare-> Dataset -train-> Model -sample-> Cohort
           -screen-> Screening -evaluate-> Evidence -release-> release/ or withheld/

A stage is skipped where the manifest it left names the same config part and the same inputs.
Which parts of the config a stage depends on stands once, in `DEPENDS`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from synthmed import config as configs
from synthmed import store
from synthmed.artifacts import Catalogue, Cohort, Dataset, ScreenedCohort
from synthmed.conditions import Conditions
from synthmed.config import Config
from synthmed.errors import UsageError
from synthmed.loader import Loader
from synthmed.progress import Progress
from synthmed.stages import evaluate, ingest, prepare, release, sample, screen, train
from synthmed.store import FOLDER, Artifact, Kind, Run
from synthmed.types import Decision

STAGES: Mapping[str, ModuleType] = {
    "ingest": ingest,
    "prepare": prepare,
    "train": train,
    "sample": sample,
    "screen": screen,
    "evaluate": evaluate,
    "release": release,
}
KINDS: Mapping[str, Kind] = dict(zip(STAGES, FOLDER, strict=False))

_READ = {"source", "format", "table", "patient", "modality", "channels", "conditions"}
DEPENDS: Mapping[str, Callable[[Config], Any]] = {
    "ingest": lambda c: c.data.model_dump(mode="json", include=_READ),
    "prepare": lambda c: {
        **c.data.model_dump(mode="json", exclude=_READ),
        "seed": c.seed,
        "private": c.privacy is not None,
    },
    "train": lambda c: c.model_dump(mode="json", include={"backbone", "train", "privacy"}),
    "sample": lambda c: c.model_dump(mode="json", include={"sample"}),
    "screen": lambda c: c.model_dump(mode="json", include={"screen"}),
    "evaluate": lambda c: c.model_dump(mode="json", include={"evaluate"}),
    "release": lambda c: c.model_dump(mode="json", include={"policy", "export", "governance"}),
}


@dataclass
class Line:
    """One run on its way; the caller holds the run's lock and has called `begin`."""

    run: Run
    config: Config
    device: str = "cpu"
    quiet: bool = False

    def generate(self) -> Decision:
        """The product: every stage that is missing, then the decision."""
        self.ingest()
        self.prepare()
        self.train()
        self.sample()
        self.screen()
        self.evaluate()
        return self.release()

    def ingest(self) -> Artifact:
        """Source to catalogue. Where the source is gone, what was read from it is still good."""
        there = self.run.load("catalogue")
        if there and not configs.source_folder(self.config).is_dir():
            source = there.manifest.inputs["source"]
        else:
            source = ingest.source_fingerprint(self.config)
        return self._make(
            "ingest",
            {"source": source},
            lambda target, progress: ingest.ingest(self.config, target, progress=progress.update),
        )

    def prepare(self) -> Artifact:
        """Catalogue to dataset."""
        catalogue = self.run.require("catalogue")
        return self._make(
            "prepare",
            {"catalogue": catalogue.digest()},
            lambda target, progress: prepare.prepare(
                self.config, Catalogue.open(catalogue.path), target, progress
            ),
        )

    def train(self) -> Artifact:
        """Dataset to model."""
        dataset = self.run.require("dataset")

        def make(target: Path, progress: Progress) -> dict[str, Any]:
            partial = self.run.work("model")
            return train.train(
                self.config, self.loader(dataset), partial, target, progress, self.device
            )

        return self._make("train", {"dataset": dataset.digest()}, make)

    def sample(self) -> Artifact:
        """Model to cohort."""
        model, dataset = self.run.require("model"), self.run.require("dataset")

        def make(target: Path, progress: Progress) -> dict[str, Any]:
            partial = self.run.work("cohort")
            sampler = self.sampler(model, Dataset.open(dataset.path))
            return sample.sample(self.config, sampler, partial, target, progress)

        return self._make("sample", {"model": model.digest()}, make)

    def screen(self) -> Artifact:
        """Cohort to screening: what is kept, what is dropped, and replacements."""
        model, dataset = self.run.require("model"), self.run.require("dataset")
        cohort = self.run.require("cohort")

        def make(target: Path, progress: Progress) -> dict[str, Any]:
            data = Dataset.open(dataset.path)
            return screen.screen(
                self.config,
                data,
                Cohort.open(cohort.path),
                self.sampler(model, data),
                target,
                progress,
            )

        return self._make("screen", {"cohort": cohort.digest()}, make)

    def evaluate(self) -> Artifact:
        """Screening to evidence."""
        dataset, cohort = self.run.require("dataset"), self.run.require("cohort")
        screening = self.run.require("screening")
        return self._make(
            "evaluate",
            {"screening": screening.digest()},
            lambda target, progress: evaluate.evaluate(
                self.config,
                Dataset.open(dataset.path),
                Cohort.open(cohort.path),
                ScreenedCohort.open(Cohort.open(cohort.path), screening.path),
                target,
                progress,
            ),
        )

    def release(self) -> Decision:
        """Evidence to a decision, both reports, and release/ or withheld/."""
        made_from = store.digest(
            [self.run.require("evidence").digest(), DEPENDS["release"](self.config)]
        )
        there = release.standing(self.run, made_from)
        progress = Progress("release", self.quiet)
        if there is None:
            there = release.release(self.run, self.config, made_from)
            self.run.log("release", decision=there.decision)
        progress.done(there.decision)
        return there

    def loader(self, dataset: Artifact) -> Loader:
        """Batches of the training patients."""
        return Loader(
            Dataset.open(dataset.path),
            Conditions(self.config.data.conditions),
            self.config.train.batch_patients,
            self.config.train.augment,
        )

    def sampler(self, model: Artifact, dataset: Dataset) -> sample.Sampler:
        """The trained model with the labels that the config asks for."""
        observed = [x for x, out in zip(dataset.labels, dataset.holdout, strict=True) if not out]
        labels = sample.planned_labels(self.config, observed)
        return sample.Sampler(self.config, model.path, self.device, labels)

    def _make(
        self,
        stage: str,
        inputs: Mapping[str, str],
        make: Callable[[Path, Progress], dict[str, Any]],
    ) -> Artifact:
        """The artifact of a stage: what stands, if made from the same, else a new one."""
        kind = KINDS[stage]
        summary = STAGES[stage].summary
        config = store.digest(DEPENDS[stage](self.config))
        progress = Progress(stage, self.quiet)
        there = self.run.load(kind)
        if there and there.manifest.config == config and there.manifest.inputs == inputs:
            progress.done(summary(there.manifest.facts), skipped=True)
            return there
        if there:
            # `begin` has settled what a changed config means; here the input itself is another
            progress.done("its input has changed: made anew")
        facts: dict[str, Any] = {}
        with self.run.writing(kind, config, inputs, facts) as target:
            facts.update(make(target, progress))
        self.run.log(stage, **{k: v for k, v in facts.items() if isinstance(v, int | float | str)})
        progress.done(summary(facts))
        return self.run.require(kind)


def begin(run: Run, config: Config, overwrite: bool) -> None:
    """Settle what a config means for what the run holds already, and store it resolved.

    A change under `sample` remakes the cohort and what follows. Any other change that touches a
    stage already made needs `overwrite`, which discards from the first such stage on.

    Raises:
        UsageError: stages are stale and `overwrite` is not set.
    """
    file = run.path / "config.yaml"
    text = configs.dump(config)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        stale = stale_stages(run, configs.load(file), config)
        if stale and stale[0] != "sample" and not overwrite:
            raise UsageError(
                f"run {run.path}: the config has changed; stale: {', '.join(stale)}",
                "Pass --overwrite to make them anew, or choose another folder with --run.",
            )
        if stale and stale[0] != "release":
            run.discard(KINDS[stale[0]])
    if overwrite:
        run.discard_damaged()
    store.write_bytes(file, text.encode())


def stale_stages(run: Run, old: Config, new: Config) -> list[str]:
    """The stages already made (or begun) that the new config would make otherwise, in order."""
    changed = [s for s in STAGES if DEPENDS[s](old) != DEPENDS[s](new)]
    for i, stage in enumerate(STAGES):
        made = (run.path / "release").exists() or (run.path / "withheld").exists()
        if stage in changed and (made if stage == "release" else run.holds(KINDS[stage])):
            later = list(STAGES)[i:]
            return [s for s in later if s == stage or s == "release" or run.holds(KINDS[s])]
    return []


def keep_refusals(run: Run) -> None:
    """Let the list of refused files stand where an ingest ended without anything usable."""
    listed = run.private / f".{FOLDER['catalogue']}.new" / "quarantine.tsv"
    if listed.exists():
        place = run.folder("catalogue")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        listed.rename(place / "quarantine.tsv")
