"""The line: scans in, a cohort that someone can sign for out. Read this file first.

    source -ingest-> Catalogue -prepare-> Dataset -train-> Model -sample-> Cohort
           -screen-> Screening -evaluate-> Evidence -release-> release/ or withheld/

A stage is skipped where the manifest it left names the same config part and the same inputs.
Which parts of the config a stage depends on stands once, in `DEPENDS`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from synthmed import __version__, configfile, origin, policy, ranks, receipt, store
from synthmed.artifacts import Catalogue, Cohort, Dataset, ScreenedCohort
from synthmed.conditions import Conditions
from synthmed.config import Config
from synthmed.errors import UsageError
from synthmed.given import given_masks
from synthmed.inventory import versions
from synthmed.loader import Loader
from synthmed.privacy import audited
from synthmed.privacy.ledger import Ledger
from synthmed.progress import Progress
from synthmed.stages import evaluate, fetch, ingest, prepare, release, sample, screen, train
from synthmed.stages.identifiers import source_names
from synthmed.stages.release import Grounds
from synthmed.stages.sample import Sampler
from synthmed.store import FOLDER, Artifact, Kind, Run
from synthmed.traces import BEGUN
from synthmed.training import CHECKPOINT
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
MADE_OF: Mapping[str, Sequence[Kind]] = {
    "ingest": (),
    "prepare": ("catalogue",),
    "train": ("dataset",),
    "sample": ("model",),
    "screen": ("cohort",),
    "evaluate": ("dataset", "screening"),
}
"""Which artifacts a stage makes its own of; some have other inputs beside them."""

_READ = {
    *("source", "format", "table", "patient", "modality"),
    *("channels", "conditions", "missing_labels", "select", "volumes", "tilted", "engine"),
    *("text", "faces"),
}
DEPENDS: Mapping[str, Callable[[Config], Any]] = {
    "ingest": lambda c: {
        **c.data.model_dump(mode="json", include=_READ),
        "private": c.privacy is not None,
        **({} if c.data.flat is None else {"flat": c.data.flat}),
    },
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
    overwrite: bool = False

    def generate(self) -> Decision:
        """The product: every stage that is missing, then the decision."""
        verify_features(self.config)
        self.ingest()
        self.prepare()
        self.train()
        self.sample()
        self.screen()
        self.evaluate()
        return self.release()

    def ingest(self) -> Artifact:
        """Source to catalogue. Where the source is gone, what was read from it is still good."""
        there, folder = self.run.load("catalogue"), configfile.source_folder(self.config)
        source = None
        if there is None or folder is None or folder.is_dir():
            source = ingest.source_fingerprint(self.config)
        if source is None:
            source = there.manifest.inputs["source"] if there else ""
        if there and there.manifest.inputs["source"] != source and not self.overwrite:
            raise UsageError(
                f"run {self.run.path}: data.source has changed since it was read, "
                "or SYNTHMED_HOME is another",
                "Pass --overwrite to read it again and remake all that follows, or name another "
                "run folder.",
            )
        if there and there.manifest.inputs["source"] == source:
            ingest.check_standing(Catalogue.open(there.path).scans, self.run.path)
        fetched = self.run.private / fetch.FOLDER

        def make(target: Path, progress: Progress) -> dict[str, Any]:
            facts = ingest.ingest(self.config, target, work=fetched, progress=progress.update)
            receipt.write(target, receipt.of_ingest(facts, Catalogue.open(target).scans))
            return facts

        made = self._make("ingest", {"source": source}, make)
        if fetched.exists():  # originals of identified patients, by now of no use
            shutil.rmtree(fetched)
        return made

    def prepare(self) -> Artifact:
        """Catalogue to dataset."""
        catalogue = self.run.require("catalogue")
        return self._make(
            "prepare",
            self._made_of("prepare"),
            lambda target, progress: prepare.prepare(
                self.config, Catalogue.open(catalogue.path), target, progress
            ),
        )

    def train(self) -> Artifact:
        """Dataset to model."""
        dataset = self.run.require("dataset")
        inputs = self._made_of("train")
        there, folder = self.run.load("model"), configfile.init_folder(self.config)
        if there and folder and not folder.is_dir() and "init" in there.manifest.inputs:
            # as with the source: where that run is gone, what started from it is still good
            inputs["init"] = there.manifest.inputs["init"]
        elif source := origin.find(self.config):
            inputs["init"] = source.digest

        def make(target: Path, progress: Progress) -> dict[str, Any]:
            # masks that cannot be used are found before an hour of training, not after it
            self._masks_digest(Dataset.open(dataset.path))
            ranks.tell(
                {
                    "config": self.config.model_dump(mode="json"),
                    "dataset": str(dataset.path.resolve()),
                    "checkpoint": str((self.run.work("model") / CHECKPOINT).resolve()),
                    "device": self.device,
                }
            )
            return train.train(
                self.config,
                self.loader(dataset),
                self.run.work("model"),
                target,
                progress,
                self.device,
                origin.find(self.config, self.run.manifest("catalogue")),
            )

        return self._make("train", inputs, make)

    def sample(self) -> Artifact:
        """Model to cohort."""
        model, dataset = self.run.require("model"), self.run.require("dataset")
        there, folder = self.run.load("cohort"), configfile.masks_folder(self.config)
        inputs = self._made_of("sample")
        if there and folder and not folder.is_dir():
            # as with the source: where the masks are gone, what was drawn for them is still good
            inputs["masks"] = there.manifest.inputs["masks"]
        elif digest := self._masks_digest(Dataset.open(dataset.path)):
            inputs["masks"] = digest

        def make(target: Path, progress: Progress) -> dict[str, Any]:
            # what a killed run drew for other masks is of no use
            partial = sample.fresh_unless(self.run.work("cohort"), inputs)
            sampler = self.sampler(model, Dataset.open(dataset.path))
            return sample.sample(self.config, sampler, partial, target, progress)

        return self._make("sample", inputs, make)

    def screen(self) -> Artifact:
        """Cohort to screening: what is kept, what is dropped, and replacements."""
        model, dataset = self.run.require("model"), self.run.require("dataset")
        cohort = self.run.require("cohort")

        def make(target: Path, progress: Progress) -> dict[str, Any]:
            data = Dataset.open(dataset.path)
            self._check_masks(cohort, data)
            return screen.screen(
                self.config,
                data,
                Cohort.open(cohort.path),
                self.sampler(model, data),
                target,
                progress,
                self.device,
            )

        return self._make("screen", self._made_of("screen"), make)

    def evaluate(self) -> Artifact:
        """Screening to evidence."""
        dataset, screening = self.run.require("dataset"), self.run.require("screening")
        cohort = Cohort.open(self.run.require("cohort").path)

        def make(target: Path, progress: Progress) -> dict[str, Any]:
            return evaluate.evaluate(
                self.config,
                Dataset.open(dataset.path),
                ScreenedCohort.open(cohort, screening.path),
                screen.read_copies(screening.path),
                target,
                progress,
                self.device,
            )

        return self._make("evaluate", self._made_of("evaluate"), make)

    def standing(self) -> Decision | None:
        """The decision that stands in the run, if it was made of what stands there now."""
        return release.standing(self.run, self._grounds(self._all_made()).digest)

    def release(self) -> Decision:
        """Evidence to a decision, both reports, and release/ or withheld/."""
        made = self._all_made()
        grounds = self._grounds(made)
        progress = Progress("release", self.quiet)
        decision = release.standing(self.run, grounds.digest)
        if decision is not None:
            progress.done(decision.decision, skipped=True)
            return decision
        shipped = ScreenedCohort.open(Cohort.open(made["cohort"].path), made["screening"].path)
        facts = {
            **made["dataset"].manifest.facts,
            **made["screening"].manifest.facts,
            "n_synthetic": len(shipped.samples),
            "seed": self.config.seed,
            "versions": versions(),
            "init": origin.released(made["model"].manifest.facts["init"]),
            "privacy": made["model"].manifest.facts["privacy"],
            # a cohort that was screened or measured was looked at, whether or not it was decided on
            "attempts": max(
                1 + self.run.count("release"), *map(self.run.count, ("screen", "evaluate"))
            ),
            "digests": {
                "config": store.digest(self.config.model_dump(mode="json")),
                **{kind: artifact.digest() for kind, artifact in made.items()},
            },
        }
        decision = release.release(
            self.run,
            self.config,
            grounds,
            shipped,
            facts,
            real=Dataset.open(made["dataset"].path),
            names=source_names(self.config),
        )
        self.run.log("release", decision=decision.decision)
        self.run.record(__version__)
        progress.done(decision.decision)
        return decision

    def _made_of(self, stage: str) -> dict[str, str]:
        """Digests of the artifacts that a stage makes its own of."""
        return {kind: self.run.require(kind).digest() for kind in MADE_OF[stage]}

    def _all_made(self) -> dict[Kind, Artifact]:
        """Every artifact, each made of those before it.

        Raises:
            UsageError: an artifact is of another config than this one, or was made of others than
                stand beside it, as after half a copy; or the run holds somebody who was forgotten.
        """
        made = {kind: self.run.require(kind) for kind in FOLDER}
        for stage in MADE_OF:
            manifest = made[KINDS[stage]].manifest
            fits = manifest.config == store.digest(DEPENDS[stage](self.config))
            if not fits or not self._made_of(stage).items() <= manifest.inputs.items():
                raise UsageError(
                    f"run {self.run.path}: what {stage} made there is of another config, or of "
                    "other input than stands beside it",
                    f"`synthmed generate {self.run.path / 'config.yaml'} --run {self.run.path}` "
                    "makes anew what does not fit.",
                )
        ingest.check_standing(Catalogue.open(made["catalogue"].path).scans, self.run.path)
        return made

    def _grounds(self, made: Mapping[Kind, Artifact]) -> Grounds:
        """What is decided on."""
        evidence = evaluate.read_estimates(made["evidence"].path)
        evidence += audited.estimates(self.run, made["model"])
        inside = audited.inside(self.run, made["model"])
        told = [e.model_dump(mode="json") for e in [*evidence, *inside] if e.group == "audit"]
        rest = [made["evidence"].digest(), DEPENDS["release"](self.config), *told]
        return Grounds(
            evidence,
            inside,
            digest=store.digest(rest),
            audit_failed=audited.failed(self.run, made["model"]),
        )

    def loader(self, dataset: Artifact) -> Loader:
        """Batches of the training patients."""
        return loader_of(self.config, dataset.path)

    def sampler(self, model: Artifact, dataset: Dataset) -> Sampler:
        """The trained model with the labels that the config asks for."""
        rows = zip(dataset.patients, dataset.labels, dataset.holdout, strict=True)
        # one set of labels a person: somebody scanned five times is not a cell of five
        observed = {patient: labels for patient, labels, held_out in rows if not held_out}
        labels = sample.planned_labels(self.config, list(observed.values()))
        masks = given_masks(self.config, dataset.channels, dataset.grid, dataset.affine)
        return Sampler(self.config, model.path, self.device, labels, masks)

    def _check_masks(self, cohort: Artifact, dataset: Dataset) -> None:
        """See that replacements are drawn for the masks that the cohort was drawn for.

        Raises:
            UsageError: they are others now, or one of them is a patient's.
        """
        drawn_for = cohort.manifest.inputs.get("masks")
        if drawn_for is not None and self._masks_digest(dataset) != drawn_for:
            raise UsageError(
                f"run {self.run.path}: the masks of sample.masks have changed since it was sampled",
                "`synthmed generate` draws the cohort anew for those that are there now.",
            )

    def _masks_digest(self, dataset: Dataset) -> str | None:
        """Digest of the masks to draw images for, all of them checked; null where none is given."""
        masks = given_masks(self.config, dataset.channels, dataset.grid, dataset.affine)
        return masks.check(dataset) if masks else None

    def artifact(self, stage: str) -> Artifact:
        """Run one stage by name (not `release`, whose result is a decision)."""
        made: Artifact = getattr(self, stage)()
        return made

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
        paid = kind in ("dataset", "model") and self.run.manifest("model")
        if paid and self.config.privacy is not None and not self.overwrite:
            raise UsageError(
                f"run {self.run.path}: its model was trained on other input, or by another "
                "version; its patients have paid for it",
                "Pass --overwrite to train anew, which charges them again.",
            )
        if there:
            # `begin` has settled what a changed config means; here the input itself is another
            progress.done("its input has changed: made anew")
        facts: dict[str, Any] = {}
        started = time.monotonic()
        with self.run.writing(kind, config, inputs, facts) as target:
            facts.update(make(target, progress))
        seconds = round(time.monotonic() - started, 1)
        self.run.log(
            stage,
            seconds=seconds,
            **{k: v for k, v in facts.items() if isinstance(v, int | float | str)},
        )
        self.run.record(__version__)
        progress.done(summary(facts))
        return self.run.require(kind)


def verify_features(config: Config) -> None:
    """See that what will judge the cohort is there, before hours are spent on making it.

    Raises:
        UsageError: a network of `evaluate.features` is missing or is another file, or the engine
            of radiomics is not installed.
    """
    for feature in config.evaluate.features:
        feature.verify()


def loader_of(config: Config, dataset: Path) -> Loader:
    """Batches of the training patients of a prepared cohort."""
    return Loader(
        Dataset.open(dataset),
        Conditions(config.data.conditions),
        config.train.batch_patients,
        config.train.augment,
    )


def follow() -> int:
    """The life of a process that torchrun started beside process 0, which runs the command."""
    order = ranks.told()
    if order is not None:
        config = Config.model_validate(order["config"])
        device = order["device"]
        if device == "cuda":
            import torch

            device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        loader = loader_of(config, Path(order["dataset"]))
        train.follow(config, loader, Path(order["checkpoint"]), device)
    return 0


def begin(run: Run, config: Config, overwrite: bool) -> None:
    """Settle what a config means for what the run holds already, and store it resolved.

    A change under `sample` remakes the cohort and what follows. Any other change that touches a
    stage already made needs `overwrite`, which discards from the first such stage on.

    Raises:
        UsageError: stages are stale and `overwrite` is not set, people are half taken out, or the
            policy names what there cannot be.
    """
    policy.verify(config)
    if (run.private / BEGUN).exists():
        raise UsageError(
            f"run {run.path}: `synthmed forget` was cut off in it",
            f"Let it end first: `synthmed forget --in {run.path}`.",
        )
    file = run.path / "config.yaml"
    text = configfile.dump(config)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        try:
            old = configfile.load(file)
        except UsageError:
            if not overwrite:
                raise UsageError(
                    f"run {run.path}: its config.yaml is not one this version can read",
                    "Pass --overwrite to make the run anew, or name another run folder.",
                ) from None
            run.discard("catalogue")
            old = config
        stale = stale_stages(run, old, config)
        changed = [s for s in stale if DEPENDS[s](old) != DEPENDS[s](config)]
        if changed not in ([], ["sample"]) and not overwrite:
            raise UsageError(
                f"run {run.path}: the config has changed; stale: {', '.join(stale)}",
                "Pass --overwrite to make them anew, or name another run folder.",
            )
        if stale and stale[0] != "release":
            if "train" in stale:
                _check_can_be_paid_again(run, config)
            run.discard(KINDS[stale[0]])
        elif stale:
            run.discard_release()
    if overwrite:
        run.discard_damaged()
    store.write_bytes(file, text.encode())


def _check_can_be_paid_again(run: Run, config: Config) -> None:
    """Keep a private model that its patients cannot pay for a second time.

    Raises:
        BudgetExhausted: the new training would be refused, after the old model was gone.
    """
    dataset, there = run.load("dataset"), run.load("model")
    steps = config.train.max_steps
    if config.privacy is None or dataset is None or there is None or steps is None:
        return
    if there.manifest.facts["privacy"] is not None:
        from synthmed.privacy.session import planned_steps, require_budget  # Opacus: seconds

        patients = Dataset.open(dataset.path).train_patients()
        planned = planned_steps(config.privacy, steps)
        require_budget(Ledger(), patients, config.privacy, planned)


def stale_stages(run: Run, old: Config, new: Config) -> list[str]:
    """The stages already made (or begun) that the new config would make otherwise, in order."""
    changed = [s for s in STAGES if DEPENDS[s](old) != DEPENDS[s](new)]
    for i, stage in enumerate(STAGES):
        made = (run.path / "release").exists() or (run.path / "withheld").exists()
        if stage in changed and (made if stage == "release" else run.holds(KINDS[stage])):
            later = list(STAGES)[i:]
            return [s for s in later if s == stage or s == "release" or run.holds(KINDS[s])]
    return []


def preview(place: Path, config: Config) -> dict[str, str]:
    """What `generate` would do with each stage, without touching the disk."""
    file = place / "config.yaml"
    if not file.is_file():
        return dict.fromkeys(STAGES, "to do")
    run = Run(place)
    stale = stale_stages(run, configfile.load(file), config)
    out = {}
    for stage, kind in KINDS.items():
        made = (run.folder(kind) / "manifest.json").is_file()
        begun = run.holds(kind) and not made
        state = "done" if made else "begun, goes on" if begun else "to do"
        out[stage] = "stale: the config has changed" if stage in stale else state
    decided = any((place / n).is_dir() for n in ("release", "withheld"))
    out["release"] = "done" if decided and "release" not in stale else "to do"
    return out


def keep_refusals(run: Run) -> None:
    """Let the list of refused files stand where an ingest ended without anything usable."""
    listed = run.private / f".{FOLDER['catalogue']}.new" / "quarantine.tsv"
    if listed.exists():
        place = run.folder("catalogue")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        listed.rename(place / "quarantine.tsv")
