"""Dataset to model: the one loop that trains every backbone, round by round, phase by phase.

Every random number is keyed by (seed, round, phase, step, patient), so a run that was stopped and
resumed ends, on a CPU, in the same weights as one that was not. A checkpoint is one safetensors
file, written whole; minutes are turned into steps once, before the first step.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from synthmed.backbones.generative import Batch, Generative
from synthmed.config import Config, Optimizer
from synthmed.errors import Interrupted, SynthmedError, UsageError
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.progress import Progress
from synthmed.store import write_bytes, write_json

CANONICAL_BATCH = 16
"""How many samples one forward pass draws, whatever the shard: stored with the model."""

CHECKPOINT = "checkpoint.safetensors"
LOG = "training.jsonl"


class Training:
    """Everything that changes while a model is trained, and how it is saved and restored.

    Args:
        model: the model; its modules' parameters are trained in place.
        steps: number of steps of each round.
    """

    def __init__(self, model: Generative, steps: Sequence[int]) -> None:
        self.model = model
        self.rounds = model.rounds()
        self.steps = list(steps)
        self.round = 0
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self.figures: dict[str, float] = {}
        self.params = named_parameters(model)
        self._begin_round()

    def _begin_round(self) -> None:
        """Fresh optimizers and averages for the phases of the current round."""
        self.optimizers: dict[str, torch.optim.AdamW] = {}
        self.averages: dict[str, dict[str, Tensor]] = {}
        if self.round == len(self.rounds):
            return
        for phase in self.rounds[self.round].phases:
            mine = {k: p for k, p in self.params.items() if phase.trainable(k) and p.requires_grad}
            self.optimizers[phase.name] = torch.optim.AdamW(
                mine.values(),
                lr=phase.optimizer.learning_rate,
                betas=phase.optimizer.betas,
                weight_decay=phase.optimizer.weight_decay,
            )
            if phase.ema is not None:
                self.averages[phase.name] = {k: p.detach().clone() for k, p in mine.items()}

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
        self._begin_round()

    def save(self, path: Path) -> None:
        """Write the log so far beside `path`, then the whole state, whole or not at all."""
        with open(path.with_name(LOG), "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(entry) + "\n" for entry in self.log)
        self.log.clear()
        tensors = {f"module/{k}": v for k, v in named_state(self.model).items()}
        for phase, optimizer in self.optimizers.items():
            names = [k for k, p in self.params.items() if any(p is q for q in _owned(optimizer))]
            for name in names:
                for key, value in optimizer.state.get(self.params[name], {}).items():
                    tensors[f"optimizer/{phase}/{name}/{key}"] = value
            for name, value in self.averages.get(phase, {}).items():
                tensors[f"average/{phase}/{name}"] = value
        state = {
            "round": self.round,
            "step": self.step,
            "steps": self.steps,
            "figures": self.figures,
        }
        write_bytes(path, as_bytes(tensors, {"state": json.dumps(state)}))

    @classmethod
    def restore(cls, model: Generative, path: Path) -> Training:
        """The state saved in `path`, on the model's device."""
        from safetensors import safe_open

        with safe_open(path, "pt") as handle:
            state = json.loads(handle.metadata()["state"])
        tensors = load_file(path)
        load_state(model, {k[7:]: v for k, v in tensors.items() if k.startswith("module/")})
        self = cls(model, state["steps"])
        self.round, self.step = state["round"], state["step"]
        self.figures = state["figures"]
        self._begin_round()
        # lines written for steps after this checkpoint will be written again
        log = path.with_name(LOG)
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
        reached = (self.round, self.step)
        # and a line that a kill or a full disk cut off is one of them: it has no end
        whole = [x for x in lines if x.endswith("\n")]
        kept = [x for x in whole if (json.loads(x)["round"], json.loads(x)["step"]) < reached]
        write_bytes(log, "".join(kept).encode())
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "average":
                phase, name = rest.split("/")
                self.averages[phase][name].copy_(value)
            elif kind == "optimizer":
                phase, name, slot = rest.split("/")
                place = value if slot == "step" else value.to(self.params[name].device)
                self.optimizers[phase].state[self.params[name]][slot] = place
        return self


