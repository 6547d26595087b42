"""Dataset to model: the one loop that trains every backbone, round by round, phase by phase.

Minutes are turned into steps, and memory into pieces of a batch, once, before the first step.
"""

from __future__ import annotations

import json
import math
import secrets
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from synthmed import memory, ranks
from synthmed.backbones.generative import Examination, Generative, Round, named_parameters
from synthmed.config import Config
from synthmed.errors import Interrupted, UsageError
from synthmed.inventory import fast_bfloat16
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.memory import Fitting
from synthmed.origin import ABOUT, KNEW_HELD_OUT, WEIGHTS, Origin, provenance
from synthmed.privacy.ledger import Ledger
from synthmed.progress import Progress, count
from synthmed.report.mosaic import png
from synthmed.store import write_bytes, write_json
from synthmed.trainable import frozen, merge, n_trained, restrict
from synthmed.training import (
    CHECKPOINT,
    LOG,
    Training,
    as_bytes,
    load_state,
    named_state,
    one_step,
    phase_step,
    saved_state,
)
from synthmed.watch import Watch, looks, unwatched, warnings

if TYPE_CHECKING:
    from synthmed.privacy.session import Session

CANONICAL_BATCH = 16
"""How many samples one forward pass draws, whatever the shard: stored with the model."""

TRIAL_STEPS = 6
"""Steps that each phase is timed for."""

RECENT = 200
"""Lines of the training log that a model looks at for its remarks, where all phases step often."""

RECENT_STEPS = 40
"""Steps of each phase that are among them: two windows of a median, at either end."""

COMPILE_STEPS = 2000
"""Steps from which on `train.compile: auto` compiles on CUDA, where it takes a minute or two."""


def train(
    config: Config,
    loader: Loader,
    partial: Path,
    target: Path,
    progress: Progress,
    device: str,
    origin: Origin | None = None,
) -> dict[str, Any]:
    """Train to the end, going on from a checkpoint in `partial`, and fill `target`.

    `target` gets weights.safetensors (the averaged weights), model.json (how to build and sample
    it, and how it came about), training.jsonl and examination/ (what the model shows of itself).

    Args:
        config: the run's config.
        loader: the cohort.
        partial: folder of the checkpoint.
        target: folder to fill.
        progress: told of steps and warnings.
        device: where to train.
        origin: the model to start from; None draws all weights.

    Returns:
        Facts: steps, parameters, where the weights started, and what the rounds' `finish` and the
        examination found.

    Raises:
        UsageError: nothing of `origin` fits, or the model cannot be trained privately.
        BudgetExhausted: privacy is promised, and some patient has too little left.
        ResourceError: no piece of a batch fits into `train.memory_gib`.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was written first.
        SynthmedError: the loss is no longer a number.
    """
    key = Key.root(config.seed).fold("train")
    model = build(config, loader, key.fold("weights"), device)
    private_run = config.privacy is not None
    if ranks.world() > 1 and not private_run:
        raise UsageError(
            f"torchrun: {ranks.world()} processes share the patients of private steps alone",
            "Without a privacy block start one process.",
        )
    told = loader.spec.condition_width
    started_from = None
    if origin:
        started_from = origin.start(model, told, buffers=not private_run)
        if not private_run:  # where they are declared to be public, and who is whom is protected
            knew = started_from["knew_held_out"] = origin.knew(loader.dataset.holdout_patients())
            if knew is not False:
                progress.warn(f"train.init: {KNEW_HELD_OUT[knew]}; expect REVIEW at best")
    fixed = frozen(model)
    restricted(model, config, key)
    if started_from:
        lacking = {*started_from["fresh"], *started_from["but_condition"]}
        _require_all_brought(lacking & (frozen(model) - fixed), config)
    checkpoint = partial / CHECKPOINT
    amp = precision(config, device)
    with arithmetic(device, amp), loader.ahead(), interruptible() as interrupted:
        if private_run:
            from synthmed.privacy.refusals import refuse

            refuse(config, model)
        state = _begun(config, model, loader, key, checkpoint, device, origin)
        private = _private(config, loader, state, checkpoint, device)
        if private is not None:
            ranks.tell({"begin": private.attempt})
            ranks.meet()
        _loop(state, config, loader, key, checkpoint, device, amp, progress, interrupted, private)
    trained = n_trained(model)
    merge(model)
    write_model(target, config, model, loader, started_from)
    write_bytes(target / LOG, (partial / LOG).read_bytes())
    examined = examine(model, loader, device)
    seen = looks(partial / LOG)
    remarks = [
        *model.remarks(recent(partial / LOG, state.rounds), state.figures),
        *warnings(seen).values(),
        *(unwatched(loader, state, seen) if config.train.watch else []),
    ]
    write_examination(target / "examination", examined, remarks)
    return {
        "steps": state.steps,
        "pieces": state.pieces,
        "recompute": state.recompute,
        "n_parameters": sum(p.numel() for p in named_parameters(model).values()),
        "n_trained": trained,
        "precision": "bf16" if amp else "fp32",
        "init": started_from,
        "privacy": private.statement() if private else None,
        "figures": finite({**examined.figures, **state.figures}),
        "remarks": remarks,
    }


