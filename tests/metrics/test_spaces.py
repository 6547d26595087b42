"""Other spaces than the descriptor: volumes of regions jointly, and networks that a user brings."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.distance import pdist
from sklearn.metrics.pairwise import rbf_kernel

from synthmed import configfile
from synthmed.artifacts import ChannelInfo
from synthmed.config import Evaluate
from synthmed.errors import UsageError
from synthmed.metrics import DEFAULT_METRICS, InSpace, RegionVolumeSMD
from synthmed.metrics.network import Network, middle_slices
from synthmed.metrics.shared import Shared
from synthmed.metrics.sides import Cases, Sides
from synthmed.metrics.spaced import Mapped
from synthmed.metrics.spaces import RegionVolumes
from synthmed.pipeline import DEPENDS
from synthmed.policy import decide
from synthmed.progress import Progress
from synthmed.stages.evaluate import judge
from synthmed.types import WORST, Estimate
from tests.metrics.cohorts import GRID, cases, made, sides

# --- regions -------------------------------------------------------------------------------------

CHANNELS = (ChannelInfo("T1w"), ChannelInfo("a:a", mask="a"), ChannelInfo("b:b", mask="b"))


def two_regions(first: np.ndarray, second: np.ndarray, prefix: str) -> Cases:
    """Scans with two balls whose volumes are e^first and e^second times a usual one."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, k) for k in GRID), indexing="ij")
    volumes = np.zeros((len(first), 3, *GRID), np.float16)
    for i, logs in enumerate(zip(first, second, strict=True)):
        for channel, middle, log in zip((1, 2), (-0.45, 0.45), logs, strict=True):
            distance = np.sqrt((x - middle) ** 2 + y**2 + z**2)
            volumes[i, channel] = np.clip((0.3 * np.exp(log / 3) - distance) / 0.1 + 0.5, 0, 1)
        volumes[i, 0] = 0.4 * volumes[i, 1] + 0.8 * volumes[i, 2]
    return Cases(
        volumes, np.array([f"{prefix}{i:03d}" for i in range(len(first))]), [{}] * len(first)
    )


def people(seed: int, n: int, prefix: str) -> Cases:
    """People in whom both regions are large, or both small."""
    rng = np.random.default_rng(seed)
    common, own = rng.standard_normal(n), rng.standard_normal((2, n))
    first, second = 0.2 * (0.95 * common + 0.3 * own)
    return two_regions(first, second, prefix)


def of_regions(synthetic: Cases) -> Sides:
    of = sides(people(1, 60, "t"), people(2, 50, "h"), synthetic, resamples=200)
    return Sides(**{**of.__dict__, "channels": CHANNELS})


def measured(metric: Any, of: Sides) -> dict[tuple[str, str | None], Estimate]:
    return {(e.name, e.slice): e for e in metric.estimate(of, Shared(of))}


def mismatched(honest: Cases) -> Cases:
    """The same volumes of each region, and the largest first one goes with the smallest second."""
    size = honest.volumes[:, 1:].sum(axis=(2, 3, 4), dtype=np.float64)
    by_first, by_second = np.argsort(size[:, 0]), np.argsort(size[:, 1])[::-1]
    volumes = honest.volumes.copy()
    volumes[by_first, 2] = honest.volumes[by_second, 2]
    volumes[:, 0] = 0.4 * volumes[:, 1] + 0.8 * volumes[:, 2]
    return made(volumes)


def test_regions_that_do_not_belong_together_are_seen_only_jointly() -> None:
    honest = people(3, 50, "s")
    told = []
    for cohort in (made(honest.volumes), mismatched(honest)):
        of = of_regions(cohort)
        joint, single = measured(InSpace(), of), measured(RegionVolumeSMD(), of)
        told.append((joint, {k: e.model_dump() for k, e in single.items()}))
    (equal, alone), (inverted, alone_inverted) = told
    for name in ("mmd2", "mmd2_excess"):
        assert equal[name, "features=regions"].ci[0] < 0
        assert inverted[name, "features=regions"].ci[0] > 0.02
    assert p_value(equal["mmd2", "features=regions"]) > 0.05
    assert p_value(inverted["mmd2", "features=regions"]) == pytest.approx(1 / 201, rel=0.01)
    found = inverted["frechet", "features=regions"]
    assert found.ci[0] > 2 * found.floor
    for key, values in alone.items():  # the means and spreads are the same people's
        for field in ("value", "floor", "ceiling"):
            assert alone_inverted[key][field] == pytest.approx(values[field], rel=1e-9)


