"""A private training as a whole: charged, repeatable, refused when it cannot be sound or paid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binom
from torch import Generator, Tensor, nn
from torch.func import functional_call

from synthmed import configfile
from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.backbones.generative import (
    Batch,
    Draws,
    Params,
    Phase,
    Round,
    VolumeSpec,
    named_parameters,
    submodule,
)
from synthmed.conditions import Conditions
from synthmed.config import Augment, Config, Optimizer
from synthmed.deid.pseudonyms import KEY_BYTES, KEY_FILE
from synthmed.errors import BudgetExhausted, InputError, Interrupted, UsageError
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.origin import Origin
from synthmed.privacy import oracle
from synthmed.privacy.accounting import epsilon
from synthmed.privacy.gradients import per_patient
from synthmed.privacy.ledger import FILE, HEAD, Ledger, Steps
from synthmed.progress import Progress
from synthmed.stages import train as stage
from synthmed.training import (
    CHECKPOINT,
    LOG,
    Training,
    named_state,
    saved_state,
)
from synthmed.trial import noise_loader
from tests.proofs.mechanism import stop_at_batch

GRID = (8, 8, 8)
DX = {"kind": "categorical", "categories": ["A", "B"]}
QUIET = Progress("train", quiet=True)
PRIVATE = {"epsilon": 8.0, "sample_rate": 0.4, "patients": 10, "at_once": 3}
BACKBONES: dict[str, dict[str, Any]] = {
    "cvae": {"name": "cvae", "latent": 3, "widths": [4, 4], "prior": "standard"},
    "cgan": {"name": "cgan", "latent": 3, "widths": [4, 4], "hidden": 4, "critic_steps": 2},
    "ddpm": {"name": "ddpm", "widths": [4, 8], "prediction": "v"},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[Path]:
    """A SYNTHMED_HOME of the test's own, with a known key: who a step draws depends on it, and so
    how many steps are charged before the batch at which some tests stop."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    (folder / KEY_FILE).write_bytes(bytes(KEY_BYTES))
    (folder / KEY_FILE).chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNTHMED_HOME", str(folder))
        yield folder


def dataset(n: int = 14, seed: int = 0) -> Dataset:
    """Every third patient held out, every fourth with two scans."""
    patients = sorted([f"p{i:02d}" for i in range(n)] + [f"p{i:02d}" for i in range(0, n, 4)])
    rng = np.random.default_rng(seed)
    return Dataset(
        volumes=rng.random((len(patients), 1, *GRID)).astype(np.float16),
        patients=np.array(patients),
        labels=[{"dx": "AB"[i % 2]} for i in range(len(patients))],
        holdout=np.array([int(p[1:]) % 3 == 2 for p in patients]),
        channels=[ChannelInfo("T1w")],
        affine=np.diag([2.0, 2, 3, 1]),
    )


def config(family: str = "cvae", **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "data": {
            "source": "x",
            "patient": "patient",
            "grid": GRID,
            "spacing_mm": [2, 2, 3],
            "conditions": {"dx": DX},
            "view": "grid",
        },
        "backbone": BACKBONES[family],
        "privacy": dict(PRIVATE),
        "train": {"max_steps": 6, "precision": "fp32"},
    }
    for dotted, value in changes.items():
        configfile._put(tree, dotted.replace("__", "."), value)
    return configfile.validate(tree, "test")


def loader(conf: Config, data: Dataset | None = None) -> Loader:
    return Loader(data or dataset(), Conditions(conf.data.conditions), 4, conf.train.augment)


def run(
    conf: Config, folder: Path, data: Dataset | None = None, stop_at: int | None = None
) -> dict[str, Any]:
    """Train in `folder`; a signal during the given step where asked for."""
    partial, target = folder / "partial", folder / "target"
    for place in (partial, target):
        place.mkdir(parents=True, exist_ok=True)
    source = loader(conf, data)
    if stop_at is not None:
        stop_at_batch(source, "private_batch", stop_at)
    return stage.train(conf, source, partial, target, QUIET, "cpu")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "target" / "weights.safetensors")


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(x) for x in (folder / "target" / LOG).read_text().splitlines()]


