"""Generator and critic, the three bounds on the critic's slope, and the measures of variety."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from synthmed.backbones.nets.adversarial import (
    Critic,
    Generator,
    even,
    level_sizes,
    unchecked,
)
from synthmed.backbones.nets.diversity import (
    compare,
    distances,
    effective_number,
    mean_distance,
)
from synthmed.backbones.nets.intensity import _LIFT
from synthmed.backbones.nets.lipschitz import Spectral, clip_weights, gradient_penalty


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


@pytest.fixture(autouse=True)
def _weights_from_one_seed() -> None:
    torch.manual_seed(0)


def make(grid: tuple[int, int, int], given: int = 0) -> tuple[Generator, tuple[Tensor, ...]]:
    """A small generator and what it takes for two samples."""
    network = Generator(2, given, grid, (4, 8, 8), 3, latent=5)
    noises = [randn(2, *s, seed=i) for i, s in enumerate(network.noise_shapes)]
    masks = (randn(2, given, *grid, seed=9) > 0).float()
    return network, (randn(2, 5, seed=7), randn(2, 3, seed=8), noises, masks)  # type: ignore[return-value]


@pytest.mark.parametrize("grid", [(8, 8, 8), (9, 12, 10), (5, 7, 3), (40, 6, 17), (2, 2, 1)])
@pytest.mark.parametrize("given", [0, 2])
def test_any_grid_goes_through_both_networks(grid: tuple[int, int, int], given: int) -> None:
    network, told = make(grid, given)
    made = network(*told)
    assert made.shape == (2, 2, *grid)
    assert made.min() >= -_LIFT  # what is below 0 is black, and cut where samples are drawn
    critic = Critic(2, given, grid, (4, 8, 8), 3, 6, bias=True)
    scores = critic(made, told[1], told[3])
    assert scores.shape == (2,)
    assert torch.isfinite(scores).all()


def test_a_critic_s_levels_have_the_sizes_that_the_generator_s_have() -> None:
    critic = Critic(1, 0, (9, 12, 40), (4, 4, 4), 0, 4, bias=False)
    h = critic.stem(torch.zeros(1, 8, *level_sizes((9, 12, 40), 3)[0]))
    for level, size in zip(critic.levels, level_sizes((9, 12, 40), 3)[1:], strict=True):
        h = level(h)
        assert h.shape[2:] == size


def test_odd_sides_are_made_even_by_their_last_plane() -> None:
    x = randn(1, 1, 3, 4, 5)
    wide = even(x)
    assert wide.shape == (1, 1, 4, 4, 6)
    assert torch.equal(wide[:, :, :3, :, :5], x)
    assert torch.equal(wide[:, :, 3, :, :5], x[:, :, 2])


def alternating(grid: tuple[int, int, int]) -> list[Tensor]:
    """The seven patterns of period two along one axis, two, or three: (1, 1, X, Y, Z) each."""
    lines = [(-1.0) ** torch.arange(n) for n in grid]
    along = [
        torch.einsum("x,y,z->xyz", *(v if k else v.abs() for v, k in zip(lines, on, strict=True)))
        for on in itertools.product((0, 1), repeat=3)
    ]
    return [x[None, None] for x in along[1:]]


@pytest.mark.parametrize("grid", [(8, 8, 8), (9, 7, 6), (2, 5, 8)])
def test_no_pattern_of_period_two_is_left_and_a_constant_is(grid: tuple[int, int, int]) -> None:
    for pattern in alternating(grid):
        assert unchecked(pattern).abs().max() < 1e-7
    torch.testing.assert_close(
        unchecked(torch.full((1, 1, *grid), 0.3)), torch.full(grid, 0.3)[None, None]
    )


def test_a_single_slice_is_filtered_within_its_plane() -> None:
    x = randn(2, 1, 6, 7, 1)
    torch.testing.assert_close(unchecked(x), unchecked(x.expand(2, 1, 6, 7, 4))[..., :1])


def test_inside_it_is_the_binomial_filter() -> None:
    x = randn(2, 3, 7, 8, 6)
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.einsum("x,y,z->xyz", line, line, line).expand(3, 1, 3, 3, 3)
    torch.testing.assert_close(
        unchecked(x)[..., 1:-1, 1:-1, 1:-1], F.conv3d(x, kernel, groups=3), atol=1e-6, rtol=0
    )


def test_volumes_are_no_checkerboards_whatever_the_weights() -> None:
    """The voxels of a cube may have channels as different as they like."""
    grid = (8, 8, 8)
    network, told = make(grid)
    with torch.no_grad():
        network.out.weight.zero_()
        network.out.bias.copy_(torch.tensor([3.0, -3.0]).repeat(8))
        network.template.fill_(2.0)  # where softplus is the identity
        x = network(*told)
        network.out.bias.zero_()
        plain = network(*told)
    torch.testing.assert_close(x, plain)


def test_the_first_volumes_are_smooth() -> None:
    """Before training the eight voxels of a cube are alike: no grain for the critic to undo."""
    network, told = make((8, 8, 8))
    cubes = network.out(randn(1, network.out.in_channels, 4, 4, 4)).unflatten(1, (-1, 8))
    assert cubes.std(2).max() < 1e-6
    assert network(*told).std() > 1e-3  # or the above would say nothing


@pytest.mark.parametrize("what", ["latent", "condition", "noise", "mask"])
def test_all_that_a_generator_is_told_changes_its_volume(what: str) -> None:
    network, (z, c, noises, masks) = make((8, 8, 8), given=1)
    for p in network.parameters():  # noise has no weight before training
        p.data.add_(0.05 * randn(*p.shape, seed=1))
    before = network(z, c, noises, masks)
    changed = {
        "latent": lambda: network(z + 1, c, noises, masks),
        "condition": lambda: network(z, c + 1, noises, masks),
        "noise": lambda: network(z, c, [n + 1 if n.shape[1] > 1 else n for n in noises], masks),
        "mask": lambda: network(z, c, noises, 1 - masks),
    }[what]()
    assert (before - changed).abs().max() > 1e-3


def test_a_critic_s_condition_is_a_projection_of_its_features() -> None:
    """score(x, c) - score(x, 0) is linear in c (Miyato and Koyama 2018, eq. 3)."""
    critic = Critic(1, 0, (8, 8, 8), (4, 8), 3, 6, bias=True)
    x, none = randn(5, 1, 8, 8, 8), torch.zeros(5, 0, 8, 8, 8)
    a, b = randn(5, 3, seed=1), randn(5, 3, seed=2)

    def shift(c: Tensor) -> Tensor:
        return critic(x, c, none) - critic(x, torch.zeros_like(c), none)

    torch.testing.assert_close(shift(2 * a - b), 2 * shift(a) - shift(b))
    assert shift(a).abs().max() > 1e-4


@pytest.mark.parametrize("grid", [(8, 8, 8), (16, 20, 24)])
def test_slopes_begin_small_whatever_the_grid(grid: tuple[int, int, int]) -> None:
    critic = Critic(1, 0, grid, (4, 8), 0, 6, bias=False)
    x = torch.rand(8, 1, *grid, generator=seeded(), requires_grad=True)
    none = torch.zeros(8, 0, *grid)
    (slope,) = torch.autograd.grad(critic(x, none[:, :, 0, 0, 0], none).sum(), x)
    assert float(slope.flatten(1).norm(dim=1).mean()) == pytest.approx(0.3, rel=0.3)


def test_dropped_features_do_not_reach_the_score() -> None:
    critic = Critic(1, 0, (8, 8, 8), (4, 8), 3, 6, bias=False)
    x, c, none = randn(2, 1, 8, 8, 8), randn(2, 3), torch.zeros(2, 0, 8, 8, 8)
    assert not critic(x, c, none, torch.zeros(2, 6)).any()
    assert torch.equal(critic(x, c, none, torch.ones(2, 6)), critic(x, c, none))


# --- slopes -----------------------------------------------------------------------------------


def test_penalty_of_a_linear_critic_is_its_closed_form() -> None:
    w = randn(3, 2, 2, 2)
    penalty = gradient_penalty(lambda x: (x * w).sum((1, 2, 3, 4)) + 7, randn(5, 3, 2, 2, 2))
    torch.testing.assert_close(penalty, ((w.norm() - 1) ** 2).expand(5))


def test_penalty_of_a_quadratic_critic_is_each_sample_s_own() -> None:
    """score = |x|^2 / 2 has slope |x|; a times it has penalty (a |x| - 1)^2."""
    x, a = randn(4, 6), torch.tensor(1.5, requires_grad=True)
    penalty = gradient_penalty(lambda v: a * v.square().sum(1) / 2, x)
    size = x.norm(dim=1)
    torch.testing.assert_close(penalty, (1.5 * size - 1) ** 2)
    (slope,) = torch.autograd.grad(penalty.sum(), a)
    torch.testing.assert_close(slope, (2 * (1.5 * size - 1) * size).sum())


def test_penalty_agrees_with_autograd_on_the_real_critic() -> None:
    critic = Critic(1, 0, (9, 8, 7), (4, 8), 3, 6, bias=False)
    x, c, none = randn(3, 1, 9, 8, 7), randn(3, 3), torch.zeros(3, 0, 9, 8, 7)
    penalty = gradient_penalty(lambda v: critic(v, c, none), x)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(critic(leaf, c, none).sum(), leaf, create_graph=True)
    expected = (slope.flatten(1).norm(dim=1) - 1) ** 2
    torch.testing.assert_close(penalty, expected)
    mine = torch.autograd.grad(penalty.sum(), critic.stem.weight)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(expected.sum(), critic.stem.weight)[0])


def test_clipped_weights_are_within_the_bound_and_small_ones_are_left() -> None:
    layer = nn.Linear(20, 20)
    before = layer.weight.detach().clone()
    clip_weights(layer, 0.05)
    assert max(p.abs().max() for p in layer.parameters()) <= 0.05
    small = before.abs() <= 0.05
    assert small.any() and not small.all()
    assert torch.equal(layer.weight[small], before[small])


def test_normalised_weights_have_a_largest_singular_value_of_one() -> None:
    network = nn.Sequential(nn.Conv3d(2, 5, 3), nn.Flatten(), nn.Linear(40, 7), nn.Linear(7, 1))
    spectral = Spectral(network)
    params = dict(network.named_parameters())
    for _ in range(100):
        spectral.follow(params)
    for name, value in spectral.normalised(params).items():
        if value.dim() > 1:
            top = torch.linalg.svdvals(value.detach().flatten(1))[0]
            assert top == pytest.approx(1, abs=1e-3), name
        else:
            assert torch.equal(value, params[name])


def test_power_iterations_follow_weights_that_move() -> None:
    """The bound holds while training, with few iterations a step (Miyato et al. 2018, sec. 2.1)."""
    layer = nn.Linear(30, 20)
    spectral = Spectral(layer)
    for i in range(100):
        layer.weight.data.add_(0.01 * randn(20, 30, seed=i))
        spectral.follow({"weight": layer.weight})
        top = torch.linalg.svdvals(spectral.normalised({"weight": layer.weight})["weight"])[0]
        assert 1 - 1e-5 < top < 1.1


def test_normalised_weights_take_the_gradient_through_their_size() -> None:
    """W / sigma(W) does not change with the size of W: its gradient along W is 0."""
    layer = nn.Linear(6, 5)
    spectral = Spectral(layer)
    out = spectral.normalised({"weight": layer.weight})["weight"]
    (slope,) = torch.autograd.grad((out * randn(5, 6)).sum(), layer.weight)
    assert (slope * layer.weight).sum().abs() < 1e-5
    assert slope.norm() > 0.1


@pytest.mark.parametrize(("stride", "patches"), [(1, 27), (2, 8)])
def test_the_norm_of_a_normalised_convolution_is_bounded_as_stated(
    stride: int, patches: int
) -> None:
    """By power iteration on the operator itself: at most the root of the patches a voxel is in."""
    conv = nn.Conv3d(2, 3, 3, stride=stride, padding=1, bias=False)
    conv.weight.data.abs_()  # all of one sign: the patches add up, as the bound allows
    spectral = Spectral(conv)
    weight = spectral.normalised({"weight": conv.weight})["weight"].detach()
    x = torch.rand(1, 2, 8, 8, 8, generator=seeded())
    for _ in range(100):
        x = x / x.norm()
        y = F.conv3d(x, weight, stride=stride, padding=1)
        size = y.norm()
        pad = (8 - 1) % stride
        x = F.conv_transpose3d(y, weight, stride=stride, padding=1, output_padding=pad)
    assert 1 < size <= math.sqrt(patches)


def test_normalised_parameters_go_into_a_functional_call() -> None:
    critic = Critic(1, 0, (8, 8, 8), (4, 8), 3, 6, bias=True)
    spectral = Spectral(critic)
    mine = spectral.normalised(dict(critic.named_parameters()))
    x, c = randn(2, 1, 8, 8, 8), randn(2, 3)
    score = functional_call(critic, mine, (x, c, torch.zeros(2, 0, 8, 8, 8)))
    assert torch.isfinite(score).all()
    assert list(spectral.state_dict())  # the singular vectors are kept with the weights


# --- variety ----------------------------------------------------------------------------------


def test_effective_number_counts_groups_that_are_far_apart() -> None:
    centres = 100 * torch.eye(4)
    assert effective_number(centres.repeat(5, 1), 1.0) == pytest.approx(4)
    assert effective_number(torch.ones(7, 3), 1.0) == pytest.approx(1)
    assert effective_number(100 * torch.eye(9), 1.0) == pytest.approx(9)


def test_effective_number_of_unequal_groups_is_the_exponential_of_their_entropy() -> None:
    rows = 100 * torch.eye(2)[[0, 0, 0, 1]]
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_number(rows, 1.0) == pytest.approx(expected)


def test_distances_are_those_of_a_loop() -> None:
    x = randn(5, 3).double()
    brute = torch.stack([torch.stack([(a - b).norm() for b in x]) for a in x])
    torch.testing.assert_close(distances(x), brute)
    off = [float(brute[i, j]) for i in range(5) for j in range(5) if i != j]
    assert mean_distance(x) == pytest.approx(sum(off) / len(off))


def test_the_same_scans_have_the_same_variety_and_one_repeated_scan_has_none() -> None:
    scans = torch.rand(12, 1, 16, 16, 8, generator=seeded())
    same = compare(scans, scans)
    assert same["spread"] == pytest.approx(1)
    assert same["offset"] == 0
    assert compare(scans, scans + 1)["offset"] > 1
    assert same["modes"] == pytest.approx(same["modes_training"])
    one = compare(scans, scans[:1].expand_as(scans))
    assert one["spread"] == 0
    assert one["modes"] == pytest.approx(1)


def test_grain_alone_is_no_variety() -> None:
    """Voxel noise on one volume is averaged away, or it would hide a collapsed latent."""
    scans = torch.rand(12, 1, 1, 1, 1, generator=seeded()).expand(12, 1, 32, 32, 32)
    grain = 0.5 + 0.3 * randn(12, 1, 32, 32, 32)
    assert mean_distance(grain.flatten(1)) > mean_distance(scans.flatten(1))
    assert compare(scans, grain)["spread"] < 0.3
