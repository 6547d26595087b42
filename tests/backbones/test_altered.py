"""What a critic sees: each change against a loop or a closed form."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from synthmed.backbones.nets import altered
from tests.backbones.test_cgan import GRID, batch, build, drawn, named_parameters, phases

SHAPE = (8, 10, 16)


def still(n: int) -> dict[str, Tensor]:
    """Draws that change nothing: no shift, no tone, and a hole beyond the field of view."""
    return {
        "move_S": torch.zeros(n, 3),
        "tone_S": torch.zeros(n, 2),
        "hole_S": torch.full((n, 3), 5.0),
    }


def volumes(n: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, *SHAPE, generator=g)
    return x, (torch.rand(n, 1, *SHAPE, generator=g) > 0.5).float()


def test_draws_that_change_nothing_change_nothing() -> None:
    x, given = volumes()
    seen, masks = altered.altered(x, given, still(4))
    torch.testing.assert_close(seen, x)
    torch.testing.assert_close(masks, given)


def test_a_shift_moves_scan_and_mask_together_and_brings_zeros_in() -> None:
    x, given = volumes(1)
    draws = still(1)
    draws["move_S"] = torch.tensor([[1.0, -1.0, 0.5]])
    seen, masks = altered.altered(x, given, draws)
    by = (1, -1, 1)  # an eighth of 8 and of 10, a sixteenth of 16, in whole voxels
    expected = torch.zeros(3, *SHAPE)
    both = torch.cat([x, given], 1)[0]
    for i in range(SHAPE[0]):
        for j in range(SHAPE[1]):
            for k in range(SHAPE[2]):
                at = (i - by[0], j - by[1], k - by[2])
                if all(0 <= a < n for a, n in zip(at, SHAPE, strict=True)):
                    expected[:, i, j, k] = both[:, at[0], at[1], at[2]]
    torch.testing.assert_close(torch.cat([seen, masks], 1)[0], expected)


def test_tone_changes_mean_and_contrast_of_scans_alone() -> None:
    x, given = volumes()
    draws = still(4)
    draws["tone_S"][:, 0] = 1.0
    draws["tone_S"][:, 1] = -1.0
    seen, masks = altered.altered(x, given, draws)
    mean = x.mean((1, 2, 3, 4))
    torch.testing.assert_close(seen.mean((1, 2, 3, 4)), mean + altered.BRIGHTER)
    torch.testing.assert_close(
        seen.std((1, 2, 3, 4)), (1 - altered.CONTRAST) * x.std((1, 2, 3, 4)), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(masks, given)


def test_a_mask_that_is_drawn_has_no_tone() -> None:
    """Nor does it count for the mean that contrast is raised about."""
    x, given = volumes()
    draws = still(4)
    draws["tone_S"][:] = 0.5
    seen, _ = altered.altered(x, given, draws, masks=1)
    alone, _ = altered.altered(x[:, :1], given, draws)
    torch.testing.assert_close(seen[:, :1], alone)
    assert torch.equal(seen[:, 1:], x[:, 1:])
    model = build(alter=True)
    model.spec = dataclasses.replace(model.spec, channels=2, masks=1)
    shown, _ = model._altered(x, given, {f"scan_{k}": v[:, None] for k, v in draws.items()}, "scan")
    assert torch.equal(shown, seen)


def test_a_hole_hides_an_eighth_of_the_field_of_view() -> None:
    x, given = volumes(1)
    draws = still(1)
    draws["hole_S"] = torch.full((1, 3), 0.5)
    seen, _ = altered.altered(x, given, draws)
    hidden = seen[0, 0] == 0
    assert hidden.sum() == 4 * 4 * 8
    assert hidden[2:6, 3:7, 4:12].all() and not hidden[0].any() and not hidden[:, :, -1].any()


def test_both_sides_are_changed_alike_and_apart() -> None:
    g = torch.Generator().manual_seed(0)
    many = altered.draw(g, 20_000)
    for name, low in (("move_S", -1), ("tone_S", -1), ("hole_S", 0)):
        assert many[name].min() >= low and many[name].max() <= 1
        assert abs(float(many[name].mean()) - (low + 1) / 2) < 0.01
    draws = phases(build(alter=True))[0].draw(torch.Generator().manual_seed(0), 2)
    assert {f"{side}_{k}" for side in ("scan", "made") for k in many} <= set(draws)
    assert not torch.equal(draws["scan_move_S"], draws["made_move_S"])


def test_the_generator_learns_through_the_change() -> None:
    """Its gradient is that of the altered sample, so a sample need not look altered itself."""
    model = build(alter=True)
    generator = phases(model)[1]
    params = named_parameters(model)
    loss = generator.loss(params, None, drawn(generator), 0.5).sum()
    mine = [p for k, p in params.items() if k.startswith("generator.")]
    slopes = torch.autograd.grad(loss, mine, allow_unused=True)
    assert sum(float(s.norm()) for s in slopes if s is not None) > 0
    c = batch().c[:, 0]
    none = c.new_zeros(3, 0, *GRID)
    plain = build(alter=False).sample(c, torch.arange(3), none)
    torch.testing.assert_close(model.sample(c, torch.arange(3), none), plain)
