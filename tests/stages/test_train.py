"""Batches and the loop: who is read when, and what a stopped training goes on from."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synthmed import configfile
from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.backbones.cvae import ConditionalVAE
from synthmed.backbones.examining import evenly, scans, shares
from synthmed.backbones.generative import Batch, Examination, Phase
from synthmed.conditions import Conditions
from synthmed.config import Augment, Config, Optimizer
from synthmed.errors import Interrupted, SynthmedError
from synthmed.inventory import fast_bfloat16
from synthmed.keys import Key
from synthmed.loader import READ, Loader, unaugmented
from synthmed.memory import Fitting
from synthmed.progress import Progress
from synthmed.stages import train as stage
from synthmed.training import CHECKPOINT, LOG, Training, schedule

KEY = Key.root(3)
QUIET = Progress("train", quiet=True)
SENTINEL = 8.0
"""Every voxel of a held-out scan; nothing of a training scan comes near it."""


def dataset(n: int = 11, grid: tuple[int, int, int] = (8, 8, 8)) -> Dataset:
    """n patients, every third held out, every fourth with two scans."""
    patients = sorted([f"p{i:02d}" for i in range(n)] + [f"p{i:02d}" for i in range(0, n, 4)])
    rng = np.random.default_rng(0)
    held = np.array([int(p[1:]) % 3 == 0 for p in patients])
    volumes = rng.random((len(patients), 2, *grid)).astype(np.float16)
    volumes[held] = SENTINEL
    return Dataset(
        volumes=volumes,
        patients=np.array(patients),
        labels=[{"dx": "AB"[i % 2]} for i in range(len(patients))],
        holdout=held,
        channels=[ChannelInfo("T1w"), ChannelInfo("seg:a", mask="seg", label_value=1)],
        affine=np.diag([2.0, 2, 3, 1]),
    )


DX = {"kind": "categorical", "categories": ["A", "B"]}


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "data": {"source": "x", "grid": [8, 8, 8], "conditions": {"dx": DX}},
        "backbone": {"name": "cvae", "latent": 3, "widths": [4, 4]},
        "privacy": None,
        "train": {"max_steps": 6, "batch_patients": 3, "precision": "fp32"},
    }
    for dotted, value in changes.items():
        configfile._put(tree, dotted.replace("__", "."), value)
    return configfile.validate(tree, "test")


def loader(data: Dataset, batch: int = 3, augment: Augment | None = None) -> Loader:
    conditions = config().data.conditions
    return Loader(data, Conditions(conditions), batch, augment or Augment())


def reading(every: int = 1) -> Phase:
    """A phase that draws one number a patient."""
    return Phase(
        name="p",
        trainable=lambda n: True,
        draw=lambda g, s: {"e": torch.randn(s, generator=g)},
        loss=lambda params, batch, draws, progress: draws["e"],
        optimizer=Optimizer(),
        reads_patients=True,
        every=every,
    )


# --- loader --------------------------------------------------------------------------------------


def test_a_batch_is_a_function_of_its_key_and_step() -> None:
    augment = Augment(flip=True, shift_voxels=1, rotate_degrees=5, intensity=0.1)
    one, two = (loader(dataset(), augment=augment) for _ in range(2))
    two.draw(reading(), KEY, 4, "cpu")  # what was drawn before leaves no trace
    torch.manual_seed(0)
    a = one.draw(reading(), KEY, 7, "cpu")
    torch.manual_seed(1)
    b = two.draw(reading(), KEY, 7, "cpu")
    assert a[0] is not None
    assert b[0] is not None
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(a[1]["e"], b[1]["e"])
    other = one.draw(reading(), KEY, 8, "cpu")
    assert other[0] is not None
    assert not torch.equal(a[0].x, other[0].x)
    assert not torch.equal(a[1]["e"], other[1]["e"])
    elsewhere = one.draw(reading(), Key.root(4), 7, "cpu")
    assert not torch.equal(a[1]["e"], elsewhere[1]["e"])


def test_a_model_is_told_what_it_draws_and_what_it_is_given() -> None:
    """A given mask is 0 or 1 as at sampling, however it was turned; a drawn one keeps its edges."""
    data = dataset()
    given = ChannelInfo("lesion:b", mask="lesion", label_value=1, given=True)
    three = np.concatenate([data.volumes, data.volumes[:, :1]], 1)
    data = dataclasses.replace(data, volumes=three, channels=[*data.channels, given])
    turned = loader(data, augment=Augment(rotate_degrees=20))
    assert (turned.spec.channels, turned.spec.masks, turned.spec.given) == (2, 1, 1)
    assert turned.spec.told_width > 0
    assert turned.spec.condition_width == 2 + turned.spec.told_width
    batch, _ = turned.draw(reading(), KEY, 0, "cpu")
    assert batch is not None
    assert set(batch.given.unique().tolist()) == {0.0, 1.0}
    assert len(batch.x[:, :, 1].unique()) > 2


def test_a_patients_scan_and_noise_do_not_depend_on_the_others() -> None:
    """The same patient at the same step in a batch of another size: bit-identical."""
    augment = Augment(shift_voxels=1, intensity=0.1)
    small, large = loader(dataset(), 2, augment), loader(dataset(), 7, augment)
    step = 0
    both = set(small.order(KEY, step)) & set(large.order(KEY, step))
    assert both
    a, da = small.draw(reading(), KEY, step, "cpu")
    b, db = large.draw(reading(), KEY, step, "cpu")
    assert a is not None
    assert b is not None
    for patient in both:
        i, j = small.order(KEY, step).index(patient), large.order(KEY, step).index(patient)
        assert torch.equal(a.x[i], b.x[j])
        assert torch.equal(da["e"][i], db["e"][j])


@pytest.mark.parametrize("batch", [2, 3, 7, 50])
def test_an_epoch_visits_nobody_twice(batch: int) -> None:
    source = loader(dataset(), batch)
    per_epoch = len(source.patients) // source.batch_patients
    visits: Counter[str] = Counter()
    for epoch in range(40):
        names = [n for s in range(per_epoch) for n in source.order(KEY, epoch * per_epoch + s)]
        assert len(names) == len(set(names))
        visits.update(names)
    assert set(visits) == set(source.patients), "whom one epoch leaves out another one visits"
    assert max(visits.values()) - min(visits.values()) < 30


def test_no_held_out_patient_is_ever_read() -> None:
    data = dataset()
    source = loader(data, 4)
    for step in range(60):
        batch, _ = source.draw(reading(), KEY, step, "cpu")
        assert batch is not None
        assert float(batch.x.max()) < 2, "a held-out scan was read"
        assert not set(source.order(KEY, step)) & set(data.holdout_patients())
    assert max(float(b.x.max()) for b in source.all_train("cpu")) < 2
    n_scans = sum(float(b.mask.sum()) for b in source.all_train("cpu"))
    assert n_scans == int((~data.holdout).sum())
    assert float(data.volumes.max()) == SENTINEL, "the sentinel was there to be found"


def test_every_scan_of_a_patient_is_used_with_its_own_label() -> None:
    data = dataset()
    source = loader(data, 6)
    seen: dict[str, set[int]] = {p: set() for p in source.patients}
    for step in range(60):
        batch, _ = source.draw(reading(), KEY, step, "cpu")
        assert batch is not None
        for name, x, c in zip(source.order(KEY, step), batch.x, batch.c, strict=True):
            same = [
                i for i, v in enumerate(data.volumes)
                if np.array_equal(v.astype(np.float32), x[0].numpy())
            ]  # fmt: skip
            assert len(same) == 1
            assert data.patients[same[0]] == name
            assert "AB"[int(c[0].argmax())] == data.labels[same[0]]["dx"]
            seen[name].add(same[0])
    for name, rows in seen.items():
        assert rows == set(np.flatnonzero(data.patients == name))


def test_intensity_changes_leave_masks_alone() -> None:
    plain, bright = (loader(dataset(), 3, a) for a in (Augment(), Augment(intensity=0.3)))
    a, _ = plain.draw(reading(), KEY, 0, "cpu")
    b, _ = bright.draw(reading(), KEY, 0, "cpu")
    assert a is not None
    assert b is not None
    assert torch.equal(a.x[:, :, 1], b.x[:, :, 1])
    assert not torch.equal(a.x[:, :, 0], b.x[:, :, 0])


# --- schedule ------------------------------------------------------------------------------------


def test_the_learning_rate_rises_once_and_ends_at_a_tenth() -> None:
    optimizer = Optimizer(warmup=0.2)
    factors = [schedule(optimizer, i / 1000) for i in range(1001)]
    top = int(np.argmax(factors))
    assert factors[top] == pytest.approx(1, abs=1e-6)
    assert top == 200
    assert np.all(np.diff(factors[:200]) >= 0)
    assert np.all(np.diff(factors[200:]) <= 0)
    assert factors[-1] == pytest.approx(0.1)
    assert min(factors) > 0
    assert schedule(Optimizer(warmup=0), 0) == pytest.approx(1)
    # halfway down the cosine
    assert factors[600] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))


# --- the loop ------------------------------------------------------------------------------------


def run(
    conf: Config, folder: Path, interrupt_at: int | None = None, data: Dataset | None = None
) -> dict[str, Any]:
    """Train in `folder`; a signal after the given step where asked for."""
    partial, target = folder / "partial", folder / "target"
    for place in (partial, target):
        place.mkdir(parents=True, exist_ok=True)

    class Stopper(Progress):
        def update(self, done: int, total: int, note: str = "") -> None:
            if done == interrupt_at:
                import signal

                signal.raise_signal(signal.SIGTERM)

    source = loader(data or dataset(), conf.train.batch_patients, conf.train.augment)
    return stage.train(conf, source, partial, target, Stopper("train", quiet=True), "cpu")


def weights(folder: Path) -> bytes:
    return (folder / "target/weights.safetensors").read_bytes()


def logged(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "target" / LOG).read_text()
    return [json.loads(x) for x in text.splitlines()]


def test_the_same_seed_gives_the_same_weights_whatever_the_global_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    run(config(), tmp_path / "a")
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    run(config(), tmp_path / "b")
    assert torch.equal(torch.random.get_rng_state(), state), "global state is left alone"
    run(config(seed=1), tmp_path / "c")
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


@pytest.mark.parametrize("at", [1, 4, 6])
def test_an_interrupted_training_ends_in_the_same_weights(at: int, tmp_path: Path) -> None:
    run(config(), tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"step {at} of 6") as error:
        run(config(), tmp_path / "parts", interrupt_at=at)
    assert error.value.exit_code == 130
    assert not (tmp_path / "parts/target/weights.safetensors").exists()
    run(config(), tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    assert [x["step"] for x in logged(tmp_path / "parts")] == list(range(6))


def test_a_log_that_ran_ahead_or_was_cut_off_is_mended(tmp_path: Path) -> None:
    """A kill between log and checkpoint, and one within a line: no step twice, none unreadable."""
    run(config(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config(), tmp_path / "killed", interrupt_at=3)
    log = tmp_path / "killed/partial" / LOG
    ahead = "".join(json.dumps(x) + "\n" for x in logged(tmp_path / "whole")[3:5])
    log.write_text(log.read_text() + ahead + '{"round": 0, "st')
    run(config(), tmp_path / "killed")
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_minutes_are_turned_into_steps_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming on a slower machine keeps the count of the first start."""
    conf = config(train__max_steps=None, train__max_minutes=0.001)
    asked: list[float] = []

    def measured(*args: Any) -> list[float]:
        asked.append(0.006 if not asked else 0.0006)  # ten times as fast when asked again
        return asked[-1:]

    monkeypatch.setattr(stage, "seconds_per_step", measured)
    with pytest.raises(Interrupted):
        run(conf, tmp_path, interrupt_at=2)
    facts = run(conf, tmp_path)
    assert facts["steps"] == [10]
    assert asked == [0.006]
    assert len(logged(tmp_path)) == 10


