"""What finds a broken private mechanism: six planted bugs, and honest runs that must not alarm.

`python -m tests.proofs.mechanism 300` prints the alarms of honest runs and whether each bug is
found. At most 1 % of the honest runs may alarm.
"""

from __future__ import annotations

import hmac
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from opacus import GradSampleModule
from torch import Generator, Tensor, nn
from torch.func import functional_call

from synthmed import configfile
from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.backbones.generative import Batch, Draws, Params, Phase, Round, VolumeSpec, submodule
from synthmed.conditions import Conditions
from synthmed.config import Config, Optimizer
from synthmed.errors import Interrupted, SynthmedError, UsageError
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.privacy import oracle, patient_step
from synthmed.privacy.accounting import noise_for
from synthmed.privacy.audit import canaries, records
from synthmed.privacy.gradients import per_patient
from synthmed.privacy.ledger import Ledger
from synthmed.privacy.noise import SecretStream
from synthmed.privacy.patient_step import Mechanism, PatientStep
from synthmed.privacy.session import Session
from synthmed.progress import Progress
from synthmed.stages import train as stage
from synthmed.training import CHECKPOINT

CLAIMED = Mechanism(0.3, 1.5, clip=0.7, divisor=18.0)
N_STEPS, N_PATIENTS = 40, 60
SHAPES = [(40, 30), (100,)]
N_PARAMETERS = 1300
ALLOWED = 0.01
FIRST_SEED = 1000
"""Seeds below this one were seen while the tests were made: they prove nothing."""


def parameters() -> list[nn.Parameter]:
    """Those that the steps train."""
    return [nn.Parameter(torch.zeros(s)) for s in SHAPES]


# --- the fast tests -------------------------------------------------------------------------------


def log_of(seed: int, rate: float = CLAIMED.sample_rate) -> list[dict[str, float]]:
    """The private log of `N_STEPS` steps on patients with gradients of all sizes."""
    rng = np.random.default_rng(seed)
    mine = parameters()
    step = PatientStep(torch.optim.SGD(mine, lr=1e-3), CLAIMED)
    g = torch.Generator().manual_seed(seed)
    lines = []
    for k in range(N_STEPS):
        n = int(rng.binomial(N_PATIENTS, rate))
        each = [torch.randn(n, *p.shape, generator=g) * 0.03 for p in mine]
        chunks = [(each, torch.zeros(n))] if n else []
        taken = step.take(chunks, SecretStream(Key.root(seed).fold(k).digest))
        lines.append(
            {
                "x.patients": taken.n_patients,
                "x.largest": taken.largest,
                "x.off": taken.off,
                "x.noise": taken.noise,
            }
        )
    return lines


def off_definition(seed: int) -> float:
    """Distance of one step from a loop over patients in float64, relative to that."""
    mine, n = parameters(), 5 + seed % 7
    g = torch.Generator().manual_seed(seed)
    each = [torch.randn(n, *s, generator=g) * 0.03 for s in SHAPES]
    key = Key.root(seed).digest
    step = PatientStep(torch.optim.SGD(mine, lr=1.0), CLAIMED)
    step.take([(each, torch.zeros(n))], SecretStream(key))
    total = np.zeros(N_PARAMETERS)
    for i in range(n):
        flat = np.concatenate([e[i].double().numpy().ravel() for e in each])
        total += flat * min(1.0, CLAIMED.clip / float(np.linalg.norm(flat)))
    noise = SecretStream(key).normal(total.shape).numpy()
    meant = (total + CLAIMED.noise_multiplier * CLAIMED.clip * noise) / CLAIMED.divisor
    found = -np.concatenate([p.detach().numpy().ravel() for p in mine])
    return float(np.linalg.norm(found - meant) / np.linalg.norm(meant))


class Network:
    """A convolution and a square: the smallest model that Opacus' hooks can be wrong about."""

    def __init__(self, padding: Literal["zeros", "circular"] = "zeros") -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Conv3d(1, 3, 3, padding=1, padding_mode=padding), nn.Tanh(), nn.Flatten(1)
            )

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def rounds(self) -> Sequence[Round]:
        """One phase."""
        phase = Phase(
            "planted", lambda n: True, self._draw, self._loss, Optimizer(), reads_patients=True
        )
        return [Round([phase])]

    def _draw(self, g: Generator, n: int) -> Draws:
        return {"e": torch.randn(n, generator=g)}

    def _loss(self, params: Params, batch: Batch | None, draws: Draws, progress: float) -> Tensor:
        if batch is None:
            raise TypeError("reads patients")
        out = functional_call(self.net, submodule(params, "net"), (batch.x.flatten(0, 1),))
        each = squares(out).reshape(batch.mask.shape)
        return (each * batch.mask).sum(1) / batch.mask.sum(1)


def squares(out: Tensor) -> Tensor:
    """What a scan loses: (n, F) to (n,)."""
    return (out - 0.3).square().sum(1)


