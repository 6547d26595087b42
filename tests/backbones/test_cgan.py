"""The conditional GAN: its losses in closed form, what its phases read, what it learns and says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.func import grad, vmap

from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.backbones.cgan import CGAN, ConditionalGAN
from synthmed.backbones.examining import scans
from synthmed.backbones.generative import Batch, Phase, Round, VolumeSpec, named_parameters
from synthmed.backbones.nets import watch
from synthmed.backbones.nets.adversarial import _SHIFT
from synthmed.backbones.nets.altered import altered
from synthmed.backbones.nets.diversity import apart
from synthmed.conditions import Conditions
from synthmed.config import Augment, Categorical, Config, Optimizer
from synthmed.errors import UsageError
from synthmed.keys import Key, torch_generator
from synthmed.loader import Loader
from synthmed.stages.train import recent
from synthmed.training import Training, named_state, one_step

GRID = (8, 8, 8)
SMALL: dict[str, Any] = {"widths": (4, 8), "latent": 4, "hidden": 8, "alter": False}
"""Without alteration the losses are those of the papers; what it does is in test_altered.py."""
DARK, BRIGHT = 0.2, 0.8


def build(given: int = 0, condition: Tensor | None = None, **settings: Any) -> ConditionalGAN:
    def draw(generator: torch.Generator) -> Tensor:
        return torch.rand(3, generator=generator) if condition is None else condition

    spec = VolumeSpec(1, GRID, 3, given, draw_condition=draw)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CGAN(**SMALL | settings).build(spec, Optimizer())


def batch(patients: int = 3, scans: int = 2, given: int = 0, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(patients, scans)
    mask[0, 1:] = 0
    return Batch(
        torch.rand(patients, scans, 1, *GRID, generator=g),
        torch.rand(patients, scans, 3, generator=g),
        (torch.rand(patients, scans, given, *GRID, generator=g) > 0.5).float(),
        mask,
    )


def drawn(phase: Phase, patients: int = 3, scans: int = 2) -> dict[str, Tensor]:
    each = [phase.draw(torch.Generator().manual_seed(i), scans) for i in range(patients)]
    return {k: torch.stack([d[k] for d in each]) for k in each[0]}


def phases(model: ConditionalGAN) -> tuple[Phase, Phase]:
    critic, generator = model.rounds()[0].phases
    return critic, generator


BOUNDS = [
    ("wasserstein", "penalty"),
    ("wasserstein", "clip"),
    ("wasserstein", "spectral"),
    ("bce", "penalty"),
    ("bce", "clip"),
    ("bce", "spectral"),
    ("bce", "none"),
]


# --- settings ---------------------------------------------------------------------------------


def test_default_is_the_wgan_gp_of_its_paper() -> None:
    model = build()
    critic, generator = phases(model)
    assert (model.config.loss, model.config.lipschitz) == ("wasserstein", "penalty")
    assert (model.config.penalty, generator.every) == (10, 5)
    assert critic.optimizer.betas == generator.optimizer.betas == (0, 0.9)
    assert critic.optimizer.weight_decay == generator.optimizer.weight_decay == 0
    assert critic.optimizer.learning_rate != generator.optimizer.learning_rate
    assert critic.ema is None and generator.ema is not None
    assert CGAN().alter


def test_a_wasserstein_critic_without_a_bound_is_refused() -> None:
    with pytest.raises(ValidationError, match="set lipschitz to penalty, clip or spectral"):
        CGAN(loss="wasserstein", lipschitz="none")


# --- losses -----------------------------------------------------------------------------------


def scores(model: ConditionalGAN, x: Tensor, c: Tensor) -> Tensor:
    value: Tensor = model.critic(x, c, x.new_zeros(len(x), 0, *GRID))
    return value


def made_in(
    model: ConditionalGAN, draws: Mapping[str, Tensor], c: Tensor, given: Tensor | None = None
) -> Tensor:
    noises = [draws["noise0_S"].flatten(0, 1), draws["noise1_S"].flatten(0, 1)]
    z = draws["z_SL"].flatten(0, 1)
    masks = c.new_zeros(len(c), 0, *GRID) if given is None else given
    made: Tensor = model.generator(z, c, noises, masks)
    return made


def test_variety_counts_what_two_latents_of_one_condition_make_apart() -> None:
    """And nothing else: the draws before it, and the loss without it, are as they were."""
    plain, varied = build(), build(variety=0.7)
    (_, without), (critic, generator) = phases(plain), phases(varied)
    params, told = named_parameters(varied), drawn(generator, 3, 1)
    for name, value in drawn(without, 3, 1).items():
        assert torch.equal(told[name], value)
    c = told["c_SD"][:, 0]
    with torch.no_grad():
        one, other = (made_in(varied, {**told, "z_SL": told[k]}, c) for k in ("z_SL", "other_SL"))
        loss = generator.loss(params, None, told, 0.5)
        assert loss == pytest.approx(
            without.loss(named_parameters(plain), None, told, 0.5) - 0.7 * apart(one, other)
        )
    assert not any(k.startswith("other") for k in drawn(critic, 3, 1))


def test_apart_is_a_matter_of_shape_and_not_of_brightness() -> None:
    x = torch.rand(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    assert apart(x, 0.5 * x + 0.2).exp().max() < 0.1
    # two independent volumes, standardised: the root of two
    assert apart(x, x.flip(0)).exp() == pytest.approx(math.sqrt(2), rel=0.1)


@pytest.mark.parametrize("loss", ["wasserstein", "bce"])
def test_losses_are_those_of_the_papers(loss: str) -> None:
    """Without a penalty: Arjovsky et al. 2017, eq. 2 and 3, and Goodfellow et al. 2014, eq. 1."""
    model = build(loss=loss, lipschitz="clip")
    critic, generator = phases(model)
    params, b, draws = named_parameters(model), batch(3, 1), drawn(critic, 3, 1)
    x, c = b.x[:, 0], b.c[:, 0]
    with torch.no_grad():
        real, made = scores(model, x, c), scores(model, made_in(model, draws, c), c)
        told = drawn(generator, 3, 1)
        fooled = scores(model, made_in(model, told, told["c_SD"][:, 0]), told["c_SD"][:, 0])
        of_critic = critic.loss(params, b, draws, 0.5)
        of_generator = generator.loss(params, None, told, 0.5)
    if loss == "wasserstein":
        torch.testing.assert_close(of_critic, made - real)
        torch.testing.assert_close(of_generator, -fooled)
    else:
        torch.testing.assert_close(of_critic, -real.sigmoid().log() - (1 - made.sigmoid()).log())
        torch.testing.assert_close(of_generator, -fooled.sigmoid().log())


def test_penalty_is_taken_on_the_line_between_a_scan_and_a_sample() -> None:
    model = build()
    plain = build(lipschitz="clip")  # the same weights, no penalty
    critic = phases(model)[0]
    b, draws = batch(3, 1), drawn(critic, 3, 1)
    x, c = b.x[:, 0], b.c[:, 0]
    with torch.no_grad():
        t = draws["between_S"][:, :, None, None, None]
        between = t * x + (1 - t) * made_in(model, draws, c)
    between.requires_grad_()
    (slope,) = torch.autograd.grad(scores(model, between, c).sum(), between)
    expected = 10 * (slope.flatten(1).norm(dim=1) - 1) ** 2
    with torch.no_grad():
        got = critic.loss(named_parameters(model), b, draws, 0.5) - phases(plain)[0].loss(
            named_parameters(plain), b, draws, 0.5
        )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert expected.min() > 0.01


def test_on_that_line_an_altered_volume_keeps_its_own_mask() -> None:
    """Where the line is at its end the slope is that of the sample with the sample's mask."""
    model, plain = (build(given=2, alter=True, lipschitz=k) for k in ("penalty", "clip"))
    b, draws = batch(3, 1, given=2), drawn(phases(model)[0], 3, 1)
    draws["between_S"] = torch.zeros(3, 1)
    c, given = b.c[:, 0], b.given[:, 0]
    change = {k.removeprefix("made_"): v[:, 0] for k, v in draws.items() if k.startswith("made_")}
    with torch.no_grad():
        made, its_mask = altered(made_in(model, draws, c, given), given, change)
        got = phases(model)[0].loss(named_parameters(model), b, draws, 0.5) - phases(plain)[0].loss(
            named_parameters(plain), b, draws, 0.5
        )
    made.requires_grad_()
    (slope,) = torch.autograd.grad(model.critic(made, c, its_mask, None).sum(), made)
    torch.testing.assert_close(
        got, 10 * (slope.flatten(1).norm(dim=1) - 1) ** 2, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("alter", [False, True])
@pytest.mark.parametrize(("loss", "bound"), BOUNDS)
def test_every_variant_gives_per_patient_gradients_by_vmap(
    loss: str, bound: str, alter: bool
) -> None:
    model = build(loss=loss, lipschitz=bound, dropout=0.3, alter=alter)
    critic = phases(model)[0]
    params = {k: p.detach() for k, p in named_parameters(model).items()}
    mine = {k: p for k, p in params.items() if critic.trainable(k)}
    b, draws = batch(), drawn(critic)

    def one(p: dict[str, Tensor], b: Batch, d: dict[str, Tensor]) -> Tensor:
        alone = Batch(*(t[None] for t in b))
        return critic.loss({**params, **p}, alone, {k: v[None] for k, v in d.items()}, 0.5)[0]

    each = vmap(grad(one), in_dims=(None, 0, 0))(mine, b, draws)
    leaves = {k: p.clone().requires_grad_() for k, p in mine.items()}
    total = critic.loss({**params, **leaves}, b, draws, 0.5).sum()
    whole = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    size = torch.stack([g.norm() for g in whole if g is not None]).norm()
    assert size > 0
    for k, g in zip(leaves, whole, strict=True):
        expected = torch.zeros_like(leaves[k]) if g is None else g
        assert (each[k].sum(0) - expected).norm() <= 1e-4 * size


def test_dropped_features_come_from_the_draws() -> None:
    model = build(dropout=0.5)
    critic = phases(model)[0]
    draws = drawn(critic, 200, 1)
    kept = draws["keep_SH"]
    assert set(kept.unique().tolist()) == {0, 2}
    assert float(kept.mean()) == pytest.approx(1, abs=0.1)


# --- what the phases read ---------------------------------------------------------------------


def test_the_generator_reads_no_patient_and_draws_its_conditions_itself() -> None:
    condition = torch.tensor([0.0, 1.0, 0.0])
    model = build(condition=condition)
    critic, generator = phases(model)
    assert critic.reads_patients and not generator.reads_patients
    draws = drawn(generator)
    assert torch.equal(draws["c_SD"], condition.expand(3, 2, 3))
    assert "c_SD" not in drawn(critic)
    loss = generator.loss(named_parameters(model), None, draws, 0.5)
    assert loss.shape == (3,)


def test_with_given_masks_the_generator_reads_them_and_says_so() -> None:
    """They come from patients, so its phase has to be privatised; padded scans do not count."""
    model = build(given=2)
    for p in model.generator.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    generator = phases(model)[1]
    assert generator.reads_patients
    draws = drawn(generator)
    assert "c_SD" not in draws
    params, first = named_parameters(model), batch(given=2)
    other = first._replace(given=first.given.clone())
    other.given[1] = 1 - other.given[1]
    other.given[0, 1] = 1 - other.given[0, 1]  # padding
    a, b = (generator.loss(params, x, draws, 0.5) for x in (first, other))
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert a[1] != b[1]


def test_an_image_follows_the_mask_it_is_drawn_for() -> None:
    model = build(given=1)
    keys, c = torch.arange(2), torch.zeros(2, 3)
    masks = torch.zeros(2, 1, *GRID)
    masks[:, :, 2:6, 2:6, 2:6] = 1
    a, b = model.sample(c, keys, masks), model.sample(c, keys, 1 - masks)
    assert (a - b).abs().max() > 1e-3


def test_the_critic_s_step_leaves_the_generator_alone_and_the_other_way_round() -> None:
    model = build()
    for phase, reads in zip(phases(model), (batch(), None), strict=True):
        params = named_parameters(model)
        other = [p for k, p in params.items() if not phase.trainable(k)]
        assert other
        loss = phase.loss(params, reads, drawn(phase), 0.5).sum()
        slopes = torch.autograd.grad(loss, other, allow_unused=True)
        if phase.name == "critic":  # its samples carry no gradient back
            assert all(s is None for s in slopes)


# --- labels that are not known ----------------------------------------------------------------


def declared_pair(hidden: float = 0.0, **settings: Any) -> ConditionalGAN:
    """Two labels of two categories, and a generator that is `hidden` brighter without the first.

    What it adds to every volume it takes from both categories of that label, so that a volume of
    a complete condition is the same whatever `hidden` is.
    """
    pair = Conditions({k: Categorical(categories=("a", "b")) for k in ("first", "second")})
    spec = VolumeSpec(1, GRID, 4, draw_condition=pair.draw_encoded, label_widths=pair.widths)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CGAN(**SMALL | settings).build(spec, Optimizer())
    model.generator.template.data[0] += hidden
    model.generator.template.data[1:3] -= hidden / _SHIFT
    return model


def lacking(data: Batch, rows: Sequence[int]) -> Batch:
    """Two classes and their partner label; these patients lack the first."""
    classes = torch.nn.functional.one_hot(torch.arange(len(data.x)) % 2, 2).float()
    c = torch.cat([classes, classes.flip(1)], 1)
    c[list(rows), :2] = 0
    return data._replace(c=c[:, None].expand(-1, data.x.shape[1], -1))


def test_the_generator_is_never_asked_for_a_label_that_is_unknown() -> None:
    """It is trained on complete conditions alone: what it does without one must not be seen."""
    data = lacking(batch(6, 1), [0, 3, 4])
    seen = []
    for hidden in (0.0, 5.0):
        model = declared_pair(hidden)
        critic, params = phases(model)[0], named_parameters(model)
        losses = critic.loss(params, data, drawn(critic, 6, 1), 0.5).detach()
        finish = model.rounds()[0].finish
        assert finish is not None
        seen.append((losses, finish([data]), model.examine(data, data).figures))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-3, atol=1e-3)
    for a, b in zip(seen[0][1:], seen[1][1:], strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)


