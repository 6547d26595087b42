"""A feature network that the user brings: a file, and the hash of what is in it."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator

from synthmed.errors import UsageError, pip
from synthmed.metrics.blocks import Singles
from synthmed.metrics.shared import Shared, Side
from synthmed.metrics.spaces import Measure, Slug, Space
from synthmed.metrics.stats import Floats

TORCHSCRIPT = (".pt", ".ts")
ONNX = ".onnx"
EXTERNAL_WEIGHTS = "session.model_external_initializers_file_folder_path"
PIECE_VALUES = 1_000_000
"""Values that a network is given at once; what it makes of them is many times as much."""
LEAST_SHARE = 0.01
ROUNDING = 1e-4

Forward = Callable[[Singles], Any]
Positive = Annotated[int, Field(ge=1, le=512)]


class Network(Space):
    """Features of a network in a file of TorchScript or ONNX.

    Nothing is read from the file, let alone run, unless its bytes have the stated SHA-256. The
    network sees (b, C, X, Y, Z) float32 in prepared intensity, 0 to 1 from background to bright
    tissue, axes to the right, the front and the top; with `slices` (b n, C, H, W), the middle n of
    each scan as radiologists look at them: anterior or superior up, the patient's right or front on
    the left. It answers (b, D) or (b, D, ...), which is averaged over what follows D, and over the
    slices of a scan. Its numbers are z-scored on real train; the standard deviation of each counts
    as at least a hundredth of their root mean square and a ten-thousandth of its own mean, so that
    a dead unit or rounding says nothing.

    Args:
        name: stands in the slice of the estimates, `features=NAME`.
        file: path, `~` and environment variables allowed; .pt and .ts are TorchScript, .onnx ONNX
            (with all weights in the one file; needs onnxruntime).
        sha256: of the file, 64 hexadecimal digits.
        shape: voxels [X, Y, Z] that scans are resampled to first, trilinearly; null: as they are.
        channels: how many the network takes. A cohort with one image channel repeats it; null:
            as many as the cohort has.
        mean: subtracted first, one number or one a channel.
        std: divided by then, likewise.
        slices: the plane of slices that a 2-D network is given; null for a 3-D one.
        n_slices: how many of them, at most.
    """

    kind: Literal["network"] = "network"
    name: Slug
    file: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
    shape: tuple[Positive, Positive, Positive] | None = None
    channels: Positive | None = None
    mean: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0,)
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    slices: Literal["axial", "coronal", "sagittal"] | None = None
    n_slices: Positive = 8

    @field_validator("file")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if Path(value).suffix not in (*TORCHSCRIPT, ONNX):
            raise ValueError("expected a file of TorchScript (.pt, .ts) or ONNX (.onnx)")
        return value

    @property
    def numbers(self) -> str:
        file = f"{Path(self.file).name}, sha256 {self.sha256[:12].lower()}"
        return f"features of the network {self.name} ({file})"

    def verify(self) -> None:
        self._load()

    def measure(self, shared: Shared) -> Measure:
        forward = self._load()
        self._check_channels(len(shared.images))

        def features(side: Side) -> Floats:
            rows = [
                self._answer(forward, piece)
                for block in shared.blocks(side)
                for piece in self._pieces(block)
            ]
            return np.concatenate(rows) if rows else np.zeros((0, 1))

        return features

    def least(self, mean: Floats, sd: Floats) -> Floats:
        usual = LEAST_SHARE * np.sqrt(np.mean(sd**2))
        return np.asarray(np.maximum(np.maximum(usual, ROUNDING * np.abs(mean)), 1e-12))

    def _load(self) -> Forward:
        """The network, ready to be asked, after its hash was compared."""
        path = Path(os.path.expanduser(os.path.expandvars(self.file)))
        try:
            content = path.read_bytes()
        except OSError as error:
            raise self._wrong(f"{path} cannot be read ({error.strerror})") from None
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256.lower():
            raise self._wrong(
                f"{path} is not the file that was declared: expected sha256 "
                f"{self.sha256.lower()}, found {found}",
                "Nothing of it was run. Set sha256 only if you know where the file comes from.",
            )
        # the bytes that were hashed are the bytes that are read
        if path.suffix == ONNX:
            return self._onnx(content, path)
        return self._torchscript(content, path)

    def _torchscript(self, content: bytes, path: Path) -> Forward:
        import torch

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch would rather have another format
                load: Any = torch.jit.load  # carries no types
                network = load(io.BytesIO(content), map_location="cpu").eval()
        except Exception as error:  # what a foreign file can make of the reader has no one class
            raise self._unreadable(path, "TorchScript", error) from None

        def forward(x: Singles) -> Any:
            with torch.no_grad():
                answer = network(torch.from_numpy(x))
            return answer.numpy() if isinstance(answer, torch.Tensor) else answer

        return forward

    def _onnx(self, content: bytes, path: Path) -> Forward:
        if importlib.util.find_spec("onnxruntime") is None:
            raise self._wrong(
                f"{path.name}: onnxruntime is not installed",
                f"Install it with: {pip('onnx')}, or bring TorchScript.",
            )
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # weights in a file beside it are under no hash: looked for where nothing can be
        options.add_session_config_entry(EXTERNAL_WEIGHTS, os.devnull)
        try:
            session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
            (asked,) = session.get_inputs()
        except Exception as error:  # onnxruntime's own classes, which it does not export
            raise self._unreadable(path, "ONNX with one input", error) from None
        one_by_one = asked.shape[:1] == [1]  # exported for a single scan

        def forward(x: Singles) -> Any:
            if one_by_one:
                return np.concatenate([session.run(None, {asked.name: row[None]})[0] for row in x])
            return session.run(None, {asked.name: x})[0]

        return forward

    def _check_channels(self, n_images: int) -> None:
        wanted = self.channels or n_images
        if n_images not in (1, wanted):
            raise self._wrong(f"channels is {wanted}, and the cohort has {n_images} image channels")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, wanted):
                raise self._wrong(f"{key} has {len(values)} numbers, expected 1 or {wanted}")

    def _pieces(self, block: Singles) -> Iterator[Singles]:
        """A block in parts of few scans, (b, C, X, Y, Z) as the network wants them."""
        import torch

        wanted = self.channels or block.shape[1]
        grid = self.shape or block.shape[2:]
        step = max(1, PIECE_VALUES // (wanted * int(np.prod(grid))))
        mean, std = (
            np.array(v, dtype=np.float32)[:, None, None, None] for v in (self.mean, self.std)
        )
        for start in range(0, len(block), step):
            piece = block[start : start + step]
            if self.shape:
                resampled = torch.nn.functional.interpolate(
                    torch.from_numpy(piece), self.shape, mode="trilinear", align_corners=False
                )
                piece = resampled.numpy()
            if wanted > piece.shape[1]:
                piece = np.repeat(piece, wanted, axis=1)
            yield np.ascontiguousarray((piece - mean) / std, dtype=np.float32)

    def _answer(self, forward: Forward, piece: Singles) -> Floats:
        """(b, D) features of (b, C, X, Y, Z)."""
        x = piece if self.slices is None else middle_slices(piece, self.slices, self.n_slices)
        try:
            answer = forward(x)
        except Exception as error:  # whatever the network raises
            shape = " x ".join(map(str, x.shape))
            raise self._wrong(
                f"it does not take {shape} ({_first_line(error)})",
                "Compare shape, channels and slices with what it was exported for.",
            ) from None
        if not isinstance(answer, np.ndarray) or answer.ndim < 2 or len(answer) != len(x):
            given = answer.shape if isinstance(answer, np.ndarray) else type(answer).__name__
            raise self._wrong(
                f"it answers {given} to {len(x)} inputs",
                "Export it so that it gives one tensor (n, D), or (n, D, ...) to be averaged.",
            )
        if answer.size == 0 or not np.isfinite(answer).all():
            raise self._wrong("it answers with numbers that are not finite, or with none at all")
        rows = answer.reshape(len(x), answer.shape[1], -1).mean(axis=2, dtype=np.float64)
        return np.asarray(rows.reshape(len(piece), -1, rows.shape[1]).mean(axis=1))

    def _unreadable(self, path: Path, kind: str, error: Exception) -> UsageError:
        return self._wrong(f"{path} is no {kind} that can be read here ({_first_line(error)})")

    def _wrong(self, what: str, remedy: str = "") -> UsageError:
        return UsageError(f"evaluate.features, network {self.name}: {what}", remedy)


def middle_slices(
    volumes_bcxyz: Singles, plane: Literal["axial", "coronal", "sagittal"], n: int
) -> Singles:
    """(b n, C, H, W) middle slices, as radiologists look at them; those of a scan in a row.

    Args:
        volumes_bcxyz: (b, C, X, Y, Z), axes to the right, the front and the top.
        plane: along Z, Y or X.
        n: slices of each scan; all where it has fewer.

    >>> x = np.arange(8, dtype=np.float32).reshape(1, 1, 2, 2, 2)  # 4 x + 2 y + z
    >>> middle_slices(x, "axial", 1)[0, 0].tolist()  # z = 0: the front above, the right on the left
    [[6.0, 2.0], [4.0, 0.0]]
    """
    axis = {"sagittal": 2, "coronal": 3, "axial": 4}[plane]
    length = volumes_bcxyz.shape[axis]
    start = max(0, (length - n) // 2)
    middle = volumes_bcxyz.take(range(start, min(length, start + n)), axis=axis)
    x_bnchw = np.moveaxis(middle, axis, 1).swapaxes(3, 4)[..., ::-1, ::-1]
    return np.ascontiguousarray(x_bnchw).reshape(-1, *x_bnchw.shape[2:])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1 if "Traceback" in lines[:1] else 0][:200]
