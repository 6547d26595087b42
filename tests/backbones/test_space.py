"""The spaces of a diffusion model: into them and back, and what a given mask becomes there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from synthmed.backbones.generative import Batch, VolumeSpec
from synthmed.backbones.space import Bands, Codes, Room, Space, numbers
from synthmed.config import Optimizer

GRID, CHANNELS, GIVEN, D = (9, 12, 10), 2, 3, 2
SPEC = VolumeSpec(CHANNELS, GRID, D, GIVEN)
AUTOENCODER = {"widths": (4, 8), "code": {"kind": "map", "channels": 3}}
SPACES: dict[str, dict[str, Any]] = {
    "voxel": {"kind": "voxel"},
    "wavelet 1": {"kind": "wavelet", "levels": 1},
    "wavelet 2": {"kind": "wavelet", "levels": 2},
    "latent": {"kind": "latent", "autoencoder": AUTOENCODER},
}


def build(settings: dict[str, Any], spec: VolumeSpec = SPEC) -> Room:
    space: Space = TypeAdapter(Space).validate_python(settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return space.build(spec, Optimizer())


def codes(**autoencoder: Any) -> Codes:
    room = build({"kind": "latent", "share": 0.25, "autoencoder": {**AUTOENCODER, **autoencoder}})
    assert isinstance(room, Codes)
    return room


def volumes(n: int = 4, seed: int = 0, spec: VolumeSpec = SPEC) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, spec.channels, *spec.grid, generator=g), torch.rand(n, D, generator=g)


def batch(n: int = 20) -> Batch:
    x, c = volumes(n)
    none = torch.zeros(n, 1, GIVEN, *GRID)
    return Batch(x[:, None], c[:, None], none, torch.ones(n, 1))


def zeros(x: Tensor) -> Tensor:
    return torch.zeros(len(x), CHANNELS, *GRID)


# --- every space ---------------------------------------------------------------------------------


@pytest.fixture(params=SPACES.values(), ids=SPACES)
def room(request: pytest.FixtureRequest) -> Room:
    return build(request.param)


def test_shapes_are_those_it_declares(room: Room) -> None:
    x, c = volumes()
    y = room.enter(x, c)
    assert y.shape == (4, *room.shape)
    assert numbers(room) == y[0].numel()
    assert room.leave(y, c, zeros(x)).shape == x.shape
    masks = torch.rand(4, GIVEN, *GRID, generator=torch.Generator().manual_seed(1))
    assert room.place(masks).shape == (4, room.given_channels, *room.shape[1:])


def test_without_given_masks_there_is_nothing_to_place() -> None:
    for settings_ in SPACES.values():
        room = build(settings_, VolumeSpec(1, GRID, D))
        assert room.given_channels == 0
        assert room.place(torch.zeros(4, 0, *GRID)).shape == (4, 0, *room.shape[1:])


def test_a_row_is_its_own_on_every_way(room: Room) -> None:
    (x, c), (other, c_other) = volumes(), volumes(seed=1)
    masks = torch.rand(4, GIVEN, *GRID, generator=torch.Generator().manual_seed(1))
    white = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def all_of(x: Tensor, c: Tensor, masks: Tensor, white: Tensor) -> list[Tensor]:
        y = room.enter(x, c)
        return [y, room.leave(y, c, white), room.place(masks).clone()]

    before = all_of(x, c, masks, white)
    x[2], c[2], masks[2], white[2] = other[2], c_other[2], 1 - masks[2], -white[2]
    for a, b in zip(before, all_of(x, c, masks, white), strict=True):
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])
        assert not torch.equal(a[2], b[2])


# --- voxels and bands ----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 9)] * 3),
    channels=st.integers(1, 2),
    levels=st.integers(0, 2),
)
def test_bands_go_back_exactly_on_any_grid(
    grid: tuple[int, int, int], channels: int, levels: int
) -> None:
    spec = VolumeSpec(channels, grid, D)
    room = Bands(spec, levels)
    x, c = volumes(spec=spec)
    back = room.leave(room.enter(x, c), c, torch.randn(x.shape))
    torch.testing.assert_close(back, x, atol=2e-6, rtol=0)
    assert room.rounds() == []
    assert not room.modules


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_bands_keep_distances_and_white_noise(levels: int) -> None:
    """On a grid that needs no padding they are a rotation of the voxels times two."""
    spec = VolumeSpec(1, (4, 4, 8), D)
    room = Bands(spec, levels)
    basis = torch.eye(128).reshape(128, 1, 4, 4, 8)
    origin = room.enter(torch.zeros_like(basis), torch.zeros(128, D)).flatten(1)
    map_ = room.enter(basis, torch.zeros(128, D)).flatten(1) - origin
    torch.testing.assert_close(map_ @ map_.T, 4 * torch.eye(128), atol=1e-5, rtol=0)


def test_images_lie_about_zero() -> None:
    """The voxels' numbers go from -1 to 1, so a volume half bright is at the origin."""
    for levels in (0, 1, 2):
        room = Bands(SPEC, levels)
        half = torch.full((1, CHANNELS, *GRID), 0.5)
        assert float(room.enter(half, torch.zeros(1, D)).abs().max()) < 1e-6
        bright = room.enter(2 * half, torch.zeros(1, D)).square().sum()
        padded = 1
        for n in room.padded:
            padded *= n
        torch.testing.assert_close(bright, torch.tensor(float(CHANNELS * padded)))