def test_the_critic_is_told_what_is_unknown_and_known_labels_are_kept() -> None:
    model = declared_pair(lipschitz="clip")
    critic = phases(model)[0]
    data, draws = lacking(batch(6, 1), [0, 3, 4]), drawn(critic, 6, 1)
    x, c = data.x[:, 0], data.c[:, 0]
    asked = c.clone()
    asked[[0, 3, 4], :2] = draws["labels_SD"][[0, 3, 4], 0, :2]
    assert (asked.reshape(6, 2, 2).sum(2) == 1).all(), "complete"
    with torch.no_grad():
        loss = critic.loss(named_parameters(model), data, draws, 0.5)
        made = made_in(model, draws, asked)
        torch.testing.assert_close(loss, scores(model, made, c) - scores(model, x, c))
    assert len({tuple(d[0].tolist()) for d in drawn(critic, 60, 1)["labels_SD"]}) == 4


def test_what_is_drawn_for_unknown_labels_comes_after_all_else() -> None:
    """The draws of a training whose labels are all known stay what they were."""
    critic = phases(build(alter=True, dropout=0.5))[0]
    g = torch.Generator().manual_seed(0)
    draws = dict(critic.draw(g, 2))
    del draws["labels_SD"]
    unlabelled = phases(build(alter=True, dropout=0.5, given=1))[0]
    assert "labels_SD" not in unlabelled.draw(torch.Generator(), 2)
    others = unlabelled.draw(torch.Generator().manual_seed(0), 2)
    assert draws.keys() == others.keys()
    assert all(torch.equal(draws[k], others[k]) for k in draws)


