"""Where a model's first weights come from: `train.init`, another run's model.

Every tensor whose name and shape are the new model's is taken, parameters and buffers alike; what
a `finish` fits is fitted anew at its time. A weight that differs only in how many numbers the
model is told is taken but for these: they come last wherever a backbone takes them in, and are 0 at
first, as if nothing were known. The rest stays as freshly drawn, and is listed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from synthmed import traces
from synthmed.backbones.generative import Generative, named_parameters
from synthmed.config import Config
from synthmed.configfile import init_folder
from synthmed.errors import InputError, UsageError
from synthmed.store import Manifest, Run, file_sha256
from synthmed.training import load_state, named_state

WEIGHTS = "weights.safetensors"
ABOUT = "model.json"

KNEW_HELD_OUT = {
    True: "people held out here, or others of the same names, are among those that these weights "
    "were trained on, so that no test can tell what the model remembers of them",
    None: "nothing says that these weights were not trained on people held out here, so that no "
    "test can tell what the model remembers of them",
    False: "these weights were trained on nobody who is held out here",
}
"""What `Origin.knew` found, in words."""


@dataclass(frozen=True)
class Origin:
    """The model that a training starts from.

    Args:
        path: its folder; stays private.
        digest: SHA-256 of its weights.
        about: what its model.json says of how it came about (`provenance`).
        condition_width: how many numbers that model is told.
        learned_from: pseudonyms of the people that it was trained on; empty where nothing says so,
            as of a folder outside its run, or may say it, as of a private one.
        all_known: whether they are all, under the names that people have in this run too.
    """

    path: Path
    digest: str
    about: Mapping[str, Any]
    condition_width: int
    learned_from: frozenset[str] = frozenset()
    all_known: bool = False

    def knew(self, held_out: Collection[str]) -> bool | None:
        """Whether these weights were trained on some of the people; None where nothing says it.

        By pseudonym: another cohort that counts its patients alike is taken for the same people.
        """
        if not self.learned_from.isdisjoint(held_out):
            return True
        return False if self.all_known else None

    def start(
        self, model: Generative, condition_width: int, buffers: bool = True
    ) -> dict[str, Any]:
        """Set the weights that fit; returns the provenance, and which tensors stayed fresh.

        Args:
            model: to start.
            condition_width: how many numbers it is told.
            buffers: take these too; a private training leaves them, since some are fitted to
                the other run's patients and nothing would fit them anew.

        Raises:
            UsageError: no tensor fits, or one of the two models goes on from the cohort's Gaussian
                and the other does not: what a network adds is then in another unit.
        """
        there = load_file(self.path / WEIGHTS)
        mine = named_state(model)
        begun = [any(k.endswith("linear.mean_n") for k in state) for state in (there, mine)]
        if begun[0] != begun[1]:
            raise UsageError(
                "train.init: one of the two models begins as the cohort's Gaussian "
                f"({'that one' if begun[0] else 'this one'}), the other does not",
                "Set backbone.factors to the same number in both configs, or leave train.init out.",
            )
        if not buffers:
            there = {k: v for k, v in there.items() if k in named_parameters(model)}
        taken = {
            k: there[k]
            for k, v in mine.items()
            if k in there and there[k].shape == v.shape and there[k].dtype == v.dtype
        }
        widths = self.condition_width, condition_width
        partly = {
            k: whole
            for k, axis in _told_last(model).items()
            if k in there and k in mine and k not in taken
            if (whole := _but_condition(there[k], mine[k], axis, widths)) is not None
        }
        taken |= partly
        if not taken:
            raise UsageError(
                "train.init: no tensor of that model fits this one, by name and shape",
                "Give both runs the same backbone settings, or leave train.init out.",
            )
        load_state(model, {**mine, **taken})
        return {
            "weights": self.digest,
            **self.about,
            "n_taken": len(taken),
            "n_fresh": len(mine) - len(taken),
            "fresh": sorted(set(mine) - set(taken)),
            "but_condition": sorted(partly),
        }


def _told_last(model: Generative) -> dict[str, int]:
    """Parameters along an axis of which the numbers that the model is told come last."""
    return {
        f"{name}.{parameter}": axis
        for name, module in model.modules.items()
        for parameter, axis in getattr(module, "TOLD_LAST", {}).items()
    }


def _but_condition(there: Tensor, mine: Tensor, axis: int, told: tuple[int, int]) -> Tensor | None:
    """A weight of another model with 0 for the numbers that this one is told; None if none fits.

    Args:
        there: of the other model.
        mine: of this one, for its shape.
        axis: along which these numbers come last.
        told: how many that model is told, and how many this one.
    """
    others = [s[:axis] + s[axis + 1 :] for s in (there.shape, mine.shape)]
    before, kept = (t.shape[axis] - n for t, n in zip((there, mine), told, strict=True))
    if others[0] != others[1] or there.dtype != mine.dtype or before != kept:
        return None
    whole = torch.zeros_like(mine)
    whole.narrow(axis, 0, kept).copy_(there.narrow(axis, 0, kept))
    return whole


def provenance(config: Config, start: Mapping[str, Any] | None) -> dict[str, Any]:
    """How a model came about, for those who start from it: public facts, and no path.

    Args:
        config: of the run that trained it.
        start: what `Origin.start` returned there, if it did not start from nothing.
    """
    return {
        "backbone": config.backbone.name,
        "title": config.export.name,
        "modality": config.data.modality,
        "privacy": config.privacy and config.privacy.model_dump(mode="json"),
        "init": released(start),
    }


def released(start: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What reports and the model card say of it: all but the names of tensors."""
    names = ("fresh", "but_condition")
    return None if start is None else {k: v for k, v in start.items() if k not in names}