# --- what is charged ------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_step_that_reads_patients_is_charged_to_those_trained_on(
    backbone: str, tmp_path: Path
) -> None:
    conf = config(backbone)
    facts = run(conf, tmp_path)
    stated = facts["privacy"]
    ledger = Ledger()
    (account,) = ledger.accounts.values()
    assert account.patients == set(dataset().train_patients())
    assert stated["steps"] == account.steps.n == 6
    cost = epsilon([Steps(stated["noise_multiplier"], 0.4, 6)], 1e-5)
    assert 0.99 * 8 < cost <= stated["epsilon"] <= 8
    life = stated["lifetime"]
    assert life["epsilon"] == stated["epsilon"] <= stated["epsilon_crosscheck"]
    assert (stated["unit"], life["runs_charged"], life["runs_unprotected"]) == ("patient", 1, 0)
    phase = {"cvae": "vae", "cgan": "critic", "ddpm": "denoising"}[backbone]
    assert {c[0] for c in account.charges} == {f"0.{phase}"}
    for line in log(tmp_path):
        assert line[f"{phase}.largest"] <= 1 + 1e-5
        assert 0.8 < line[f"{phase}.noise"] < 1.2
    if backbone == "cgan":  # its generator reads nobody
        assert "generator.patients" not in log(tmp_path)[0]


def test_patients_are_drawn_at_the_rate_and_each_for_itself(tmp_path: Path) -> None:
    """Counts over 60 steps are binomial, empty steps among them."""
    conf = config(train__max_steps=60, privacy__sample_rate=0.15)
    run(conf, tmp_path / "a")
    counts = [int(line["vae.patients"]) for line in log(tmp_path / "a")]
    n = len(dataset().train_patients()) * 60
    assert binom.ppf(1e-3, n, 0.15) <= sum(counts) <= binom.ppf(1 - 1e-3, n, 0.15)
    assert min(counts) == 0 and len(set(counts)) > 3
    assert np.var(counts) > 0.3


def test_what_a_patient_is_shown_does_not_depend_on_the_others() -> None:
    conf = config(train__augment=Augment(shift_voxels=1).model_dump())
    phase = conf.backbone.build(loader(conf).spec, conf.train.optimizer).rounds()[0].phases[0]
    source = loader(conf)
    key = Key.root(1)
    alone, noise = source.private_batch(phase, key, ["p01"], 3, "cpu")
    beside, noises = source.private_batch(phase, key, ["p04", "p01"], 3, "cpu")
    assert alone.x.shape[1] == 3 and beside.x.shape[1] == 6, "p04 has two scans"
    assert beside.mask.tolist() == [[1.0] * 6, [1.0] * 3 + [0.0] * 3]
    for a, b in zip([*alone, *noise.values()], [*beside, *noises.values()], strict=True):
        assert torch.equal(a[0], b[1, :3])
    assert len({float(x.sum()) for x in alone.x[0]}) == 3, "each repeat is changed anew"


# --- the promise ----------------------------------------------------------------------------------


def test_the_promise_holds_over_runs(tmp_path: Path) -> None:
    """Two runs may share it; a third, another seed or an overwritten one is refused, exit 6."""
    for name in ("a", "b"):
        facts = run(config(privacy__spend=3.0, seed=ord(name)), tmp_path / name)
    stated = facts["privacy"]
    assert stated["lifetime"]["runs_charged"] == 2
    assert 3.0 < stated["lifetime"]["epsilon"] < 6.0, "composition is better than the sum"
    assert stated["epsilon"] <= 3.0, "what leaves tells of this run alone"
    conf = config(seed=3)
    before = (tmp_path / "home" / FILE).read_bytes()
    with pytest.raises(
        BudgetExhausted, match=r"some of its patients have paid \d\.\d\d before"
    ) as e:
        run(conf, tmp_path / "c")
    assert e.value.exit_code == 6
    assert (tmp_path / "home" / FILE).read_bytes() == before, "nothing was charged"
    others = replace(dataset(), patients=np.array(["q" + p for p in dataset().patients]))
    assert run(conf, tmp_path / "d", others)["privacy"]["lifetime"]["runs_charged"] == 1


def test_an_earlier_promise_binds_a_later_run(tmp_path: Path) -> None:
    """Its report has left: another config's larger epsilon, or looser delta, cannot break it."""
    run(config(privacy__epsilon=2.0), tmp_path / "a")
    for looser in ({"privacy__epsilon": 90.0}, {"privacy__delta": 1e-2, "privacy__spend": 1.0}):
        with pytest.raises(BudgetExhausted, match="2 at delta 1e-05 was promised"):
            run(config(**looser), tmp_path / "b")


