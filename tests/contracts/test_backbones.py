"""What every backbone must hold, over every member of the union."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import grad, vmap

from synthmed.backbones import Backbone
from synthmed.backbones.generative import Batch, Phase, VolumeSpec, named_parameters
from synthmed.config import Optimizer
from synthmed.keys import Key

GRID, CHANNELS, WIDTH, PATIENTS, SCANS = (9, 12, 10), 2, 3, 3, 2
SLICES = [(9, 12, 1), (9, 1, 10), (1, 12, 10)]
SPEC = VolumeSpec(CHANNELS, GRID, WIDTH)
NOTHING = torch.zeros(4, 0, *GRID)


MAP = {"widths": (4, 8), "code": {"kind": "map", "channels": 3}}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "autoencoder": [{"factors": 6}],
    "cgan": [{"factors": 6}, {"factors": 2, "variety": 0.5}],
    "cvae": [{"factors": 6}],
    "ddpm": [
        {"space": {"kind": "voxel"}, "prediction": "v", "dropout": 0.2},
        {"space": {"kind": "voxel"}, "prediction": "residual", "unconditional": 0},
        {"space": {"kind": "wavelet", "levels": 2}, "prediction": "epsilon"},
        {"space": {"kind": "wavelet", "levels": 1}, "prediction": "sample"},
        {"space": {"kind": "latent", "autoencoder": MAP}},
        {"space": {"kind": "latent", "autoencoder": MAP}, "prediction": "v", "guidance": 2},
    ],
}
"""Further settings of a member that change what it computes, by its name."""


def members() -> list[Any]:
    """Each member with its defaults, then with each of its variants: class and settings."""
    union = getattr(Backbone, "__args__", None)
    found = []
    for member in union[0].__args__ if union else [Backbone]:
        name = member.model_fields["name"].default
        for settings in [{}, *VARIANTS.get(name, [])]:
            words = [w for v in settings.values() for w in _words(v)]
            found.append(pytest.param((member, settings), id=" ".join([name, *words])))
    return found


def _words(setting: Any) -> list[str]:
    """What a setting is called in the name of a test."""
    return [str(setting["kind"])] if isinstance(setting, dict) else [str(setting)]


def built(member: Any, settings: dict[str, Any], spec: VolumeSpec = SPEC) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = {"widths": (4, 8), "latent": 4}
        small = {k: v for k, v in tiny.items() if k in member.model_fields}
        model = member.model_validate({**small, **settings}).build(spec, Optimizer())
    for start in (r for r in model.rounds() if not r.phases):
        # of what begins as a Gaussian rows can mix in it too, and unfitted it is black and flat
        start.finish([batch(2, grid=spec.grid)])
    return model


@pytest.fixture(params=members())
def model(request: pytest.FixtureRequest) -> Any:
    return built(*request.param)


def batch(seed: int = 0, patients: int = PATIENTS, grid: tuple[int, int, int] = GRID) -> Batch:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(patients, SCANS)
    mask[0, 1] = 0  # the first patient has one scan, the second is padding
    return Batch(
        torch.rand(patients, SCANS, CHANNELS, *grid, generator=g),
        torch.rand(patients, SCANS, WIDTH, generator=g),
        torch.zeros(patients, SCANS, 0, *grid),
        mask,
    )


def draws(phase: Phase, patients: int = PATIENTS) -> dict[str, torch.Tensor]:
    each = [phase.draw(torch.Generator().manual_seed(i), SCANS) for i in range(patients)]
    return {k: torch.stack([d[k] for d in each]) for k in each[0]}


def phases(model: Any) -> list[Phase]:
    return [p for r in model.rounds() for p in r.phases]


def test_shares_of_the_budget_sum_to_one_and_phases_are_named_once(model: Any) -> None:
    assert sum(r.share for r in model.rounds()) == pytest.approx(1)
    names = [p.name for p in phases(model)]
    assert len(set(names)) == len(names)


def test_every_parameter_is_trained_by_some_phase_and_gets_a_gradient(model: Any) -> None:
    params = named_parameters(model)
    reached: set[str] = set()
    for phase in phases(model):
        loss = phase.loss(params, batch() if phase.reads_patients else None, draws(phase), 1.0)
        mine = {k: p for k, p in params.items() if phase.trainable(k) and p.requires_grad}
        grads = torch.autograd.grad(loss.sum(), list(mine.values()), allow_unused=True)
        reached |= {k for k, g in zip(mine, grads, strict=True) if g is not None and g.any()}
    assert reached == {k for k, p in params.items() if p.requires_grad}


def test_one_finite_loss_a_patient(model: Any) -> None:
    for phase in phases(model):
        loss = phase.loss(
            named_parameters(model), batch() if phase.reads_patients else None, draws(phase), 0.5
        )
        assert loss.shape == (PATIENTS,)
        assert torch.isfinite(loss).all()


def test_isolation_changing_one_patient_leaves_the_others_bit_identical(model: Any) -> None:
    for phase in (p for p in phases(model) if p.reads_patients):
        params = named_parameters(model)
        first, other = batch(0), batch(1)
        mixed = first._replace(x=first.x.clone(), c=first.c.clone())
        mixed.x[1], mixed.c[1] = other.x[1], other.c[1]
        a = phase.loss(params, first, draws(phase), 0.5)
        b = phase.loss(params, mixed, draws(phase), 0.5)
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert a[1] != b[1]


def test_padding_is_not_seen(model: Any) -> None:
    for phase in (p for p in phases(model) if p.reads_patients):
        params = named_parameters(model)
        padded = batch()
        changed = padded._replace(x=padded.x.clone())
        changed.x[0, 1] = 0.123
        a, b = (phase.loss(params, x, draws(phase), 0.5) for x in (padded, changed))
        assert torch.equal(a, b)


def test_per_patient_gradients_by_vmap_equal_a_loop(model: Any) -> None:
    """The private path: the same loss on one patient, under vmap(grad), against autograd."""
    for phase in (p for p in phases(model) if p.reads_patients):
        params = {k: p.detach() for k, p in named_parameters(model).items() if p.requires_grad}
        frozen = {k: p for k, p in named_parameters(model).items() if not p.requires_grad}
        x, d = batch(), draws(phase)

        def one(
            p: dict[str, torch.Tensor],
            b: Batch,
            r: dict[str, torch.Tensor],
            phase: Phase = phase,
            frozen: dict[str, torch.Tensor] = frozen,
        ) -> torch.Tensor:
            alone = Batch(*(t[None] for t in b))
            return phase.loss({**frozen, **p}, alone, {k: v[None] for k, v in r.items()}, 0.5)[0]

        each = vmap(grad(one), in_dims=(None, 0, 0))(params, x, d)
        for i in range(PATIENTS):
            leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
            loss = one(leaves, Batch(*(t[i] for t in x)), {k: v[i] for k, v in d.items()})
            brute = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            size = torch.stack([g.norm() for g in brute if g is not None]).norm()
            for k, g in zip(leaves, brute, strict=True):
                if g is not None:
                    assert (each[k][i] - g).norm() <= 1e-4 * size


def test_loss_is_pure_and_leaves_global_randomness_alone(model: Any) -> None:
    for phase in phases(model):
        params = named_parameters(model)
        x = batch() if phase.reads_patients else None
        before = torch.random.get_rng_state()
        a, b = (phase.loss(params, x, draws(phase), 0.5) for _ in range(2))
        assert torch.equal(a, b)
        assert torch.equal(before, torch.random.get_rng_state())


def test_samples_have_the_shape_and_depend_on_their_own_row_alone(model: Any) -> None:
    c = torch.rand(4, WIDTH, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(4)
    a = model.sample(c, keys, NOTHING)
    assert a.shape == (4, CHANNELS, *GRID)
    assert torch.isfinite(a).all()
    changed = c.clone()
    changed[2] += 1
    b = model.sample(changed, torch.tensor([0, 9, 2, 3]), NOTHING)
    assert torch.equal(a[[0, 3]], b[[0, 3]])
    assert not torch.equal(a[1], b[1])
    assert not torch.equal(a[2], b[2])


def test_membership_scores_are_one_a_scan_and_depend_on_their_own_row_alone(model: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x, c = torch.rand(4, CHANNELS, *GRID, generator=g), torch.rand(4, WIDTH, generator=g)
    changed = x.clone()
    changed[1] = 1 - changed[1]
    before = torch.random.get_rng_state()
    a, again, b = (model.membership_scores(v, c, NOTHING, Key.root(0)) for v in (x, x, changed))
    assert torch.equal(before, torch.random.get_rng_state())
    assert a and a.keys() == b.keys()
    for name, score in a.items():
        assert score.shape == (4,) and score.dtype == torch.float64 and not score.requires_grad
        assert torch.isfinite(score).all()
        assert torch.equal(score, again[name])
        assert torch.equal(score[[0, 2, 3]], b[name][[0, 2, 3]])
        assert score[1] != b[name][1]


def test_parameters_and_kept_buffers_survive_a_round_trip(model: Any) -> None:
    for module in model.modules.values():
        state = {k: v.clone() for k, v in module.state_dict().items()}
        for p in module.parameters():
            p.data.add_(1)
        module.load_state_dict(state)
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("grid", SLICES, ids=["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("member", members())
def test_single_slices_are_learned_and_drawn(member: Any, grid: tuple[int, int, int]) -> None:
    """A volume of one voxel along an axis: finite losses and gradients, samples of that grid."""
    model = built(*member, VolumeSpec(CHANNELS, grid, WIDTH))
    for phase in phases(model):
        params = {k: v.detach().requires_grad_() for k, v in named_parameters(model).items()}
        x = batch(grid=grid) if phase.reads_patients else None
        loss = phase.loss(params, x, draws(phase), 0.5)
        assert torch.isfinite(loss).all()
        moved = [p for name, p in params.items() if phase.trainable(name)]
        for slope in torch.autograd.grad(loss.sum(), moved, allow_unused=True):
            assert slope is None or torch.isfinite(slope).all()
    c = torch.rand(4, WIDTH, generator=torch.Generator().manual_seed(0))
    out = model.sample(c, torch.arange(4), torch.zeros(4, 0, *grid))
    assert out.shape == (4, CHANNELS, *grid)
    assert torch.isfinite(out).all()
