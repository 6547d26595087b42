"""The config: frozen parts, one YAML file, complete in itself (configfile.py reads it)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from synthmed import ages
from synthmed.backbones import Backbone
from synthmed.formats import address
from synthmed.metrics import DEFAULT_METRICS, Metric
from synthmed.metrics.spaced import Feature, InSpace
from synthmed.trainable import Choice
from synthmed.types import HALVES

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=40)]
CATEGORY = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
Category = Annotated[str, Field(pattern=CATEGORY, max_length=40)]


class Part(BaseModel):
    """A piece of the config: frozen, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


RESERVED = frozenset({"attack", "condition", "control", "features", "region"})
"""What slices of estimates begin with, beside the names of labels."""


class Categorical(Part):
    """A condition with named categories.

    Args:
        categories: 2 to 64 of them, in the order the network sees them.
    """

    kind: Literal["categorical"] = "categorical"
    categories: Annotated[tuple[Category, ...], Field(min_length=2, max_length=64)]

    @field_validator("categories")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a category twice")
        return value


class Continuous(Part):
    """A condition with a number.

    Args:
        low: end of the range that is public; what lies outside is refused.
        high: the other end.
        unit: such as years; 1 for none. Ages are pooled from 90 years on: say `years` where the
            name has no word `age`, and months or weeks where they are these.
    """

    kind: Literal["continuous"] = "continuous"
    low: float
    high: float
    unit: str = "1"

    @model_validator(mode="after")
    def _ordered(self) -> Continuous:
        if self.high <= self.low:
            raise ValueError(f"high ({self.high}) must be above low ({self.low})")
        return self


Condition = Annotated[Categorical | Continuous, Field(discriminator="kind")]


class Select(Part):
    """Which volumes of a DICOM source are wanted; all that is given has to fit.

    Args:
        description: patterns (`*T1*`) for the series' description or protocol, of which one has to
            fit, without regard to case; one that begins with `!` must not.
        volume: the same for the names of split volumes.
        plane: of the slices.
        contrast: whether an agent was given.
        max_spacing_mm: bound on the longest side of a voxel.
        repetition_ms: lowest and highest repetition time.
        echo_ms: the same of the echo time.
        inversion_ms: the same of the inversion time.
    """

    description: tuple[str, ...] = ()
    volume: tuple[str, ...] = ()
    plane: Literal["axial", "coronal", "sagittal"] | None = None
    contrast: bool | None = None
    max_spacing_mm: Annotated[float, Field(gt=0)] | None = None
    repetition_ms: tuple[float, float] | None = None
    echo_ms: tuple[float, float] | None = None
    inversion_ms: tuple[float, float] | None = None

    @field_validator("repetition_ms", "echo_ms", "inversion_ms")
    @classmethod
    def _rising(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"{value}: the low end comes first")
        return value


class Channel(Part):
    """Where one channel comes from: one of column, path and select.

    A text alone stands for a column or a path.

    Args:
        column: of the table, with a path relative to the table.
        path: a pattern, relative to the table (or to the source where there is none), which may
            name columns in braces: `segs/{participant_id}_seg.nii.gz`.
        select: of a DICOM source, where each session gives the one volume that fits.
        labels: of a mask, each with its value; without it the channel is an image.
        given: the mask is told to the model, which draws images for it, instead of being drawn.
    """

    column: str | None = None
    path: str | None = None
    select: Select | None = None
    labels: Mapping[Name, Annotated[int, Field(ge=1, le=255)]] | None = None
    given: bool = False

    @model_validator(mode="after")
    def _one_place(self) -> Channel:
        if [self.column, self.path, self.select].count(None) != 2:
            raise ValueError("give one of column, path and select")
        if self.select and self.labels:
            raise ValueError("select: a DICOM series is an image, no mask with labels")
        if self.path is not None and (
            Path(self.path).is_absolute() or ".." in Path(self.path).parts
        ):
            raise ValueError("path must stay inside data.source (no leading / and no ..)")
        return self

    @model_validator(mode="after")
    def _distinct_labels(self) -> Channel:
        values = list((self.labels or {}).values())
        if len(set(values)) < len(values):
            raise ValueError("labels: two of them have one value")
        if self.given and not self.labels:
            raise ValueError("given: only a mask can be given; declare its labels")
        return self


