"""One training: what changes in it, one step of it, and how it is saved and gone on from.

Every random number is keyed by (seed, round, phase, step, patient), so a training that was stopped
and resumed ends, on a CPU, in the same weights as one that was not. A checkpoint is one
safetensors file, written whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from synthmed import ranks
from synthmed.backbones.generative import (
    Batch,
    Draws,
    Generative,
    Phase,
    named_parameters,
    trained_by,
)
from synthmed.backbones.nets.recomputable import set_recompute
from synthmed.config import Config, Optimizer
from synthmed.errors import InputError, SynthmedError
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.store import write_bytes

CHECKPOINT = "checkpoint.safetensors"
LOG = "training.jsonl"


class Training:
    """Everything that changes while a model is trained, and how it is saved and restored.

    Args:
        model: the model; its modules' parameters are trained in place.
        steps: number of steps of each round.
        pieces: into how many pieces a step's patients are split, one after the other; more
            pieces need less memory, and the gradient is that of the whole up to rounding.
        origin: digest of the weights it started from, where they were another run's.
        recompute: whether blocks compute their inside again on the way back; needs less memory,
            for the same gradient.

    `private` is what a private training has to find again when it goes on: its number in the
    ledger, and how far that had come.
    """

    def __init__(
        self,
        model: Generative,
        steps: Sequence[int],
        pieces: int = 1,
        origin: str | None = None,
        recompute: bool = False,
    ) -> None:
        self.model = model
        self.rounds = model.rounds()
        self.steps = list(steps)
        self.pieces, self.recompute = pieces, recompute
        set_recompute(model.modules.values(), recompute)
        self.origin = origin
        self.private: dict[str, Any] | None = None
        self.round = 0
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}
        self.params = named_parameters(model)
        self.begin_round()

    def begin_round(self) -> None:
        """Fresh optimizers and averages for the phases of the current round."""
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.averages: dict[str, dict[str, Tensor]] = {}
        if self.round == len(self.rounds):
            return
        for phase in self.rounds[self.round].phases:
            mine = trained_by(phase, self.params)
            self.optimizers[phase.name] = optimizer_of(phase.optimizer, list(mine.values()))
            if phase.ema is not None:
                self.averages[phase.name] = {k: p.detach().clone() for k, p in mine.items()}

    def averaged(self) -> dict[str, Tensor]:
        """All parameters, with the averages in place of those that have one."""
        averages = {k: v for average in self.averages.values() for k, v in average.items()}
        return {k: averages.get(k, p.detach()) for k, p in self.params.items()}

    def end_round(self, finish_batches: Sequence[Batch]) -> None:
        """Keep the averaged weights, run the round's `finish`, and turn to the next round."""
        for average in self.averages.values():
            for name, value in average.items():
                self.params[name].data.copy_(value)
        finish = self.rounds[self.round].finish
        if finish is not None:
            self.figures.update(finish(finish_batches))
        self.round += 1
        self.step = 0
        self.begin_round()

    def save(self, path: Path) -> None:
        """Write the log so far beside `path`, then the whole state, whole or not at all."""
        with open(path.with_name(LOG), "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(entry) + "\n" for entry in self.log)
        self.log.clear()
        tensors = {f"module/{k}": v for k, v in named_state(self.model).items()}
        for phase, optimizer in self.optimizers.items():
            names = [k for k, p in self.params.items() if any(p is q for q in owned(optimizer))]
            for name in names:
                for key, value in optimizer.state.get(self.params[name], {}).items():
                    tensors[f"optimizer/{phase}/{name}/{key}"] = value
            for name, value in self.averages.get(phase, {}).items():
                tensors[f"average/{phase}/{name}"] = value
        state = {
            "round": self.round,
            "step": self.step,
            "steps": self.steps,
            "pieces": self.pieces,
            "recompute": self.recompute,
            "origin": self.origin,
            "private": self.private,
            "figures": self.figures,
        }
        write_bytes(path, as_bytes(tensors, {"state": json.dumps(state)}))

    @classmethod
    def restore(cls, model: Generative, path: Path, log: bool = True) -> Training:
        """The state saved in `path`, on the model's device; its log is cut to it unless told not
        to."""
        state = saved_state(path)
        tensors = load_file(path)
        load_state(model, {k[7:]: v for k, v in tensors.items() if k.startswith("module/")})
        recompute = state.get("recompute", False)
        self = cls(model, state["steps"], state["pieces"], state["origin"], recompute)
        self.round, self.step = state["round"], state["step"]
        self.private = state["private"]
        self.figures = state["figures"]
        self.begin_round()
        if log:
            self._cut(path.with_name(LOG))
        if {k.split("/")[1] for k in tensors if k.startswith("average/")} - set(self.averages):
            raise _of_another_version()
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "average":
                phase, name = rest.split("/")
                self.averages[phase][name].copy_(value)
            elif kind == "optimizer":
                phase, name, slot = rest.split("/")
                p = self.params[name]
                # as the parameter lies in memory, channels last where it does
                place = torch.zeros_like(p) if value.shape == p.shape else value.to(p.device)
                self.optimizers[phase].state[p][slot] = place.copy_(value)
        return self

    def _cut(self, log: Path) -> None:
        """Lines written for steps after this checkpoint will be written again."""
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
        reached = (self.round, self.step)
        # and a line that a kill or a full disk cut off is one of them: it has no end
        whole = [x for x in lines if x.endswith("\n")]
        kept = [x for x in whole if (json.loads(x)["round"], json.loads(x)["step"]) < reached]
        write_bytes(log, "".join(kept).encode())


def saved_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    with safe_open(path, "pt") as handle:
        state: dict[str, Any] = json.loads(handle.metadata()["state"])
    return state


class PrivateSteps(Protocol):
    """Takes the steps of phases that read patients, where privacy was promised to them."""

    def step(self, state: Training, phase: Phase, progress: float) -> dict[str, float]:
        """One step: parameters are changed, and figures for the private log returned."""
        ...


def one_step(
    state: Training,
    loader: Loader,
    config: Config,
    key: Key,
    device: str,
    amp: bool,
    private: PrivateSteps | None = None,
) -> dict[str, float]:
    """Step every phase that is due; returns the mean loss and the gradient norm of each."""
    out: dict[str, float] = {}
    for phase in state.rounds[state.round].phases:
        if state.step % phase.every == 0:
            out |= phase_step(state, phase, loader, config, key, device, amp, private)
    return out


def phase_step(
    state: Training,
    phase: Phase,
    loader: Loader,
    config: Config,
    key: Key,
    device: str,
    amp: bool,
    private: PrivateSteps | None = None,
) -> dict[str, float]:
    """One step of one phase: gradient, clipping, optimizer, projection, average."""
    progress = state.step / state.steps[state.round]
    optimizer = state.optimizers[phase.name]
    factor = schedule(phase.optimizer, progress)
    for group in optimizer.param_groups:
        group["lr"] = phase.optimizer.learning_rate * factor
    if phase.reads_patients and private is not None:
        figures = private.step(state, phase, progress)
    else:
        with ranks.step(where(state, phase)):
            figures = _plain_step(state, phase, loader, config, key, device, amp, progress)
    if phase.project is not None:
        phase.project()
    if phase.ema is not None:
        # young averages forget faster, so that they do not remember the initial weights
        steps = state.step // phase.every
        decay = min(phase.ema, (1 + steps) / (10 + steps))
        for name, average in state.averages[phase.name].items():
            average.lerp_(state.params[name].detach(), 1 - decay)
    return figures


def where(state: Training, phase: Phase) -> ranks.Message:
    """Which step this is, for the processes that take it as well."""
    return {"round": state.round, "step": state.step, "phase": phase.name}


def _plain_step(
    state: Training,
    phase: Phase,
    loader: Loader,
    config: Config,
    key: Key,
    device: str,
    amp: bool,
    progress: float,
) -> dict[str, float]:
    """Gradient of the mean over a batch, clipping, optimizer."""
    batch, draws = loader.draw(phase, phase_key(key, state, phase), state.step, device)
    optimizer = state.optimizers[phase.name]
    mine = owned(optimizer)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
        loss, grads = gradient(state, phase, batch, draws, progress, mine)
    for p, g in zip(mine, grads, strict=True):
        p.grad = g
    norm = float(torch.nn.utils.clip_grad_norm_(mine, config.train.gradient_clip))
    value = float(loss)
    for what, number in (("loss", value), ("gradient of the loss", norm)):
        if not math.isfinite(number):  # of the gradient: the step would make every weight so
            raise SynthmedError(
                f"training diverged at step {state.step}: the {what} {phase.name} is {number}",
                f"Lower train.optimizer.learning_rate (of a GAN the two rates in backbone), "
                f"{phase.optimizer.learning_rate:g} now, or set train.precision: fp32.",
            )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {phase.name: round(value, 6), f"{phase.name}.gradient": round(norm, 6)}


def gradient(
    state: Training,
    phase: Phase,
    batch: Batch | None,
    draws: Draws,
    progress: float,
    wanted: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """The mean loss over patients and its gradient, worked through in `state.pieces`.

    A loss is one number a patient, so the pieces' gradients sum to that of the whole.
    """
    if state.pieces == 1:
        mean = phase.loss(state.params, batch, draws, progress).mean()
        return mean.detach(), list(torch.autograd.grad(mean, wanted, allow_unused=True))
    n = len(batch.mask) if batch is not None else len(next(iter(draws.values())))
    total = torch.zeros((), device=wanted[0].device)
    sums: list[Tensor | None] = [None] * len(wanted)
    for part, noise in split(batch, draws, state.pieces):
        loss = phase.loss(state.params, part, noise, progress).sum() / n
        total += loss.detach()
        for i, g in enumerate(torch.autograd.grad(loss, wanted, allow_unused=True)):
            before = sums[i]
            if g is not None:
                sums[i] = g if before is None else before + g
    return total, sums


def split(batch: Batch | None, draws: Draws, pieces: int) -> list[tuple[Batch | None, Draws]]:
    """A batch and its draws in `pieces` of nearly equal size, in order."""
    parts = {k: v.tensor_split(pieces) for k, v in draws.items()}
    fields = None if batch is None else [t.tensor_split(pieces) for t in batch]
    return [
        (
            None if fields is None else Batch(*(f[i] for f in fields)),
            {k: v[i] for k, v in parts.items()},
        )
        for i in range(pieces)
    ]


def phase_key(key: Key, state: Training, phase: Phase) -> Key:
    """The key of a phase's draws in the current round."""
    return key.fold("round", state.round, phase.name)


def optimizer_of(
    settings: Optimizer, params: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """What steps these parameters; `phase_step` sets its rate."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.rule == "sgd":
        return torch.optim.SGD(params, lr=rate, weight_decay=decay, fused=True)
    return torch.optim.AdamW(params, lr=rate, betas=settings.betas, weight_decay=decay, fused=True)


def schedule(optimizer: Optimizer, progress: float) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine down to a tenth."""
    if progress < optimizer.warmup:
        return max(progress / optimizer.warmup, 0.01)
    rest = (progress - optimizer.warmup) / (1 - optimizer.warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * rest))


def named_state(model: Generative) -> dict[str, Tensor]:
    """All parameters and kept buffers by `module.name`."""
    return {
        f"{name}.{k}": v.detach()
        for name, module in model.modules.items()
        for k, v in module.state_dict().items()
    }


def load_state(model: Generative, state: Mapping[str, Tensor]) -> None:
    """Set what `named_state` gave.

    Raises:
        InputError: a name is missing or unexpected, or a shape another.
    """
    for name, module in model.modules.items():
        prefix = name + "."
        mine = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        try:
            module.load_state_dict(mine)
        except RuntimeError:
            raise _of_another_version() from None


def _of_another_version() -> InputError:
    return InputError(
        "the model, or what was kept of its training, is of another version of this program",
        "Remove private/model and private/model.partial of the run: the same command trains anew.",
    )


def as_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as safetensors; the library's own writer hides a full disk behind another error."""
    return save({k: v.contiguous().cpu() for k, v in tensors.items()}, metadata)


def owned(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer steps."""
    return [p for group in optimizer.param_groups for p in group["params"]]
