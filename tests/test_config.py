"""Configs: every shipped one is valid, and each mistake is named by its path."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY

from synthmed import configfile
from synthmed.backbones import Backbone
from synthmed.config import DEFAULT_POLICY, Config, Policy
from synthmed.errors import UsageError
from synthmed.inventory import inventory
from synthmed.metrics import DEFAULT_METRICS

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
CONTRACT = {"quickstart", "acdc", "brain3mm", "dicom", "hippocampus-cvae"}


def changed(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(yaml.safe_dump(TINY))
    for dotted, value in changes.items():
        configfile._put(tree, dotted.replace("__", "."), value)
    return tree


def fault(tree: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as error:
        configfile.validate(tree, "test.yaml")
    text = str(error.value)
    assert text.startswith("config test.yaml: ")
    return text


# --- shipped -------------------------------------------------------------------------------------


def test_no_shipped_config_is_skipped() -> None:
    """Counted against the folder itself and the contract: an empty parametrisation would pass."""
    files = [p for p in (ROOT / "configs").rglob("*") if p.is_file()]
    assert sorted(files) == SHIPPED, "a config is a .yaml file"
    assert {p.stem for p in SHIPPED} >= CONTRACT
    assert set(inventory()["configs"]) == {p.stem for p in SHIPPED}
    assert configfile.shipped_folder("configs") == ROOT / "configs"


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: p.stem)
def test_a_shipped_config_is_valid_and_says_how_it_is_run(file: Path) -> None:
    config = configfile.load(file)
    assert isinstance(config, Config)
    first = file.read_text(encoding="utf-8").splitlines()[0]
    said = "make generate" if file.stem == "quickstart" else f"synthmed generate {file.stem}"
    assert re.match(rf"# {re.escape(said)}( |$)", first)
    assert re.search(r"minute|hour|second", first), "opens with its cost"
    assert configfile.find(file.stem) == file
    assert "privacy" in yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: p.stem)
def test_a_resolved_config_reloads_to_an_equal_one(file: Path, tmp_path: Path) -> None:
    config = configfile.load(file, ["sample.count=7"], {"seed": 3})
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(configfile.dump(config), encoding="utf-8")
    again = configfile.load(resolved)
    assert again == config
    assert configfile.dump(again) == configfile.dump(config)
    assert (again.sample.count, again.seed) == (7, 3)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("trian", "train"),
        ("data__chanels", "channels"),
        ("backbone__latnet", "latent"),
        ("train__optimizer__learning_rat", "learning_rate"),
        ("data__conditions__diagnosis__categorys", "categories"),
        ("sample__cuont", "count"),
    ],
)
def test_a_misspelt_key_names_its_path_and_what_was_meant(key: str, suggestion: str) -> None:
    text = fault(changed(**{key: 3}))
    assert f"{key.replace('__', '.')}: unknown key; did you mean {suggestion}?" in text


def test_a_key_like_no_other_lists_what_there_is() -> None:
    text = fault(changed(sample__zzzz=1))
    assert "sample.zzzz: unknown key; known: count, labels, masks, prior, seed" in text


def test_faults_inside_a_list_name_the_place() -> None:
    assert "evaluate.metrics.0.foo: unknown key" in fault(
        changed(evaluate__metrics=[{"name": "mmd2", "foo": 1}])
    )
    assert "policy.rules.1.estimat: unknown key; did you mean estimate?" in fault(
        changed(policy__rules=[{"estimate": "copies", "at_most": 0}, {"estimat": "x"}])
    )


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ({"widthz": [4, 8]}, "backbone.widthz: unknown key; did you mean widths?"),
        (
            {"penalty": {"kind": "l1", "wieght": 1}},
            "backbone.penalty.wieght: unknown key; did you mean weight?",
        ),
        ({"code": {"length": 3}}, "backbone.code.kind: missing; known: 'map', 'vector'"),
        ({"code": {"kind": "map", "channels": 0}}, "backbone.code.channels: "),
    ],
)
def test_faults_inside_a_chosen_backbone_name_its_own_keys(
    backbone: dict[str, Any], said: str
) -> None:
    assert said in fault(changed(backbone={"name": "autoencoder", **backbone}))


def test_an_unknown_name_lists_the_valid_ones() -> None:
    text = fault(changed(backbone={"name": "cvea"}))
    assert "backbone.name: " in text
    for name in inventory()["backbones"]:
        assert name in text
    assert "cvea" in text
    text = fault(changed(evaluate__metrics=[{"name": "fid"}]))
    for metric in DEFAULT_METRICS:
        assert metric.name in text


def test_a_missing_kind_lists_the_valid_ones() -> None:
    text = fault(changed(data__conditions={"sex": {"categories": ["F", "M"]}}))
    assert "data.conditions.sex.kind: missing; known: 'categorical', 'continuous'" in text


def test_missing_privacy_says_what_null_means() -> None:
    tree = changed()
    del tree["privacy"]
    assert "privacy: missing (null says: no protection)" in fault(tree)


def test_at_most_three_faults_are_told() -> None:
    text = fault(changed(**{f"wrong{i}": i for i in range(5)}))
    assert text.count("unknown key") == 3
    assert "(and 2 more)" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample__labels": {"diagnose": {"atrophy": 1}}}, "declares diagnosis, sex"),
        ({"sample__labels": {"age": {"70": 1}}}, "sample.labels.age: no such categorical"),
        ({"sample__labels": {"sex": {"X": 1}}}, "sample.labels.sex.X: not a category; known: F, M"),
        # found before an hour of training, not after it
        ({"sample__labels": {"sex": {"F": 19}}}, "sex: asks for 19 samples, sample.count is 18"),
        ({"data__holdout": 1.5}, "data.holdout: "),
        ({"data__grid": [4, 16, 16]}, "data.grid: (4, 16, 16): each side must be 8 to 512"),
        ({"data__grid": [16, 16]}, "data.grid.2: missing"),
        ({"data__grid": [1, 1, 16]}, "each side must be 8 to 512 voxels; of single slices one"),
        ({"data__grid": [4, 16, 1]}, "each side must be 8 to 512 voxels; of single slices one"),
        ({"data__grid": [16, 16, 1], "data__faces": "remove"}, "faces remove: a brain is found"),
        ({"data__conditions__age__high": 10}, "data.conditions.age: high (10.0) must be above"),
        ({"data__conditions__sex__categories": ["F", "F"]}, "names a category twice"),
        (
            {"data__conditions": {"region": {"kind": "categorical", "categories": ["a", "b"]}}},
            "data.conditions: region: the evidence calls its own slices so",
        ),
        ({"data__channels": {"T1w": "/etc/*.nii"}}, "path must stay inside data.source"),
        ({"data__channels": {"T1w": "../*.nii"}}, "path must stay inside data.source"),
        ({"train": {"batch_patients": 4}}, "train: give max_minutes or max_steps"),
        ({"train__max_steps": 0}, "train.max_steps: "),
        ({"policy__rules": [{"estimate": "x"}]}, "policy.rules.0: give either at_most or at_least"),
        ({"policy__rules": [{"estimate": "x", "at_most": 2, "review": 1}]}, "the looser limit"),
        (
            {"data__channels": {"T1w": {"column": "image", "given": True}}},
            "only a mask can be given",
        ),
        (
            {"data__channels": {"T1w": "image", "m": {"column": "m", "labels": {"a": 1, "b": 1}}}},
            "data.channels.m: labels: two of them have one value",
        ),
        ({"data__missing_labels": "drop"}, "data.missing_labels: "),
        ({"sample__masks": "masks"}, "sample.masks: no channel has given: true"),
        ({"data__intensity__low_percentile": float("nan")}, "data.intensity.low_percentile: "),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], said: str) -> None:
    assert said in fault(changed(**changes))


def test_a_given_mask_has_to_come_from_elsewhere() -> None:
    channels = {"T1w": "image", "roi": {"column": "m", "labels": {"a": 1}, "given": True}}
    text = fault(changed(data__channels=channels))
    assert "sample.masks: data.channels.roi is given" in text
    assert "training patients' own masks are theirs" in text
    there = configfile.validate(changed(data__channels=channels, sample__masks="m"), "test")
    assert configfile.masks_folder(there) == Path("m")


def test_channels_have_a_shorthand() -> None:
    config = configfile.validate(
        changed(
            data__channels={
                "T1w": "image",
                "seg": {"path": "segs/{participant_id}.nii.gz", "labels": {"a": 1}},
                "T2w": "t2/*.nii.gz",
            }
        ),
        "test",
    )
    assert config.data.channels is not None
    assert config.data.channels["T1w"].column == "image"
    assert config.data.channels["T2w"].path == "t2/*.nii.gz"
    assert "at least one channel that is an image" in fault(
        changed(data__channels={"seg": {"column": "seg", "labels": {"a": 1}}})
    )


# --- files and overrides -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty, or not a mapping"),
        (b"- a\n- b\n", "empty, or not a mapping"),
        (b"data: [1\nx: 2\n", "not valid YAML at line 2"),
        (b"\xff\xfe\x00\x01", "not a UTF-8 text file"),
        (b"data: !!python/object/apply:os.system [echo]\n", "not valid YAML at line 1"),
    ],
)
def test_a_file_that_is_no_config_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        configfile.load(file)
    assert said in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed: 1\ndata: {}\nseed: 2\n", "the key seed stands twice, at lines 1 and 3"),
        (
            "data:\n  grid: 1\n  source: x\n  grid: 2\n",
            "the key grid stands twice, at lines 2 and 4",
        ),
        ("train: {max_steps: 1, max_steps: 1}\n", "the key max_steps stands twice, at line 1"),
        ("a: [{b: 1, 'b': 2}]\n", "the key b stands twice, at line 1"),
    ],
)
def test_a_key_that_stands_twice_is_named(content: str, said: str, tmp_path: Path) -> None:
    """Also where both values are equal: one of them is not what the writer thinks it is."""
    file = tmp_path / "twice.yaml"
    file.write_text(content)
    with pytest.raises(UsageError, match=re.escape(f"config {file}: {said}; keep one of them")):
        configfile.load(file)


def test_a_key_may_stand_in_two_mappings_and_override_a_merged_one() -> None:
    text = "base: &b {x: 1, y: 2}\nother: {<<: *b, x: 3}\nthird: {x: 1}\n"
    assert configfile.parse(text)["other"] == {"x": 3, "y": 2}


def test_an_override_with_a_key_twice_is_quoted(make_config: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"--set sample=.*the key count stands twice"):
        configfile.load(make_config(), ["sample={count: 1, count: 2}"])


def test_an_unknown_config_lists_the_shipped_ones() -> None:
    with pytest.raises(UsageError) as error:
        configfile.find("quickstrat")
    for file in SHIPPED:
        assert file.stem in str(error.value)


def test_overrides_are_yaml_and_reach_any_depth(make_config: Callable[..., Path]) -> None:
    config = configfile.load(
        make_config(),
        [
            "train.optimizer.learning_rate=2e-3",
            "backbone.widths=[4, 4]",
            "data.patient=subject_group",
            "export.name=a=b",
            "sample.labels={sex: {F: 2}}",
            "data.spacing_mm=null",
        ],
        {"sample.count": 5},
    )
    assert config.train.optimizer.learning_rate == pytest.approx(2e-3)
    assert config.backbone.widths == (4, 4)
    assert config.data.patient == "subject_group"
    assert config.export.name == "a=b"
    assert config.sample.labels == {"sex": {"F": 2}}
    assert config.sample.count == 5
    assert config.data.spacing_mm is None
    assert config.train.max_steps == 5, "what was not named stays"


@pytest.mark.parametrize("item", ["train.max_steps", "=3", "a=[1"])
def test_a_wrong_override_is_quoted(item: str, make_config: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--set {item}: ")):
        configfile.load(make_config(), [item])


def test_a_source_with_an_unset_variable_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configfile.validate(changed(data__source="${NO_SUCH_VARIABLE}/x"), "test")
    with pytest.raises(UsageError, match="NO_SUCH_VARIABLE is not set"):
        configfile.source_folder(config)
    asked = config.model_copy(
        update={"sample": config.sample.model_copy(update={"masks": "$Z_/m"})}
    )
    with pytest.raises(UsageError, match=r"sample.masks: environment variable Z_ is not set"):
        configfile.masks_folder(asked)
    monkeypatch.setenv("NO_SUCH_VARIABLE", "/there")
    assert configfile.source_folder(config) == Path("/there/x")


def test_the_starting_policy_asks_about_copies_first() -> None:
    """Every default rule names an estimate that the default metrics make, safety before looks."""
    names = [r["estimate"] for r in DEFAULT_POLICY]
    assert names[:3] == ["copied_patients", "copies_shipped", "authenticity_excess"]
    assert Policy().rules[0].at_most == 0.05
    assert Policy().rules[0].bound == "upper", "no copy among few samples proves nothing"
    assert Policy().rules[1].at_most == 0


def test_every_backbone_is_built_from_its_defaults() -> None:
    for name in inventory()["backbones"]:
        config = configfile.validate(changed(backbone={"name": name}), "test")
        assert config.backbone.name == name
    assert inventory()["backbones"], Backbone
