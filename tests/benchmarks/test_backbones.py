"""The backbones' table: the whole script on phantoms, what it refuses, and what it would see."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from synthmed import configfile
from synthmed.artifacts import Cohort, Dataset
from synthmed.errors import SynthmedError, UsageError
from synthmed.formats.synthetic import UNIT
from synthmed.keys import Key
from synthmed.stages.prepare import CLIP
from synthmed.types import Array
from tests.benchmarks import backbones
from tests.benchmarks.backbones import BEGIN, END, MODELS, RESULTS, configured, main, table, tables
from tests.benchmarks.cohorts import insert
from tests.benchmarks.part import CURVED, FEWER, HOUSE, Part, judged, prepared, sheet, write_volumes
from tests.benchmarks.reference import TRIAL_STEPS, Gaussian, Monai, Recipe, train_scans

TINY: dict[str, dict[str, Any]] = {
    "cvae": {"name": "cvae", "latent": 4, "widths": [4, 8]},
    "autoencoder": {
        "name": "autoencoder",
        "widths": [4, 8],
        "code": {"kind": "vector", "length": 4},
    },
    "cgan": {"name": "cgan", "latent": 4, "widths": [4, 8], "hidden": 8, "critic_steps": 1},
    "ddpm": {
        "name": "ddpm",
        "widths": [8, 8],
        "depth": 1,
        "factors": 4,
        "sampler": {"name": "dpm_solver", "steps": 3},
    },
    "spectral": {"name": "spectral", "coefficients": 4},
}
COUNT = 12
REFERENCE = ("--monai-channels", "32", "32", "--ddim-steps", "2", "--ancestral-steps", "2")


@pytest.fixture(scope="module")
def configs(make_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of configs: `tiny` is a cvae, the others lend their backbones."""
    folder = tmp_path_factory.mktemp("shipped")
    conditions = {"diagnosis": {"kind": "categorical", "categories": ["control", "atrophy"]}}
    for name, backbone in TINY.items():
        file = make_config(f"backbones-{name}", backbone=backbone, data__conditions=conditions)
        tree = yaml.safe_load(file.read_text())
        tree["train"]["batch_patients"] = {"ddpm": 3}.get(name, 4)
        target = folder / ("tiny.yaml" if name == "cvae" else f"hippocampus-{name}.yaml")
        target.write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "page.md"
    file.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter\n")
    return file