# --- training ---------------------------------------------------------------------------------


def cohort() -> Loader:
    """24 patients of two classes, dark and bright."""
    rng = np.random.default_rng(0)
    level = np.repeat([DARK, BRIGHT], 12)[:, None, None, None, None]
    dataset = Dataset(
        volumes=(level + 0.05 * rng.standard_normal((24, 1, *GRID))).astype(np.float16),
        patients=np.array([f"p{i:02d}" for i in range(24)]),
        labels=[{"class": "dark"}] * 12 + [{"class": "bright"}] * 12,
        holdout=np.zeros(24, bool),
        channels=[ChannelInfo("T1w")],
        affine=np.eye(4),
    )
    declared = {"class": Categorical(categories=("dark", "bright"))}
    return Loader(dataset, Conditions(declared), 8, Augment())


def settings_of(steps: int) -> Config:
    """Of a run of so many steps."""
    return Config.model_validate(
        {
            "data": {"source": "x", "grid": GRID},
            "backbone": {"name": "cgan"},
            "privacy": None,
            "train": {"max_steps": steps},
        }
    )


def fit(
    steps: int, n: int | None = None, **settings: Any
) -> tuple[ConditionalGAN, list[dict[str, float]], Mapping[str, float]]:
    """A model trained by the loop's own `one_step`, its log and what its round found."""
    loader, config = cohort(), settings_of(steps)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CGAN(**SMALL | settings).build(loader.spec, Optimizer())
    state = Training(model, [steps])
    log = []
    for i in range(steps if n is None else n):
        log.append({"step": i, **one_step(state, loader, config, Key.root(0), "cpu", amp=False)})
        state.step += 1
    if n is None:
        state.end_round(loader.all_train("cpu"))
    return model, log, state.figures