def p_value(estimate: Estimate) -> float:
    return float(estimate.note.split("p = ")[1].split(" ")[0])


def test_larger_regions_are_the_ceiling_and_are_seen() -> None:
    of = of_regions(made(people(3, 50, "s").volumes))
    found = measured(InSpace(), of)["mmd2", "features=regions"]
    assert found.floor < found.ceiling and "grown by a tenth" in found.method
    mapped = Mapped(Shared(of), RegionVolumes())
    grown, real = mapped._raw("blurred"), mapped._raw("holdout")
    np.testing.assert_allclose(np.exp(grown), 1.1 * np.exp(real), rtol=1e-12)
    expected = of.holdout.volumes[:, 1:].astype(np.float64).sum(axis=(2, 3, 4))
    np.testing.assert_allclose(np.exp(real), expected, rtol=1e-6)


def test_tissue_classes_stand_in_where_there_are_no_masks() -> None:
    rng = np.random.default_rng(5)
    train, holdout, honest = cases(rng, 40, "t", twice=6), cases(rng, 30, "h"), cases(rng, 30, "s")
    spoilt = np.where(honest.volumes > 0.5, honest.volumes * np.float16(1.15), honest.volumes)
    low = []
    for volumes in (honest.volumes, spoilt, np.zeros_like(spoilt)):
        of = sides(train, holdout, made(volumes))
        found = measured(InSpace(), of)
        assert {k[0] for k in found} == {"mmd2", "mmd2_excess", "frechet"}
        low.append(found["mmd2", "features=regions"].ci[0])
    assert low[0] < 0 < min(low[1:])


def test_spaces_are_no_subgroups() -> None:
    """One estimate for each name and slice, and the worst subgroup is one of labels."""
    rng = np.random.default_rng(7)
    sides_ = [cases(rng, n, p) for n, p in ((30, "t"), (28, "h"), (26, "s"))]
    labelled = [
        Cases(c.volumes, c.patients, [{"kind": "ab"[i % 2]} for i in range(len(c))]) for c in sides_
    ]
    of = sides(*labelled, categorical={"kind": ("a", "b")})
    metrics = [m for m in DEFAULT_METRICS if m.name in ("mmd2", "frechet", "features")]
    found = judge(of, Shared(of), metrics, Progress("evaluate", quiet=True))
    assert decide([], found, n_holdout=28)  # raises where two share a name and a slice
    assert [e for e in found if e.slice == "features=regions" and e.value is not None]
    (worst,) = [e for e in found if e.slice == WORST]
    assert "kind=" in worst.note


# --- networks ------------------------------------------------------------------------------------


class Moments(torch.nn.Module):
    """(b, C, ...) to (b, 2 C, ...): voxels and their squares, whose averages are moments."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x * x], 1)


class Whole(torch.nn.Module):
    """(b, C, ...) to (b, all voxels): what a network is given, as it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


class Nothing(torch.nn.Module):
    """Divides by zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) / 0 - x.flatten(1) / 0


class Scalar(torch.nn.Module):
    """One number for all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean()