@pytest.fixture(scope="module")
def call(
    configs: Path, page: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Run the script in this process and return its folder of results."""
    out = tmp_path_factory.mktemp("benchmark") / "out"

    def run(*words: str, **changes: Any) -> Path:
        options = {"cohorts": "tiny", "count": COUNT, "max-steps": 2, "minutes": 10} | changes
        fixed = {"configs": configs, "page": page, "out": out, "results": out / "results"}
        given = [w for k, v in (fixed | options).items() for w in (f"--{k}", str(v))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backbones, "apart", lambda step, *a: step(*a))
            patch.setenv("SYNTHMED_HOME", "set by the script")
            assert main([*given, *REFERENCE, *words]) == 0
        return out

    return run


@pytest.fixture(scope="module")
def out(call: Callable[..., Path]) -> Path:
    """Every model, in two sittings."""
    call("--models", *HOUSE)
    return call("--curve")


@pytest.fixture(scope="module")
def part(configs: Path, tmp_path_factory: pytest.TempPathFactory) -> Part:
    """A prepared cohort of phantoms."""
    folder = tmp_path_factory.mktemp("part") / "tiny-gaussian"
    part = Part(
        cohort="tiny",
        model="gaussian",
        config=configured("tiny", "gaussian", configs, {"data.holdout": 0.5}),
        folder=folder,
        result=folder / "result.json",
        recipe=Recipe(channels=(32, 32), batch=2, ddim_steps=3, ancestral_steps=2),
    )
    prepared(part)
    return part


def result(out: Path, model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results" / f"tiny-{model}.json").read_text())
    return found


# --- the whole script -----------------------------------------------------------------------------


def test_every_model_is_trained_and_measured(out: Path) -> None:
    found = {m: result(out, m) for m in MODELS}
    steps = {m: sum(r["training"]["steps"]) for m, r in found.items()}
    assert steps == {**dict.fromkeys(HOUSE, 2), "gaussian": 0, "monai": 2}
    for model, r in found.items():
        assert r["n_synthetic"] == COUNT
        names = {e["name"] for e in r["estimates"]}
        assert {name for _, name in set(backbones.FIGURES) - set(backbones.PAIRS)} <= names
        assert r["training"]["n_parameters"] > 0 and r["training"]["peak_bytes"] > 2**20
        assert r["sampling"]["seconds"] > 0
        assert (r["sampling"]["ancestral_seconds"] is not None) == (model == "monai")
        curve = list(r["curve"])
        assert curve == (["10", "100"] if model in CURVED else [])
        assert list(r["fewer_steps"]) == ([str(n) for n in FEWER] if model in CURVED else [])
    assert len({r["dataset"] for r in found.values()}) == 1


def test_all_models_are_asked_for_the_same_labels(out: Path) -> None:
    """As the config draws them, one by one."""
    labels = {
        m: [s.labels for s in Cohort.open(out / f"tiny-{m}/private/drawn").samples] for m in MODELS
    }
    assert all(x == labels["cvae"] for x in labels.values())
    assert {x["diagnosis"] for x in labels["cvae"]} == {"control", "atrophy"}


def test_the_page_holds_one_table_of_all(out: Path, page: Path) -> None:
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "| | floor | ceiling | " + " | ".join(MODELS) + " |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows} == {len(MODELS) + 4}
    assert "tiny: 18 people to train on, 6 held out" in text
    assert str(out) not in text
    assert "dice" not in text, "the cohort has no masks"


def test_a_cohort_with_masks_has_rows_of_them(out: Path) -> None:
    plain = result(out, "cvae")
    dice = {"name": "dice_tstr", "slice": None, "value": 0.5, "ci": [0.4, 0.6]}
    masked = {**plain, "model": "cgan"}
    masked["estimates"] = [*plain["estimates"], {**dice, "floor": 0.8, "ceiling": 0.1}]
    assert "| dice_tstr [95 %] | 0.8 | 0.1 | – | 0.5 [0.4, 0.6] |" in table([plain, masked])
    assert "segmentability" not in table([plain, masked])


def test_a_done_part_is_kept_and_the_table_made_of_what_there_is(
    out: Path, page: Path, call: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.json")}
    text = page.read_text()
    call("--curve")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.json")} == before
    capsys.readouterr()
    call("--table-only")
    assert page.read_text() == text
    assert capsys.readouterr().out.strip() in text


def test_a_part_of_other_settings_is_not_taken_for_this_one(
    out: Path, call: Callable[..., Path]
) -> None:
    with pytest.raises(SynthmedError, match="made with other settings"):
        call("--models", "cvae", minutes=11)
    with pytest.raises(SynthmedError, match="made with other settings"):
        call("--models", "monai", "--monai-batch", "2")


def test_a_curve_is_trained_for_its_share_of_the_time(out: Path) -> None:
    early = configfile.load(out / "tiny-ddpm-10" / "config.yaml")
    assert early.train.max_minutes == pytest.approx(1)
    curve = result(out, "ddpm")["curve"]
    training = json.loads((out / "tiny-ddpm-10" / "training.json").read_text())
    assert curve["10"]["seconds"] == training["seconds"]


def test_fewer_steps_make_other_samples_of_the_same_model(out: Path) -> None:
    """And none of the part's own is touched."""
    r = result(out, "ddpm")
    hurried = Cohort.open(out / "tiny-ddpm/private/hurried")
    own = Cohort.open(out / "tiny-ddpm/private/drawn")
    assert len(own.samples) == COUNT
    a, b = (nib.load(c.path / c.samples[0].files["T1w"]).get_fdata() for c in (hurried, own))
    assert a.shape == b.shape and (a != b).any()
    values = [found["value"] for found in r["fewer_steps"].values()]
    assert len(set(values)) == len(FEWER) and r["curve"]["100"]["value"] not in values


def test_real_scans_are_not_drawn_into_the_docs(
    out: Path, call: Callable[..., Path], page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        call("--docs")
    assert not (page.parent / "images").exists()
    monkeypatch.setattr(backbones, "PHANTOMS", ("tiny",))
    call("--docs", "--models", "cvae")
    assert [p.name for p in (page.parent / "images").iterdir()] == ["tiny-cvae.png"]


def test_a_step_runs_in_a_process_of_its_own() -> None:
    def pid(found: dict[str, Any]) -> int:
        return int(found["pid"])

    assert pid(backbones.apart(whoami)) != pid(whoami())


def whoami() -> dict[str, Any]:
    import os

    return {"pid": os.getpid()}


def test_the_page_of_the_project_has_the_markers() -> None:
    assert "text" in insert(backbones.PAGE.read_text(encoding="utf-8"), "text", BEGIN, END)


# --- the configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cohort", [*backbones.COHORTS, *backbones.PHANTOMS])
def test_every_cohort_has_a_config_for_every_model(cohort: str, model: str) -> None:
    values = {"train.max_minutes": 7.0, "train.max_steps": None, "sample.count": 100}
    config = configured(cohort, model, values=values)
    data = [configured(cohort, m).data for m in MODELS]
    assert all(d == data[0] for d in data)
    assert model not in HOUSE or config.backbone.name == model
    assert (config.train.max_minutes, config.train.max_steps) == (7.0, None)


def test_a_backbone_is_lent_with_its_training(configs: Path) -> None:
    lent = configured("tiny", "ddpm", configs, {"train.max_steps": 9})
    assert lent.backbone.name == "ddpm"
    assert (lent.train.batch_patients, lent.train.max_steps) == (3, 9)
    assert configured("tiny", "cvae", configs).train.batch_patients == 4


def test_a_model_from_outside_is_limited_by_the_time_alone() -> None:
    minutes = {"train.max_minutes": 7.0}
    assert configured("acdc", "cvae", values=minutes).train.max_steps == 600
    assert configured("acdc", "monai", values=minutes).train.max_steps is None
    assert configured("acdc", "monai", values=minutes | {"train.max_steps": 9}).train.max_steps == 9


# --- the table ------------------------------------------------------------------------------------


def test_parts_that_do_not_compare_are_refused(out: Path) -> None:
    a, b = result(out, "cvae"), result(out, "ddpm")
    with pytest.raises(ValueError, match=r"differ in minutes: cvae 10\.0, ddpm 5"):
        tables([a, b | {"minutes": 5}])
    with pytest.raises(ValueError, match="differ in dataset"):
        tables([a, b | {"dataset": "another"}])
    moved = [e | {"floor": 0.123} if e["name"] == "mmd2" else e for e in b["estimates"]]
    with pytest.raises(ValueError, match=r"mmd2 .*do not have one floor"):
        tables([a, b | {"estimates": moved}])


def test_the_measured_cohorts_come_in_the_issues_order(out: Path) -> None:
    a = result(out, "cvae")
    text = tables([a | {"cohort": c} for c in ("another", "acdc", "hippocampus")])
    heads = [line.split(":")[0] for line in text.splitlines() if "people to train on" in line]
    assert heads == ["hippocampus", "acdc", "another"]


# --- planted cohorts ------------------------------------------------------------------------------


def one_scan_each(data: Dataset) -> Dataset:
    """The first scan of everybody, in the numbers that a written volume can hold."""
    rows = np.sort(np.unique(data.patients, return_index=True)[1])
    return replace(
        data,
        volumes=(np.round(data.volumes[rows].astype(np.float32) * UNIT) / UNIT).astype(np.float16),
        patients=data.patients[rows],
        labels=[data.labels[i] for i in rows],
        holdout=data.holdout[rows],
    )


def planted(part: Part, held_out: bool, name: str) -> dict[str, Any]:
    """Estimates of the real scans of one side, 12 people each, in the place of samples."""
    data = one_scan_each(part.dataset())
    rows = np.flatnonzero(data.holdout == held_out)
    assert len(rows) == 12
    target = part.folder / "private" / name
    target.mkdir()
    samples, _ = write_volumes(
        data,
        lambda k: data.labels[rows[k]],
        lambda indices, _: data.volumes[rows[list(indices)]].astype(np.float32),
        range(len(rows)),
        target,
    )
    found = judged(part, data, Cohort(target, samples))
    return {e.name: e for e in found if e.slice is None}


def test_held_out_people_as_samples_reach_the_floor(part: Part) -> None:
    """What cannot be told from held-out people scores as they do."""
    found = planted(part, held_out=True, name="holdout")
    for name in ("authenticity", "condition_accuracy"):
        assert found[name].value == pytest.approx(found[name].floor, abs=1e-9), name
    assert found["copies"].value == 0
    assert found["mmd2"].value < 0  # each meets itself on the other side


def test_training_people_as_samples_are_found_out(part: Part) -> None:
    """They reach the floor of every distribution figure, and none of the memorization figures."""
    found = planted(part, held_out=False, name="train")
    for name in ("mmd2", "precision", "recall", "density", "coverage"):
        assert found[name].value == pytest.approx(found[name].floor, abs=1e-9), name
    assert found["authenticity"].value == 0
    assert found["membership_auc"].value == 1


# --- the references -------------------------------------------------------------------------------


def test_the_gaussian_has_the_scans_mean_and_covariance() -> None:
    """Against closed forms, on correlated numbers; each row from its own key alone."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(30, 6)) @ rng.normal(size=(6, 6)) + 3
    gaussian = Gaussian.fit(mixed.astype(np.float32).reshape(30, 1, 2, 3, 1))
    keys = [Key.root(k) for k in range(20_000)]
    drawn = gaussian.sample(keys)
    assert drawn.shape == (20_000, 1, 2, 3, 1)
    flat, exact = drawn.reshape(len(keys), 6), np.cov(mixed.T)
    sd = np.sqrt(np.diag(exact))
    # four standard errors of a mean, of a variance and of a covariance
    assert np.all(np.abs(flat.mean(0) - mixed.mean(0)) < 4 * sd / np.sqrt(len(keys)))
    error = np.sqrt((exact**2 + np.outer(sd, sd) ** 2) / len(keys))
    assert np.all(np.abs(np.cov(flat.T) - exact) < 4 * error)
    assert np.array_equal(gaussian.sample(keys[3:4])[0], drawn[3])


def test_a_saved_gaussian_draws_the_same(tmp_path: Path) -> None:
    gaussian = Gaussian.fit(np.random.default_rng(1).random((5, 1, 2, 2, 2), dtype=np.float32))
    gaussian.save(tmp_path / "g.safetensors")
    again, keys = Gaussian.load(tmp_path / "g.safetensors"), [Key.root(0)]
    assert np.array_equal(gaussian.sample(keys), again.sample(keys))


@pytest.fixture(scope="module")
def monai(part: Part) -> Monai:
    """The reference on a grid that has to be padded, with weights that are not its first zeros."""
    model = Monai(part.recipe, part.config, (1, 7, 8, 9), seed=0, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in model.network.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def test_the_reference_draws_volumes_of_the_grid_by_label_and_key_alone(monai: Monai) -> None:
    labels, keys = (
        [{"diagnosis": "control"}, {"diagnosis": "atrophy"}],
        [Key.root(k) for k in (1, 2)],
    )
    both = monai.sample(labels, keys)
    assert both.shape == (2, 1, 7, 8, 9)
    assert both.min() >= 0 and both.max() <= CLIP
    swapped = monai.sample(labels[::-1], keys[::-1])
    assert np.allclose(swapped[::-1], both, atol=1e-5)
    assert not np.allclose(both[0], both[1])
    assert monai.ancestral_seconds(labels, keys) > 0


def test_the_class_is_told_to_the_reference(monai: Monai) -> None:
    keys = [Key.root(1), Key.root(1)]
    both = monai.sample([{"diagnosis": "control"}, {"diagnosis": "atrophy"}], keys)
    assert not np.allclose(both[0], both[1], atol=1e-6)


def test_the_reference_learns(part: Part) -> None:
    """Noise and class alike."""
    scans = np.full((6, 1, 8, 8, 8), 0.1, np.float32)
    scans[3:] = 0.9
    labels = [{"diagnosis": name} for name in ("control", "atrophy") for _ in range(3)]
    model = Monai(part.recipe, part.config, scans.shape[1:], seed=0, device="cpu")
    x, t = torch.from_numpy(scans), torch.arange(100, 700, 100)
    noise = torch.randn(scans.shape, generator=torch.Generator().manual_seed(0))
    noisy = model.ddpm.add_noise(x, noise, t)

    @torch.no_grad()
    def loss(told: list[dict[str, str]]) -> float:
        found = model._predicted(noisy, t, model._classes(told), torch.arange(6))
        return float((found - noise).square().mean())

    # its last layer starts at zero
    assert loss(labels) == pytest.approx(float(noise.square().mean()))
    assert model.train(scans, labels, 100, 30, seed=0) == 30
    assert loss(labels) < 0.9 * float(noise.square().mean())
    assert loss(labels) != loss(labels[::-1])


def test_the_reference_ends_in_time(part: Part) -> None:
    scans: Array = np.zeros((4, 1, 8, 8, 8), np.float32)
    model = Monai(part.recipe, part.config, scans.shape[1:], seed=0, device="cpu")
    labels = [{"diagnosis": "control"}] * 4
    assert model.train(scans, labels, 1e-9, None, 0) == TRIAL_STEPS


def test_a_number_is_no_class(part: Part, make_config: Callable[..., Path]) -> None:
    config = configfile.load(make_config("numbers"))
    with pytest.raises(UsageError, match="age is a number"):
        Monai(part.recipe, config, (1, 8, 8, 8), 0, "cpu")
    conditions = {
        k: {"kind": "categorical", "categories": c}
        for k, c in (("sex", ["F", "M"]), ("site", ["A", "B", "C"]))
    }
    both = configfile.load(make_config("both", data__conditions=conditions))
    model = Monai(part.recipe, both, (1, 8, 8, 8), 0, "cpu")
    numbers = model._classes([{"sex": s, "site": c} for s in "FM" for c in "ABC"])
    assert numbers is not None and numbers.tolist() == list(range(6))


def test_an_unconditional_reference_needs_no_label(
    part: Part, make_config: Callable[..., Path]
) -> None:
    config = configfile.load(make_config("unconditional", data__conditions={}))
    model = Monai(part.recipe, config, (1, 8, 8, 8), 0, "cpu")
    assert model.sample([{}], [Key.root(0)]).shape == (1, 1, 8, 8, 8)


def test_training_scans_hold_nobody_that_is_held_out(part: Part) -> None:
    data = part.dataset()
    scans, labels = train_scans(data)
    assert len(scans) == len(labels) == int(np.sum(~data.holdout))
    assert np.array_equal(scans[0], data.volumes[np.flatnonzero(~data.holdout)[0]])


def test_a_sheet_has_real_scans_left_and_the_first_samples_right(part: Part) -> None:
    data = part.dataset()
    place = part.folder / "private" / "black"
    place.mkdir()
    black, _ = write_volumes(
        data,
        lambda k: data.labels[0],
        lambda indices, _: np.zeros((len(indices), *data.volumes.shape[1:]), np.float32),
        range(20),
        place,
    )
    picture = sheet(data, Cohort(place, black))
    assert picture.shape == (8 * 128, 4 * 388 + 16)
    left, right = picture[:, : 2 * 388], picture[:, -2 * 388 :]
    assert left.max() > 0 and right.max() == 0


def test_what_a_result_depends_on_is_told_apart(part: Part) -> None:
    def made(by: Part) -> dict[str, Any]:
        return {"settings": json.loads(json.dumps(by.settings))}

    assert part.has_made(made(part))
    assert str(part.config.data.source) not in json.dumps(part.settings)
    other = replace(part, recipe=Recipe(batch=9))
    assert part.has_made(made(other))  # a Gaussian has no recipe
    assert not replace(part, model="monai").has_made(made(replace(other, model="monai")))
    assert not part.has_made(made(part.early(10)))
    assert not part.has_made(made(replace(part, device="cuda")))


def test_a_field_that_settings_do_not_name_has_its_default_in_them(part: Part) -> None:
    house = replace(part, model=part.config.backbone.name)
    told = house.settings

    def made(**data: Any) -> dict[str, Any]:
        return {"settings": told | {"data": data}}

    older = {k: v for k, v in told["data"].items() if k != "text"}
    assert house.has_made(made(**older))
    data = house.config.data.model_copy(update={"text": "mask"})
    masked = replace(house, config=house.config.model_copy(update={"data": data}))
    assert not masked.has_made(made(**older))
    assert not house.has_made(made(**told["data"], gone=1))
    assert not house.has_made(made(**told["data"] | {"view": "grid"}))


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda f: f.stem)
def test_the_kept_results_are_those_of_the_configs(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYNTHMED_REAL_DATA", "elsewhere")
    result = json.loads(file.read_text())
    values = {"train.max_minutes": result["minutes"], "sample.count": result["n_synthetic"]}
    config = configured(result["cohort"], result["model"], values=values)
    part = Part(result["cohort"], result["model"], config, Path(), file, result["device"])
    assert part.has_made(result)
