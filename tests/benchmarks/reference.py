"""What the backbones are compared with: a Gaussian in voxel space, and MONAI's diffusion model.

Neither knows anything of synthmed but the prepared scans. `Monai` is what a user of MONAI writes
today after its 3D tutorial: DiffusionModelUNet, DDPMScheduler, Adam, float32; DDIMScheduler to
sample. The class goes in by the network's own embedding, which MONAI's inferer cannot pass on, so
its two loops stand here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from synthmed.artifacts import Dataset
from synthmed.config import Config
from synthmed.errors import SynthmedError, UsageError
from synthmed.keys import Key, torch_generator
from synthmed.stages.prepare import CLIP
from synthmed.store import write_bytes
from synthmed.training import as_bytes
from synthmed.types import Array, Labels

TRIAL_STEPS = 8
"""Steps after which the reference's number of steps is set."""


def train_scans(dataset: Dataset) -> tuple[Array, list[Labels]]:
    """Every training scan in the dataset's order, (n, C, X, Y, Z), and its labels."""
    rows = np.flatnonzero(~dataset.holdout)
    return dataset.volumes[rows].astype(np.float32), [dataset.labels[i] for i in rows]


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian with the mean and the covariance of the training scans, conditions ignored.

    Args:
        mean: (C, X, Y, Z).
        centred: (n, C, X, Y, Z), the scans less their mean.
    """

    mean: Array
    centred: Array

    @classmethod
    def fit(cls, scans: Array) -> Gaussian:
        """From scans (n, C, X, Y, Z), at least two."""
        mean = scans.mean(axis=0)
        return cls(mean, scans - mean)

    @property
    def n_parameters(self) -> int:
        """Numbers that are kept."""
        return self.mean.size + self.centred.size

    def sample(self, keys: Sequence[Key]) -> Array:
        """(B, C, X, Y, Z), row i from key i alone.

        With z of n independent normal numbers, z^T centred / sqrt(n - 1) has exactly the sample
        covariance of the scans, so that no principal component has to be computed.
        """
        n = len(self.centred)
        z = np.stack([key.numpy().standard_normal(n) for key in keys]).astype(np.float32)
        return self.mean + np.tensordot(z, self.centred, axes=1) / math.sqrt(n - 1)

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        tensors = {k: torch.from_numpy(getattr(self, k)) for k in ("mean", "centred")}
        write_bytes(path, as_bytes(tensors))

    @classmethod
    def load(cls, path: Path) -> Gaussian:
        """What `save` wrote."""
        return cls(**{k: v.numpy() for k, v in load_file(path).items()})


@dataclass(frozen=True)
class Recipe:
    """How the reference is built and trained.

    The tutorial has batches of 16 and a rate of 5e-5. On two cores that is 80 steps an hour and
    leaves nothing but noise, so the defaults are kinder: more steps, each twice as long.

    Args:
        channels: of the network, a level each; multiples of 32.
        batch: scans a step.
        learning_rate: of Adam, constant.
        ddim_steps: of the sampler.
        ancestral_steps: of the 1000 that are timed; all cost the same.
    """

    channels: tuple[int, ...] = (32, 64, 64)
    batch: int = 4
    learning_rate: float = 1e-4
    ddim_steps: int = 25
    ancestral_steps: int = 100


class Monai:
    """The network with its noise schedule.

    Args:
        recipe: how.
        config: whose categorical conditions, jointly, are the class.
        shape: (C, X, Y, Z) of a scan.
        seed: of the weights.
        device: where.
    """

    STEPS = 1000

    def __init__(
        self, recipe: Recipe, config: Config, shape: Sequence[int], seed: int, device: str
    ) -> None:
        from monai.networks.nets import DiffusionModelUNet
        from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

        self.recipe, self.shape, self.device = recipe, tuple(shape), device
        self.classes = class_numbers(config)
        levels = len(recipe.channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = DiffusionModelUNet(
                spatial_dims=3,
                in_channels=shape[0],
                out_channels=shape[0],
                channels=recipe.channels,
                attention_levels=(False,) * (levels - 1) + (True,),
                num_head_channels=(0,) * (levels - 1) + recipe.channels[-1:],
                num_res_blocks=1,
                # of its default 32 one channel a group would be left, and the norm of a single
                # channel takes away what noise level and class add to it
                norm_num_groups=8,
                num_class_embeds=len(self.classes) or None,
                use_flash_attention=device.startswith("cuda"),
            ).to(device)
        schedule: dict[str, Any] = {
            "num_train_timesteps": self.STEPS,
            "schedule": "scaled_linear_beta",
            "beta_start": 0.0005,
            "beta_end": 0.0195,
            "clip_sample_min": 0.0,
            "clip_sample_max": CLIP,
        }
        self.ddpm, self.ddim = DDPMScheduler(**schedule), DDIMScheduler(**schedule)
        self.padding = padding(self.shape[1:], 2 ** (levels - 1))

    @property
    def n_parameters(self) -> int:
        """Of the network."""
        return sum(p.numel() for p in self.network.parameters())

    def train(
        self,
        scans: Array,
        labels: Sequence[Labels],
        minutes: float,
        max_steps: int | None,
        seed: int,
    ) -> int:
        """Train for so long; the number of steps.

        As in a run, the minutes are turned into steps once, here at the speed of the first ones.

        Args:
            scans: (n, C, X, Y, Z), 0 to `CLIP`.
            labels: of each scan.
            minutes: of training.
            max_steps: at most so many.
            seed: of the order, the times and the noise.
        """
        generator = torch_generator(seed)
        x = torch.from_numpy(scans).to(self.device)
        classes = self._classes(labels)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=self.recipe.learning_rate)
        order = torch.zeros(0, dtype=torch.long)
        total = math.inf if max_steps is None else max_steps
        step, times = 0, [time.monotonic()]
        self.network.train()
        while step < total:
            if len(order) < min(self.recipe.batch, len(x)):
                order = torch.randperm(len(x), generator=generator)
            rows, order = order[: self.recipe.batch], order[self.recipe.batch :]
            batch = self._padded(x[rows])
            noise = torch.randn(batch.shape, generator=generator).to(self.device)
            t = torch.randint(self.STEPS, (len(rows),), generator=generator).to(self.device)
            noisy = self.ddpm.add_noise(original_samples=batch, noise=noise, timesteps=t)
            loss = torch.nn.functional.mse_loss(self._predicted(noisy, t, classes, rows), noise)
            if not math.isfinite(float(loss.detach())):
                raise SynthmedError(f"the reference diverged at step {step}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            if step <= TRIAL_STEPS:
                times.append(time.monotonic())
            if step == TRIAL_STEPS:
                total = min(total, max(step, steps_in(minutes, times)))
        return step

    def sample(self, labels: Sequence[Labels], keys: Sequence[Key]) -> Array:
        """(B, C, X, Y, Z) by DDIM, row i from label and key i alone."""
        self.ddim.set_timesteps(self.recipe.ddim_steps)
        return self._drawn(self.ddim, self.ddim.timesteps, labels, keys)

    def ancestral_seconds(self, labels: Sequence[Labels], keys: Sequence[Key]) -> float:
        """Seconds a volume that the full chain takes, from its first steps on a few volumes."""
        self.ddpm.set_timesteps(self.STEPS)
        times = self.ddpm.timesteps[: self.recipe.ancestral_steps]
        started = time.monotonic()
        self._drawn(self.ddpm, times, labels, keys)
        return (time.monotonic() - started) / len(times) * self.STEPS / len(keys)

    def save(self, path: Path) -> None:
        """Write the weights."""
        write_bytes(path, as_bytes(self.network.state_dict()))

    def load(self, path: Path) -> None:
        """Take the weights that `save` wrote."""
        self.network.load_state_dict(load_file(path))

    @torch.inference_mode()
    def _drawn(
        self, scheduler: Any, times: Tensor, labels: Sequence[Labels], keys: Sequence[Key]
    ) -> Array:
        self.network.eval()
        sizes = [n + sum(p) for n, p in zip(self.shape[1:], self.padding, strict=True)]
        generators = [key.torch() for key in keys]
        noise = [torch.randn(self.shape[0], *sizes, generator=g) for g in generators]
        x, rows = torch.stack(noise).to(self.device), torch.arange(len(keys))
        classes = self._classes(labels)
        extra = {}
        if scheduler is self.ddpm:  # draws more noise in each step, for the whole batch
            extra["generator"] = torch.Generator(self.device).manual_seed(keys[0].integer())
        for t in times:
            at = torch.full((len(x),), int(t), device=self.device)
            x, _ = scheduler.step(self._predicted(x, at, classes, rows), int(t), x, **extra)
        (i, _), (j, _), (k, _) = self.padding
        nx, ny, nz = self.shape[1:]
        out: Array = x[..., i : i + nx, j : j + ny, k : k + nz].cpu().numpy()
        return out

    def _predicted(self, x: Tensor, t: Tensor, classes: Tensor | None, rows: Tensor) -> Tensor:
        """The noise that the network sees in `x`, at times `t`, for the classes of `rows`."""
        told = None if classes is None else classes[rows]
        noise: Tensor = self.network(x, timesteps=t, class_labels=told)
        return noise

    def _classes(self, labels: Sequence[Labels]) -> Tensor | None:
        """The number of each scan's class; None where there is no condition."""
        if not self.classes:
            return None
        names = [name for name, _ in next(iter(self.classes))]
        numbers = [self.classes[tuple((n, str(each[n])) for n in names)] for each in labels]
        return torch.tensor(numbers, device=self.device)

    def _padded(self, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, [n for pair in reversed(self.padding) for n in pair])