def test_one_patient_who_has_paid_is_enough(tmp_path: Path) -> None:
    run(config(), tmp_path / "a")
    names = ["p00" if p == "p00" else "q" + p for p in dataset().patients]
    with pytest.raises(BudgetExhausted):
        run(config(), tmp_path / "b", replace(dataset(), patients=np.array(names)))


def test_a_run_without_protection_is_remembered(tmp_path: Path) -> None:
    run(config(privacy=None), tmp_path / "a")
    assert run(config(), tmp_path / "b")["privacy"]["lifetime"]["runs_unprotected"] == 1


def test_steps_that_cost_again_end_before_the_promise_breaks(tmp_path: Path) -> None:
    """A training that comes back another way is charged afresh, until nothing is left."""
    conf = config()
    with pytest.raises(Interrupted):
        run(conf, tmp_path, stop_at=4)
    checkpoint = tmp_path / "partial" / CHECKPOINT
    saved = checkpoint.read_bytes()

    def again_and_again() -> None:
        for seed in range(6):  # other weights: each of its steps is drawn and charged afresh
            checkpoint.write_bytes(saved)
            _disturb(checkpoint, seed)
            shutil.rmtree(tmp_path / "target")
            run(conf, tmp_path)

    with pytest.raises(BudgetExhausted, match="would break a promise") as e:
        again_and_again()
    assert e.value.exit_code == 6
    (account,) = Ledger().accounts.values()
    assert epsilon([account.steps], 1e-5) <= 8
    assert epsilon([account.steps._replace(n=account.steps.n + 1)], 1e-5) > 8


def test_a_training_that_goes_on_pays_with_what_others_have_left(tmp_path: Path) -> None:
    """However often it is begun again: a second attempt knows what the first one knew."""
    with pytest.raises(Interrupted):
        run(config(), tmp_path / "a", stop_at=3)
    run(config(privacy__spend=6.0, seed=1), tmp_path / "b")
    for _ in range(3):
        shutil.rmtree(tmp_path / "a" / "target")
        with pytest.raises(BudgetExhausted, match="would break a promise"):
            run(config(), tmp_path / "a")
    (history,) = Ledger().histories({"p00"})
    assert len(history) == 2
    assert 7 < epsilon([a.steps for a in history], 1e-5) <= 8