def test_the_smaller_of_minutes_and_steps_holds(tmp_path: Path) -> None:
    facts = run(config(train__max_steps=2, train__max_minutes=60), tmp_path)
    assert facts["steps"] == [2]


def test_measuring_the_speed_leaves_no_trace(tmp_path: Path) -> None:
    """A budget of minutes that allows the same steps ends in the same weights."""
    run(config(), tmp_path / "steps")
    run(config(train__max_minutes=60), tmp_path / "both")
    assert weights(tmp_path / "steps") == weights(tmp_path / "both")


def test_a_loss_that_is_no_number_says_what_to_do(tmp_path: Path) -> None:
    data = dataset()
    broken = np.array(data.volumes)
    broken[~data.holdout] = np.nan
    bad = Dataset(**{**data.__dict__, "volumes": broken})
    with pytest.raises(
        SynthmedError, match="training diverged at step 0: the loss vae is nan"
    ) as e:
        run(config(), tmp_path, data=bad)
    assert "learning_rate" in str(e.value)


def test_a_gradient_that_is_no_number_moves_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is a number all the while: the step would make every weight NaN, and be saved."""
    build, steps = stage.build, []

    def planted(*args: Any) -> Any:
        model = build(*args)

        def spoil(g: torch.Tensor) -> torch.Tensor:
            steps.append(len(steps))
            return g * math.nan if len(steps) > 3 else g

        next(model.modules["decoder"].parameters()).register_hook(spoil)
        return model

    monkeypatch.setattr(stage, "build", planted)
    said = "training diverged at step 3: the gradient of the loss vae is nan"
    with pytest.raises(SynthmedError, match=said):
        run(config(), tmp_path)
    saved = torch.load(tmp_path / "partial" / CHECKPOINT, weights_only=True)
    assert all(torch.isfinite(t).all() for t in numbers_in(saved))


def numbers_in(state: Any) -> list[torch.Tensor]:
    """Every floating tensor of a checkpoint."""
    if isinstance(state, torch.Tensor):
        return [state] if state.is_floating_point() else []
    each = state.values() if isinstance(state, dict) else state
    return [t for v in each if isinstance(v, dict | list | tuple | torch.Tensor)
            for t in numbers_in(v)]  # fmt: skip


def test_what_is_kept_of_a_model_names_no_patient(tmp_path: Path) -> None:
    run(config(), tmp_path)
    kept = b"".join(p.read_bytes() for p in (tmp_path / "target").rglob("*") if p.is_file())
    assert not [p for p in set(dataset().patients) if p.encode() + b'"' in kept]
    names = {k.split(".")[0] for k in load_file(tmp_path / "target/weights.safetensors")}
    assert "decoder" in names
    assert not names & {"optimizer", "average"}
    about = json.loads((tmp_path / "target/model.json").read_text())
    assert about["batch"] == stage.CANONICAL_BATCH
    assert about["grid"] == [8, 8, 8]


def test_the_checkpoint_is_written_when_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    original: Callable[..., None] = Training.save

    def counting(self: Training, path: Path) -> None:
        saved.append(self.step)
        original(self, path)

    monkeypatch.setattr(Training, "save", counting)
    run(config(train__checkpoint_minutes=1e-9), tmp_path / "often")
    assert saved == [0, 1, 2, 3, 4, 5, 6, 0]
    saved.clear()
    run(config(), tmp_path / "seldom")
    assert saved == [0, 0], "at the start, and where the round ends"
    assert (tmp_path / "seldom/partial" / CHECKPOINT).is_file()
    assert weights(tmp_path / "often") == weights(tmp_path / "seldom")


# --- batches drawn ahead -------------------------------------------------------------------------


def test_batches_drawn_ahead_are_the_same_and_come_from_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    augment = Augment(flip=True, shift_voxels=1, rotate_degrees=5, intensity=0.1)
    plain, early = (loader(dataset(), augment=augment) for _ in range(2))
    threads: list[str] = []
    original = Loader._draw

    def noting(self: Loader, *args: Any) -> Any:
        if self is early:
            threads.append(threading.current_thread().name)
        return original(self, *args)

    monkeypatch.setattr(Loader, "_draw", noting)
    phase = reading(every=2)
    with early.ahead():
        for step in (0, 2, 4, 11, 13):  # with a jump, as between rounds
            key = KEY if step < 10 else Key.root(4)
            a, b = plain.draw(phase, key, step, "cpu"), early.draw(phase, key, step, "cpu")
            assert a[0] is not None
            assert b[0] is not None
            assert all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
            assert torch.equal(a[1]["e"], b[1]["e"])
    assert sum(name.startswith("MainThread") for name in threads) == 2, "the first, and the jump"
    early.draw(phase, KEY, 0, "cpu")
    assert threads[-1] == "MainThread", "no thread outlives the training"


def test_all_training_scans_are_read_one_batch_at_a_time() -> None:
    data = dataset(60)
    source = loader(data)
    batches = source.all_train("cpu")
    assert len(batches) > 2 and all(b.mask.numel() <= READ for b in batches)
    assert torch.equal(batches[-1].x, batches[len(batches) - 1].x)
    assert [len(b.x) for b in batches[1:]] == [len(b.x) for b in batches][1:]
    whole = torch.cat([scans(b)[0] for b in batches])
    assert torch.equal(whole, torch.from_numpy(data.volumes[~data.holdout].astype(np.float32)))


def test_a_row_is_a_person_with_all_their_scans() -> None:
    """One person has forty scans: their batch is their own, and they count as one."""
    base = dataset(40)
    often = next(i for i, held in enumerate(base.holdout) if not held)
    rows = np.concatenate([np.repeat(often, 39), np.arange(len(base.patients))])
    rows = rows[np.argsort(base.patients[rows], kind="stable")]
    data = Dataset(
        **{
            **base.__dict__,
            "volumes": base.volumes[rows],
            "patients": base.patients[rows],
            "labels": [base.labels[i] for i in rows],
            "holdout": base.holdout[rows],
        }
    )
    source = loader(data)
    batches = source.all_train("cpu")
    assert sum(len(b.mask) for b in batches) == len(source.patients)
    counts = [int(n) for b in batches for n in b.mask.sum(1)]
    assert counts == [len(source.scans[p]) for p in source.patients]
    assert max(counts) >= 40 and all(b.mask.numel() <= max(READ, max(counts)) for b in batches)
    even = evenly(batches)
    held = np.repeat(np.arange(len(counts)), counts)[even.numpy()]
    assert len(set(np.bincount(held))) == 1, "everybody has as many rows"
    torch.testing.assert_close(
        sum(shares(b).sum() for b in batches), torch.tensor(float(len(counts)))
    )


# --- what is done to a scan is told --------------------------------------------------------------


def test_brightness_learnt_with_its_gain_is_asked_for_without() -> None:
    """White volumes under random gains, and a line from what is told to brightness."""
    data = dataset(40)
    white = Dataset(**{**data.__dict__, "volumes": np.ones_like(data.volumes)})
    source = loader(white, 8, Augment(intensity=0.3, flip=True))
    assert source.spec.condition_width == 2 + 3
    assert source.description()["condition_width"] == 5
    told, seen = [], []
    for step in range(40):
        batch, _ = source.draw(reading(), KEY, step, "cpu")
        assert batch is not None
        told.append(batch.c[:, 0])
        seen.append(batch.x[:, 0, 0].mean((1, 2, 3)))
    c, brightness = torch.cat(told).double(), torch.cat(seen).double()
    assert brightness.std() > 0.1, "gains differ"
    design = torch.cat([c[:, 2:], c.new_ones(len(c), 1)], 1)
    line = torch.linalg.lstsq(design, brightness[:, None])
    weights = line.solution[:, 0]
    # one to the power of anything is one: what is seen is 1 + 0.3 told
    line_told = torch.tensor([0, 0.3, 0, 1], dtype=torch.float64)
    torch.testing.assert_close(weights, line_told, rtol=0, atol=1e-4)
    asked = unaugmented(np.array([[1, 0]], np.float32), None, source.augment)
    assert asked.tolist() == [[1, 0, 0, 0, 0]]
    answer = float(torch.from_numpy(asked[:, 2:]).double() @ weights[:3] + weights[3])
    assert answer == pytest.approx(1)
    for b in source.all_train("cpu"):
        assert not b.c[:, :, 2:].any()
        assert float(scans(b)[0][:, 0].min()) == 1, "unchanged"


def test_changes_are_not_told_where_that_is_switched_off() -> None:
    source = loader(dataset(), 3, Augment(intensity=0.3, flip=True, conditioned=False))
    assert source.spec.condition_width == 2
    batch, _ = source.draw(reading(), KEY, 0, "cpu")
    assert batch is not None
    assert batch.c.shape == (3, 1, 2)


def test_what_a_phase_without_patients_is_told_looks_like_what_one_with_is() -> None:
    source = loader(dataset(), 3, Augment(intensity=0.3, flip=True))
    assert source.spec.draw_condition is not None
    drawn = torch.stack([source.spec.draw_condition(KEY.fold(i).torch()) for i in range(200)])
    assert drawn.shape == (200, 5)
    assert set(drawn[:, 2].tolist()) == {0, 1}
    assert drawn[:, 3:].abs().max() <= 1
    brightened = drawn[:, 3:].any(1)
    assert 0.35 < brightened.float().mean() < 0.65, "each with probability one half"
    assert drawn[brightened, 3:].std() > 0.5


def test_a_model_trained_with_changes_is_sampled_without(
    tmp_path: Path, synthmed: Callable[..., Any], make_config: Callable[..., Path]
) -> None:
    """The whole line, and the width in model.json."""
    file = make_config("augmented", train__augment={"flip": True, "intensity": 0.1})
    assert synthmed("generate", file, "--run", tmp_path, "--device", "cpu", "-q").code == 0
    about = json.loads((tmp_path / "private/model/model.json").read_text())
    conditions = Conditions(configfile.load(file).data.conditions)
    assert about["condition_width"] == conditions.width + 3


# --- memory, compiling, examination --------------------------------------------------------------


def test_the_pieces_are_decided_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = config(train__batch_patients=4, train__memory_gib=1)
    decided = [Fitting(2, True)]
    monkeypatch.setattr("synthmed.memory.fitting", lambda *a: decided.pop())
    facts = run(conf, tmp_path / "whole")
    assert (facts["pieces"], facts["recompute"]) == (2, True)
    decided.append(Fitting(2, True))
    with pytest.raises(Interrupted):
        run(conf, tmp_path / "parts", interrupt_at=3)
    again = run(conf, tmp_path / "parts")
    assert (again["pieces"], again["recompute"]) == (2, True), "nothing is measured again"
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_bfloat16_is_fast_where_the_processor_has_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that supports it may emulate it."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for has in ((False, False), (True, False), (False, True)):
        for name, value in zip(names, has, strict=True):
            monkeypatch.setattr(torch.cpu, name, lambda value=value: value)
        fast = any(has) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        assert fast_bfloat16("cpu") == fast
    for name in names:  # of another torch
        monkeypatch.delattr(torch.cpu, name)
    assert not fast_bfloat16("cpu")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert not fast_bfloat16("cuda")


def test_a_finish_may_read_a_few_scans_alone() -> None:
    source = loader(dataset())
    people = source.patients
    few = source.all_train("cpu", 4)
    chosen = [people[i] for i in np.linspace(0, len(people) - 1, 4).round().astype(int)]
    wanted = source.read([int(source.scans[p][0]) for p in chosen], "cpu").x
    assert torch.equal(torch.cat([b.x for b in few]), wanted)
    all_scans = int((~source.dataset.holdout).sum())
    for most, n in ((None, all_scans), (10_000, len(people))):
        assert sum(float(b.mask.sum()) for b in source.all_train("cpu", most)) == n


def test_minutes_are_steps_at_the_speed_of_what_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled modules are timed again; a training that goes on compiles once and times nothing."""
    fast: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: fast.append(self))
    monkeypatch.setattr(stage, "seconds_per_step", lambda *a: [6.0 if fast else 12.0])
    minutes = config(train__compile="on", train__max_minutes=1, train__max_steps=100)
    with pytest.raises(Interrupted):
        run(minutes, tmp_path, interrupt_at=2)
    n = len(fast)
    assert n > 1
    assert run(minutes, tmp_path)["steps"] == [10]
    assert len(fast) == 2 * n


