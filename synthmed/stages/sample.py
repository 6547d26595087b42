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
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from synthmed.artifacts import ChannelInfo, Sample
from synthmed.backbones.generative import Generative
from synthmed.conditions import Conditions
from synthmed.config import Config
from synthmed.errors import UsageError
from synthmed.formats import synthetic
from synthmed.keys import Key
from synthmed.loader import spec_of
from synthmed.progress import Progress
from synthmed.stages.prepare import CLIP
from synthmed.stages.train import load_state
from synthmed.store import write_bytes
from synthmed.types import Affine


class Sampler:
    """A trained model, ready to draw from.

    Args:
        config: the run's resolved config.
        path: the model's folder.
        device: where to run it.
        labels_of: labels for every sample index.
    """

    def __init__(
        self,
        config: Config,
        path: Path,
        device: str,
        labels_of: Callable[[int], Mapping[str, str | float]],
    ) -> None:
        about = json.loads((path / "model.json").read_text(encoding="utf-8"))
        self.conditions = Conditions(config.data.conditions)
        self.channels = [ChannelInfo(**c) for c in about["channels"]]
        self.affine: Affine = np.array(about["affine"])
        self.batch: int = about["batch"]
        self.device = device
        self.labels_of = labels_of
        self.key = Key.root(sample_seed(config)).fold("sample")
        x, y, z = about["grid"]
        self.spec = spec_of(self.channels, (x, y, z), self.conditions)
        self.model: Generative = config.backbone.build(self.spec, config.train.optimizer)
        load_state(self.model, load_file(path / "weights.safetensors"))
        for module in self.model.modules.values():
            module.to(device).eval()

    def canonical_batch(self, number: int) -> npt.NDArray[np.float32]:
        """The B volumes of one canonical batch: (B, C, X, Y, Z), in the data's range."""
        indices = range(number * self.batch, (number + 1) * self.batch)
        encoded = np.stack([self.conditions.encode(self.labels_of(k)) for k in indices])
        keys = torch.tensor([self.key.fold(k).integer() for k in indices])
        given = torch.zeros(len(indices), self.spec.given, *self.spec.grid, device=self.device)
        with torch.inference_mode():
            x = self.model.sample(torch.from_numpy(encoded).to(self.device), keys, given)
        top = torch.tensor([CLIP if c.mask is None else 1.0 for c in self.channels])
        bounded = torch.minimum(x.clamp(min=0), top.to(x.device)[:, None, None, None])
        return bounded.float().cpu().numpy()

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
    pool = _joint(observed) if config.sample.prior == "cohort" else []

    declared = config.sample.prior if isinstance(config.sample.prior, Mapping) else {}

    def labels(k: int) -> dict[str, str | float]:
        if pool:
            drawn = dict(pool[int(key.fold("joint", k).numpy().integers(len(pool)))])
            for name, c in config.data.conditions.items():
                if c.kind == "continuous":  # rounding may have left the declared range
                    drawn[name] = min(max(float(drawn[name]), c.low), c.high)
        else:
            drawn = conditions.draw(key.fold(k), declared)
        for name, values in fixed.items():
            if k < len(values):
                drawn[name] = values[k]
        return drawn

    return labels


def _joint(observed: Sequence[Mapping[str, str | float]]) -> list[Mapping[str, str | float]]:
    """The cohort's own label sets, rare ones merged into the commonest.

    A combination of categories that fewer than five patients share would single them out; such
    patients count for the commonest combination instead. Numbers are rounded to five units.
    """
    coarse = [
        {k: v if isinstance(v, str) else 5.0 * round(v / 5) for k, v in labels.items()}
        for labels in observed
    ]
    cells = [tuple(sorted((k, v) for k, v in x.items() if isinstance(v, str))) for x in coarse]
    sizes = {c: cells.count(c) for c in cells}
    common = max(sizes, key=lambda c: (sizes[c], c))
    if sizes[common] < 5:
        raise UsageError(
            "sample.prior: cohort: no combination of labels is shared by five training patients",
            "Declare a prior of your own, or use uniform.",
        )
    return [
        x if sizes[cell] >= 5 else {**x, **dict(common)}
        for x, cell in zip(coarse, cells, strict=True)
    ]


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write a samples.jsonl."""
    write_bytes(path, "".join(s.model_dump_json() + "\n" for s in samples).encode())


def summary(facts: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    return f"{facts['n_samples']} synthetic scans from seed {facts['seed']}"