def _begun(
    config: Config,
    model: Generative,
    loader: Loader,
    key: Key,
    checkpoint: Path,
    device: str,
    origin: Origin | None,
) -> Training:
    """What the checkpoint holds, or a training before its first step, saved."""
    digest = origin.digest if origin else None
    if checkpoint.exists() and saved_state(checkpoint)["origin"] == digest:
        state = Training.restore(model, checkpoint)
        compiled(config, model, device, state.steps)
        return state
    checkpoint.with_name(LOG).unlink(missing_ok=True)  # of a training from other weights
    fitting = memory.fitting(config, loader, device)
    steps = plan_steps(config, model, loader, key, device, fitting)
    if compiled(config, model, device, steps):  # minutes are steps at the speed of that
        steps = plan_steps(config, model, loader, key, device, fitting)
    state = Training(model, steps, fitting.pieces, digest, fitting.recompute)
    state.save(checkpoint)
    return state


def _private(
    config: Config, loader: Loader, state: Training, checkpoint: Path, device: str
) -> Session | None:
    """The private side of the training; null where nothing is promised, which is noted down."""
    if config.privacy is None:
        if (state.round, state.step) == (0, 0):
            Ledger().note_unprotected(secrets.token_hex(16), loader.patients)
        return None
    from synthmed.privacy.session import Session  # imports Opacus: seconds

    session = Session(config, loader, state, device)
    state.save(checkpoint)
    return session


def _loop(
    state: Training,
    config: Config,
    loader: Loader,
    key: Key,
    checkpoint: Path,
    device: str,
    amp: bool,
    progress: Progress,
    interrupted: Sequence[int],
    private: Session | None,
) -> None:
    """Every step that is left, with its looks, checkpoints and warnings."""
    log = checkpoint.with_name(LOG)
    watch = Watch(loader, key, device, amp) if config.train.watch else None
    seen, warned = looks(log), set[str]()
    total = sum(state.steps)
    progress.resume_at(sum(state.steps[: state.round]) + state.step)
    saved = time.monotonic()
    while state.round < len(state.rounds):
        for _ in range(state.steps[state.round] - state.step):
            losses = one_step(state, loader, config, key, device, amp, private)
            line = {"round": state.round, "step": state.step, **losses}
            if watch and watch.due(state):
                line |= watch.look(state)
                seen.append(line)
                for phase, warning in warnings(seen).items():
                    if phase not in warned:  # once, though its figures go on changing
                        progress.warn(warning)
                        warned.add(phase)
            state.log.append(line)
            state.step += 1
            done = sum(state.steps[: state.round]) + state.step
            shown = "  ".join(f"{k} {v:.3f}" for k, v in losses.items() if "." not in k)
            progress.update(done, total, shown)
            due = time.monotonic() - saved > 60 * config.train.checkpoint_minutes
            if due or interrupted:
                state.save(checkpoint)
                saved = time.monotonic()
                for remark in state.model.remarks(recent(log, state.rounds), state.figures):
                    progress.warn(remark)
            if interrupted:
                raise _stopped(done, total)
        ended = state.rounds[state.round]
        with arithmetic(device, False):  # moments and deviations are of all of float32
            state.end_round(loader.all_train(device, ended.finish_scans) if ended.finish else [])
        state.save(checkpoint)
        if state.round < len(state.rounds):
            ranks.tell({"restore": True})
            ranks.meet()
        if interrupted:  # it came while the round was finishing
            raise _stopped(sum(state.steps[: state.round]), total)