def find(config: Config, catalogue: Manifest | None = None) -> Origin | None:
    """The model that `train.init` names; None where it names none.

    Args:
        config: of the run that starts from it.
        catalogue: that run's; without it nobody knows whether its people have the same names.

    Raises:
        UsageError: there is no finished model, one of another backbone, or one that was trained
            on somebody who was forgotten (forget.py).
    """
    folder = init_folder(config)
    if folder is None:
        return None
    if not ((folder / WEIGHTS).is_file() and (folder / ABOUT).is_file()):
        raise UsageError(
            f"train.init {config.train.init}: no trained model there",
            "Give a run whose training has ended, or its folder private/model.",
        )
    manifest = folder / "manifest.json"
    if manifest.is_file() and "n_forgotten" in json.loads(manifest.read_bytes())["facts"]:
        raise UsageError(
            f"train.init {config.train.init}: the model there was trained on people who were "
            "forgotten since",
            "Train it anew, or start from another one.",
        )
    told = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    about = told.get("provenance")
    if about is None or about["backbone"] != config.backbone.name:
        kind = "a version that did not say what it is" if about is None else about["backbone"]
        raise UsageError(
            f"train.init {config.train.init}: the model there is of {kind}, "
            f"this config's backbone is {config.backbone.name}",
            "Start from a model of the same backbone.",
        )
    start = Origin(folder, file_sha256(folder / WEIGHTS), about, told["condition_width"])
    return _learned_from(start, config, catalogue)


def _learned_from(start: Origin, config: Config, catalogue: Manifest | None) -> Origin:
    """With the people that a model in RUN/private/model was trained on, as far as that is known.

    Who is whom can be told by pseudonym where both runs read the same source under the same key
    (the digest of a source is keyed) and took the same column for people. A private model's people
    are not looked at: whether one of them is held out here would be said outside its epsilon.
    """
    folder = start.path.resolve()
    if folder.parts[-2:] != ("private", "model") or start.about["privacy"] is not None:
        return start
    run = Run(folder.parents[1])
    try:
        model, there = run.manifest("model"), run.manifest("catalogue")
        people = traces.trained_on(run, model) if model else None
        text = (run.path / "config.yaml").read_text(encoding="utf-8")
    except (OSError, InputError):  # of another version, or in part
        return start
    same = (
        there is not None
        and catalogue is not None
        and there.inputs["source"] == catalogue.inputs["source"]
        and yaml.safe_load(text)["data"].get("patient") == config.data.patient
    )
    return replace(
        start,
        learned_from=frozenset(people or ()),
        all_known=people is not None and same and start.about["init"] is None,
    )
