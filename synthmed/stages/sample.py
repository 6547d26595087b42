"""Model to cohort: draw synthetic volumes, sample k from (model, seed, k) and its condition alone.

Sample k belongs to canonical batch k // B, where B is stored with the model; the last batch is
padded. So shards, larger counts and replacements give the same volumes bit for bit on one kind of
device and thread count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from synthmed.artifacts import ChannelInfo, Sample
from synthmed.backbones.generative import Generative
from synthmed.conditions import Conditions, rounded
from synthmed.config import Config, Continuous
from synthmed.errors import UsageError
from synthmed.formats import synthetic
from synthmed.given import GivenMasks
from synthmed.keys import Key
from synthmed.loader import spec_of, unaugmented
from synthmed.progress import Progress
from synthmed.stages.prepare import CLIP
from synthmed.store import write_bytes, write_json
from synthmed.training import load_state
from synthmed.types import Affine, Array
from synthmed.view import Size, Views, cut


class Sampler:
    """A trained model, ready to draw from.

    Args:
        config: the run's resolved config.
        path: the model's folder.
        device: where to run it.
        labels_of: labels for every sample index.
        masks: what to draw images for, where the model is given masks.
    """

    def __init__(
        self,
        config: Config,
        path: Path,
        device: str,
        labels_of: Callable[[int], Mapping[str, str | float]],
        masks: GivenMasks | None = None,
    ) -> None:
        about = json.loads((path / "model.json").read_text(encoding="utf-8"))
        self.conditions = Conditions(config.data.conditions)
        self.channels = [ChannelInfo(**c) for c in about["channels"]]
        self.affine: Affine = np.array(about["affine"])
        self.batch: int = about["batch"]
        self.device = device
        self.labels_of = labels_of
        self.masks = masks
        self.key = Key.root(sample_seed(config)).fold("sample")
        x, y, z = about["grid"]
        self.augment = config.train.augment
        self.views = Views.from_json(about["views"]) if about["views"] else None
        self.spec = spec_of(self.channels, (x, y, z), self.conditions, self.views, self.augment)
        order = self.key.fold("masks").numpy().permutation(len(masks) if masks else 1)
        self.mask_of: Callable[[int], int] = lambda k: int(order[k % len(order)])
        self.model: Generative = config.backbone.build(self.spec, config.train.optimizer)
        load_state(self.model, load_file(path / "weights.safetensors"))
        for module in self.model.modules.values():
            module.to(device).eval()

    def canonical_batch(self, number: int) -> Array:
        """The B volumes of one canonical batch: (B, C + K, X, Y, Z), in the data's range.

        Given masks are the last channels, as they were given.
        """
        indices = range(number * self.batch, (number + 1) * self.batch)
        labels = np.stack([self.conditions.encode(self.labels_of(k)) for k in indices])
        sizes = self._views(indices, labels)
        told = self.views.encode(sizes) if self.views else None
        encoded = unaugmented(labels, told, self.augment)
        keys = torch.tensor([self.key.fold(k).integer() for k in indices])
        given = self._given(indices)
        with torch.inference_mode():
            x = self.model.sample(
                torch.from_numpy(encoded).to(self.device),
                keys,
                torch.from_numpy(given).to(self.device),
            )
        drawn = self.channels[: self.spec.channels]
        top = torch.tensor([CLIP if c.mask is None else 1.0 for c in drawn])
        bounded = torch.minimum(x.clamp(min=0), top.to(x.device)[:, None, None, None])
        if self.views:
            bounded = cut(bounded, sizes)
        return np.concatenate([bounded.float().cpu().numpy(), given], axis=1)

    def _views(self, indices: Sequence[int], labels: Array) -> list[Size]:
        """How much of the grid each of these samples covers; nothing where all cover all of it."""
        if self.views is None:
            return []
        generators = [self.key.fold(k, "view").torch() for k in indices]
        told = torch.from_numpy(labels)
        return [self.views.draw(g, c) for g, c in zip(generators, told, strict=True)]

    def _given(self, indices: Sequence[int]) -> Array:
        """(B, K, X, Y, Z) masks of these samples; K is 0 for a model that is given none."""
        if self.spec.given == 0:
            return np.zeros((len(indices), 0, *self.spec.grid), np.float32)
        if self.masks is None:
            raise ValueError("this model is given masks, and none are there to draw images for")
        return np.stack([self.masks.read(self.mask_of(k)) for k in indices])

    def stand_in(self, replaced: Mapping[int, int]) -> None:
        """Give new samples the labels and the mask of those they replace: new index to old."""
        labels_of, mask_of = self.labels_of, self.mask_of
        self.labels_of = lambda k: labels_of(replaced.get(k, k))
        self.mask_of = lambda k: mask_of(replaced.get(k, k))

    def write(
        self, indices: Sequence[int], target: Path, done: Callable[[int], None]
    ) -> list[Sample]:
        """Draw the samples `indices` and write them below `target`; files already there are kept.

        Args:
            indices: which samples of the stream, ascending.
            target: folder for the volumes; written whole, one by one.
            done: called with the number of samples written so far.
        """
        names = {k: self._files(k) for k in indices}
        missing = [k for k in indices if not all((target / f).exists() for f in names[k].values())]
        for number in sorted({k // self.batch for k in missing}):
            volumes = self.canonical_batch(number)
            for k in (k for k in missing if k // self.batch == number):
                voxels = volumes[k % self.batch]
                synthetic.write(target, names[k], voxels, self.channels, self.affine)
                done(sum(j <= k for j in indices))
        return [Sample(index=k, labels=dict(self.labels_of(k)), files=names[k]) for k in indices]

    def _files(self, index: int) -> dict[str, str]:
        return {
            name: f"syn-{index:06d}_{name}.nii.gz" for name in synthetic.volume_names(self.channels)
        }


def sample(
    config: Config, sampler: Sampler, partial: Path, target: Path, progress: Progress
) -> dict[str, Any]:
    """Fill `target` with the cohort: samples.jsonl and one .nii.gz a channel and sample.

    Volumes are first written into `partial`, from where a killed run goes on.

    Returns:
        Facts: count and seed.
    """
    count = sample_count(config)
    samples = sampler.write(range(count), partial, lambda n: progress.update(n, count))
    for s in samples:
        for file in s.files.values():
            (partial / file).rename(target / file)
    write_samples(target / "samples.jsonl", samples)
    return {"n_samples": count, "seed": sample_seed(config)}


def fresh_unless(partial: Path, inputs: Mapping[str, str]) -> Path:
    """`partial`, emptied unless what it holds was drawn from the same inputs."""
    mark = partial / ".inputs.json"
    if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != dict(inputs):
        for path in partial.iterdir():
            path.unlink()
        write_json(mark, dict(inputs))
    return partial


def sample_seed(config: Config) -> int:
    """`sample.seed`, by default the run's own."""
    return config.seed if config.sample.seed is None else config.sample.seed


