"""The autoencoder: its penalties and corruptions, its codes, and the density fitted to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.func import grad, vmap

from synthmed.backbones.autoencoder import Autoencoder, Compressor, GenerativeAutoencoder
from synthmed.backbones.autoencoder import density_of as hoyer
from synthmed.backbones.corruption import Erase, Noise
from synthmed.backbones.generative import Batch, VolumeSpec, named_parameters
from synthmed.backbones.nets.codec import CodeScale
from synthmed.backbones.nets.noise import _FLOOR
from synthmed.config import Optimizer
from synthmed.errors import UsageError
from synthmed.keys import Key

GRID, D = (9, 12, 10), 2
SPEC = VolumeSpec(2, GRID, D)
VECTOR = {"code": {"kind": "vector", "length": 4}}
SIX = {"kind": "vector", "length": 6}
MAP = {"code": {"kind": "map", "channels": 3}}
VARIANTS: Mapping[str, dict[str, Any]] = {
    "map": MAP,
    "sparse": {**VECTOR, "penalty": {"kind": "l1", "weight": 1.0}},
    "sparse map": {**MAP, "penalty": {"kind": "l1", "weight": 1.0}},
    "decayed": {**VECTOR, "penalty": {"kind": "l2"}},
    "noise": {**VECTOR, "corruption": {"kind": "noise", "sd": 0.2}},
    "erase": {**MAP, "corruption": {"kind": "erase"}},
    "no residual": {**VECTOR, "residual": "none"},
    "begun": {**VECTOR, "factors": 3},
}


def build(spec: VolumeSpec = SPEC, **settings: Any) -> GenerativeAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Autoencoder.model_validate({"widths": (4, 8), **settings})
        return config.build(spec, Optimizer())


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def model(request: pytest.FixtureRequest) -> GenerativeAutoencoder:
    made = build(**request.param)
    for start in made.rounds()[:-1]:
        assert start.finish is not None
        start.finish([batch(seed=2)])
    return made


def batch(patients: int = 3, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(patients, 2)
    mask[0, 1] = 0
    return Batch(
        torch.rand(patients, 2, 2, *GRID, generator=g),
        torch.rand(patients, 2, D, generator=g),
        torch.zeros(patients, 2, 0, *GRID),
        mask,
    )


def draws(model: GenerativeAutoencoder) -> dict[str, Tensor]:
    phase = model.rounds()[-1].phases[0]
    each = [phase.draw(torch.Generator().manual_seed(i), 2) for i in range(3)]
    return {k: torch.stack([d[k] for d in each]) for k in each[0]}


# --- every variant keeps the contract ------------------------------------------------------------


def test_one_patient_s_loss_is_its_own(model: GenerativeAutoencoder) -> None:
    loss = model.rounds()[-1].phases[0].loss
    params = named_parameters(model)
    first, other = batch(), batch(seed=1)
    mixed = first._replace(x=first.x.clone(), c=first.c.clone())
    mixed.x[1], mixed.c[1] = other.x[1], other.c[1]
    mixed.x[0, 1] = 7  # padding
    a, b = (loss(params, x, draws(model), 0.5) for x in (first, mixed))
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert a[1] != b[1]


def test_gradients_by_patient_equal_a_loop(model: GenerativeAutoencoder) -> None:
    loss = model.rounds()[-1].phases[0].loss
    every = named_parameters(model)
    params = {k: p.detach() for k, p in every.items() if p.requires_grad}
    frozen = {k: p for k, p in every.items() if not p.requires_grad}
    x, d = batch(), draws(model)

    def one(p: dict[str, Tensor], b: Batch, r: dict[str, Tensor]) -> Tensor:
        alone = Batch(*(t[None] for t in b))
        return loss({**frozen, **p}, alone, {k: v[None] for k, v in r.items()}, 0.5)[0]

    each = vmap(grad(one), in_dims=(None, 0, 0))(params, x, d)
    for i in range(3):
        alone = grad(one)(params, Batch(*(t[i] for t in x)), {k: v[i] for k, v in d.items()})
        size = torch.stack([g.norm() for g in alone.values()]).norm()
        assert all((each[k][i] - g).norm() <= 1e-4 * size for k, g in alone.items())


def test_finish_fits_and_a_fresh_model_with_its_state_samples_the_same(
    model: GenerativeAutoencoder,
) -> None:
    figures = model._finish([batch(20), batch(20, seed=1)])
    assert figures["latent"] == torch.tensor(model.compressor.code_shape).prod()
    keys, c = torch.arange(3), torch.rand(3, D, generator=torch.Generator().manual_seed(0))
    a = model.sample(c, keys, torch.zeros(3, 0, *GRID))
    assert a.shape == (3, 2, *GRID)
    other = GenerativeAutoencoder(model.config, SPEC, Optimizer())
    for name, module in other.modules.items():
        module.load_state_dict(model.modules[name].state_dict())
    assert torch.equal(other.sample(c, keys, torch.zeros(3, 0, *GRID)), a)


def test_examine_tells_how_well_it_reconstructs(model: GenerativeAutoencoder) -> None:
    seen = model.examine(batch(), batch(seed=1))
    figures = {f"{f}_{s}" for f in ("psnr", "ssim") for s in ("train", "holdout")}
    assert figures <= set(seen.figures)
    assert {"reconstructions_train", "reconstructions_holdout"} <= set(seen.pictures)
    spoilt = model.config.corruption.kind != "none"
    assert (len([k for k in seen.figures if "repaired" in k]) > 0) == spoilt
    assert ("units" in seen.tables) == (model.config.code.kind == "vector")
    again = model.examine(batch(), None)
    assert all(seen.figures[k] == v for k, v in again.figures.items())
    assert not any("holdout" in k for k in again.figures)


# --- codes ---------------------------------------------------------------------------------------


def test_a_map_keeps_its_place_and_a_vector_has_none() -> None:
    # 9 x 12 x 10 is folded to 5 x 6 x 5 and halved once
    assert build(**MAP).compressor.code_shape == (3, 3, 3, 3)
    assert build(**VECTOR).compressor.code_shape == (4, 1, 1, 1)
    compressor = build(VolumeSpec(1, (32, 32, 32), 0), **MAP).compressor
    x = torch.zeros(1, 1, 32, 32, 32)
    changed = x.clone()
    changed[..., 28:, 28:, 28:] = 1
    moved = compressor.encode(changed, torch.zeros(1, 0)) - compressor.encode(x, torch.zeros(1, 0))
    size = moved.square().sum(1)[0]
    assert size[-1, -1, -1] > 10 * size[:4, :4, :4].mean()


def test_codes_are_in_units_of_their_measured_scale_and_decode_the_same() -> None:
    compressor = build(**MAP).compressor
    x, c = batch(20).x[:, 0], batch(20).c[:, 0]
    with torch.no_grad():
        raw = compressor.encode(x, c)
        before = compressor.decode(raw, c)
        code, _, _ = compressor.measure([batch(20)._replace(mask=torch.ones(20, 2))])
        wide = code.transpose(0, 1).flatten(1)
        torch.testing.assert_close(wide.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(wide.std(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)
        after = compressor.decode(compressor.encode(x, c), c)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_a_channel_that_does_not_vary_is_left_alone() -> None:
    scale = CodeScale(2)
    codes = torch.stack([torch.full((5, 2, 2, 2), 3.0), torch.randn(5, 2, 2, 2)], 1)
    scale.fit(codes)
    assert torch.isfinite(scale.normalise(codes)).all()
    assert scale.sd_K[0] == 1
    torch.testing.assert_close(scale.restore(scale.normalise(codes)), codes)


# --- penalties -----------------------------------------------------------------------------------


def test_the_sparsity_is_one_over_the_root_for_one_unit_and_one_for_equal_ones() -> None:
    a = torch.tensor([[0, 3.0, 0, 0], [2.0, 2, 2, 2], [1.0, 1, 0, 0], [0, 0, 0, 0]])
    assert hoyer(a).tolist() == pytest.approx([0.5, 1, 2**-0.5, 0], abs=1e-6)
    assert hoyer(100 * a).tolist() == pytest.approx(hoyer(a).tolist(), abs=1e-6)


def test_weight_decay_is_the_penalty_s_and_reads_no_patient() -> None:
    assert build(penalty={"kind": "l2", "weight": 0.3}).rounds()[0].phases[
        0
    ].optimizer == Optimizer(weight_decay=0.3)
    assert build().rounds()[0].phases[0].optimizer == Optimizer()


def scans(n: int = 32) -> Batch:
    """Volumes that take few numbers to say: a ramp and a plate, of random strength."""
    g = torch.Generator().manual_seed(0)
    strength = torch.rand(n, 2, generator=g)
    ramp = torch.linspace(0, 1, 8)[:, None, None].expand(8, 8, 8)
    plate = torch.zeros(8, 8, 8)
    plate[2:6, 3:5] = 1
    x = torch.einsum("nk,kxyz->nxyz", strength, torch.stack([ramp, plate]))
    x = x + 0.02 * torch.randn(n, 8, 8, 8, generator=g)
    return Batch(
        x[:, None, None], torch.zeros(n, 1, 0), torch.zeros(n, 1, 0, 8, 8, 8), torch.ones(n, 1)
    )


def trained(steps: int = 120, **settings: Any) -> tuple[GenerativeAutoencoder, dict[str, float]]:
    data = scans()
    model = build(VolumeSpec(1, (8, 8, 8), 0), **settings)
    phase = model.rounds()[-1].phases[0]
    params = named_parameters(model)
    optimizer = torch.optim.AdamW([p for p in params.values() if p.requires_grad], lr=5e-3)
    for step in range(steps):
        each = [phase.draw(torch.Generator().manual_seed(32 * step + i), 1) for i in range(32)]
        d = {k: torch.stack([e[k] for e in each]) for k in each[0]}
        optimizer.zero_grad()
        phase.loss(params, data, d, step / steps).mean().backward()
        torch.nn.utils.clip_grad_norm_([p for p in params.values() if p.requires_grad], 1.0)
        optimizer.step()
    return model, dict(model._finish([data]))


def test_it_learns_to_reconstruct_and_its_samples_vary_as_the_data_does() -> None:
    model, figures = trained(code=SIX)
    data = scans()
    seen = model.examine(data, None)
    variance = float(data.x.var(0).mean())
    error = 10 ** (-seen.figures["psnr_train"] / 10)
    assert error < 0.1 * variance
    x = model.sample(torch.zeros(200, 0), torch.arange(200), torch.zeros(200, 0, 8, 8, 8))
    assert float(x.var(0).mean()) == pytest.approx(variance, rel=0.4)
    torch.testing.assert_close(x.mean(0), data.x[:, 0].mean(0), atol=0.15, rtol=0)
    assert figures["latent_active"] >= 2
    assert model.remarks([], figures) == []


def test_the_l1_penalty_silences_units() -> None:
    code = {"kind": "vector", "length": 16}
    _, free = trained(code=code, penalty={"kind": "l1", "weight": 1e-4})
    model, sparse = trained(code=code, penalty={"kind": "l1", "weight": 2.0})
    assert sparse["active_share"] < 0.5 * free["active_share"]
    # what is told is what the decoder reads
    x, c = scans().x[:, 0], scans().c[:, 0]
    with torch.no_grad():
        read = model.compressor.decoder.active(model.compressor.encoder(x, c))
    assert sparse["active_share"] == pytest.approx(float((read > 0).double().mean()), abs=1e-4)


def test_a_collapsed_code_is_remarked_on() -> None:
    model = build(**VECTOR)
    assert "COLLAPSED" in model.remarks([], {"latent_active": 1, "latent": 4})[0]
    assert "directions" in model.remarks([], {"latent_active": 4, "mixture_explained": 0.5})[0]
    assert model.remarks([], {}) == []


# --- corruption ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def denoiser() -> GenerativeAutoencoder:
    return trained(code=SIX, corruption={"kind": "noise", "sd": 0.3})[0]


def test_trained_on_noise_it_removes_noise(denoiser: GenerativeAutoencoder) -> None:
    figures = denoiser.examine(scans(), None).figures
    assert figures["psnr_spoilt_train"] == pytest.approx(-20 * math.log10(0.3), abs=0.3)
    assert figures["psnr_repaired_train"] > figures["psnr_spoilt_train"] + 6


def test_trained_on_holes_it_fills_them() -> None:
    model, _ = trained(code=SIX, corruption={"kind": "erase"})
    figures = model.examine(scans(), None).figures
    assert figures["psnr_repaired_train"] > figures["psnr_spoilt_train"] + 3


def test_the_residual_is_measured_on_scans_that_are_whole(
    denoiser: GenerativeAutoencoder,
) -> None:
    x, c = scans().x[:, 0], scans().c[:, 0]
    compressor = denoiser.compressor
    with torch.no_grad():
        left = (x - compressor.decode(compressor.encode(x, c), c)).square().mean(0).sqrt()
    wanted = (left**2 + _FLOOR**2).sqrt()
    torch.testing.assert_close(compressor.noise.scale(), wanted, atol=1e-6, rtol=1e-3)


def test_noise_has_the_deviation_asked_for() -> None:
    noise = Noise(sd=0.25)
    d = noise.draw(SPEC, torch.Generator().manual_seed(0), 40)
    x = torch.zeros(40, 2, *GRID)
    spoilt = noise.apply(x, {k: v[None] for k, v in d.items()})
    assert float(spoilt.std()) == pytest.approx(0.25, rel=0.02)


def test_holes_are_cuboids_of_the_sizes_asked_for_in_all_channels() -> None:
    erase = Erase(blocks=1, side=(0.3, 0.5))
    spec = VolumeSpec(2, (20, 30, 10), 0)
    kept = erase.draw(spec, torch.Generator().manual_seed(0), 200)["kept_S1XYZ"]
    spoilt = erase.apply(torch.ones(200, 2, 20, 30, 10), {"kept_S1XYZ": kept[None]})
    assert torch.equal(spoilt[:, 0], spoilt[:, 1])
    whole, places = 0, set()
    for scan in kept[:, 0]:
        hole = (scan == 0).nonzero()
        if len(hole) == 0:
            whole += 1
            continue
        low, high = hole.min(0).values, hole.max(0).values
        size = high - low + 1
        assert len(hole) == size.prod(), "one full cuboid"
        assert ((size >= torch.tensor([6, 9, 3])) & (size <= torch.tensor([10, 15, 5]))).all()
        places.add(tuple(low.tolist()))
    assert whole == pytest.approx(100, abs=30), "none or one block, evenly"
    assert len(places) > 50


# --- limits --------------------------------------------------------------------------------------


def test_given_masks_are_refused_with_the_families_that_take_them() -> None:
    with pytest.raises(UsageError, match="autoencoder: cannot draw an image for a mask") as error:
        Autoencoder().build(VolumeSpec(1, GRID, 0, given=1), Optimizer())
    assert "ddpm or cgan" in str(error.value)


def test_a_compressor_trains_only_what_is_its_own() -> None:
    """A latent model has further modules: their names must not be this phase's."""
    phase = Compressor(Autoencoder(widths=(4, 8)), SPEC, Optimizer()).phase()
    assert phase.trainable("encoder.blocks.0.weight")
    assert not phase.trainable("denoiser.weight")
    assert not phase.trainable("encoder_of_masks.weight")