def train(
    config: Config, loader: Loader, partial: Path, target: Path, progress: Progress, device: str
) -> dict[str, Any]:
    """Train to the end, going on from a checkpoint in `partial`, and fill `target`.

    `target` gets weights.safetensors (the averaged weights), model.json (how to build and sample
    it) and training.jsonl.

    Returns:
        Facts: steps, parameters, and what the rounds' `finish` found.

    Raises:
        UsageError: differential privacy is asked for, which this version does not have.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was written first.
        SynthmedError: the loss is no longer a number.
    """
    if config.privacy is not None:
        raise UsageError(
            "privacy: this version cannot train with differential privacy",
            "Set privacy: null to train without a formal guarantee, or wait for a later version.",
        )
    key = Key.root(config.seed).fold("train")
    model = build(config, loader, key.fold("weights"), device)
    checkpoint = partial / CHECKPOINT
    amp = precision(config, device)
    if checkpoint.exists():
        state = Training.restore(model, checkpoint)
    else:
        state = Training(model, plan_steps(config, model, loader, key, device))
        state.save(checkpoint)
    total = sum(state.steps)
    before = sum(state.steps[: state.round])
    progress.resume_at(before + state.step)
    saved = time.monotonic()
    with interruptible() as interrupted:
        while state.round < len(state.rounds):
            for _ in range(state.steps[state.round] - state.step):
                losses = one_step(state, loader, config, key, device, amp)
                state.log.append({"round": state.round, "step": state.step, **losses})
                state.step += 1
                done = sum(state.steps[: state.round]) + state.step
                shown = "  ".join(f"{k} {v:.3f}" for k, v in losses.items() if "." not in k)
                progress.update(done, total, shown)
                due = time.monotonic() - saved > 60 * config.train.checkpoint_minutes
                if due or interrupted:
                    state.save(checkpoint)
                    saved = time.monotonic()
                    for remark in model.remarks(recent(partial / LOG), state.figures):
                        progress.warn(remark)
                if interrupted:
                    raise _stopped(done, total)
            state.end_round(loader.all_train(device) if state.rounds[state.round].finish else [])
            state.save(checkpoint)
            if interrupted:  # it came while the round was finishing
                raise _stopped(sum(state.steps[: state.round]), total)
    write_bytes(target / "weights.safetensors", as_bytes(named_state(model)))
    write_bytes(target / LOG, (partial / LOG).read_bytes())
    write_json(target / "model.json", {"batch": CANONICAL_BATCH, **loader.description()})
    return {
        "steps": state.steps,
        "n_parameters": sum(p.numel() for p in state.params.values()),
        "precision": "bf16" if amp else "fp32",
        "figures": state.figures,
        "remarks": list(model.remarks(recent(partial / LOG), state.figures)),
    }


def recent(log: Path, n: int = 200) -> list[dict[str, float]]:
    """The last lines of a training log, those of its last round alone."""
    lines = [json.loads(x) for x in log.read_text(encoding="utf-8").splitlines()[-n:]]
    return [x for x in lines if x["round"] == lines[-1]["round"]]


def one_step(
    state: Training, loader: Loader, config: Config, key: Key, device: str, amp: bool
) -> dict[str, float]:
    """Step every phase that is due; returns the mean loss and the gradient norm of each."""
    current = state.rounds[state.round]
    out: dict[str, float] = {}
    for phase in current.phases:
        if state.step % phase.every:
            continue
        here = key.fold("round", state.round, phase.name)
        batch, draws = loader.draw(phase, here, state.step, device)
        progress = state.step / state.steps[state.round]
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            loss = phase.loss(state.params, batch, draws, progress).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SynthmedError(
                f"training diverged at step {state.step}: the loss {phase.name} is {value}",
                "Lower train.optimizer.learning_rate, or set train.precision: fp32.",
            )
        optimizer = state.optimizers[phase.name]
        optimizer.zero_grad(set_to_none=True)
        owned = _owned(optimizer)
        grads = torch.autograd.grad(loss, owned, allow_unused=True)
        for p, g in zip(owned, grads, strict=True):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(owned, config.train.gradient_clip)
        factor = schedule(phase.optimizer, progress)
        for group in optimizer.param_groups:
            group["lr"] = phase.optimizer.learning_rate * factor
        optimizer.step()
        if phase.project is not None:
            phase.project()
        if phase.ema is not None:
            # young averages forget faster, so that they do not remember the initial weights
            steps = state.step // phase.every
            decay = min(phase.ema, (1 + steps) / (10 + steps))
            for name, average in state.averages[phase.name].items():
                average.lerp_(state.params[name].detach(), 1 - decay)
        out[phase.name] = round(value, 6)
        out[f"{phase.name}.gradient"] = round(float(norm.detach()), 6)
    return out