def examined(model: Network) -> None:
    """The oracle's look at a model.

    Raises:
        UsageError: no way gives the right gradient.
    """
    params = {f"net.{k}": p for k, p in model.net.named_parameters()}
    spec = VolumeSpec(channels=1, grid=(6, 6, 6), condition_width=2)
    phase = model.rounds()[0].phases[0]
    oracle.examine(model, phase, params, list(params), spec, Key.root(0), "cpu")  # type: ignore[arg-type]


def alarms(seed: int, model: Network | None = None) -> list[str]:
    """What the fast tests say of the mechanism as it is; empty where it is sound."""
    said = []
    try:
        checks = records(log_of(seed), "x", CLAIMED, N_PATIENTS, N_PARAMETERS, N_STEPS)
        said += [c.name for c in checks if not c.passed]
        if off_definition(seed) > 1e-4:
            said.append("not the step of the definition")
    except SynthmedError as error:
        said.append(str(error).splitlines()[0])
    try:
        examined(model or Network())
    except UsageError as error:
        said.append(str(error).splitlines()[0])
    return said


# --- a training that is stopped -------------------------------------------------------------------

PRIVATE = {
    "data": {
        "source": "x",
        "patient": "patient",
        "grid": (8, 8, 8),
        "spacing_mm": [2, 2, 3],
        "conditions": {"dx": {"kind": "categorical", "categories": ["A", "B"]}},
        "view": "grid",
    },
    "backbone": {"name": "cvae", "latent": 3, "widths": [4, 4], "prior": "standard"},
    "privacy": {"epsilon": 8.0, "sample_rate": 0.5, "patients": 10},
    "train": {"max_steps": 6, "precision": "fp32"},
}


def private() -> tuple[Config, Loader]:
    """A config, and ten patients to train on, of noise."""
    config = configfile.validate(dict(PRIVATE), "proof")
    data = Dataset(
        volumes=np.random.default_rng(0).random((14, 1, 8, 8, 8)).astype(np.float16),
        patients=np.array([f"p{i:02d}" for i in range(14)]),
        labels=[{"dx": "AB"[i % 2]} for i in range(14)],
        holdout=np.arange(14) >= 10,
        channels=[ChannelInfo("T1w")],
        affine=np.diag([2.0, 2, 3, 1]),
    )
    return config, Loader(data, Conditions(config.data.conditions), 4, config.train.augment)


def unpaid(folder: Path) -> int:
    """Steps that a training drew without paying for them, when it was stopped and went on from a
    checkpoint that was older: different noise counts as another step."""
    drawn: set[bytes] = set()

    class Watched(SecretStream):
        def __init__(self, key: bytes) -> None:
            drawn.add(key)
            super().__init__(key)

    with (
        mock.patch.dict(os.environ, SYNTHMED_HOME=str(folder / "home")),
        mock.patch("synthmed.privacy.session.SecretStream", Watched),
    ):
        partial = folder / "partial"
        partial.mkdir()
        older = None
        for stop_at in (2, 5, None):
            config, loader = private()
            if stop_at is not None:
                stop_at_batch(loader, "private_batch", stop_at)
            target = folder / f"target-{stop_at}"
            target.mkdir()
            try:
                stage.train(config, loader, partial, target, Progress("train", True), "cpu")
            except Interrupted:
                saved = (partial / CHECKPOINT).read_bytes()
                if older is not None:  # as after a kill: what came since was not saved
                    (partial / CHECKPOINT).write_bytes(older)
                older = saved
        (account,) = Ledger().accounts.values()
        return len(drawn) - len(account.charges)


