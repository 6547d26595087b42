"""One part of the backbones' table: one model on one cohort, trained, sampled and measured.

Every model runs through the same stages: the run's own ingest and prepare, and its own screen and
evaluate on what was sampled, nothing filtered. Train and sample are those of the run for a
backbone, and those of reference.py for the others. Each step is one function that a process of its
own can run, so that the peak of its memory is its own.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from synthmed.artifacts import Cohort, Dataset, Sample, ScreenedCohort
from synthmed.config import Config
from synthmed.formats import synthetic
from synthmed.inventory import versions
from synthmed.keys import Key
from synthmed.measure import peak_bytes
from synthmed.metrics.mmd import MMD
from synthmed.pipeline import Line, begin
from synthmed.progress import Progress
from synthmed.report.mosaic import GAP_PIXELS, Grey, png, three_planes
from synthmed.stages.evaluate import evaluate, read_estimates
from synthmed.stages.prepare import CLIP
from synthmed.stages.sample import planned_labels, sample_seed, write_samples
from synthmed.stages.screen import read_copies, screen
from synthmed.store import Run, digest, file_sha256, write_bytes, write_json
from synthmed.training import CHECKPOINT
from synthmed.types import Array, Estimate, Labels
from tests.benchmarks.reference import Gaussian, Monai, Recipe, chunks, train_scans

Step = Callable[..., dict[str, Any]]

HOUSE = ("autoencoder", "cvae", "cgan", "ddpm", "spectral")
OUTSIDE = ("gaussian", "monai")
SECTIONS = ("data", "backbone", "train", "sample", "seed")
"""Of the config, on which a trained model and its samples depend."""
PLACES = {"data": "source", "train": "init"}
"""Of their fields, those that name a file of one machine."""
DRAWN = "drawn"
"""Folder of a part's samples, below private/."""
HURRIED = "hurried"
"""Folder of samples that were made in fewer steps."""
CURVED = ("ddpm",)
EARLY = (10,)
"""Per cent of the time at which `--curve` looks, beside the end."""
FEWER = (2, 5, 10)
"""Steps of the sampler in which `--curve` looks as well."""
LOOK = 40
"""Samples of such a look."""
SHEET = 16
"""Scans of either side on a contact sheet."""
SHEET_COLUMNS = 2
TIMED = 2
"""Volumes that the reference's full chain is timed on."""


@dataclass(frozen=True)
class Part:
    """What to make.

    Args:
        cohort: its name.
        model: a backbone, or one of `OUTSIDE`.
        config: of the run; its backbone does not count for a model of `OUTSIDE`.
        folder: of the run.
        result: file for its figures.
        device: where to train and sample.
        recipe: of the reference.
    """

    cohort: str
    model: str
    config: Config
    folder: Path
    result: Path
    device: str = "cpu"
    recipe: Recipe = field(default_factory=Recipe)

    @property
    def settings(self) -> dict[str, Any]:
        """What training and sampling depend on, beside the data and the code.

        Not where the scans or the weights to start from lie, which is one machine's business, and
        not what is measured: the table refuses parts that were measured with different controls.
        """
        config = self.config.model_dump(mode="json", include=set(SECTIONS))
        for section, place in PLACES.items():
            del config[section][place]
        if self.model in OUTSIDE:
            del config["backbone"]
            config["train"] = {k: config["train"][k] for k in ("max_minutes", "max_steps")}
        recipe = {"recipe": asdict(self.recipe)} if self.model == "monai" else {}
        stated: dict[str, Any] = json.loads(json.dumps(config | recipe | {"device": self.device}))
        return stated

    def has_made(self, result: Mapping[str, Any]) -> bool:
        """Whether a result has its settings; what they do not name yet has its default in them."""
        settings: Mapping[str, Any] = result["settings"]
        stated = self.config.model_dump(mode="json")
        own = {k: settings[k] for k in SECTIONS if k in settings}
        for section, place in PLACES.items():
            own[section] = {**own[section], place: stated[section][place]}
        recipe = settings.get("recipe", asdict(self.recipe))
        try:
            config = Config.model_validate(stated | own)
            other = replace(self, config=config, device=settings["device"], recipe=Recipe(**recipe))
        except (ValidationError, TypeError):  # a field of theirs is gone
            return False
        return other.settings == self.settings

    @property
    def minutes(self) -> float:
        """Of training."""
        return self.config.train.max_minutes or 0.0

    @property
    def weights(self) -> Path:
        """Of a model from outside."""
        return self.folder / "private" / f"{self.model}.safetensors"

    def early(self, percent: int) -> Part:
        """The same with a part of the time."""
        train = self.config.train
        shorter = train.model_copy(update={"max_minutes": self.minutes * percent / 100})
        folder = self.folder.with_name(f"{self.folder.name}-{percent}")
        config = self.config.model_copy(update={"train": shorter})
        return replace(self, folder=folder, config=config)

    def hurried(self, steps: int) -> Part:
        """The same trained model with fewer steps of its sampler."""
        sampler = self.config.backbone.sampler.model_copy(update={"steps": steps})
        backbone = self.config.backbone.model_copy(update={"sampler": sampler})
        return replace(self, config=self.config.model_copy(update={"backbone": backbone}))

    def key(self, *parts: str | int) -> Key:
        """Of this model's own randomness."""
        return Key.root(sample_seed(self.config)).fold(self.model, *parts)

    def dataset(self) -> Dataset:
        """What its run has prepared."""
        return Dataset.open(Run(self.folder).require("dataset").path)

    def network(self, dataset: Dataset) -> Monai:
        """The reference before training."""
        seed = self.key("weights").integer()
        return Monai(self.recipe, self.config, dataset.volumes.shape[1:], seed, self.device)