def test_what_others_charge_while_the_oracle_works_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings begun at once: the second sees that the first has spent everything."""
    examine = oracle.examine

    def beside_another(*args: Any) -> Any:
        monkeypatch.setattr(oracle, "examine", examine)
        run(config(seed=1), tmp_path / "a")
        return examine(*args)

    monkeypatch.setattr(oracle, "examine", beside_another)
    with pytest.raises(BudgetExhausted, match="have paid"):
        run(config(), tmp_path / "b")
    (account,) = Ledger().accounts.values()
    assert len(account.charges) == 6, "the first one's alone"


def _disturb(checkpoint: Path, seed: int) -> None:
    from safetensors import safe_open
    from safetensors.torch import save

    tensors = load_file(checkpoint)
    with safe_open(checkpoint, "pt") as handle:
        about = handle.metadata()
    name = next(k for k in sorted(tensors) if k.startswith("module/decoder"))
    tensors[name] = tensors[name] + 1e-3 * (seed + 1)
    checkpoint.write_bytes(save(tensors, about))


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_interrupted_training_ends_in_the_same_weights_and_ledger(
    backbone: str, tmp_path: Path, home: Path
) -> None:
    conf = config(backbone)
    with pytest.raises(Interrupted):
        run(conf, tmp_path / "a", stop_at=4)
    # as after a kill: the checkpoint is older than the last charge
    run(conf, tmp_path / "a")
    charged = {a.run: a.charges for a in Ledger().accounts.values()}
    assert [len(c) for c in charged.values()] == [6]
    run_id = next(iter(charged))
    # the same run from the beginning: its account and key are there, no step is charged again
    (tmp_path / "b" / "partial").mkdir(parents=True)
    _rewind(tmp_path, conf, run_id)
    run(conf, tmp_path / "b")
    assert {a.run: a.charges for a in Ledger().accounts.values()} == charged
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[k], b[k]) for k in a)


def _rewind(tmp_path: Path, conf: Config, run_id: str) -> None:
    """A checkpoint before the first step that belongs to this account."""
    source = loader(conf)
    key = Key.root(conf.seed).fold("train")
    model = stage.build(conf, source, key.fold("weights"), "cpu")
    state = Training(model, stage.steps_within(conf, model, []))
    before = saved_state(tmp_path / "a" / "partial" / CHECKPOINT)["private"]
    assert before["run"] == run_id
    state.private = before
    state.save(tmp_path / "b" / "partial" / CHECKPOINT)


@pytest.mark.parametrize("loss", ["all", "file", "older"])
def test_a_lost_ledger_means_a_refusal_not_a_fresh_budget(
    loss: str, tmp_path: Path, home: Path
) -> None:
    conf = config()
    with pytest.raises(Interrupted):
        run(conf, tmp_path, stop_at=4)
    if loss == "older":
        lines = (home / FILE).read_bytes().splitlines(keepends=True)
        (home / FILE).write_bytes(b"".join(lines[:2]))
    else:
        (home / FILE).unlink()
    if loss == "all":
        (home / HEAD).unlink()
    with pytest.raises(InputError, match="privacy ledger"):
        run(conf, tmp_path)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__max_minutes": 5}, "train.max_minutes"),
        ({"train__precision": "bf16"}, "train.precision"),
        ({"train__compile": "on"}, "train.compile"),
        ({"train__init": "elsewhere"}, "privacy.init_is_public"),
        ({"data__patient": None}, "data.patient"),
        ({"data__spacing_mm": None}, "data.spacing_mm"),
        ({"data__view": "drawn"}, "data.view"),
        ({"sample__prior": "cohort"}, "sample.prior"),
        ({"backbone": {"name": "cvae", "latent": 2, "widths": [4, 4]}}, "prior: standard"),
        ({"backbone": {"name": "ddpm", "widths": [4, 8]}}, "prediction: v"),
        ({"backbone": {**BACKBONES["cgan"], "factors": 4}}, "factors: 0"),
        (
            {"backbone": {**BACKBONES["cvae"], "factors": 4, "prior": "fitted"}},
            "prior: standard and backbone.factors: 0",
        ),
        ({"backbone": {"name": "autoencoder", "widths": [4, 4]}}, "Use cvae"),
    ],
)
def test_what_no_noise_covers_is_refused(
    changes: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        run(config(**changes), tmp_path)
    assert message in str(error.value)
    assert not Ledger().accounts


def test_weights_to_start_from_bring_no_fit_of_theirs(tmp_path: Path) -> None:
    """Parameters are taken, buffers that were fitted to the other run's patients are not."""
    fitted = config(privacy=None, backbone={**BACKBONES["cvae"], "prior": "fitted"})
    run(fitted, tmp_path / "a")
    there = weights(tmp_path / "a")
    assert not torch.equal(there["prior.factor_LL"], torch.eye(3)), "the control: it was fitted"
    conf = config()
    model = stage.build(conf, loader(conf), Key.root(9), "cpu")
    width = loader(conf).spec.condition_width
    Origin(tmp_path / "a" / "target", "digest", {}, width).start(model, width, buffers=False)
    mine = named_state(model)
    assert torch.equal(mine["prior.factor_LL"], torch.eye(3))
    assert all(torch.equal(mine[k], there[k]) for k in named_parameters(model))


def test_a_phase_that_reads_nobody_does_not_tell_how_many_there_are() -> None:
    """Its batch is the config's, not the smaller of that and the cohort."""
    conf = config("cgan", train__batch_patients=64)
    source = Loader(dataset(), Conditions(conf.data.conditions), 64, conf.train.augment)
    assert source.batch_patients < 64
    phases = conf.backbone.build(source.spec, conf.train.optimizer).rounds()[0].phases
    (generator,) = [p for p in phases if not p.reads_patients]
    _, draws = source.draw(generator, Key.root(0), 0, "cpu")
    assert {len(v) for v in draws.values()} == {64}


def test_a_checkpoint_of_another_cohort_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(config(), tmp_path, stop_at=4)
    others = replace(dataset(), patients=np.array(["q" + p for p in dataset().patients]))
    with pytest.raises(InputError, match="charged to other patients"):
        run(config(), tmp_path, others)


class Planted:
    """A model whose loss is whatever a test makes it."""

    def __init__(self, loss: Callable[[nn.Module, Params, Batch, Draws], Tensor]) -> None:
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(512, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)
        )
        self._of = loss

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return {"net": self.net}

    def rounds(self) -> Sequence[Round]:
        phase = Phase(
            "planted", lambda n: True, self._draw, self._loss, Optimizer(), reads_patients=True
        )
        return [Round([phase])]

    def _draw(self, g: Generator, n: int) -> Draws:
        return {"e": torch.randn(n, generator=g)}

    def _loss(self, params: Params, batch: Batch | None, draws: Draws, progress: float) -> Tensor:
        assert batch is not None
        return self._of(self.net, params, batch, draws)


