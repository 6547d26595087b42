"""Attacks on the weights: what was learnt by heart is found, what was not is not."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished, Result
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import softplus

from synthmed import configfile
from synthmed.artifacts import Dataset
from synthmed.backbones.cvae import LatentPrior
from synthmed.backbones.ddpm import _ATTACK_DRAWS, _ATTACKED_AT, DDPM, Diffusion
from synthmed.backbones.generative import VolumeSpec
from synthmed.config import Config, Optimizer
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.metrics.stats import Floats
from synthmed.privacy import whitebox
from synthmed.progress import Progress
from synthmed.report.page import _worst_slices
from synthmed.stages import train
from synthmed.store import Artifact, Manifest
from synthmed.trial import noise_loader
from synthmed.types import Estimate

KEY = Key.root(0)
QUIET = Progress("audit", quiet=True)
MAP = {"widths": (4, 8), "code": {"kind": "map", "channels": 3}}
BACKBONES: dict[str, dict[str, Any]] = {
    "cvae": {"name": "cvae", "latent": 8, "widths": (4, 8)},
    "autoencoder": {"name": "autoencoder", "widths": (4, 8)},
    "ddpm voxel": {
        "name": "ddpm", "widths": (8,), "space": {"kind": "voxel"}, "prediction": "v"
    },
    "ddpm wavelet": {"name": "ddpm", "widths": (8,)},
    "ddpm latent": {
        "name": "ddpm", "widths": (8,), "space": {"kind": "latent", "autoencoder": MAP}
    },
    "cgan": {"name": "cgan", "widths": (4, 8), "latent": 4, "hidden": 16},
    "spectral": {"name": "spectral"},
}  # fmt: skip
ATTACKS = {
    "cvae": {"evidence lower bound", "reconstruction"},
    "autoencoder": {"reconstruction"},
    "ddpm voxel": {"denoising loss"},
    "ddpm wavelet": {"denoising loss"},
    "ddpm latent": {"denoising loss", "reconstruction"},
    "cgan": {"critic"},
    "spectral": {"distance to the moments"},
}
every_backbone = pytest.mark.parametrize("name", BACKBONES)


def config(name: str, steps: int = 60, seed: int = 0) -> Config:
    dx = {"kind": "categorical", "categories": ["A", "B"]}
    tree = {
        "seed": seed,
        "data": {"source": "x", "grid": [8, 8, 8], "conditions": {"dx": dx}},
        "backbone": BACKBONES[name],
        "privacy": None,
        "train": {
            "max_steps": steps, "batch_patients": 10, "precision": "fp32", "watch": False,
            "optimizer": {"learning_rate": 1e-2},
        },
    }  # fmt: skip
    return configfile.validate(tree, "test")


def cohort(settings: Config, n_train: int = 10, n_holdout: int = 10) -> Loader:
    """Patients of pure noise: nothing about one of them can be known but by heart."""
    return noise_loader(settings, n_train, 10, n_holdout)


def trained(settings: Config, loader: Loader, folder: Path) -> Artifact:
    partial, target = folder / "partial", folder / "model"
    partial.mkdir()
    target.mkdir()
    if settings.backbone.name == "cgan":
        return memorising_critic(settings, loader, target)
    facts = train.train(settings, loader, partial, target, QUIET, "cpu")
    return artifact(target, facts)


def artifact(folder: Path, facts: Mapping[str, Any] = {"pieces": 1, "init": None}) -> Artifact:
    return Artifact(folder, Manifest(kind="model", config="", inputs={}, files={}, facts=facts))


def memorising_critic(settings: Config, loader: Loader, folder: Path) -> Artifact:
    """A critic beside a generator that draws as the patients are drawn: all that is left for it to
    learn is who they were. A real generator comes there, if ever, after more steps than a test has.
    """
    model: Any = train.build(settings, loader, KEY, "cpu")
    batch = loader.read(np.flatnonzero(~loader.dataset.holdout).tolist(), "cpu")
    x, c, given = batch.x[:, 0], batch.c[:, 0], batch.given[:, 0]
    optimizer = torch.optim.Adam(model.critic.parameters(), lr=0.02, betas=(0.0, 0.9))
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        drawn = torch.rand(x.shape, generator=g)
        scores = model.critic(x, c, given, None), model.critic(drawn, c, given, None)
        optimizer.zero_grad()
        (softplus(-scores[0]) + softplus(scores[1])).mean().backward()
        optimizer.step()
    train.write_model(folder, settings, model, loader, None)
    return artifact(folder)


def untrained(settings: Config, loader: Loader, folder: Path) -> Artifact:
    model = train.build(settings, loader, Key.root(settings.seed).fold("fresh"), "cpu")
    train.write_model(folder, settings, model, loader, None)
    return artifact(folder)


def attack(settings: Config, model: Artifact, loader: Loader, key: Key = KEY) -> list[Estimate]:
    return whitebox.attack(settings, model, loader, "cpu", key, 0, QUIET)


@pytest.fixture(scope="module")
def by_heart() -> dict[str, tuple[Config, Loader, Artifact]]:
    """Trained models, each when first asked for."""
    return {}


@pytest.fixture
def learnt(
    name: str,
    by_heart: dict[str, tuple[Config, Loader, Artifact]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Config, Loader, Artifact]:
    if name not in by_heart:
        settings = config(name)
        loader = cohort(settings)
        model = trained(settings, loader, tmp_path_factory.mktemp("learnt"))
        by_heart[name] = settings, loader, model
    return by_heart[name]


# --- what is found, and what is not ---------------------------------------------------------------


@every_backbone
def test_patients_learnt_by_heart_are_told_from_others(
    name: str, learnt: tuple[Config, Loader, Artifact]
) -> None:
    settings, loader, model = learnt
    found = attack(settings, model, loader)
    aucs = {e.slice: e for e in found if e.name == "whitebox_auc"}
    assert set(aucs) == {f"score={a}" for a in ATTACKS[name]}
    for e in aucs.values():
        assert e.value is not None and e.ci is not None
        assert e.value > 0.95
        assert e.ci[0] > 0.5 and "members-only control" in e.note
        assert (e.group, e.better, e.n, e.n_holdout, e.floor) == ("audit", "lower", 10, 10, 0.5)
    shares = [e for e in found if e.name == "whitebox_tpr_at_fpr10"]
    assert len(shares) == len(aucs) and all(e.value and e.value > 0.3 for e in shares)


def test_untrained_weights_know_nobody(tmp_path: Path) -> None:
    """Of 18 intervals at 95 % about one misses one half; five have a chance below 1 in 100, even
    where a bootstrap of so few covers 93 %."""
    missed = n = 0
    for name in BACKBONES:
        for seed in range(2):
            settings = config(name, seed=seed + 10 * len(name))
            loader = cohort(settings)
            with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
                found = attack(settings, untrained(settings, loader, Path(folder)), loader)
            for e in (e for e in found if e.name == "whitebox_auc"):
                assert e.ci is not None
                missed += not e.ci[0] <= 0.5 <= e.ci[1]
                n += 1
    assert n == 18 and missed <= 4


@every_backbone
def test_a_patient_s_score_is_its_own_whatever_the_company(
    name: str, learnt: tuple[Config, Loader, Artifact]
) -> None:
    """Bit for bit where others change, and up to rounding where the batches are others too."""
    settings, loader, model = learnt
    built = whitebox.load(settings, model, loader, "cpu")
    data = loader.dataset
    changed = np.array(data.volumes)
    changed[1::2] = np.random.default_rng(0).random(changed[1::2].shape)
    others = Loader(
        replace(data, volumes=changed), loader.conditions, 10, settings.train.augment
    )  # fmt: skip
    few = np.array([0, 2, 4, 6, 10, 12, 18])
    alone = replace(
        data, volumes=data.volumes[few], patients=data.patients[few],
        labels=[data.labels[i] for i in few], holdout=data.holdout[few],
    )  # fmt: skip
    fewer = Loader(alone, loader.conditions, 4, settings.train.augment)
    whole, mixed = (whitebox.both_sides(built, x, "cpu", 10, KEY, QUIET) for x in (loader, others))
    part = whitebox.both_sides(built, fewer, "cpu", 4, KEY, QUIET)
    for attacked in ATTACKS[name]:
        for side in (0, 1):
            a, b = whole[side][attacked], mixed[side][attacked]
            assert np.array_equal(a[::2], b[::2]) and not np.any(a[1::2] == b[1::2])
        kept = [[0, 2, 4, 6], [0, 2, 8]]
        for side in (0, 1):
            a, b = whole[side][attacked][kept[side]], part[side][attacked]
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@every_backbone
def test_seeds_reproduce(name: str, learnt: tuple[Config, Loader, Artifact]) -> None:
    settings, loader, model = learnt
    torch.manual_seed(0)
    first = attack(settings, model, loader)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert attack(settings, model, loader) == first
    assert torch.equal(before, torch.random.get_rng_state())
    built = whitebox.load(settings, model, loader, "cpu")
    one, other = (
        whitebox.both_sides(built, loader, "cpu", 10, key, QUIET) for key in (KEY, Key.root(1))
    )
    for attacked in ATTACKS[name]:
        drawn = attacked in ("denoising loss", "evidence lower bound")
        assert np.array_equal(one[0][attacked], other[0][attacked]) != drawn


def test_scans_of_one_person_are_one_score() -> None:
    """The mean over scans, for a person whose scans lie in two batches."""
    settings = config("autoencoder")
    loader = cohort(settings, 8, 4)
    data = loader.dataset
    names = np.array(["a", "b", "c", "d", "a", "a", "b", "e", "x", "y", "x", "z"])
    several: Dataset = replace(data, patients=names)
    both = Loader(several, loader.conditions, 5, settings.train.augment)
    model = train.build(settings, both, KEY, "cpu")
    members, others = whitebox.both_sides(model, both, "cpu", 5, KEY, QUIET)
    batch = both.read(list(range(12)), "cpu")
    each = model.membership_scores(batch.x[:, 0], batch.c[:, 0], batch.given[:, 0], KEY)
    scans = each["reconstruction"].numpy()
    for found, people in ((members, "abcde"), (others, "xyz")):
        wanted = [scans[names == p].mean() for p in people]
        np.testing.assert_allclose(found["reconstruction"], wanted, rtol=1e-5)


# --- the scores against their definitions ---------------------------------------------------------


@pytest.mark.parametrize("prediction", ["v", "epsilon", "sample"])
def test_the_denoising_score_is_the_loss_of_ho_et_al(prediction: str) -> None:
    """eq. 14 at each level, by a loop over scans, levels and draws."""
    settings = DDPM.model_validate(
        {"space": {"kind": "voxel"}, "prediction": prediction, "widths": (4,)}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = settings.build(VolumeSpec(1, (8, 8, 8), 2), Optimizer())
    assert isinstance(model, Diffusion)
    x, c = torch.rand(3, 1, 8, 8, 8), torch.rand(3, 2)
    nothing = torch.zeros(3, 0, 8, 8, 8)
    found = model.membership_scores(x, c, nothing, KEY)["denoising loss"]
    process, wanted = model.process, torch.zeros(3, dtype=torch.float64)
    for n in range(3):
        y = 2 * x[[n, n]] - 1
        for i, sigma in enumerate(_ATTACKED_AT):
            t = process.time_of_sigma(torch.tensor(sigma))
            errors = []
            for k in range(_ATTACK_DRAWS):
                eps = torch.randn(1, 8, 8, 8, generator=KEY.fold("noise", i, k).torch())
                x_t = process.diffuse(y, eps.expand(2, -1, -1, -1, -1), t)
                with torch.no_grad():
                    level = torch.full((2,), math.log(sigma))
                    out = model.network(x_t, level, c[[n, n]])
                _, noise = process.estimates(settings.prediction, out, x_t, t)  # type: ignore[arg-type]
                errors.append(float((noise - eps)[0].double().square().mean()))
            # of the clean tensor: sigma^2 times that of the noise
            wanted[n] -= math.log(np.mean(errors) * sigma**2) / len(_ATTACKED_AT)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_divergence_from_the_fitted_prior_is_that_of_torch() -> None:
    g = torch.Generator().manual_seed(0)
    prior = LatentPrior(2, 3)
    mean, log_var = torch.randn(40, 3, generator=g), torch.randn(40, 3, generator=g) - 2
    c = torch.randn(40, 2, generator=g)
    standard = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)
    torch.testing.assert_close(prior.divergence(mean, log_var, c).float(), standard)
    prior.fit(mean + c @ torch.tensor([[1.0, 2, 3], [0, -1, 0.5]]), log_var.exp(), c)
    centre = c @ prior.weight_DL + prior.bias_L
    wanted = kl_divergence(
        MultivariateNormal(mean, torch.diag_embed(log_var.exp())),
        MultivariateNormal(centre, scale_tril=prior.factor_LL),
    )
    torch.testing.assert_close(
        prior.divergence(mean, log_var, c).float(), wanted, rtol=1e-4, atol=1e-4
    )


def test_the_bound_is_below_the_likelihood_and_grows_with_the_fit(tmp_path: Path) -> None:
    """By Monte Carlo over the prior: log p(x) >= the bound, of a decoder that ignores the latent
    with equality but for the divergence."""
    settings = config("cvae")
    loader = cohort(settings)
    model: Any = train.build(settings, loader, KEY, "cpu")
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.zero_()
    batch = loader.read(list(range(6)), "cpu")
    x, c, nothing = batch.x[:, 0], batch.c[:, 0], batch.given[:, 0]
    found = model.membership_scores(x, c, nothing, KEY)["evidence lower bound"] * 512
    with torch.no_grad():
        flat = model.decoder(torch.zeros(6, 8), c)
        density = -model.noise.full(x - flat).double()
        mean, log_var = model.encoder(x, c)
    standard = Independent(Normal(torch.zeros(8), 1.0), 1)
    posterior = Independent(Normal(mean, (0.5 * log_var).exp()), 1)
    wanted = density - kl_divergence(posterior, standard.expand((6,))).double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("backbone", ["ddpm voxel", "ddpm wavelet", "ddpm latent", "cgan"])
def test_masks_are_told_to_the_attack(backbone: str) -> None:
    """Drawn ones are among the channels; a given one changes the score of its own scan alone."""
    settings = config(backbone)
    spec = VolumeSpec(2, (8, 8, 8), 0, given=1, masks=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = settings.backbone.build(spec, Optimizer())
    g = torch.Generator().manual_seed(1)
    x, given = (torch.rand(4, n, 8, 8, 8, generator=g) for n in (2, 1))
    other = given.clone()
    other[2] = 1 - other[2]
    a, b = (model.membership_scores(x, x.new_zeros(4, 0), m, KEY) for m in (given, other))
    first = next(iter(a))
    assert torch.equal(a[first][[0, 1, 3]], b[first][[0, 1, 3]])
    assert a[first][2] != b[first][2]
    assert all(torch.isfinite(v).all() for v in a.values())


# --- from scores to estimates ---------------------------------------------------------------------


def estimates(members: Floats, others: Floats) -> tuple[Estimate, Estimate]:
    auc, share = whitebox.estimates({"x": members}, {"x": others}, KEY, 200, 7, "said")
    return auc, share


def test_both_estimates_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(3)
    for n, m in ((12, 9), (40, 30), (7, 20)):
        a, b = rng.normal(0.7, 1, n), rng.normal(0, 1, m)
        auc, share = estimates(a, b)
        assert auc.value == pytest.approx(np.mean([x > y for x in a for y in b]))
        assert auc.ci is not None and auc.ci[0] <= auc.value <= auc.ci[1]
        best = max(t for t in [-np.inf, *b] if np.mean(b >= t) > 0.1)  # the next one is a tenth
        assert share.value == pytest.approx(np.mean(a > best)) and np.mean(b > best) <= 0.1
        assert (auc.n, auc.n_holdout, auc.seed, auc.slice) == (n, m, 7, "score=x")
        assert (auc.floor, share.floor) == (0.5, (m // 10 + 1) / (m + 1))  # whom chance would name
        assert auc.note.endswith("; said") and share.note.endswith("; said")


def test_scores_that_are_all_the_same_are_guessing() -> None:
    auc, share = estimates(np.ones(10), np.ones(8))
    assert auc.value == 0.5 and share.value == 0 and auc.ci == (0.5, 0.5)


def test_scores_that_are_no_numbers_have_no_value() -> None:
    for e in estimates(np.array([1.0, np.nan, 2.0, 3.0]), np.ones(5)):
        assert e.value is None and e.ci is None and "diverged" in e.note
    text = whitebox.describe(estimates(np.array([np.inf] * 4), np.ones(5)))
    assert text == [
        "weights    x: not attacked: some scores are no numbers: the training has diverged"
    ]


@pytest.mark.parametrize(("n_train", "n_holdout"), [(10, 0), (10, 1), (3, 5)])
def test_without_both_sides_nothing_is_attacked(
    n_train: int, n_holdout: int, tmp_path: Path
) -> None:
    settings = config("autoencoder")
    loader = cohort(settings, n_train, n_holdout)
    found = attack(settings, untrained(settings, loader, tmp_path), loader)
    assert [e.name for e in found] == list(whitebox.NAMES)
    assert all(e.value is None and f"{n_holdout} held-out patients" in e.note for e in found)
    (line,) = whitebox.describe(found)
    assert line.startswith(f"weights    not attacked: {n_train} training and {n_holdout} held-out")


# --- the command ----------------------------------------------------------------------------------


def test_a_run_without_privacy_is_attacked_and_has_no_claim(
    copied: Finished, synthmed: Callable[..., Result]
) -> None:
    result = synthmed("audit", copied.path, "--device", "cpu")
    assert result.code == 0
    assert "claim      none: the run was trained without differential privacy" in result.out
    assert "weights    evidence lower bound: AUC" in result.out
    assert "weights never leave the house" in result.out
    assert "passed" not in result.out and "held-out patients under the weights" in result.err
    again = synthmed("audit", copied.path, "--device", "cpu", "--json", "-q")
    assert again.code == 0 and again.err == ""
    found = again.json()
    assert found["passed"] and found["epsilon_claimed"] is None and found["records"] == []
    file = (copied.path / "private/audit/audit.json").read_text()
    assert json.loads(file) == found
    index = json.loads((copied.path / "private/prepare/dataset.json").read_text())
    assert not [s["patient"] for s in index["scans"] if s["patient"] in file]


def test_the_restricted_report_shows_it_and_nothing_that_leaves_does(
    copied: Finished, synthmed: Callable[..., Result]
) -> None:
    assert synthmed("release", copied.path, "-q").code == 0
    before = {p: p.read_bytes() for p in (copied.path / "release").rglob("*") if p.is_file()}
    found = synthmed("audit", copied.path, "--device", "cpu", "--json", "-q").json()
    assert synthmed("release", copied.path, "-q").code == 0
    inside = json.loads((copied.path / "private/report/report.json").read_text())
    shown = [e for e in inside["estimates"] if e["group"] == "audit"]
    assert {(e["name"], e["slice"]) for e in shown} == {
        (name, f"score={a}") for name in whitebox.NAMES for a in ATTACKS["cvae"]
    }
    assert [e["value"] for e in shown] == [e["value"] for e in found["membership"]]
    page = (copied.path / "private/report/report.html").read_text()
    assert "Do the weights tell who was trained on?" in page
    assert not [e for e in _worst_slices(inside) if e["group"] == "audit"]
    for path, content in before.items():
        text = path.read_bytes()
        assert b"whitebox" not in text and b"weights tell" not in text
        if path.suffix == ".gz":
            assert text == content


def test_no_policy_can_ask_for_it(
    copied: Finished, synthmed: Callable[..., Result], make_config: Callable[..., Path]
) -> None:
    """A cohort is judged by what it tells itself; a rule on the weights finds no figure."""
    synthmed("audit", copied.path, "--device", "cpu", "-q")
    rules = [{"estimate": "whitebox_auc", "slice": "score=reconstruction", "at_most": 1}]
    asked = make_config("asked", policy__rules=rules)
    result = synthmed("generate", asked, "--run", copied.path, "--overwrite", "-q", "--json")
    assert result.code == 4 and result.json()["decision"] == "REVIEW"
    assert any("was not computed" in x for x in result.json()["reasons"])
    shared = (copied.path / "withheld/report/report.json").read_text()
    assert "score=reconstruction" in shared  # the rule itself, and no figure
    assert json.loads(shared)["estimates"] == []


def test_a_promise_that_the_model_does_not_state_is_no_claim_that_passes(
    copied: Finished, synthmed: Callable[..., Result]
) -> None:
    file = copied.path / "config.yaml"
    text = file.read_text()
    block = "privacy: {epsilon: 8, sample_rate: 0.5, patients: 18}"
    promised = {"privacy: null": block, "view: drawn": "view: grid"}
    for before, after in {**promised, "patient: null": "patient: participant_id"}.items():
        assert text.count(f"{before}\n") == 1
        text = text.replace(before, after)
    file.write_text(text)
    result = synthmed("audit", copied.path, "--device", "cpu")
    assert result.code == 2 and "its model states nothing" in result.err