class Picky(torch.nn.Module):
    """Takes three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def saved(module: torch.nn.Module, folder: Path, **settings: Any) -> Network:
    file = folder / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have another format
        torch.jit.save(torch.jit.script(module), file)
    return declared(file, **settings)


def declared(file: Path, **settings: Any) -> Network:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Network(**{"name": "net", "file": str(file), "sha256": sha256, **settings})


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(*parts: tuple[int, int | bytes | str]) -> bytes:
    """A protocol buffer of (field, value): numbers as varints, the rest with its length before."""
    out = b""
    for field, value in parts:
        if isinstance(value, int):
            out += varint(field << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(field << 3 | 2) + varint(len(data)) + data
    return out


def onnx(file: Path, nodes: list[bytes], *weights: bytes) -> Network:
    """A graph from x to z as ONNX, written field by field (the numbers are those of onnx.proto)."""

    def value(name: str) -> bytes:
        shape = message(*[(1, message((2, f"{name}{i}"))) for i in range(5)])
        return message((1, name), (2, message((1, message((1, 1), (2, shape))))))

    inside = [*((1, n) for n in nodes), (2, "g"), *((5, w) for w in weights)]
    graph = message(*inside, (11, value("x")), (12, value("z")))
    file.write_bytes(message((1, 8), (7, graph), (8, message((2, 13)))))
    return declared(file)


def onnx_moments(file: Path) -> Network:
    """`Moments` as ONNX."""
    axis = message((1, "axis"), (3, 1), (20, 2))
    square = message((1, "x"), (1, "x"), (2, "y"), (4, "Mul"))
    both = message((1, "x"), (1, "y"), (2, "z"), (4, "Concat"), (5, axis))
    return onnx(file, [square, both])


def cohort(n_holdout: int = 12) -> Sides:
    rng = np.random.default_rng(1)
    return sides(cases(rng, 20, "t"), cases(rng, n_holdout, "h"), cases(rng, 15, "s"))


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_mmd2_of_a_known_network_is_sklearns_kernel_in_a_loop(kind: str, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        network = onnx_moments(tmp_path / "net.onnx")
    else:
        network = saved(Moments(), tmp_path)
    of = cohort()
    found = measured(InSpace(space=network), of)

    def by_hand(volumes: np.ndarray) -> np.ndarray:
        x = volumes.astype(np.float32)[:, 0].reshape(len(volumes), -1)
        return np.stack([f.mean(axis=1, dtype=np.float64) for f in (x, x * x)], axis=1)

    blurred = gaussian_filter(of.holdout.volumes.astype(np.float32), (0, 0, 0.4, 0.4, 0.4))
    sides_ = (of.train.volumes, of.holdout.volumes, of.synthetic.volumes)
    t, h, s, b = (by_hand(v) for v in (*sides_, blurred.astype(np.float16)))
    mean, sd = t.mean(axis=0), t.std(axis=0)
    scale = np.maximum(np.maximum(sd, 0.01 * np.sqrt(np.mean(sd**2))), 1e-4 * np.abs(mean))
    t, h, s, b = ((v - mean) / scale for v in (t, h, s, b))
    gamma = 1 / (2 * np.median(pdist(t)) ** 2)

    def naive(x: np.ndarray, y: np.ndarray) -> float:
        within = [
            (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
            for k in (rbf_kernel(x, x, gamma), rbf_kernel(y, y, gamma))
        ]
        return sum(within) - 2 * rbf_kernel(x, y, gamma).mean()

    mmd2 = found["mmd2", "features=net"]
    assert mmd2.value == pytest.approx(naive(s, h), abs=1e-12)
    assert mmd2.floor == pytest.approx(naive(t, h), abs=1e-12)
    assert mmd2.ceiling == pytest.approx(naive(b, t), abs=1e-12)
    excess = found["mmd2_excess", "features=net"]
    assert excess.value == pytest.approx(mmd2.value - mmd2.floor, abs=1e-12)
    for e in found.values():  # which network, and not where it lies
        assert f"{Path(network.file).name}, sha256 {network.sha256[:12]}" in e.method
        assert str(tmp_path) not in e.model_dump_json()
        assert (e.seed, e.n, e.n_holdout, e.group) == (0, 15, 12, "fidelity")


def test_a_network_sees_scans_as_they_are_or_resampled_and_scaled(tmp_path: Path) -> None:
    of = cohort()
    whole = Mapped(Shared(of), saved(Whole(), tmp_path))._raw("train")
    np.testing.assert_array_equal(whole, of.train.volumes.reshape(20, -1).astype(np.float64))
    shape = (7, 30, 10)
    settings = {"shape": shape, "channels": 3, "mean": (0.1, 0.2, 0.3), "std": (2.0,)}
    found = Mapped(Shared(of), saved(Whole(), tmp_path, **settings))._raw("holdout")
    at = [(np.arange(m) + 0.5) * n / m - 0.5 for m, n in zip(shape, GRID, strict=True)]
    points = np.meshgrid(*at, indexing="ij")
    scan = of.holdout.volumes[3, 0].astype(np.float64)
    expected = map_coordinates(scan, points, order=1, mode="nearest").ravel()
    for k, own in enumerate(np.split(found[3], 3)):
        np.testing.assert_allclose(own, (expected - settings["mean"][k]) / 2, atol=1e-6)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slices_are_the_middle_ones_as_radiologists_look_at_them(plane: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.random((2, 1, 5, 6, 7), dtype=np.float32)
    found = middle_slices(x, plane, 2)
    for scan in range(2):
        for k in range(2):
            if plane == "axial":
                expected = [[x[scan, 0, i, j, 2 + k] for i in range(5)] for j in range(6)]
            elif plane == "coronal":
                expected = [[x[scan, 0, i, 2 + k, j] for i in range(5)] for j in range(7)]
            else:
                expected = [[x[scan, 0, 1 + k, i, j] for i in range(6)] for j in range(7)]
            upright = np.array(expected)[::-1, ::-1]  # the top row is the front or the top
            np.testing.assert_array_equal(found[2 * scan + k, 0], upright)
    assert len(middle_slices(x, plane, 99)) == 2 * x.shape[{"axial": 4, "coronal": 3}.get(plane, 2)]


def test_answers_of_slices_are_averaged_over_each_scan(tmp_path: Path) -> None:
    of = cohort()
    found = Mapped(Shared(of), saved(Moments(), tmp_path, slices="axial", n_slices=4))._raw("train")
    middle = of.train.volumes[:, 0, :, :, 8:12].astype(np.float32)
    np.testing.assert_allclose(found[:, 0], middle.mean(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], (middle**2).mean(axis=(1, 2, 3)), rtol=1e-5)


def test_another_file_than_declared_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """Bytes that no reader takes: were they read first, it would be said that they cannot be."""
    for suffix in (".pt", ".onnx"):
        file = tmp_path / f"net{suffix}"
        file.write_bytes(b"no network")
        sha256 = hashlib.sha256(b"no network").hexdigest()
        with pytest.raises(UsageError) as error:
            measured(InSpace(space=declared(file, sha256="0" * 64)), cohort())
        text = str(error.value)
        assert str(file) in text and "0" * 64 in text and sha256 in text
        with pytest.raises(UsageError, match="can be read here"):
            measured(InSpace(space=declared(file, sha256=sha256.upper())), cohort())
    gone = Network(name="net", file=str(tmp_path / "gone.pt"), sha256="0" * 64)
    with pytest.raises(UsageError, match=r"gone\.pt cannot be read"):
        measured(InSpace(space=gone), cohort())


def test_weights_that_no_hash_covers_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX may keep weights in a file of their own; the hash of the one says nothing of it."""
    pytest.importorskip("onnxruntime")
    scaled = message((1, "x"), (1, "w"), (2, "z"), (4, "Mul"))
    twos = np.full(GRID[-1], 2, np.float32).tobytes()
    inside = message((1, GRID[-1]), (2, 1), (8, "w"), (9, twos))
    place = message((1, "location"), (2, "w.bin"))
    beside = message((1, GRID[-1]), (2, 1), (8, "w"), (13, place), (14, 1))
    (tmp_path / "w.bin").write_bytes(twos)
    monkeypatch.chdir(tmp_path)
    whole = Mapped(Shared(cohort()), onnx(tmp_path / "net.onnx", [scaled], inside))
    assert whole._raw("train").shape == (20, 1)
    with pytest.raises(UsageError, match="can be read here"):
        measured(InSpace(space=onnx(tmp_path / "net.onnx", [scaled], beside)), cohort())