def follow(config: Config, loader: Loader, checkpoint: Path, device: str) -> None:
    """Take the private steps of a training that process 0 runs, and write nothing.

    Args:
        config: the run's config.
        loader: the cohort.
        checkpoint: of process 0; read when that says so.
        device: where to train.
    """
    from synthmed.privacy.session import Session

    key = Key.root(config.seed).fold("train")
    model = build(config, loader, key.fold("weights"), device)
    restricted(model, config, key)
    begun = ranks.told()
    if begun is None:
        return
    state = Training.restore(model, checkpoint, log=False)
    with arithmetic(device, False), loader.ahead():
        private = Session(config, loader, state, device, begun["begin"])
        ranks.meet()
        while (message := ranks.told()) is not None:
            if "restore" in message:
                state = Training.restore(model, checkpoint, log=False)
                ranks.meet()
                continue
            state.step = message["step"]
            (phase,) = [p for p in state.rounds[state.round].phases if p.name == message["phase"]]
            phase_step(state, phase, loader, config, key, device, False, private)


def recent(log: Path, rounds: Sequence[Round]) -> list[dict[str, float]]:
    """The last lines of a training log, those of its last round alone.

    At least `RECENT`, and as many more as hold `RECENT_STEPS` of the phase that steps most rarely.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])["round"] if lines else 0
    slowest = max((phase.every for phase in rounds[last].phases), default=1)
    seen = [json.loads(x) for x in lines[-max(RECENT, RECENT_STEPS * slowest) :]]
    return [x for x in seen if x["round"] == last]


def plan_steps(
    config: Config, model: Generative, loader: Loader, key: Key, device: str, fitting: Fitting
) -> list[int]:
    """Steps of each round: given, or as many as `max_minutes` allow at the speed measured now."""
    if config.train.max_minutes is None:
        return steps_within(config, model, [])
    seconds = seconds_per_step(config, model, loader, key, device, fitting)
    return steps_within(config, model, seconds)


def steps_within(config: Config, model: Generative, seconds: Sequence[float]) -> list[int]:
    """Steps of each round within `max_steps` and, at these seconds a step, `max_minutes`."""
    minutes, limit = config.train.max_minutes, config.train.max_steps
    steps = []
    for i, current in enumerate(model.rounds()):
        allowed = [round(current.share * limit)] if limit else []
        if minutes is not None and current.phases:
            allowed.append(int(60 * minutes * current.share / seconds[i]))
        steps.append(max(1, min(allowed)) if current.phases else 0)
    return steps


def seconds_per_step(
    config: Config, model: Generative, loader: Loader, key: Key, device: str, fitting: Fitting
) -> list[float]:
    """Time of one step of each round; the weights are put back, nothing is kept."""
    kept = {k: v.clone() for k, v in named_state(model).items()}
    out = []
    for i in range(len(model.rounds())):
        out.append(round_seconds(config, model, i, loader, key, device, fitting, TRIAL_STEPS))
        load_state(model, kept)
    return out


def round_seconds(
    config: Config,
    model: Generative,
    number: int,
    loader: Loader,
    key: Key,
    device: str,
    fitting: Fitting,
    n_steps: int,
) -> float:
    """Time of one step of a round, by training on: 0 where it has no phases.

    Each phase is timed by itself and counts as often as it steps: the mean over `n_steps`, less
    the first two, which allocate.
    """
    amp = precision(config, device)
    rounds = model.rounds()
    last = [n_steps * max((p.every for p in r.phases), default=0) for r in rounds]
    trial = Training(model, last, fitting.pieces, recompute=fitting.recompute)
    trial.round = number
    trial.begin_round()
    seconds = 0.0
    for phase in rounds[number].phases:
        times = []
        for n in range(n_steps):
            trial.step = n * phase.every
            started = time.monotonic()
            phase_step(trial, phase, loader, config, key.fold("trial"), device, amp)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.monotonic() - started)
        seconds += sum(times[2:]) / len(times[2:]) / phase.every
    return seconds


def write_model(
    target: Path,
    config: Config,
    model: Generative,
    loader: Loader,
    started_from: Mapping[str, Any] | None,
) -> None:
    """weights.safetensors, and model.json with all that sampling has to know beside the config."""
    write_bytes(target / WEIGHTS, as_bytes(named_state(model)))
    about = {"batch": CANONICAL_BATCH, **loader.description()}
    write_json(target / ABOUT, {**about, "provenance": provenance(config, started_from)})


def examine(model: Generative, loader: Loader, device: str) -> Examination:
    """What the model shows of itself on the fixed subsets of either side."""
    train = loader.watched_batch("train", device)
    if train is None:
        raise ValueError("no training patient")
    return model.examine(train, loader.watched_batch("holdout", device))


def finite(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures that are numbers: what a diverged model shows of itself may not be."""
    return {k: v for k, v in figures.items() if math.isfinite(v)}