def sample_count(config: Config) -> int:
    """How many samples are asked for: `sample.count`, else what the label counts need, else 100."""
    asked = [sum(counts.values()) for counts in config.sample.labels.values()]
    return config.sample.count or max(asked, default=100)


def planned_labels(
    config: Config, observed: Sequence[Mapping[str, str | float]]
) -> Callable[[int], dict[str, str | float]]:
    """The labels of every sample index: counts that were asked for, the rest from the prior.

    None is ever missing, whatever is missing in the cohort.

    Args:
        config: the run's config.
        observed: labels of each training patient, one set a person, used with `sample.prior:
            cohort` alone.
    """
    conditions = Conditions(config.data.conditions)
    key = Key.root(sample_seed(config)).fold("labels")
    fixed = {
        name: [category for category, n in counts.items() for _ in range(n)]
        for name, counts in config.sample.labels.items()
    }
    pool = _joint(config, observed) if config.sample.prior == "cohort" else []

    declared = config.sample.prior if isinstance(config.sample.prior, Mapping) else {}

    def labels(k: int) -> dict[str, str | float]:
        if pool:
            drawn = dict(pool[int(key.fold("joint", k).numpy().integers(len(pool)))])
        else:
            drawn = conditions.draw(key.fold(k), declared)
        for name, values in fixed.items():
            if k < len(values):
                drawn[name] = values[k]
        return drawn

    return labels


NUMBER_STEPS = 20
"""Steps that the declared range of a number is cut into, where the cohort's own are drawn."""


def _joint(
    config: Config, observed: Sequence[Mapping[str, str | float]]
) -> list[Mapping[str, str | float]]:
    """The cohort's own label sets, rare ones merged into the commonest.

    A combination of categories that fewer than five patients share would single them out; such
    patients count for the commonest combination instead. Numbers are rounded to a twentieth of
    their declared range, from its lower end. A patient with a label missing is left out.
    """
    numbers = {k: c for k, c in config.data.conditions.items() if c.kind == "continuous"}
    coarse = [
        {
            name: _stepped(float(value), numbers[name]) if name in numbers else value
            for name, value in labels.items()
        }
        for labels in observed
        if len(labels) == len(config.data.conditions)
    ]
    cells = [tuple(sorted((k, v) for k, v in x.items() if isinstance(v, str))) for x in coarse]
    sizes = {c: cells.count(c) for c in cells}
    common = max(sizes, key=lambda c: (sizes[c], c), default=())
    if sizes.get(common, 0) < 5:
        raise UsageError(
            "sample.prior: cohort: no combination of labels is shared by five training patients",
            "Declare a prior of your own, or use uniform.",
        )
    return [
        x if sizes[cell] >= 5 else {**x, **dict(common)}
        for x, cell in zip(coarse, cells, strict=True)
    ]


def _stepped(value: float, c: Continuous) -> float:
    """The nearest of the `NUMBER_STEPS` + 1 values that a number may take."""
    step = (c.high - c.low) / NUMBER_STEPS
    return rounded(c.low + step * round((value - c.low) / step), c.low, c.high)


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write a samples.jsonl."""
    write_bytes(path, "".join(s.model_dump_json() + "\n" for s in samples).encode())


def summary(facts: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    return f"{facts['n_samples']} synthetic scans from seed {facts['seed']}"