@pytest.mark.parametrize(
    ("module", "settings", "said"),
    [
        (Nothing(), {}, "it answers with numbers that are not finite"),
        (Scalar(), {}, r"it answers \(\) to 20 inputs"),
        (Picky(), {}, "it does not take 20 x 1 x 20 x 22 x 20"),
        (Whole(), {"mean": (0.0, 1.0)}, "mean has 2 numbers, expected 1 or 1"),
    ],
)
def test_a_network_that_does_not_fit_is_named_with_the_reason(
    module: torch.nn.Module, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"network net: {said}"):
        measured(InSpace(space=saved(module, tmp_path, **settings)), cohort())


def test_a_dead_unit_says_nothing() -> None:
    network = Network(name="net", file="net.pt", sha256="0" * 64)
    mean, sd = np.array([0.0, 5.0, 1000.0, 0.0]), np.array([0.3, 0.4, 1e-4, 0.0])
    least = network.least(mean, sd)
    usual = 0.01 * np.sqrt(np.mean(sd**2))
    np.testing.assert_allclose(least, [usual, usual, 0.1, usual])
    assert (network.least(np.zeros(2), np.zeros(2)) > 0).all()


def test_few_people_and_no_holdout_are_said(tmp_path: Path) -> None:
    network = InSpace(space=saved(Moments(), tmp_path))
    for e in measured(network, cohort(n_holdout=0)).values():
        assert e.floor is None and e.n_holdout is None and "no held-out patients" in e.note
    for e in measured(network, cohort(n_holdout=2)).values():
        assert e.value is None and "fewer than" in e.note


