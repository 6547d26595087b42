"""The network of the diffusion model: any grid, one row at a time, and what it is told is heard."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, vmap

from synthmed.backbones.nets.unet import UNet

CHANNELS, OUT, D, B = 3, 2, 2, 4


def network(
    grid: tuple[int, int, int] = (5, 6, 7),
    widths: Sequence[int] = (4, 8),
    depth: int = 1,
    condition_width: int = D,
) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(CHANNELS, OUT, grid, widths, depth, condition_width)


def loud(net: UNet) -> UNet:
    """The same with every weight of usual size, so that no input is too faint to be seen."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(max(1, p[0].numel())))
    return net


def inputs(net: UNet, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    grid = net.place.shape[1:]
    width = net.known[0].in_features - 64
    x = torch.randn(B, CHANNELS, *grid, generator=g)
    return x, torch.randn(B, generator=g), torch.rand(B, width, generator=g)


@settings(max_examples=25, deadline=None)
@example(grid=(1, 1, 1), widths=[4, 4, 4], depth=1, condition_width=0)
@example(grid=(1, 9, 2), widths=[4, 4, 4, 4], depth=1, condition_width=0)
@given(
    grid=st.tuples(*[st.integers(1, 9)] * 3),
    widths=st.lists(st.integers(4, 12), min_size=1, max_size=3),
    depth=st.integers(1, 2),
    condition_width=st.integers(0, 2),
)
def test_any_grid_goes_in_and_comes_out(
    grid: tuple[int, int, int], widths: list[int], depth: int, condition_width: int
) -> None:
    net = network(grid, widths, depth, condition_width)
    out = net(*inputs(net))
    assert out.shape == (B, OUT, *grid)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("grid", [(7, 5, 9), (8, 8, 8)])
def test_the_whole_grid_is_seen_everywhere(grid: tuple[int, int, int]) -> None:
    """Pooling to one voxel and back: a change in a corner is felt in every place."""
    net = loud(network(grid, (4, 4, 4, 4)))
    x, level, c = inputs(net)
    changed = x.clone()
    changed[..., -1, -1, -1] += 3
    moved = (net(changed, level, c) - net(x, level, c)).abs().amax((0, 1))
    assert (moved > 1e-6).all()


def test_it_says_next_to_nothing_at_first() -> None:
    net = network((8, 8, 8), (16, 32), 2)
    with torch.no_grad():
        out = net(*inputs(net))
    assert float(out.abs().max()) < 0.1
    assert float(out.std()) > 0, "but the last layer is not dead"


def test_a_row_depends_on_itself_alone() -> None:
    net = loud(network())
    x, level, c = inputs(net)
    before = net(x, level, c)
    for change in (x, level, c):
        kept = change[2].clone()
        change[2] += 1
        after = net(x, level, c)
        change[2] = kept
        assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
        assert not torch.equal(before[2], after[2])


def test_gradients_by_row_under_vmap_equal_a_loop() -> None:
    net = network()
    x, level, c = inputs(net)
    keep = torch.ones(B, net.n_dropped)
    params = {k: p.detach() for k, p in net.named_parameters()}

    def one(p: dict[str, Tensor], *row: Tensor) -> Tensor:
        out: Tensor = functional_call(net, p, tuple(r[None] for r in row))
        return (out - 1).square().mean()

    each = vmap(grad(one), in_dims=(None, 0, 0, 0, 0))(params, x, level, c, keep)
    for i in range(B):
        alone = grad(one)(params, x[i], level[i], c[i], keep[i])
        size = torch.stack([g.norm() for g in alone.values()]).norm()
        assert all((each[k][i] - g).norm() <= 1e-5 * size for k, g in alone.items())


# --- dropout -------------------------------------------------------------------------------------


def test_keeping_all_is_the_same_as_no_dropout() -> None:
    net = loud(network(depth=2))
    x, level, c = inputs(net)
    assert torch.equal(net(x, level, c, torch.ones(B, net.n_dropped)), net(x, level, c))


def test_each_factor_belongs_to_one_channel_of_one_block() -> None:
    """Two levels of widths 4 and 8, one block each way: the sum of their widths, all of use."""
    net = loud(network())
    assert net.n_dropped == 4 + 8 + 8 + 4
    x, level, c = inputs(net)
    whole = net(x, level, c)
    for i in range(net.n_dropped):
        keep = torch.ones(B, net.n_dropped)
        keep[1, i] = 0
        dropped = net(x, level, c, keep)
        assert torch.equal(dropped[[0, 2, 3]], whole[[0, 2, 3]])
        assert not torch.equal(dropped[1], whole[1]), i


def test_features_that_are_all_dropped_leave_only_what_is_passed_on() -> None:
    """The factors act on features inside the blocks, after the condition has come in."""
    net = loud(network(widths=(4,)))
    x, level, c = inputs(net)
    keep = torch.zeros(B, net.n_dropped)
    assert torch.equal(net(x, level, c, keep), net(x, level + 1, c + 1, keep))


# --- what it is told -----------------------------------------------------------------------------


def trained(net: UNet, wanted: Tensor, x: Tensor, level: Tensor, c: Tensor) -> float:
    """Mean squared error after some steps on one batch."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(80):
        loss = (net(x, level, c) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_noise_level_condition_and_place_are_heard_from_the_first_step() -> None:
    net = network()
    x, level, c = inputs(net)
    (net(x, level, c) - 1).square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.any(), name


@pytest.mark.parametrize("told", ["level", "condition", "place"])
def test_what_only_one_of_them_tells_is_learned(told: str) -> None:
    """Inputs are all the same but one; the target is a function of that one, of variance 1."""
    net = network((6, 6, 6), (8, 8))
    x, level, c = torch.zeros(B, CHANNELS, 6, 6, 6), torch.zeros(B), torch.zeros(B, D)
    sign = torch.tensor([1.0, -1, 1, -1])
    wanted = torch.ones(B, OUT, 6, 6, 6)
    if told == "level":
        level, wanted = 2 + sign, wanted * sign[:, None, None, None, None]
    elif told == "condition":
        c, wanted = c + sign[:, None], wanted * sign[:, None, None, None, None]
    else:  # a checkerboard of cubes of two, which no zero padding tells
        place = torch.arange(6) // 2 % 2 * 2.0 - 1
        wanted = wanted * place[:, None, None] * place[:, None] * place
    assert trained(net, wanted, x, level, c) < 0.1


def test_noise_levels_from_the_least_to_the_greatest_differ() -> None:
    """Levels half an e-fold apart, over all that the samplers visit, never look alike."""
    net = network()
    level = torch.linspace(math.log(0.004), math.log(20_000), 32)
    x, c = torch.zeros(32, CHANNELS, 5, 6, 7), torch.zeros(32, D)
    with torch.no_grad():
        known = loud(net).known(torch.cat([_features(net, level), torch.zeros(32, D)], 1))
        distance = torch.cdist(known, known) + torch.eye(32)
    assert float(distance.min()) > 0.05
    assert torch.isfinite(net(x, level, c)).all()


def _features(net: UNet, level: Tensor) -> Tensor:
    """What the first layer of `known` gets for these levels."""
    seen: list[Tensor] = []
    handle = net.known.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net(torch.zeros(len(level), CHANNELS, 5, 6, 7), level, torch.zeros(len(level), D))
    handle.remove()
    return seen[0][:, :-D]