# --- the Gaussian that codes and volumes begin as -------------------------------------------------


def begun(**settings: Any) -> tuple[GenerativeAutoencoder, Batch]:
    """A model before its first step, its Gaussian fitted and its networks adding nothing, and the
    cohort of 24 with a scan each, the first planes black."""
    cohort = batch(24)
    cohort.mask[:, 1] = 0
    cohort.x.mul_(0.2).add_(0.4)  # so far from black that no draw reaches it
    cohort.x[:, :, :, :4] = 0
    made = build(**settings)
    start, learned = made.rounds()
    assert (start.phases, start.share, start.finish_privacy) == ([], 0, "refused")
    assert (len(learned.phases), learned.share) == (1, 1)
    assert start.finish is not None
    assert 0 < start.finish([cohort])["linear_explained"] <= 1
    compressor = made.compressor
    for silent in (compressor.decoder.out, compressor.encoder.head[-1]):
        torch.nn.init.zeros_(silent.weight)
        torch.nn.init.zeros_(silent.bias)
    return made, cohort


def test_before_the_first_step_scans_are_given_back_and_samples_are_the_gaussian_s() -> None:
    model, cohort = begun(**VECTOR, factors=24)
    x, c = cohort.x[:, 0], cohort.c[:, 0]
    assert model.compressor.code_shape == (24 + D, 1, 1, 1), "more than length: 4 asks for"
    assert model._finish([cohort])["mixture_explained"] == 1
    both = model.compressor
    with torch.no_grad():
        torch.testing.assert_close(both.decode(both.encode(x, c), c), x, atol=0.01, rtol=0)
    n = 40  # of each condition
    made = model.sample(c.repeat(n, 1), torch.arange(24 * n), torch.zeros(24 * n, 0, *GRID))
    assert not made[:, :, :4].any(), "where everybody is black, nobody is lit"
    lit, own = (v[:, :, 4:].flatten(1).double() for v in (made, x))
    # whatever conditions shift, over all of them together the moments are the cohort's
    variance = own.var(0, correction=0)
    assert ((lit.mean(0) - own.mean(0)) / (variance / len(lit)).sqrt()).abs().max() < 6
    spread = lit.var(0).mean() / variance.mean()
    assert float(spread) == pytest.approx(1, abs=0.1)


def test_no_direction_of_a_begun_code_is_left_out() -> None:
    """They vary alike, so that the strongest few of them would be any few."""
    model, cohort = begun(**VECTOR, factors=24, directions=4)
    assert model._finish([cohort])["mixture_explained"] == 1


def test_weights_that_hold_everybody_s_factors_tell_who_was_trained_on() -> None:
    model, cohort = begun(**VECTOR, factors=24)
    x, c = cohort.x[:, 0], cohort.c[:, 0]
    nothing = torch.zeros(24, 0, *GRID)
    mine, theirs = (model.membership_scores(v, c, nothing, Key.root(0)) for v in (x, x.roll(1, 4)))
    assert mine.keys() == {"reconstruction", "gaussian"}
    assert mine["gaussian"].min() > theirs["gaussian"].max()


@pytest.mark.parametrize("settings", [MAP, {**VECTOR, "penalty": {"kind": "l1"}}])
def test_a_code_that_cannot_begin_as_a_gaussian_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="factors: "):
        build(**settings, factors=4)