def test_compiling_is_for_long_trainings_on_cuda_unless_asked_for() -> None:
    def says(mode: str, device: str, steps: int) -> bool:
        return stage.compiles(config(train__compile=mode), device, steps)

    long = stage.COMPILE_STEPS
    assert says("auto", "cuda", long)
    assert not says("auto", "cuda", long - 1)
    assert not says("auto", "cpu", long)
    assert says("on", "cpu", 1)
    assert not says("off", "cuda", long)


def test_what_the_model_shows_of_itself_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def examine(self: object, train: Batch, holdout: Batch | None) -> Examination:
        seen.update(train=train, holdout=holdout)
        grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
        return Examination(
            figures={"sharpness": 0.5, "broken": math.nan},
            tables={"latents": [{"name": "a", "nats": 1.5}, {"name": "b", "nats": 2.0}]},
            pictures={"map": (grey, "What it shows.")},
        )

    monkeypatch.setattr(ConditionalVAE, "examine", examine)
    facts = run(config(), tmp_path)
    folder = tmp_path / "target/examination"
    assert json.loads((folder / "figures.json").read_text()) == {"sharpness": 0.5}
    assert facts["figures"]["sharpness"] == 0.5
    assert "broken" not in facts["figures"]
    assert json.loads((folder / "remarks.json").read_text()) == facts["remarks"]
    assert (folder / "latents.tsv").read_text() == "name\tnats\na\t1.5\nb\t2.0\n"
    assert (folder / "map.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "captions.json").read_text()) == {"map": "What it shows."}
    assert float(seen["train"].x.max()) < 2
    assert float(seen["holdout"].x.min()) == SENTINEL
    assert len(seen["holdout"].x) == len(dataset().holdout_patients()), "one scan a patient"
