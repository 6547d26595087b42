"""Training few parameters of a model that was trained before."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from synthmed import configfile, trainable
from synthmed.artifacts import ChannelInfo, Dataset
from synthmed.backbones import Backbone
from synthmed.backbones.generative import VolumeSpec, named_parameters
from synthmed.conditions import Conditions
from synthmed.config import Config, Optimizer
from synthmed.errors import Interrupted, UsageError
from synthmed.loader import Loader
from synthmed.origin import ABOUT, WEIGHTS, Origin
from synthmed.progress import Progress
from synthmed.stages import train as stage
from tests.proofs.mechanism import stop_at_batch

GRID = (8, 8, 8)
QUIET = Progress("train", quiet=True)
FAMILIES: dict[str, dict[str, Any]] = {
    "cvae": {"name": "cvae", "latent": 3, "widths": [4, 4], "prior": "standard"},
    "cgan": {"name": "cgan", "latent": 3, "widths": [4, 4], "hidden": 4, "critic_steps": 2},
    "ddpm": {"name": "ddpm", "widths": [4, 8], "prediction": "v"},
}
PRIVATE = {
    "epsilon": 8.0,
    "sample_rate": 0.5,
    "patients": 10,
    "init_is_public": True,
}
FEW = ("adapters", "norms_and_conditions")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHMED_HOME", str(tmp_path / "home"))


def config(family: str, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "data": {
            "source": "x",
            "patient": "patient",
            "grid": GRID,
            "spacing_mm": [2, 2, 3],
            "conditions": {"dx": {"kind": "categorical", "categories": ["A", "B"]}},
            "view": "grid",
        },
        "backbone": FAMILIES[family],
        "privacy": None,
        "train": {"max_steps": 5, "batch_patients": 4, "precision": "fp32"},
    }
    for dotted, value in changes.items():
        configfile._put(tree, dotted.replace("__", "."), value)
    return configfile.validate(tree, "test")


def loader(conf: Config) -> Loader:
    rng = np.random.default_rng(0)
    data = Dataset(
        volumes=rng.random((12, 1, *GRID)).astype(np.float16),
        patients=np.array([f"p{i:02d}" for i in range(12)]),
        labels=[{"dx": "AB"[i % 2]} for i in range(12)],
        holdout=np.arange(12) % 4 == 3,
        channels=[ChannelInfo("T1w")],
        affine=np.diag([2.0, 2, 3, 1]),
    )
    return Loader(data, Conditions(conf.data.conditions), 4, conf.train.augment)


def run(
    conf: Config, folder: Path, start: Origin | None = None, stop_at: int | None = None
) -> dict[str, Any]:
    partial, target = folder / "partial", folder / "target"
    for place in (partial, target):
        place.mkdir(parents=True, exist_ok=True)
    source = loader(conf)
    if stop_at is not None:
        stop_at_batch(source, "draw", stop_at)
    return stage.train(conf, source, partial, target, QUIET, "cpu", start)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "target" / WEIGHTS)


def origin(family: str, folder: Path) -> Origin:
    run(config(family), folder)
    about = json.loads((folder / "target" / ABOUT).read_text())
    return Origin(folder / "target", "digest", about["provenance"], about["condition_width"])


def few(choice: str, **more: Any) -> dict[str, Any]:
    return {"train__init": "before", "train__trainable": choice, "seed": 5, **more}


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    assert set(before) == set(after), "a model that was trained in part is one like any other"
    return {k for k in before if not torch.equal(before[k], after[k])}


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("choice", FEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rest_keeps_every_bit(family: str, choice: str, private: bool, tmp_path: Path) -> None:
    start = origin(family, tmp_path / "before")
    conf = config(family, **few(choice, **({"privacy": PRIVATE} if private else {})))
    facts = run(conf, tmp_path / "after", start)
    changed = moved(load_file(start.path / WEIGHTS), weights(tmp_path / "after"))
    changed -= {k for k in changed if k.startswith(("prior.", "spectrum", "critic.gain"))}
    model = stage.build(conf, loader(conf), stage.Key.root(0), "cpu")
    names = set(named_parameters(model))
    changed &= names
    assert changed, "something was learned"
    if choice == "norms_and_conditions":
        words = ("norm", "adn", "known", "modulate", "head.0", "film", "style", "score", "embed")
        words = (*words, "first.0", "last.0")  # of the U-Net: its norms in sequences
        assert all(any(w in k for w in words) for k in changed), changed
    else:
        assert all(k.endswith("weight") for k in changed), changed
    assert 0 < facts["n_trained"] < facts["n_parameters"]
    if private:
        assert facts["privacy"]["n_trained"] <= facts["n_trained"]
        assert facts["privacy"]["init_is_public"]


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_of_adapters(family: str) -> None:
    """rank x (rows + columns) a layer, and nothing else."""
    conf = config(family)
    model = stage.build(conf, loader(conf), stage.Key.root(0), "cpu")
    layers = [
        p for m in model.modules.values() for p in m.modules() if isinstance(p, trainable.LAYERS)
    ]
    wanted = sum(2 * (p.weight.shape[0] + p.weight[0].numel()) for p in layers)
    trainable.restrict(model, "adapters", rank=2)
    assert trainable.n_trained(model) == wanted > 0


def effective(model: Any) -> dict[str, Tensor]:
    """The weight that every layer works with, whatever it is made of."""
    return {
        f"{name}.{at}": part.weight.detach().clone()
        for name, module in model.modules.items()
        for at, part in module.named_modules()
        if isinstance(part, trainable.LAYERS)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_begin_as_nothing_and_are_added_in_for_good(family: str) -> None:
    conf = config(family)
    source = loader(conf)
    model = stage.build(conf, source, stage.Key.root(0), "cpu")
    c = torch.from_numpy(source.encoded[:3])
    keys, given = torch.arange(3), torch.zeros(3, 0, *GRID)
    names = set(named_parameters(model))
    as_built, before = model.sample(c, keys, given), effective(model)
    trainable.restrict(model, "adapters", rank=2)
    begun = effective(model)
    assert before.keys() == begun.keys() and all(torch.equal(before[k], begun[k]) for k in begun)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in named_parameters(model).items():
            if name.endswith(".up"):
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    with_adapters = model.sample(c, keys, given)
    assert not torch.allclose(with_adapters, as_built, atol=1e-2)
    used = effective(model)
    trainable.merge(model)
    assert set(named_parameters(model)) == names
    after = effective(model)
    assert used.keys() == after.keys() and all(torch.equal(used[k], after[k]) for k in used)


@pytest.mark.parametrize("choice", FEW)
def test_an_interrupted_training_of_few_parameters_ends_in_the_same_weights(
    choice: str, tmp_path: Path
) -> None:
    start = origin("cvae", tmp_path / "before")
    conf = config("cvae", **few(choice))
    run(conf, tmp_path / "whole", start)
    with pytest.raises(Interrupted):
        run(conf, tmp_path / "cut", start, stop_at=3)
    run(conf, tmp_path / "cut", start)
    assert moved(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == set()


def test_a_frozen_parameter_stays_frozen(tmp_path: Path) -> None:
    """A cvae with white noise keeps its spectrum fixed, whatever is chosen."""
    conf = config("cvae", backbone__noise="white")
    model = stage.build(conf, loader(conf), stage.Key.root(0), "cpu")
    for choice in FEW:
        other = copy.deepcopy(model)
        trainable.restrict(other, choice, rank=2)  # type: ignore[arg-type]
        assert not named_parameters(other)["noise.log_spectrum"].requires_grad


def test_few_parameters_of_nothing_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"trainable: adapters leaves .* at random; set train.init"
    ):
        config("cvae", train__trainable="adapters")


@pytest.mark.parametrize("choice", FEW)
@pytest.mark.parametrize("lipschitz", ["clip", "spectral"])
def test_few_parameters_of_weights_that_are_projected_are_refused(
    lipschitz: str, choice: str
) -> None:
    """Clipping weights after a step would change those that are to stay."""
    conf = config("cgan", backbone__lipschitz=lipschitz)
    model = stage.build(conf, loader(conf), stage.Key.root(0), "cpu")
    with pytest.raises(UsageError, match=f"{choice} does not go with how critic"):
        trainable.restrict(model, choice, rank=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", FEW)
def test_weights_that_init_did_not_bring_are_not_left_at_random(
    choice: str, tmp_path: Path
) -> None:
    """Another number of categories: the mean image would stay 0 for good."""
    start = origin("cvae", tmp_path / "before")
    three = {"dx": {"kind": "categorical", "categories": ["A", "B", "C"]}}
    conf = config("cvae", **few(choice, data__conditions=three))
    with pytest.raises(UsageError, match=r"would leave decoder.*template.* as drawn at random"):
        run(conf, tmp_path / "after", start)
    whole = config("cvae", train__init="before", data__conditions=three)
    assert run(whole, tmp_path / "whole", start)["init"]["fresh"]


def test_nothing_to_train_is_refused() -> None:
    spec = VolumeSpec(1, GRID, 2)
    member = next(m for m in Backbone.__args__[0].__args__ if m.__name__ == "Spectral")  # type: ignore[attr-defined]
    model = member().build(spec, Optimizer())
    for choice in FEW:
        with pytest.raises(UsageError, match=f"{choice} leaves nothing to train in moments"):
            trainable.restrict(model, choice, rank=2)  # type: ignore[arg-type]