def class_means(model: ConditionalGAN) -> list[float]:
    none = torch.zeros(32, 0, *GRID)
    means = []
    for row in torch.eye(2):
        made = model.sample(row.expand(32, 2), torch.arange(32), none)
        means.append(float(made.mean()))
    return means


# volumes of 512 voxels are less than 20 apart, where a penalty of weight 10 would keep a critic
# that begins with the wrong sign from turning it
FAST: dict[str, Any] = {
    "generator_rate": 2e-2,
    "critic_rate": 2e-2,
    "critic_steps": 4,
    "penalty": 1.0,
    "ema": 0.9,
}


# --- the Gaussian that samples begin as ---------------------------------------------------------


def begun(**settings: Any) -> ConditionalGAN:
    """A model before its first step, its Gaussian fitted to the cohort; the generator adds
    nothing yet."""
    loader = cohort()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CGAN(**SMALL | {"factors": 6} | settings).build(loader.spec, Optimizer())
    start, _ = model.rounds()
    assert (start.phases, start.share, start.finish_privacy) == ([], 0, "refused")
    assert start.finish is not None
    figures = start.finish(loader.all_train("cpu"))
    assert 0 < figures["linear_explained"] <= 1
    torch.nn.init.zeros_(model.generator.out.weight)
    return model