def schedule(optimizer: Optimizer, progress: float) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine down to a tenth."""
    if progress < optimizer.warmup:
        return max(progress / optimizer.warmup, 0.01)
    rest = (progress - optimizer.warmup) / (1 - optimizer.warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * rest))


def plan_steps(
    config: Config, model: Generative, loader: Loader, key: Key, device: str
) -> list[int]:
    """Steps of each round: given, or as many as `max_minutes` allow at the speed measured now."""
    rounds = model.rounds()
    limit = config.train.max_steps
    by_steps = (
        [max(1, round(r.share * limit)) if r.phases else 0 for r in rounds] if limit else None
    )
    if config.train.max_minutes is None:
        return by_steps or []  # the config asks for one of the two at least
    by_time = [
        max(1, int(60 * config.train.max_minutes * r.share / seconds)) if r.phases else 0
        for r, seconds in zip(
            rounds, seconds_per_step(config, model, loader, key, device), strict=True
        )
    ]
    return [min(a, b) for a, b in zip(by_time, by_steps or by_time, strict=True)]


def seconds_per_step(
    config: Config, model: Generative, loader: Loader, key: Key, device: str
) -> list[float]:
    """Time of one step of each round, measured on copies of the weights: nothing is kept."""
    amp = precision(config, device)
    kept = {k: v.clone() for k, v in named_state(model).items()}
    out = []
    for i in range(len(model.rounds())):
        trial = Training(model, [6] * len(model.rounds()))
        trial.round = i
        trial._begin_round()
        times = []
        for _ in range(6):
            started = time.monotonic()
            one_step(trial, loader, config, key.fold("trial"), device, amp)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.monotonic() - started)
            trial.step += 1
        out.append(sorted(times)[2])  # the first ones allocate and compile
        load_state(model, kept)
    return out


def build(config: Config, loader: Loader, key: Key, device: str) -> Generative:
    """The model with weights drawn from `key`, on `device`; global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key.integer())
        model = config.backbone.build(loader.spec, config.train.optimizer)
    for module in model.modules.values():
        module.to(device)
    return model


def precision(config: Config, device: str) -> bool:
    """Whether to train in bfloat16: asked for, or `auto` on hardware that multiplies it faster."""
    if config.train.precision != "auto":
        return config.train.precision == "bf16"
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or SIGTERM comes; the step under way then ends first."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        seen.append(number)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def named_parameters(model: Generative) -> dict[str, torch.nn.Parameter]:
    """All parameters by `module.parameter`."""
    return {
        f"{name}.{k}": p
        for name, module in model.modules.items()
        for k, p in module.named_parameters()
    }


def named_state(model: Generative) -> dict[str, Tensor]:
    """All parameters and kept buffers by `module.name`."""
    return {
        f"{name}.{k}": v.detach()
        for name, module in model.modules.items()
        for k, v in module.state_dict().items()
    }


def as_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as safetensors; the library's own writer hides a full disk behind another error."""
    return save({k: v.contiguous().cpu() for k, v in tensors.items()}, metadata)


def _stopped(done: int, total: int) -> Interrupted:
    return Interrupted(
        f"stopped at step {done} of {total}; the checkpoint is kept",
        "The same command goes on from there.",
    )


def load_state(model: Generative, state: Mapping[str, Tensor]) -> None:
    """Set what `named_state` gave; a missing or unexpected name raises."""
    for name, module in model.modules.items():
        prefix = name + "."
        mine = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        module.load_state_dict(mine)


def _owned(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def summary(facts: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    figures = facts["figures"]
    text = f"{sum(facts['steps'])} steps, {facts['n_parameters'] / 1e6:.1f} M parameters"
    if "latent_active" in figures:
        text += f"; {figures['latent_active']:.0f} of {figures['latent']:.0f} latents in use"
    return "; ".join([text, *facts["remarks"]])