def test_padding_repeats_the_border_and_is_cut_off_again() -> None:
    room = Bands(VolumeSpec(1, (3, 4, 4), 0), 2)
    x = torch.rand(1, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = room.enter(x, torch.zeros(1, 0))
    whole = room.haar.inverse(y)
    torch.testing.assert_close(whole[:, :, 3], whole[:, :, 2])
    # and what a model puts into the padding does not show
    whole[:, :, 3] = 7
    left = room.leave(room.haar.forward(whole), torch.zeros(1, 0), x)
    torch.testing.assert_close(left, x, atol=2e-6, rtol=0)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_masks_are_placed_whole_where_their_voxels_are(levels: int) -> None:
    room = Bands(SPEC, levels)
    masks = (torch.rand(2, GIVEN, *GRID, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    placed = room.place(masks)
    whole = room.haar.inverse(placed)[..., :9, :12, :10]
    torch.testing.assert_close(whole, masks, atol=2e-6, rtol=0)
    # a voxel's mask is told at the place of its own bands
    one = torch.zeros(1, GIVEN, *GRID)
    one[0, 1, 5, 7, 2] = 1
    felt = room.place(one).abs().amax((0, 1)).nonzero()
    side = 2**levels
    assert felt.tolist() == [[5 // side, 7 // side, 2 // side]]


# --- codes ---------------------------------------------------------------------------------------


def test_codes_are_in_units_of_their_deviation_once_measured() -> None:
    room = codes()
    first = room.rounds()
    assert [r.share for r in first] == [0.25]
    assert [r.finish_privacy for r in first] == ["refused"], "it reads patients"
    assert [p.name for p in first[0].phases] == ["reconstruction"]
    assert first[0].phases[0].reads_patients
    data = batch()
    x, c = volumes(20)
    assert float((room.enter(x, c).std() - 1).abs()) > 0.05, "or there would be nothing to do"
    assert first[0].finish is not None
    first[0].finish([data])
    y = room.enter(x, c).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_leaving_is_decoding_with_the_residual_s_texture() -> None:
    room = codes()
    x, c = volumes()
    y = room.enter(x, c)
    with torch.no_grad():
        decoded = room.compressor.decode(y, c)
        torch.testing.assert_close(room.leave(y, c, zeros(x)), decoded)
        white = torch.randn(400, CHANNELS, *GRID, generator=torch.Generator().manual_seed(0))
        many = room.leave(y[:1].expand(400, -1, -1, -1, -1), c[:1].expand(400, -1), white)
        spread = (many - decoded[:1]).std(0)
        # deviations of 400 numbers are within a tenth or so of the truth
        torch.testing.assert_close(spread, room.compressor.noise.scale(), rtol=0.2, atol=0)


def test_without_a_residual_leaving_is_decoding() -> None:
    room = codes(residual="none")
    x, c = volumes()
    with torch.no_grad():
        y = room.enter(x, c)
        assert torch.equal(room.leave(y, c, torch.randn(x.shape)), room.compressor.decode(y, c))


def test_no_gradient_goes_into_the_autoencoder() -> None:
    room = codes()
    x, c = volumes()
    y = room.enter(x.requires_grad_(), c)
    assert not y.requires_grad


def test_masks_become_local_means_on_the_codes_grid() -> None:
    room = codes()
    masks = torch.rand(2, GIVEN, *GRID, generator=torch.Generator().manual_seed(0))
    placed = room.place(masks)
    assert placed.shape == (2, GIVEN, *room.shape[1:])
    assert float(placed.min()) >= 0
    assert float(placed.max()) <= 1
    ones = room.place(torch.ones(1, GIVEN, *GRID))
    torch.testing.assert_close(ones, torch.ones_like(ones))
    corner = torch.zeros(1, GIVEN, *GRID)
    corner[..., 0, 0, 0] = 1
    felt = room.place(corner)[0, 0]
    assert felt[0, 0, 0] > 0
    assert int((felt > 0).sum()) == 1


def test_a_code_that_is_a_vector_is_known_by_its_shape() -> None:
    """The diffusion refuses it (ddpm.py); the space alone does not pretend it has places."""
    assert codes(code={"kind": "vector", "length": 5}).shape == (5, 1, 1, 1)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"kind": "fourier"}, "voxel.*wavelet.*latent"),
        ({"kind": "wavelet", "levels": 3}, "less than or equal to 2"),
        ({"kind": "voxel", "levels": 1}, "Extra inputs"),
        ({"kind": "latent", "share": 1.0}, "less than 1"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TypeAdapter(Space).validate_python(wrong)