def stop_at_batch(loader: Loader, asked: str, number: int) -> None:
    """Send this process SIGTERM when the loader's method is called for that time."""
    original, seen = getattr(loader, asked), [0]

    def counted(*args: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            signal.raise_signal(signal.SIGTERM)  # one to the process may wait for another thread
        return original(*args)

    setattr(loader, asked, counted)


# --- the bugs -------------------------------------------------------------------------------------


class Half(patient_step._Optimizer):
    """Adds noise of half the deviation."""

    def add_noise(self) -> None:
        self.noise_multiplier /= 2
        super().add_noise()
        self.noise_multiplier *= 2


class Unclipped(patient_step._Optimizer):
    """Adds gradients up as they are."""

    def clip_and_accumulate(self) -> None:
        self.max_grad_norm *= 1e6
        super().clip_and_accumulate()
        self.max_grad_norm /= 1e6


class ByBatch(patient_step._Optimizer):
    """Divides by the number of patients that happened to be drawn."""

    n_drawn = 0

    def clip_and_accumulate(self) -> None:
        self.n_drawn += len(self.params[0].grad_sample)
        super().clip_and_accumulate()

    def scale_grad(self) -> None:
        for p in self.params:
            p.grad /= max(1, self.n_drawn)
        self.n_drawn = 0


def scan_by_scan(
    way: str,
    phase: Phase,
    params: Params,
    wanted: Sequence[str],
    batch: Batch,
    draws: Draws,
    progress: float,
) -> tuple[list[Tensor], Tensor]:
    """Clips each scan's gradient and adds those up: a patient of two adds up to twice the bound."""
    n_scans = batch.mask.shape[1]
    total, losses = [torch.zeros(len(batch.mask), *params[k].shape) for k in wanted], 0.0
    for s in range(n_scans):
        one = Batch(*(t[:, s : s + 1] for t in batch))
        here = one._replace(mask=torch.ones_like(one.mask))
        noise = {k: v[:, s : s + 1] for k, v in draws.items()}
        each, loss = per_patient("loop", phase, params, wanted, here, noise, progress)
        norm = torch.stack([g.flatten(1).square().sum(1) for g in each]).sum(0).sqrt()
        factor = (1.0 / norm.clamp(min=1e-12)).clamp(max=1) * one.mask[:, 0]
        for t, g in zip(total, each, strict=True):
            t += factor.reshape(-1, *[1] * (g.ndim - 1)) * g
        losses = losses + loss
    return total, torch.as_tensor(losses)


def hooked(model: Network) -> Callable[..., tuple[list[Tensor], Tensor]]:
    """Gradients by Opacus' hooks, in place of the two ways that are used."""

    def by_hooks(
        way: str,
        phase: Phase,
        params: Params,
        wanted: Sequence[str],
        batch: Batch,
        draws: Draws,
        progress: float,
    ) -> tuple[list[Tensor], Tensor]:
        b, s = batch.mask.shape
        wrapped = GradSampleModule(model.net, loss_reduction="sum")
        scans = batch.x.flatten(0, 1).clone().requires_grad_()  # or the hooks warn
        each = squares(wrapped(scans))
        each.sum().backward()
        weight = batch.mask / batch.mask.sum(1, keepdim=True)
        found = [
            torch.einsum("bs,bs...->b...", weight, p.grad_sample.unflatten(0, (b, s))).detach()
            for p in model.net.parameters()
        ]
        wrapped.zero_grad(set_to_none=True)
        wrapped.remove_hooks()
        for p in model.net.parameters():
            del p.grad_sample
        return found, (each.detach().reshape(b, s) * weight).sum(1)

    return by_hooks


@contextmanager
def drawn_afresh() -> Iterator[None]:
    """Other noise whenever a training goes on, but one charge a step."""

    def fresh(self: Session, text: str) -> bytes:
        token = self.__dict__.setdefault("_planted", secrets.token_bytes(16))
        return hmac.digest(token, text.encode(), "sha256")

    with (
        mock.patch.object(Session, "_secret", fresh),
        mock.patch.object(Session, "_state_digest", return_value="the same"),
    ):
        yield


def found(bug: str, seed: int) -> bool:
    """Whether a planted bug is found."""
    if bug in ("half the noise", "no clipping", "a divisor from the batch"):
        planted = {"half the noise": Half, "no clipping": Unclipped}.get(bug, ByBatch)
        with mock.patch.object(patient_step, "_Optimizer", planted):
            return bool(alarms(seed))
    if bug == "clipping a scan":
        with mock.patch.object(oracle, "per_patient", scan_by_scan):
            return bool(alarms(seed))
    if bug == "padding other than zeros under hooks":
        model = Network("circular")
        with mock.patch.object(oracle, "per_patient", hooked(model)):
            return bool(alarms(seed, model))
    with drawn_afresh(), tempfile.TemporaryDirectory() as folder:
        return unpaid(Path(folder)) > 0


BUGS = (
    "half the noise",
    "no clipping",
    "clipping a scan",
    "padding other than zeros under hooks",
    "a divisor from the batch",
    "a step drawn afresh and charged once",
)
"""Those of the literature and of real code."""


CLAIM, DELTA = 8.0, 1e-5


def canary_bounds(seeds: int) -> dict[str, list[float]]:
    """Lower bounds of 1000 canaries under mechanisms that cost `CLAIM`, by rate and steps."""
    out = {}
    for q, n_steps in ((1.0, 20), (0.25, 60)):
        mechanism = Mechanism(q, noise_for(CLAIM, DELTA, q, n_steps), clip=1.0, divisor=50.0)
        keys = [Key.root(FIRST_SEED + k) for k in range(seeds)]
        found = [canaries(parameters(), mechanism, n_steps, 1000, DELTA, key) for key in keys]
        out[f"q {q:g}, T {n_steps}"] = [f["epsilon_lower_bound"] for f in found]
    return out


def run(n: int) -> tuple[int, dict[str, bool]]:
    """Alarms in `n` honest runs, and whether each bug is found with a seed of its own."""
    count = sum(bool(alarms(FIRST_SEED + k)) for k in range(n))
    return count, {bug: found(bug, FIRST_SEED + k) for k, bug in enumerate(BUGS)}


if __name__ == "__main__":
    print(run(int(sys.argv[1])))