class Intensity(Part):
    """Per-scan robust scaling: these two percentiles of a scan become 0 and 1.

    Args:
        low_percentile: becomes 0.
        high_percentile: becomes 1.
    """

    low_percentile: Annotated[float, Field(ge=0, lt=50)] = 0.5
    high_percentile: Annotated[float, Field(gt=50, le=100)] = 99.5


class Data(Part):
    """What to read, who is one person, what to condition on, and the grid to learn on.

    Args:
        source: a folder, or the address of a PACS (`dicomweb://`, `dimse://`).
        format: what is read there; `auto` is what there is, and of both NIfTI where a table names
            it.
        table: of labels, in the folder, or a file of this machine where the source is an address.
            By default every participants.tsv or .csv; of DICOM every table with a column of
            PatientIDs.
        patient: the column that names one person. By default `patient`, `subject_group` or
            `participant_id`, the first that is there; of DICOM `patient_id` or `PatientID`.
        modality: BIDS suffix of the files (T1w, FLAIR, bold), and the name of the only channel.
        channels: name to where it comes from; by default one, the modality.
        conditions: what the model is told of each scan: columns of the table. {} for none.
        select: which volumes of a DICOM source are wanted.
        volumes: what becomes of a DICOM series that holds several volumes of one place (echoes,
            b-values, moments): `one` refuses it, `split` makes a scan of each.
        tilted: what becomes of one whose slices are shifted against each other: `resample` shifts
            them back, linearly.
        engine: `dcm2niix` takes voxels from that program, where it places them as headers do.
        faces: `remove` is for heads: voxels outside the brain become background, in all channels.
        missing_labels: what becomes of a scan that lacks a declared label: it is refused, or kept
            with the label unknown.
        text: what becomes of a scan with text drawn into its pixels: it is kept (nothing is
            searched for), put into quarantine, or painted over.
        grid: voxels along X, Y and Z that the model learns on, 8 to 512 each; 1 along one of them
            for a cohort of single slices.
        spacing_mm: of these voxels, 0.05 to 50 each; null takes the cohort's median, which then
            shows.
        holdout: share of people who are never trained on. Below 50 people no fidelity line passes.
        view: of a scan that is smaller than the grid. `drawn`: the frame around it is no part of
            the image, and each sample gets a field of view as the cohort has them. `grid`: the
            frame is learned like all other voxels.
        intensity: how grey values are scaled.
    """

    source: str
    format: Literal["auto", "nifti", "dicom"] = "auto"
    table: str | None = None
    patient: str | None = None
    modality: Annotated[str, Field(pattern=r"^[A-Za-z0-9]+$", max_length=20)] = "T1w"
    channels: Mapping[Name, Channel] | None = None
    conditions: Mapping[Name, Condition] = {}
    select: Select | None = None
    volumes: Literal["one", "split"] = "one"
    tilted: Literal["refuse", "resample"] = "refuse"
    engine: Literal["own", "dcm2niix"] = "own"
    faces: Literal["keep", "remove"] = "keep"
    missing_labels: Literal["quarantine", "keep"] = "quarantine"
    text: Literal["keep", "quarantine", "mask"] = "keep"
    grid: Annotated[tuple[int, int, int], Field()]
    spacing_mm: tuple[float, float, float] | None = None
    holdout: Annotated[float, Field(gt=0, lt=0.9)] = 0.25
    view: Literal["drawn", "grid"] = "drawn"
    intensity: Intensity = Intensity()

    @property
    def subgroups(self) -> dict[str, tuple[str, str]]:
        """The slice of every subgroup to the condition and the part of it that make it."""
        return {
            f"{name}={part}": (name, part)
            for name, condition in self.conditions.items()
            for part in (condition.categories if condition.kind == "categorical" else HALVES)
        }

    @property
    def flat(self) -> int | None:
        """The axis (0, 1, 2) along which the scans are single slices; None for volumes."""
        return self.grid.index(1) if 1 in self.grid else None

    @field_validator("conditions")
    @classmethod
    def _not_taken(cls, value: Mapping[str, Condition]) -> Mapping[str, Condition]:
        for name in sorted(RESERVED & set(value)):
            raise ValueError(
                f"{name}: the evidence calls its own slices so; give the column another name"
            )
        return value

    @field_validator("conditions")
    @classmethod
    def _ages_told(cls, value: Mapping[str, Condition]) -> Mapping[str, Condition]:
        for name, condition in value.items():
            if condition.kind == "continuous" and (
                said := ages.doubt(name, condition.unit, condition.high)
            ):
                raise ValueError(f"{name}.unit: {said}")
        return value

    @field_validator("channels", mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        """`T1w: image` names a column; a string with a / or a * or a brace is a path pattern."""
        if not isinstance(value, Mapping):
            return value
        return {
            k: ({"path": v} if re.search(r"[/*{]", v) else {"column": v})
            if isinstance(v, str)
            else v
            for k, v in value.items()
        }

    @field_validator("channels")
    @classmethod
    def _one_image(cls, value: Mapping[str, Channel] | None) -> Mapping[str, Channel] | None:
        if value is not None and not any(c.labels is None for c in value.values()):
            raise ValueError("needs at least one channel that is an image, not a mask")
        return value

    @field_validator("grid")
    @classmethod
    def _grid_size(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        sides = [n for n in value if n != 1]
        if len(sides) < 2 or min(sides) < 8 or max(sides) > 512:
            raise ValueError(
                f"{value}: each side must be 8 to 512 voxels; of single slices one side is 1"
            )
        return value

    # of the whole part: an error would repeat a field's value, and a password may be in it
    @model_validator(mode="after")
    def _possible_source(self) -> Data:
        if address.is_address(self.source):
            try:
                address.parse(self.source)
            except ValueError as error:
                raise ValueError(f"source: {error}") from None
            if self.format == "nifti":
                raise ValueError("format nifti: a PACS holds DICOM")
        return self

    @model_validator(mode="after")
    def _faces_of_heads(self) -> Data:
        if self.faces == "remove" and self.flat is not None:
            raise ValueError("faces remove: a brain is found in whole heads, not in single slices")
        return self

    @model_validator(mode="after")
    def _of_one_engine(self) -> Data:
        if self.engine == "dcm2niix" and (self.volumes, self.tilted) != ("one", "refuse"):
            raise ValueError(
                "engine dcm2niix: volumes are not split and tilted stacks not resampled with it"
            )
        return self

    @field_validator("spacing_mm")
    @classmethod
    def _spacing_range(
        cls, value: tuple[float, float, float] | None
    ) -> tuple[float, float, float] | None:
        if value is not None and (min(value) < 0.05 or max(value) > 50):
            raise ValueError(f"{value}: each spacing must be 0.05 to 50 mm")
        return value


class Augment(Part):
    """Random changes of a training scan that suit the anatomy; all off by default.

    Moving interpolates, which blurs: were all scans moved, sharp ones would be asked for of a model
    that never saw one (Karras et al. 2022 have 0.12 for each change).

    Args:
        flip: mirrors left and right: only where the anatomy is symmetric and no label has a side.
        shift_voxels: the furthest along each axis.
        rotate_degrees: the most about each axis.
        scale: the most, as a share.
        intensity: the most that grey values are scaled by, as a share.
        probability: of a scan being moved (shifted, turned and scaled together) and, apart from it,
            brightened.
        conditioned: the model is told what was done, and samples are asked for with nothing done;
            without it they are as shifted, turned and mirrored as the training scans.
    """

    flip: bool = False
    shift_voxels: Annotated[float, Field(ge=0, le=8)] = 0.0
    rotate_degrees: Annotated[float, Field(ge=0, le=30)] = 0.0
    scale: Annotated[float, Field(ge=0, le=0.2)] = 0.0
    intensity: Annotated[float, Field(ge=0, le=0.3)] = 0.0
    probability: Annotated[float, Field(gt=0, le=1)] = 0.5
    conditioned: bool = True


class Optimizer(Part):
    """AdamW, or plain gradient descent, with a linear warm-up and a cosine decay to a tenth.

    Args:
        rule: which of the two.
        learning_rate: after the warm-up.
        weight_decay: decoupled, of AdamW; of gradient descent as a term of the gradient.
        betas: of AdamW's two moments.
        warmup: share of training.
    """

    rule: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05


class Train(Part):
    """How long, how many patients a step, how often a checkpoint is written, and at what cost.

    Args:
        max_minutes: become steps at the speed measured at the start. One of the two is needed; of
            both the smaller holds.
        max_steps: exact, for runs that have to be equal.
        batch_patients: a step, one scan of each.
        optimizer: how weights move.
        gradient_clip: largest norm of a step's gradient.
        checkpoint_minutes: between two checkpoints.
        precision: `auto` is bf16 where the hardware has instructions for it, but for private runs.
        augment: how training scans are changed.
        init: another run (its folder, or its private/model) whose weights training starts from.
        trainable: only a part of what `init` has brought, for cohorts too small to move more:
            `norms_and_conditions`, or `adapters` at every layer's weight.
        adapter_rank: of the adapters.
        watch: compares, now and then, the loss on training and on held-out patients, and warns
            where the model learns its patients by heart.
        memory_gib: bound on the peak of training: a step's patients are worked through in pieces
            that fit, and where none do, ddpm's activations are computed again on the way back.
        compile: torch.compile; `auto` uses it on CUDA where training is long enough to pay for it,
            but for private runs.
    """

    max_minutes: Annotated[float, Field(gt=0)] | None = None
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_patients: Annotated[int, Field(ge=2, le=1024)] = 16
    optimizer: Optimizer = Optimizer()
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 3.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    augment: Augment = Augment()
    init: str | None = None
    trainable: Choice = "all"
    adapter_rank: Annotated[int, Field(ge=1, le=64)] = 4
    watch: bool = True
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    compile: Literal["auto", "on", "off"] = "auto"

    @model_validator(mode="after")
    def _bounded(self) -> Train:
        if self.max_minutes is None and self.max_steps is None:
            raise ValueError("give max_minutes or max_steps (or both: the smaller one holds)")
        return self

    @model_validator(mode="after")
    def _trained_before(self) -> Train:
        if self.trainable != "all" and self.init is None:
            raise ValueError(
                f"trainable: {self.trainable} leaves most weights as they begin, which is at "
                "random; set train.init to a run whose weights they shall be"
            )
        return self


class Privacy(Part):
    """A promise about every patient: epsilon at delta over all that ever touches the data.

    Everything here is a public constant: none may be chosen by looking at the patients.

    Args:
        epsilon: what all private runs of this SYNTHMED_HOME together may spend on one patient.
        delta: 1e-5 by default; above 1e-4 the report says what that permits.
        spend: epsilon that this run may use of it; null is all of it.
        sample_rate: q, the probability with which each patient is in a step.
        patients: about how many people are trained on, as a figure that may be public. It only
            sets the scale of the updates, so it need not be exact.
        clip: C, the norm that a patient's gradient is clipped to.
        draws: K, noise draws and augmentations that a patient's gradient is averaged over.
        at_once: patients whose gradients are in memory together; changes nothing else.
        init_is_public: declares that the weights of `train.init` were trained on nobody (phantoms)
            or on public data. The report says so; without it they are refused.
    """

    epsilon: Annotated[float, Field(gt=0, le=100)]
    delta: Annotated[float, Field(gt=0, lt=0.1)] = 1e-5
    spend: Annotated[float, Field(gt=0, le=100)] | None = None
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    patients: Annotated[int, Field(ge=2)]
    clip: Annotated[float, Field(gt=0)] = 1.0
    draws: Annotated[int, Field(ge=1, le=64)] = 2
    at_once: Annotated[int, Field(ge=1, le=1024)] = 4
    init_is_public: bool = False

    @model_validator(mode="after")
    def _within(self) -> Privacy:
        if self.spend is not None and self.spend > self.epsilon:
            raise ValueError(f"spend {self.spend:g} is more than epsilon {self.epsilon:g}")
        return self


Weights = Mapping[str, Annotated[float, Field(ge=0)]]
Range = tuple[float, float]


class Sample(Part):
    """How many, from which seed, and which conditions.

    Args:
        count: of samples; by default what `labels` asks for, else 100.
        seed: of the samples; by default that of the run.
        labels: counts that are asked for (`{diagnosis: {atrophy: 40}}`).
        prior: of what is left open: `uniform` over what is declared, `cohort` for the training
            patients' own joint distribution (cells under five merged), or a declared one: weights
            of categories and ranges of numbers (`{diagnosis: {control: 3, atrophy: 1}, age: [60,
            80]}`), uniform where it is silent.
        masks: a folder of label maps to draw images for, where a channel is `given`; with several
            such channels it holds a folder of the same file names for each.
    """

    count: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    labels: Mapping[str, Mapping[str, Annotated[int, Field(ge=1)]]] = {}
    prior: Literal["uniform", "cohort"] | Mapping[str, Weights | Range] = "uniform"
    masks: str | None = None


class Screen(Part):
    """Whether samples that copy a patient are dropped and replaced, and how many may be.

    Args:
        filter: drops them. With `privacy` none is dropped: a selection that looked at patients is
            no longer private.
        max_dropped: share of what was sampled; a cohort of which more are flagged is withheld.
        false_discovery_rate: of the copies test.
    """

    filter: bool = True
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.05
    false_discovery_rate: Annotated[float, Field(gt=0, le=0.2)] = 0.01


class Evaluate(Part):
    """What is measured.

    Args:
        resamples: behind intervals and permutation p-values.
        metrics: in the order of the report; by default all below.
        features: further spaces in which distributions are compared, after all metrics: networks
            that you bring, and radiomics.
    """

    resamples: Annotated[int, Field(ge=100, le=10_000)] = 500
    metrics: tuple[Metric, ...] = DEFAULT_METRICS
    features: tuple[Feature, ...] = ()

    @property
    def asked(self) -> tuple[Metric, ...]:
        """All that is measured, in the order of the report."""
        return (*self.metrics, *(InSpace(space=f) for f in self.features))

    @model_validator(mode="after")
    def _spaces_told_apart(self) -> Evaluate:
        names = [m.space.name for m in self.asked if isinstance(m, InSpace)]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(
                f"features: two are called {twice[0]}, which stands in the slice of both; "
                "give each a name of its own"
            )
        return self


class Rule(Part):
    """One line of a policy.

    Args:
        estimate: its name.
        slice: which part of it; null is the whole cohort.
        bound: which side of its interval is asked, or the value.
        relative_to: makes the limit a factor on the estimate's own floor or ceiling.
        at_most: the limit, one of the two.
        at_least: the limit.
        review: the looser end of a band beyond the limit, in which a person may sign.
        required: if not, the rule is left out where a run has no such estimate, as one without
            labels has no utility; one that is there and has no value still has to be decided.
    """

    estimate: str
    slice: str | None = None
    bound: Literal["lower", "upper", "value"] = "value"
    relative_to: Literal["floor", "ceiling"] | None = None
    at_most: float | None = None
    at_least: float | None = None
    review: float | None = None
    required: bool = True

    @model_validator(mode="after")
    def _one_limit(self) -> Rule:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("give either at_most or at_least")
        if self.review is not None and (
            (self.at_most is not None and self.review < self.at_most)
            or (self.at_least is not None and self.review > self.at_least)
        ):
            raise ValueError("review must be the looser limit")
        if (self.bound, self.at_most is None) in (("lower", False), ("upper", True)):
            raise ValueError(
                "a limit above is held by the upper bound and one below by the lower: take the "
                "other bound, or value"
            )
        return self


DEFAULT_POLICY: tuple[Mapping[str, Any], ...] = (
    {"estimate": "copied_patients", "bound": "upper", "at_most": 0.05},
    {"estimate": "copies_shipped", "at_most": 0},
    {"estimate": "authenticity_excess", "at_least": -0.1},
    {"estimate": "mmd2_excess", "bound": "upper", "relative_to": "ceiling", "at_most": 0.25},
    {"estimate": "coverage", "relative_to": "floor", "at_least": 0.85, "review": 0.7},
    {"estimate": "recall", "relative_to": "floor", "at_least": 0.8, "review": 0.6},
    {"estimate": "region_volume_smd", "bound": "upper", "at_most": 0.3, "review": 0.5},
    {
        "estimate": "mmd2_excess",
        "slice": "worst subgroup",
        "bound": "upper",
        "relative_to": "ceiling",
        "at_most": 0.5,
        "required": False,
    },
    {
        "estimate": "auc_tstr_minus_trtr",
        "bound": "lower",
        "at_least": -0.1,
        "required": False,
    },
)
"""The starting policy: what a release must meet unless the config says otherwise."""


class Policy(Part):
    """What a release must meet; every rule is printed with the decision.

    Args:
        rules: by default the starting policy (docs/evidence.md).
    """

    rules: Annotated[tuple[Rule, ...], Field(min_length=1)] = tuple(
        Rule(**r) for r in DEFAULT_POLICY
    )


class Export(Part):
    """What the release holds beside the BIDS volumes.

    Args:
        name: the cohort's title.
        license: that the cohort is given under.
    """

    name: str = "Synthetic MRI cohort"
    license: str = "not stated"


class Governance(Part):
    """Who answers for the data: goes into the datasheet as it stands, never inferred.

    Args:
        legal_basis: on which the patients' scans are used.
        ethics_number: of the approval.
        recipient: who gets the cohort; `forget` names it where a release has to be recalled.
        licence: of the cohort; in the report in the place of `export.license`.
    """

    legal_basis: str | None = None
    ethics_number: str | None = None
    recipient: str | None = None
    licence: str | None = None


class Config(Part):
    """A complete run.

    Args:
        data: what is read.
        backbone: the kind of model.
        privacy: has to be written out: null says that there is no protection.
        train: how it learns.
        seed: of everything that is drawn.
        sample: what is drawn from the model.
        screen: how copies are looked for.
        evaluate: what is measured.
        policy: what a release has to meet.
        export: what the release says of itself.
        governance: what its datasheet says.
    """

    data: Data
    backbone: Backbone
    privacy: Privacy | None
    train: Train
    seed: Annotated[int, Field(ge=0)] = 0
    sample: Sample = Sample()
    screen: Screen = Screen()
    evaluate: Evaluate = Evaluate()
    policy: Policy = Policy()
    export: Export = Export()
    governance: Governance = Governance()

    @model_validator(mode="after")
    def _labels_declared(self) -> Config:
        for name, counts in self.sample.labels.items():
            condition = self.data.conditions.get(name)
            if not isinstance(condition, Categorical):
                declared = [
                    k for k, c in self.data.conditions.items() if isinstance(c, Categorical)
                ]
                raise ValueError(
                    f"sample.labels.{name}: no such categorical condition; "
                    f"data.conditions declares {', '.join(declared) or 'none'}"
                )
            for category in counts:
                if category not in condition.categories:
                    raise ValueError(
                        f"sample.labels.{name}.{category}: not a category; "
                        f"known: {', '.join(condition.categories)}"
                    )
            asked = sum(counts.values())
            if self.sample.count is not None and asked > self.sample.count:
                raise ValueError(
                    f"sample.labels.{name}: asks for {asked} samples, sample.count is "
                    f"{self.sample.count}; raise sample.count (or --count), or lower the labels'"
                )
        if isinstance(self.sample.prior, Mapping):
            for name, wanted in self.sample.prior.items():
                self._check_prior(name, wanted)
        return self

    @model_validator(mode="after")
    def _public_constants(self) -> Config:
        """Under differential privacy nothing may be taken from the patients without being paid."""
        if self.privacy is None:
            return self
        refused = {
            "train.max_minutes: how many steps fit into a time depends on the machine's load and "
            "the patients, and their number is a part of the promise; set max_steps instead": (
                self.train.max_minutes is not None
            ),
            "data.view: drawn fits the sizes of the patients' fields of view; set grid": (
                self.data.view != "grid"
            ),
            "data.spacing_mm: null takes the cohort's median; write the voxel size down": (
                self.data.spacing_mm is None
            ),
            "data.patient: name the column that says who is one person (or set data.format: dicom, "
            "where it is PatientID): a person under two names would pay twice as little": (
                self.data.patient is None and self.data.format != "dicom"
            ),
            "sample.prior: cohort draws labels as the patients have them; use uniform, or declare "
            "a distribution that is public": self.sample.prior == "cohort",
            "train.precision: bf16 is not what the gradients are checked in; leave it out": (
                self.train.precision == "bf16"
            ),
            "train.compile: compiled code is not what the gradients are checked in; leave it out": (
                self.train.compile == "on"
            ),
            "train.init: those weights were trained on somebody; set privacy.init_is_public: true "
            "only if they were trained on phantoms or on public data": (
                self.train.init is not None and not self.privacy.init_is_public
            ),
        }
        for message, applies in refused.items():
            if applies:
                raise ValueError(f"{message} (privacy is promised)")
        return self

    @model_validator(mode="after")
    def _masks_from_elsewhere(self) -> Config:
        given = [k for k, c in (self.data.channels or {}).items() if c.given]
        if given and self.sample.masks is None:
            raise ValueError(
                f"sample.masks: data.channels.{given[0]} is given, so sampling needs a folder of "
                "label maps that may leave the house; the training patients' own masks are theirs"
            )
        if self.sample.masks is not None and not given:
            raise ValueError("sample.masks: no channel has given: true, so no mask would be used")
        return self

    def _check_prior(self, name: str, wanted: Weights | Range) -> None:
        condition = self.data.conditions.get(name)
        if condition is None:
            raise ValueError(
                f"sample.prior.{name}: no such condition; "
                f"data.conditions declares {', '.join(self.data.conditions) or 'none'}"
            )
        if isinstance(condition, Categorical):
            if not isinstance(wanted, Mapping) or not set(wanted) <= set(condition.categories):
                known = ", ".join(condition.categories)
                raise ValueError(f"sample.prior.{name}: give a weight a category; known: {known}")
            if not sum(wanted.values()) > 0:
                raise ValueError(f"sample.prior.{name}: the weights sum to 0")
        elif isinstance(wanted, Mapping) or not (
            condition.low <= wanted[0] < wanted[1] <= condition.high
        ):
            raise ValueError(
                f"sample.prior.{name}: give [low, high] within [{condition.low}, {condition.high}]"
            )