def examined(loss: Callable[[nn.Module, Params, Batch, Draws], Tensor]) -> tuple[str, float]:
    torch.manual_seed(0)
    model = Planted(loss)
    params = {f"net.{k}": p for k, p in model.net.named_parameters()}
    spec = VolumeSpec(channels=1, grid=GRID, condition_width=2)
    phase = model.rounds()[0].phases[0]
    return oracle.examine(model, phase, params, list(params), spec, Key.root(0), "cpu")  # type: ignore[arg-type]


def _forward(net: nn.Module, params: Params, batch: Batch) -> Tensor:
    out: Tensor = functional_call(net, submodule(params, "net"), (batch.x.flatten(0, 1),))
    return out.reshape(batch.mask.shape)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1)


def test_a_batch_norm_is_found_out() -> None:
    with pytest.raises(UsageError, match="one patient's loss changes when another patient does"):
        examined(lambda net, p, b, d: _mean(_forward(net, p, b) ** 2, b.mask))


def test_running_statistics_are_found_out() -> None:
    """The loss is each patient's own, but computing it leaves a trace in a buffer."""

    def loss(net: nn.Module, params: Params, batch: Batch, draws: Draws) -> Tensor:
        net[2].eval()  # type: ignore[index]
        with torch.no_grad():
            net[2].running_mean += batch.x.mean()  # type: ignore[index]
        x = batch.x.flatten(2).mean(2) * params["net.1.bias"].sum()
        return _mean(x, batch.mask)

    with pytest.raises(UsageError, match="running_mean, which no noise protects"):
        examined(loss)


def test_a_gradient_that_misses_a_part_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways that disagree with brute force: neither is used."""

    def halved(way: str, *args: Any) -> tuple[list[Tensor], Tensor]:
        gradients, losses = per_patient("loop", *args)
        return [g * (0.5 if i == 0 else 1) for i, g in enumerate(gradients)], losses

    monkeypatch.setattr(oracle, "per_patient", halved)
    with pytest.raises(UsageError, match="no way gives the right gradient"):
        examined(_by_hand)


def _by_hand(net: nn.Module, params: Params, batch: Batch, draws: Draws) -> Tensor:
    x = batch.x.flatten(2)
    h = torch.tanh(x @ params["net.1.weight"].T + params["net.1.bias"])
    out = h @ params["net.3.weight"][0] + params["net.3.bias"] + 0 * params["net.2.weight"].sum()
    return _mean((out - draws["e"]) ** 2 + 0 * params["net.2.bias"].sum(), batch.mask)


def test_a_sound_model_passes() -> None:
    way, error = examined(_by_hand)
    assert way in oracle.WAYS and error < 1e-5


SHIPPED = sorted(
    file
    for file in (Path(__file__).resolve().parents[2] / "configs").glob("*.yaml")
    if configfile.load(file).privacy is not None
)


@pytest.mark.parametrize("which", [*BACKBONES, *SHIPPED], ids=lambda w: Path(w).stem)
def test_every_way_gives_the_gradients_of_brute_force(which: str | Path) -> None:
    """For each private backbone and shipped private config: each way agrees to 1e-4."""
    assert SHIPPED
    if isinstance(which, Path):
        conf = configfile.load(which)
        source = noise_loader(conf, 4, 2)
    else:
        conf = config(which)
        source = loader(conf)
    model = stage.build(conf, source, Key.root(2), "cpu")
    stage.restricted(model, conf, Key.root(2))
    params = {
        f"{m}.{k}": p for m, module in model.modules.items() for k, p in module.named_parameters()
    }
    (phase,) = [p for r in model.rounds() for p in r.phases if p.reads_patients]
    wanted = [k for k in params if phase.trainable(k) and params[k].requires_grad]
    batch, draws = oracle.made_up(phase, source.spec, Key.root(3), "cpu")
    exact = [oracle._plainly(phase, params, wanted, batch, draws, i) for i in range(3)]
    for way in oracle.WAYS:
        gradients, losses = per_patient(way, phase, params, wanted, batch, draws, 0.5)
        for i in range(3):
            assert oracle._error([g[i] for g in gradients], exact[i]) < 1e-4, way
        torch.testing.assert_close(losses, phase.loss(params, batch, draws, 0.5).detach())
