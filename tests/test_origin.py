"""`train.init`: what is taken from another run, what is told of it, and when it is stale."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished, Result
from safetensors.torch import load_file

from synthmed import configfile, origin
from synthmed.config import Config
from synthmed.errors import UsageError
from synthmed.keys import Key
from synthmed.stages import train as stage
from synthmed.store import Run, file_sha256
from synthmed.training import Training, as_bytes, named_state
from synthmed.trial import noise_loader

Cli = Callable[..., Result]


def changed(finished: Finished, **values: object) -> Config:
    dotted = {k.replace("__", "."): v for k, v in values.items()}
    return configfile.load(finished.config, (), {"train.init": str(finished.path), **dotted})


def started(config: Config) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    source = noise_loader(config, 4, 4)
    model = stage.build(config, source, Key.root(9), "cpu")
    found = origin.find(config)
    assert found is not None
    told = found.start(model, source.spec.condition_width)
    return named_state(model), told


@pytest.mark.parametrize("inside", ["", "private/model"])
def test_an_equal_model_takes_everything(finished: Finished, inside: str) -> None:
    config = changed(finished, train__init=str(finished.path / inside))
    state, told = started(config)
    there = load_file(finished.path / "private/model/weights.safetensors")
    assert all(torch.equal(state[k], v) for k, v in there.items())
    assert (told["n_taken"], told["n_fresh"], told["fresh"]) == (len(there), 0, [])
    assert told["weights"] == file_sha256(finished.path / "private/model/weights.safetensors")
    assert told["backbone"] == "cvae"
    assert told["modality"] == "T1w"
    assert told["privacy"] is None
    assert str(finished.path) not in json.dumps(told)


def test_on_another_grid_what_fits_is_taken_and_the_rest_listed(finished: Finished) -> None:
    config = changed(finished, data__grid=[16, 16, 24])
    fresh = named_state(stage.build(config, noise_loader(config, 4, 4), Key.root(9), "cpu"))
    state, told = started(config)
    there = load_file(finished.path / "private/model/weights.safetensors")
    taken = {k for k in state if there[k].shape == state[k].shape}
    assert 0 < len(taken) < len(state)
    assert set(told["fresh"]) == set(state) - taken  # type: ignore[call-overload]
    for k, v in state.items():
        assert torch.equal(v, there[k] if k in taken else fresh[k]), k


@pytest.mark.parametrize("more", [True, False], ids=["more labels", "fewer labels"])
def test_with_other_labels_only_these_start_anew(finished: Finished, more: bool) -> None:
    """The numbers that a model is told come last: their columns are 0, all others are taken."""
    site = {"site": {"kind": "categorical", "categories": ["A", "B", "C"]}}
    before = configfile.load(finished.config, ()).data.conditions
    after = {k: v.model_dump() for k, v in before.items()} | site
    config = changed(finished, data__conditions=after if more else {})
    state, told = started(config)
    there = load_file(finished.path / "private/model/weights.safetensors")
    width = noise_loader(config, 4, 4).spec.condition_width
    partly = set(told["but_condition"])  # type: ignore[call-overload]
    assert {"encoder.head.0.weight", "decoder.head.0.weight", "decoder.template"} <= partly
    assert not {k for k in told["fresh"] if not k.startswith("prior.")}  # type: ignore[attr-defined]
    for name in partly:
        (axis,) = np.flatnonzero(np.array(state[name].shape) != np.array(there[name].shape))
        kept = state[name].shape[axis] - width
        old, new = there[name].narrow(axis, 0, kept), state[name].narrow(axis, 0, kept)
        assert kept > 0 and torch.equal(new, old)
        assert not state[name].narrow(axis, kept, width).any()
    assert not {"fresh", "but_condition"} & set(origin.released(told) or {})


def test_the_average_starts_from_those_weights(finished: Finished) -> None:
    config = changed(finished)
    model = stage.build(config, noise_loader(config, 4, 4), Key.root(9), "cpu")
    found = origin.find(config)
    assert found is not None
    found.start(model, found.condition_width)
    there = load_file(finished.path / "private/model/weights.safetensors")
    (average,) = Training(model, [5]).averages.values()
    assert average
    assert all(torch.equal(v, there[k]) for k, v in average.items())


def test_what_cannot_be_started_from_says_so(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trained model there"):
        origin.find(changed(finished, train__init=str(tmp_path)))
    with pytest.raises(UsageError, match="environment variable NOWHERE"):
        origin.find(changed(finished, train__init="$NOWHERE/run"))
    shutil.copytree(finished.path / "private/model", tmp_path / "model")
    about = json.loads((tmp_path / "model/model.json").read_text())
    about["provenance"]["backbone"] = "other"
    (tmp_path / "model/model.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match="the model there is of other"):
        origin.find(changed(finished, train__init=str(tmp_path / "model")))
    config = changed(finished)
    model = stage.build(config, noise_loader(config, 4, 4), Key.root(9), "cpu")
    other = {k: torch.zeros(*v.shape, 1) for k, v in named_state(model).items()}
    (tmp_path / "model/weights.safetensors").write_bytes(as_bytes(other))
    with pytest.raises(UsageError, match="no tensor of that model fits"):
        origin.Origin(tmp_path / "model", "", {}, 0).start(model, 0)


def test_a_model_that_begins_as_the_gaussian_and_one_that_does_not_are_kept_apart(
    finished: Finished,
) -> None:
    """What the networks add is in another unit there, and would be ten times too large or small."""
    with pytest.raises(UsageError, match=r"cohort's Gaussian \(this one\)") as error:
        started(changed(finished, backbone__factors=4))
    assert "backbone.factors" in str(error.value)


def test_it_is_known_whether_the_weights_knew_who_is_held_out(
    finished: Finished, tmp_path: Path
) -> None:
    index = json.loads((finished.path / "private/prepare/dataset.json").read_text())
    of = {split: {s["patient"] for s in index["scans"] if s["split"] == split}
          for split in ("train", "holdout")}  # fmt: skip
    assert len(of["train"]) > 3 and len(of["holdout"]) > 3
    catalogue = Run(finished.path).manifest("catalogue")
    assert catalogue is not None

    def knew(folder: Path, people: Iterable[str], **given: Any) -> bool | None:
        config = changed(finished, train__init=str(folder), **given.pop("config", {}))
        found = origin.find(config, given.get("catalogue", catalogue))
        assert found is not None
        return found.knew(sorted(people))

    for inside in ("", "private/model"):
        assert knew(finished.path / inside, of["holdout"]) is False
        assert knew(finished.path / inside, [*of["holdout"], min(of["train"])]) is True
    # under another key, or of another source, or by another column people have other names
    other = catalogue.model_copy(update={"inputs": {"source": "ab" * 32}})
    for unlike in ({"catalogue": other}, {"catalogue": None}, {"config": {"data__patient": "id"}}):
        assert knew(finished.path, of["holdout"], **unlike) is None
        assert knew(finished.path, of["train"], **unlike) is True
    # a folder that lies elsewhere does not say it
    shutil.copytree(finished.path / "private/model", tmp_path / "model")
    assert knew(tmp_path / "model", of["holdout"]) is None
    # nor does a model that itself started from another, nor a private one, of nobody
    for i, (told, of_train) in enumerate([({"init": {}}, True), ({"privacy": {}}, None)]):
        run = tmp_path / f"run{i}"
        shutil.copytree(finished.path, run, symlinks=True)
        about = json.loads((run / "private/model/model.json").read_text())
        about["provenance"].update(told)
        (run / "private/model/model.json").write_text(json.dumps(about))
        assert knew(run, of["holdout"]) is None
        assert knew(run, of["train"]) is of_train
    # nor one whose run another version made
    (run / "private/ingest/manifest.json").write_text("{}")
    assert knew(run, of["holdout"]) is None


def test_a_run_tells_where_it_started_and_notices_a_changed_source(
    finished: Finished, synthmed: Cli, tmp_path: Path
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(finished.path, source, symlinks=True)
    words = ("--run", run, "--device", "cpu", "-q")
    init = ("--set", f"train.init={source}", "--set", "train.max_steps=2")
    assert synthmed("generate", finished.config, *words, *init).code == 0
    manifest = json.loads((run / "private/model/manifest.json").read_text())
    digest = file_sha256(source / "private/model/weights.safetensors")
    assert manifest["inputs"]["init"] == digest
    assert manifest["facts"]["init"]["weights"] == digest
    card = (run / "release/MODEL_CARD.md").read_text()
    assert digest[:16] in card
    assert "weights of another model (cvae" in card
    for report in ("release/report/report.json", "private/report/report.json"):
        content = json.loads((run / report).read_text())
        told = content["provenance"]["init"]
        assert told["n_fresh"] == 0 and told["knew_held_out"] is False
        (line,) = [v for v in content["policy"] if v["estimate"] == "weights to start from"]
        assert line["status"] == "pass"
        page = (run / report).with_suffix(".html").read_text()
        assert "never saw those held out, nor did the weights that training started from." in page
    for file in (run / "release").rglob("*"):
        assert not file.is_file() or str(source).encode() not in file.read_bytes()
    # unchanged: nothing to do
    before = (run / "private/model/manifest.json").stat().st_mtime_ns
    assert synthmed("generate", run / "config.yaml", *words).code == 0
    assert (run / "private/model/manifest.json").stat().st_mtime_ns == before
    # the source is trained anew: what started from it is stale
    weights = source / "private/model/weights.safetensors"
    weights.write_bytes(as_bytes({k: 1.01 * v for k, v in load_file(weights).items()}))
    assert synthmed("generate", run / "config.yaml", *words).code == 0
    again = json.loads((run / "private/model/manifest.json").read_text())
    assert again["inputs"]["init"] == file_sha256(weights) != digest
    # and gone: what stands is still good
    shutil.copytree(source / "private/model", tmp_path / "model")
    shutil.rmtree(source)
    assert synthmed("generate", run / "config.yaml", *words).code == 0
    last = json.loads((run / "private/model/manifest.json").read_text())
    assert last == again
    # a model that lies elsewhere does not say whom it was trained on: a person has to look
    init = ("--set", f"train.init={tmp_path / 'model'}")
    words = ("--run", run, "--device", "cpu", "--overwrite")
    result = synthmed("generate", run / "config.yaml", *words, *init)
    assert result.code == 4 and "train.init: nothing says that these weights" in result.err
    (reason,) = json.loads((run / "withheld/report/report.json").read_text())["reasons"]
    assert reason.startswith("weights to start from: nothing says")
    page = (run / "withheld/report/report.html").read_text()
    assert "of the weights that training started from nothing says so." in page