def test_samples_begin_as_draws_of_the_cohort_s_gaussian() -> None:
    model = begun()
    assert model.linear is not None
    c = torch.eye(2).repeat(256, 1)
    made = model.sample(c, torch.arange(512), torch.zeros(512, 0, *GRID))
    z = torch.stack([model._draw_latent(torch_generator(k), 1)["z_SL"][0] for k in range(512)])
    assert z.shape == (512, 6 + 2), "a column a factor, and one a number of the label"
    drawn_alone = model.linear.draw(z, c).reshape(made.shape)
    torch.testing.assert_close(made, drawn_alone.clamp(min=0))
    # twelve scans of either class and five people's doubt: 0.3 from the middle becomes 0.21
    dark, bright = made[::2].mean(), made[1::2].mean()
    assert dark == pytest.approx(0.5 - 0.3 * 12 / 17, abs=0.02)
    assert bright == pytest.approx(0.5 + 0.3 * 12 / 17, abs=0.02)


def test_the_network_reads_the_latent_that_its_volume_began_with() -> None:
    """The first L numbers, of which the Gaussian takes its own from the first as well."""
    model = begun(latent=3)
    torch.nn.init.normal_(model.generator.out.weight)
    seen: list[Tensor] = []
    model.generator.style[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.sample(torch.eye(2), torch.arange(2), torch.zeros(2, 0, *GRID))
    z = torch.stack([model._draw_latent(torch_generator(k), 1)["z_SL"][0] for k in range(2)])
    assert torch.equal(seen[0], torch.cat([z[:, :3], torch.eye(2)], 1))


def test_a_game_that_begins_there_keeps_what_the_gaussian_knew() -> None:
    """After a few steps the classes are told apart at least as well, and no remark is made of the
    round that has no steps."""
    loader, model = cohort(), begun()
    config = settings_of(40)
    assert model.remarks([], {"linear_explained": 0.9}) == []
    before = class_means(model)
    state = Training(model, [0, 40])
    state.end_round(loader.all_train("cpu"))
    while state.step < 40:
        one_step(state, loader, config, Key.root(0), "cpu", amp=False)
        state.step += 1
    state.end_round(loader.all_train("cpu"))
    after = class_means(model)
    assert after != before
    assert after[1] - after[0] > 0.9 * (before[1] - before[0])
    assert {"linear_explained", "critic_gap"} <= set(state.figures)


def test_weights_that_hold_everybody_s_factors_tell_who_was_trained_on() -> None:
    model, loader = begun(factors=24), cohort()
    x, c, given = map(torch.cat, zip(*map(scans, loader.all_train("cpu")), strict=True))
    other = x.roll(1, 4)  # the same people, a voxel aside
    mine, theirs = (model.membership_scores(v, c, given, Key.root(0)) for v in (x, other))
    assert mine.keys() == {"critic", "gaussian"}
    assert mine["gaussian"].min() > theirs["gaussian"].max()
    few = begun(factors=2).membership_scores(x, c, given, Key.root(0))["gaussian"]
    assert few.max() < mine["gaussian"].min(), "with few factors nobody is a draw"


def test_a_gaussian_cannot_be_told_a_mask() -> None:
    with pytest.raises(UsageError, match="cannot be told a mask") as refused:
        build(given=1, factors=2)
    assert "backbone.factors: 0" in str(refused.value)


@pytest.fixture(scope="module")
def trained() -> tuple[ConditionalGAN, list[dict[str, float]], Mapping[str, float]]:
    return fit(600, **FAST)


def test_each_class_gets_its_own_brightness(trained: Any) -> None:
    """Nearer to its own than to the other's: where exactly a game of so few steps stands when it is
    stopped (0.66 to 0.77 of 0.8 by the seed) depends on the processor's rounding."""
    model, log, _ = trained
    assert sum("generator" in x for x in log) == 150
    dark, bright = class_means(model)
    assert dark == pytest.approx(DARK, abs=0.1)
    assert bright > (DARK + BRIGHT) / 2
    assert bright - dark > (BRIGHT - DARK) / 2


@pytest.mark.parametrize(
    ("loss", "bound"), [("bce", "spectral"), ("wasserstein", "spectral"), ("wasserstein", "clip")]
)
def test_other_losses_tell_the_classes_apart_too(loss: str, bound: str) -> None:
    settings = FAST | {"generator_rate": 1e-2, "critic_steps": 2}
    settings |= {"loss": loss, "lipschitz": bound, "clip": 1.0}
    before = class_means(fit(1, n=0, **settings)[0])
    dark, bright = class_means(fit(300, **settings)[0])
    assert abs(before[1] - before[0]) < 0.1
    assert bright - dark > 0.3


@pytest.mark.parametrize("bound", ["clip", "spectral"])
def test_bounds_hold_after_steps(bound: str) -> None:
    model, _, _ = fit(5, n=5, **FAST, lipschitz=bound)
    params = dict(model.critic.named_parameters())
    if bound == "clip":
        assert max(float(p.detach().abs().max()) for p in params.values()) <= model.config.clip
        return
    assert model.spectral is not None
    for name, value in model.spectral.normalised(params).items():
        if value.dim() > 1:
            assert torch.linalg.svdvals(value.detach().flatten(1))[0] < 1.1, name


def test_two_runs_of_one_seed_are_the_same_bit_for_bit() -> None:
    first, second = (named_state(fit(4, **FAST)[0]) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_critic_and_generator_agree_with_a_mixed_precision_step() -> None:
    """bfloat16 rounds the loss; it does not change what it is."""
    model = build()
    critic = phases(model)[0]
    b, draws, params = batch(), drawn(critic), named_parameters(model)
    exact = critic.loss(params, b, draws, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = critic.loss(params, b, draws, 0.5)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.03)


# --- what it says of itself -------------------------------------------------------------------


def test_a_healthy_run_draws_no_remark(trained: Any) -> None:
    model, log, figures = trained
    assert model.remarks(log[-200:], figures) == []
    assert model.remarks(log[-200:], {}) == []
    assert figures["modes_training"] >= 2 - 1e-6


def freeze(model: ConditionalGAN) -> None:
    """Force the generator to one volume, whatever it is told."""
    for p in model.generator.parameters():
        p.data.zero_()
    model.generator.template.data[0] = 1


def test_a_generator_that_draws_one_volume_is_called_collapsed() -> None:
    model, log, _ = fit(150, **FAST)
    freeze(model)
    assert any("same volume" in x for x in model.remarks(log, {}))
    figures = model.rounds()[0].finish(cohort().all_train("cpu"))  # type: ignore[misc]
    assert figures["modes"] == pytest.approx(1)
    (said,) = [x for x in model.remarks(log, figures) if "COLLAPSED" in x]
    assert "backbone." in said or "train." in said


def test_a_critic_that_cannot_learn_is_told() -> None:
    _, log, _ = fit(150, **FAST | {"critic_rate": 1e-12})
    model = build()
    assert any("does not tell scans from samples" in x for x in model.remarks(log, {}))


def line(step: int, **values: float) -> dict[str, float]:
    healthy = {"critic": -3.0, "critic.gradient": 1.0, "generator": 1.0, "generator.gradient": 1.0}
    dotted = {k.replace("_gradient", ".gradient"): v for k, v in values.items()}
    return {"round": 0, "step": step, **healthy, **dotted}


def said(config: CGAN, log: Sequence[Mapping[str, float]]) -> list[str]:
    return watch.of_losses(config, log, n_weights=10_000, n_values=512)


def test_exploding_and_vanishing_gradients_are_told() -> None:
    config = CGAN()
    assert said(config, [line(i) for i in range(100, 300)]) == []
    explodes = [line(i, critic_gradient=math.exp((i - 100) / 20)) for i in range(100, 300)]
    assert any("gradient of the critic has grown" in x for x in said(config, explodes))
    explodes = [line(i, generator_gradient=math.exp((i - 100) / 20)) for i in range(100, 300)]
    assert any("lower backbone.generator_rate" in x for x in said(config, explodes))
    # Adam's epsilon times the root of 10,000 weights is 1e-6
    gone = [line(i, generator_gradient=1e-7) for i in range(100, 300)]
    assert any("has vanished" in x for x in said(config, gone))


def test_a_gap_that_runs_away_and_a_critic_that_always_wins_are_told() -> None:
    runs = [line(i, critic=-math.exp((i - 100) / 20)) for i in range(100, 300)]
    assert any("runs away" in x for x in said(CGAN(), runs))
    wins = [line(i, critic=0.001) for i in range(100, 300)]
    assert any("with certainty" in x for x in said(CGAN(loss="bce"), wins))


def test_a_critic_that_guesses_is_told_and_one_that_learns_is_not() -> None:
    """Chance is where a GAN ends when all is well, and where one stays whose critic learns nothing:
    the sentence says both. Losses are those of a run on phantoms, and of one on hearts."""
    chance = [line(i, critic=1.386 + 0.002 * (i % 2)) for i in range(100, 300)]
    (remark,) = said(CGAN(loss="bce"), chance)
    assert "guesses. Unless samples look like scans" in remark
    assert said(CGAN(loss="bce"), chance[1:]) == [], "too few steps to say so"
    learns = [line(i, critic=1.369) for i in range(100, 300)]
    assert said(CGAN(loss="bce"), learns) == []
    assert said(CGAN(loss="wasserstein", lipschitz="clip"), chance) == []


def test_a_penalised_loss_beyond_any_distance_of_volumes_is_told() -> None:
    steady = [line(i, critic=-300.0) for i in range(100, 300)]  # 10 times the root of 512 is 226
    assert any("runs away" in x for x in said(CGAN(), steady))
    assert said(CGAN(), [line(i, critic=-20.0) for i in range(100, 300)]) == []


def test_samples_far_from_the_scans_are_told_at_the_end() -> None:
    figures = {"spread": 1.0, "modes": 9.0, "modes_training": 9.0, "offset": 0.4}
    assert watch.of_figures(figures) == []
    (told,) = watch.of_figures(figures | {"offset": 3.0})
    assert "3.0 times as far" in told and "more steps" in told
    (told,) = watch.of_figures(figures | {"modes": 1.5})
    assert told.startswith("COLLAPSED")


def test_a_rare_generator_has_steps_enough_in_the_recent_log(tmp_path: Path) -> None:
    """At ten steps of the critic for one of the generator, whose gradient then explodes."""
    model, log, _ = fit(520, n=520, **FAST | {"critic_steps": 10})
    for x in log[320:]:
        if "generator.gradient" in x:
            x["generator.gradient"] *= 1000
    file = tmp_path / "training.jsonl"
    earlier = json.dumps({"round": 0, "step": 0, "reconstruction": 1.0}) + "\n"
    file.write_text(earlier + "".join(json.dumps({"round": 1, **x}) + "\n" for x in log))
    (last,) = model.rounds()
    lines = recent(file, [Round([], share=0), last])
    assert sum("generator" in x for x in lines) == 40
    assert all("critic" in x for x in lines), "of the last round alone"
    assert any("gradient of the generator has grown" in x for x in model.remarks(lines, {}))
    often = recent(file, [Round([], share=0), fit(1, n=0, **FAST)[0].rounds()[0]])
    assert [x["step"] for x in often] == list(range(320, 520))


def test_the_first_steps_are_not_judged() -> None:
    assert said(CGAN(), [line(i, critic=10.0) for i in range(90)]) == []
    assert said(CGAN(), []) == []


def test_examination_shows_how_much_of_the_gap_is_memory(trained: Any) -> None:
    model = trained[0]
    (batches,) = [cohort().all_train("cpu")]
    whole = Batch(*(torch.cat(t) for t in zip(*batches, strict=True)))
    same = model.examine(whole, whole)
    assert same.figures["critic_gap_holdout"] == 0
    # held-out people who look like samples: all of the gap is memory
    c = whole.c.flatten(0, 1)
    samples = model.sample(c, torch.arange(len(c)), whole.given.flatten(0, 1))
    figures = model.examine(whole, whole._replace(x=samples.reshape(whole.x.shape))).figures
    assert figures["critic_gap_holdout"] == pytest.approx(figures["critic_gap"], rel=1e-4)
    assert abs(figures["critic_gap"]) > 1e-3  # or the above would say nothing
    assert "critic_gap_holdout" not in model.examine(whole, None).figures