# --- the steps ------------------------------------------------------------------------------------


def prepared(part: Part) -> dict[str, Any]:
    """Ingest and prepare; what the table says of the data."""
    run = Run(part.folder)
    with run.lock():
        begin(run, part.config, overwrite=False)
        line = Line(run, part.config, part.device)
        line.ingest()
        dataset = line.prepare()
    data = Dataset.open(dataset.path)
    # the scans and who is held out; what a manifest says beside them is another version's business
    files = [file_sha256(dataset.path / name) for name in ("volumes.npy", "dataset.json")]
    return {
        "dataset": digest(files),
        "n_train": len(data.train_patients()),
        "n_holdout": len(data.holdout_patients()),
    }


def trained(part: Part) -> dict[str, Any]:
    """Train, unless that is done: steps, seconds (null for one that was resumed), memory."""
    record = part.folder / "training.json"
    if not record.is_file():
        train = _train_house if part.model not in OUTSIDE else _train_outside
        write_json(record, train(part) | {"peak_bytes": peak_bytes(part.device)})
    out: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return out


def _train_house(part: Part) -> dict[str, Any]:
    run = Run(part.folder)
    with run.lock():
        resumed = (run.work("model") / CHECKPOINT).exists()
        started = time.monotonic()
        model = Line(run, part.config, part.device).train()
    return {
        "steps": model.manifest.facts["steps"],
        "seconds": None if resumed else time.monotonic() - started,
        "n_parameters": model.manifest.facts["n_parameters"],
    }


def _train_outside(part: Part) -> dict[str, Any]:
    dataset = part.dataset()
    scans, labels = train_scans(dataset)
    started = time.monotonic()
    if part.model == "gaussian":
        gaussian = Gaussian.fit(scans)
        gaussian.save(part.weights)
        steps, n_parameters = 0, gaussian.n_parameters
    else:
        network = part.network(dataset)
        steps = network.train(
            scans,
            labels,
            part.minutes,
            part.config.train.max_steps,
            part.key("train").integer(),
        )
        network.save(part.weights)
        n_parameters = network.n_parameters
    seconds = time.monotonic() - started
    return {"steps": [steps], "seconds": seconds, "n_parameters": n_parameters}