def write_examination(folder: Path, examined: Examination, remarks: Sequence[str]) -> None:
    """figures.json (the finite ones), remarks.json (sentences on how the training went), a .tsv a
    table, a .png a picture, and captions.json."""
    folder.mkdir()
    write_json(folder / "figures.json", finite(examined.figures))
    write_json(folder / "remarks.json", list(remarks))
    for name, rows in examined.tables.items():
        columns = list(rows[0]) if rows else []
        lines = ["\t".join(columns), *("\t".join(str(r[c]) for c in columns) for r in rows)]
        write_bytes(folder / f"{name}.tsv", ("\n".join(lines) + "\n").encode())
    for name, (grey, _) in examined.pictures.items():
        write_bytes(folder / f"{name}.png", png(grey))
    captions = {name: caption for name, (_, caption) in examined.pictures.items()}
    write_json(folder / "captions.json", captions)


def build(config: Config, loader: Loader, key: Key, device: str) -> Generative:
    """The model with weights drawn from `key`, on `device`; global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key.integer())
        model = config.backbone.build(loader.spec, config.train.optimizer)
    for module in model.modules.values():
        module.to(device)
        if device.startswith("cuda"):
            channels_last(module)
    return model


def restricted(model: Generative, config: Config, key: Key) -> None:
    """Keep from training what `train.trainable` leaves out; adapters are drawn from `key`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key.fold("adapters").integer())
        restrict(model, config.train.trainable, config.train.adapter_rank)


def _require_all_brought(missing: set[str], config: Config) -> None:
    if missing:
        named = ", ".join(sorted(missing)[:3]) + ", ..." * (len(missing) > 3)
        raise UsageError(
            f"train.trainable: {config.train.trainable} would leave {named} as drawn at random: "
            "the model of train.init has none of that shape",
            "Give both runs the same grid, channels, number of categories and backbone settings, "
            "or set train.trainable: all.",
        )


def channels_last(module: torch.nn.Module) -> None:
    """Lay the weights of 3D convolutions out as CUDA's tensor cores read them."""
    for part in module.modules():
        if isinstance(part, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            part.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def compiled(config: Config, model: Generative, device: str, steps: Sequence[int]) -> bool:
    """Compile the modules where that pays; whether it was done."""
    if config.privacy is not None or not compiles(config, device, max(steps)):
        return False
    for module in model.modules.values():
        module.compile()
    return True


def compiles(config: Config, device: str, steps: int) -> bool:
    """Whether to compile the modules: asked for, or `auto` where a long training on CUDA pays.

    On a CPU it pays nothing: a step of cvae takes as long compiled, after a minute of compiling.
    """
    if config.train.compile != "auto":
        return config.train.compile == "on"
    return device.startswith("cuda") and steps >= COMPILE_STEPS


@contextmanager
def arithmetic(device: str, amp: bool) -> Iterator[None]:
    """On CUDA, TF32 products for what bfloat16 training leaves in float32; else full float32."""
    if not device.startswith("cuda"):
        yield
        return
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [p.fp32_precision for p in places]
    for p in places:
        p.fp32_precision = "tf32" if amp else "ieee"
    try:
        yield
    finally:
        for p, value in zip(places, before, strict=True):
            p.fp32_precision = value


def precision(config: Config, device: str) -> bool:
    """Whether to train in bfloat16: asked for, or `auto` on hardware that multiplies it faster."""
    if config.train.precision != "auto":
        return config.train.precision == "bf16"
    if config.privacy is not None:  # as the gradients were checked
        return False
    return fast_bfloat16(device)


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


def _stopped(done: int, total: int) -> Interrupted:
    return Interrupted(
        f"stopped at step {done} of {total}; the checkpoint is kept",
        "The same command goes on from there.",
    )


def parameters(facts: Mapping[str, Any]) -> str:
    """How many a model has, and how many are trained: of them, or beside them as adapters."""
    text = f"{count(facts['n_parameters'])} parameters"
    if facts["n_trained"] != facts["n_parameters"]:
        text += f" ({count(facts['n_trained'])} trained)"
    return text


def summary(facts: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    figures = facts["figures"]
    text = f"{sum(facts['steps'])} steps, {parameters(facts)}"
    if facts["privacy"]:
        stated = facts["privacy"]
        text += f"; epsilon {stated['epsilon']:.2f} at delta {stated['delta']:g} a patient"
    if "latent_active" in figures:
        text += f"; {figures['latent_active']:.0f} of {figures['latent']:.0f} latents in use"
    return "; ".join([text, *facts["remarks"]])