def steps_in(minutes: float, times: Sequence[float]) -> int:
    """Steps in so many minutes, given the seconds at which the first began and each ended.

    The first two allocate and do not count.

    >>> steps_in(1, [0.0, 9.0, 18.0, 20.0, 22.0])
    30
    """
    return int(60 * minutes * (len(times) - 3) / (times[-1] - times[2]))


def class_numbers(config: Config) -> dict[tuple[tuple[str, str], ...], int]:
    """Every combination of categories, numbered; empty where there is no condition.

    Raises:
        UsageError: a condition is a number, which MONAI's embedding cannot take.
    """
    declared = config.data.conditions
    numbers = [name for name, c in declared.items() if c.kind == "continuous"]
    if numbers:
        raise UsageError(
            f"reference: {numbers[0]} is a number, and MONAI's network embeds classes alone",
            "Leave monai out of --models for this cohort.",
        )
    each = [[(k, v) for v in c.categories] for k, c in declared.items() if c.kind == "categorical"]
    return {combination: i for i, combination in enumerate(product(*each))} if each else {}


def padding(grid: Sequence[int], factor: int) -> list[tuple[int, int]]:
    """Voxels before and after each axis that make it a multiple of `factor`.

    >>> padding((40, 57), 4)
    [(0, 0), (1, 2)]
    """
    missing = [-n % factor for n in grid]
    return [(n // 2, n - n // 2) for n in missing]


def chunks(n: int, size: int) -> list[range]:
    """0 to n in runs of at most `size`.

    >>> chunks(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(a, b) for a, b in pairwise([*range(0, n, size), n])]