# --- the config ----------------------------------------------------------------------------------

GIVEN = {"kind": "network", "name": "mine", "file": "~/net.onnx", "sha256": "ab" * 32}


def with_features(*features: Any) -> dict[str, Any]:
    return {**yaml.safe_load(yaml.safe_dump(TINY)), "evaluate": {"features": list(features)}}


def test_features_of_a_config_come_back_from_yaml_and_make_the_evidence_stale() -> None:
    plain = configfile.validate(with_features(), "a.yaml")
    config = configfile.validate(with_features({**GIVEN, "shape": [32, 32, 32]}), "a.yaml")
    assert configfile.validate(yaml.safe_load(configfile.dump(config)), "b.yaml") == config
    (added,) = config.evaluate.asked[len(plain.evaluate.asked) :]
    assert added == InSpace(space=Network(**{**GIVEN, "shape": (32, 32, 32)}))
    assert DEPENDS["evaluate"](config) != DEPENDS["evaluate"](plain)


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ([GIVEN, GIVEN], "evaluate: features: two are called mine"),
        ([{**GIVEN, "name": "regions"}], "two are called regions"),
        ([{**GIVEN, "sha256": "ab"}], "evaluate.features.0.sha256: "),
        ([{**GIVEN, "file": "net.pkl"}], "evaluate.features.0.file: expected a file of TorchS"),
        ([{**GIVEN, "slice": "axial"}], "evaluate.features.0.slice: unknown key; did you mean sl"),
        ([{"kind": "resnet"}], "evaluate.features.0.kind: unknown name 'resnet'; known: 'network'"),
        ([{"file": "net.pt"}], "evaluate.features.0.kind: missing; known: 'network', 'radiomics'"),
    ],
)
def test_a_mistake_in_features_is_named_by_its_path(features: list[Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        configfile.validate(with_features(*features), "a.yaml")
    assert said in str(error.value)


def test_a_space_can_stand_among_the_metrics_and_its_name_counts() -> None:
    metrics = [{"name": "features", "space": GIVEN}]
    assert Evaluate.model_validate({"metrics": metrics}).asked[0].space.name == "mine"
    with pytest.raises(ValidationError, match="two are called mine"):
        Evaluate.model_validate({"metrics": metrics, "features": [GIVEN]})