def measured(part: Part) -> dict[str, Any]:
    """Draw the samples, time that, measure them, and lay out the contact sheet."""
    dataset, count = part.dataset(), part.config.sample.count or 0
    ancestral = None
    cohort, seconds = drawn(part, dataset, count)
    if part.model == "monai":
        network = part.network(dataset)
        network.load(part.weights)
        keys = [part.key("ancestral", k) for k in range(TIMED)]
        labels = [s.labels for s in cohort.samples[:TIMED]]
        ancestral = network.ancestral_seconds(labels, keys) * count
    picture = sheet(dataset, cohort)
    write_bytes(part.folder / "sheet.png", png(picture))
    write_bytes(part.folder / "sheet-small.png", png(picture[::2, ::2]))
    return {
        "n_synthetic": count,
        "sampling": {"seconds": seconds, "ancestral_seconds": ancestral},
        "estimates": [e.model_dump(mode="json") for e in judged(part, dataset, cohort)],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def looked(part: Part, percent: int) -> dict[str, Any]:
    """mmd2 of the first `LOOK` samples, of the model at `percent` of the time; and its minutes."""
    dataset, count = part.dataset(), min(LOOK, part.config.sample.count or 0)
    if percent == 100:
        cohort = Cohort.open(part.folder / "private" / DRAWN)
    else:
        cohort, _ = drawn(part, dataset, count)
    fewer = Cohort(cohort.path, cohort.samples[:count])
    return {**mmd2(part, dataset, fewer), "seconds": trained(part)["seconds"]}


def hastened(part: Part, steps: int) -> dict[str, Any]:
    """mmd2 of the first `LOOK` samples in so many steps, and the seconds that all would take."""
    dataset, whole = part.dataset(), part.config.sample.count or 0
    count = min(LOOK, whole)
    cohort, seconds = drawn(part.hurried(steps), dataset, count, HURRIED)
    return {**mmd2(part, dataset, cohort), "seconds": seconds * whole / count}


def mmd2(part: Part, dataset: Dataset, cohort: Cohort) -> dict[str, Any]:
    """That figure alone, with its interval."""
    found = judged(part, dataset, cohort, metrics=(MMD(),))[0]
    return {"value": found.value, "ci": found.ci}


# --- sampling and measuring -----------------------------------------------------------------------


def drawn(part: Part, dataset: Dataset, count: int, folder: str = DRAWN) -> tuple[Cohort, float]:
    """Samples 0 to `count` as files, and the seconds that a trained model took for them."""
    target = part.folder / "private" / folder
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    if part.model not in OUTSIDE:
        run = Run(part.folder)
        line = Line(run, part.config, part.device)
        sampler = line.sampler(run.require("model"), dataset)
        started = time.monotonic()
        samples = sampler.write(range(count), target, lambda n: None)
        seconds = time.monotonic() - started
    else:
        sample = _outsider(part, dataset)
        rows = zip(dataset.patients, dataset.labels, dataset.holdout, strict=True)
        observed = {patient: labels for patient, labels, held_out in rows if not held_out}
        labels_of = planned_labels(part.config, list(observed.values()))
        samples, seconds = write_volumes(dataset, labels_of, sample, range(count), target)
    write_samples(target / "samples.jsonl", samples)
    return Cohort(target, samples), seconds


def _outsider(part: Part, dataset: Dataset) -> Callable[[Sequence[int], Sequence[Labels]], Array]:
    """What draws samples of these indices with these labels."""
    if part.model == "gaussian":
        gaussian = Gaussian.load(part.weights)
        return lambda indices, _: gaussian.sample([part.key(k) for k in indices])
    network = part.network(dataset)
    network.load(part.weights)
    return lambda indices, labels: network.sample(labels, [part.key(k) for k in indices])


def write_volumes(
    dataset: Dataset,
    labels_of: Callable[[int], Labels],
    sample: Callable[[Sequence[int], Sequence[Labels]], Array],
    indices: range,
    target: Path,
    at_once: int = 4,
) -> tuple[list[Sample], float]:
    """Samples from outside, within the data's range, as the run's own sampler writes them.

    The reference takes half an hour for a hundred, so that its seconds are the median of its
    chunks times their number: a disturbance on the way does not count.
    """
    top = np.array([CLIP if c.mask is None else 1.0 for c in dataset.channels], np.float32)
    samples, seconds = [], []
    for chunk in chunks(len(indices), at_once):
        started = time.monotonic()
        labels = [labels_of(k) for k in chunk]
        volumes = np.clip(sample(chunk, labels), 0, top[:, None, None, None])
        for k, told, volume in zip(chunk, labels, volumes, strict=True):
            files = {n: f"syn-{k:06d}_{n}.nii.gz" for n in synthetic.volume_names(dataset.channels)}
            synthetic.write(target, files, volume, dataset.channels, dataset.affine)
            samples.append(Sample(index=k, labels=dict(told), files=files))
        seconds.append(time.monotonic() - started)
    return samples, statistics.median(seconds) * len(seconds)


def judged(
    part: Part, dataset: Dataset, cohort: Cohort, metrics: Sequence[Any] | None = None
) -> list[Estimate]:
    """The stages screen and evaluate on all that was sampled: nothing is dropped."""
    config, quiet = part.config, Progress("benchmark", quiet=True)
    if metrics is not None:
        chosen = config.evaluate.model_copy(update={"metrics": tuple(metrics)})
        config = config.model_copy(update={"evaluate": chosen})
    place = part.folder / "private" / "measured"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    screen(config, dataset, cohort, None, place, quiet)
    shipped = ScreenedCohort.open(cohort, place)
    evaluate(config, dataset, shipped, read_copies(place), place, quiet)
    return read_estimates(place)


def sheet(dataset: Dataset, cohort: Cohort) -> Grey:
    """Three central slices each of the first 16 training scans, left, and of samples 0 to 15."""
    real = dataset.volumes[np.flatnonzero(~dataset.holdout)[:SHEET], 0]
    shown = cohort.samples[:SHEET]
    made = synthetic.read(shown, [cohort.path] * len(shown), dataset.channels)[:, 0]
    halves = [grid_of([three_planes(v, dataset.affine) for v in side]) for side in (real, made)]
    rows = max(len(h) for h in halves)
    halves = [np.pad(h, ((0, rows - len(h)), (0, 0))) for h in halves]
    between = np.full((rows, 8 * GAP_PIXELS), 255, np.uint8)
    return np.concatenate([halves[0], between, halves[1]], axis=1)


def grid_of(pictures: Sequence[Grey]) -> npt.NDArray[np.uint8]:
    """Pictures of one size in rows of `SHEET_COLUMNS`, the last row filled with black."""
    missing = -len(pictures) % SHEET_COLUMNS
    every = [*pictures, *[np.zeros_like(pictures[0])] * missing]
    rows = [every[i : i + SHEET_COLUMNS] for i in range(0, len(every), SHEET_COLUMNS)]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


# --- all of them ----------------------------------------------------------------------------------


def made(part: Part, step: Step) -> dict[str, Any]:
    """All figures of a part but its curve, written to its file.

    Args:
        part: what to make.
        step: calls a step with its arguments, in a process of its own or not.
    """
    about = step(prepared, part)
    training = step(trained, part)
    result: dict[str, Any] = {
        "cohort": part.cohort,
        "model": part.model,
        "settings": part.settings,
        "minutes": part.minutes,
        "device": part.device,
        **about,
        "training": training,
        **step(measured, part),
        "curve": {},
        "fewer_steps": {},
    }
    write_json(part.result, result)
    return result


def curved(part: Part, result: Mapping[str, Any], step: Step) -> dict[str, Any]:
    """mmd2 by per cent of the time and by steps of the sampler, added to its file.

    The rate decays with the run, so that a shorter training is a run of its own.
    """
    curve = {}
    for percent in EARLY:
        early = part.early(percent)
        step(prepared, early)
        step(trained, early)
        curve[str(percent)] = step(looked, early, percent)
    curve["100"] = step(looked, part, 100)
    fewer = {str(steps): step(hastened, part, steps) for steps in FEWER}
    out = {**result, "curve": curve, "fewer_steps": fewer}
    write_json(part.result, out)
    return out
