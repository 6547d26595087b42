"""What this installation has: components a config can name, versions, and the machine."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from typing import Any, get_args

from synthmed import __version__

KINDS = ("backbones", "metrics", "exporters", "configs", "pipelines")

_SHOWN = ("torch", "monai", "nibabel", "pydicom", "scikit-image", "scikit-learn", "pandas")
_OPTIONAL = {
    "pylibjpeg": "compressed DICOM (synthmed[codecs])",
    "dicomweb_client": "scans from a PACS (synthmed[pacs])",
    "rapidocr_onnxruntime": "text in pixels (synthmed[text])",
    "deepbet": "faces removed from heads (synthmed[faces])",
    "onnxruntime": "feature networks in ONNX (synthmed[onnx])",
    "mirp": "radiomics in the evidence (synthmed[radiomics])",
    "snakemake": "cluster workflows (synthmed[cluster])",
}


def inventory() -> dict[str, dict[str, str]]:
    """Kind of component to name and first sentence of its documentation."""
    from synthmed import configfile
    from synthmed.backbones import Backbone
    from synthmed.metrics import Metric

    def members(union: Any) -> list[Any]:
        inner = get_args(union)
        return [m for a in inner for m in members(a)] if inner else [union]

    def table(union: Any) -> dict[str, str]:
        return {
            str(m.model_fields["name"].default): sentence(m.__doc__)
            for m in members(union)
            if hasattr(m, "model_fields")
        }

    files = sorted(configfile.shipped_folder("configs").glob("*.yaml"))
    return {
        "backbones": table(Backbone),
        "metrics": table(Metric),
        "exporters": {"bids": "NIfTI in a BIDS derivative dataset, always written."},
        "configs": {f.stem: first_comment(f.read_text(encoding="utf-8")) for f in files},
        "pipelines": {
            f.stem: first_comment(f.read_text(encoding="utf-8"))
            for f in sorted(configfile.shipped_folder("pipelines").glob("*.smk"))
        },
    }


def sentence(text: str | None) -> str:
    """The first sentence of a docstring."""
    return " ".join((text or "").strip().split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."


def first_comment(text: str) -> str:
    """The first comment line of a YAML file."""
    return text.splitlines()[0].lstrip("# ") if text.startswith("#") else ""


def fast_bfloat16(device: str) -> bool:
    """Whether a device multiplies bfloat16 faster than float32; False where that is not known.

    A library that supports bfloat16 may emulate it, which takes several times as long as float32:
    the processor has to have instructions for it.
    """
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # not public: a later torch may lack them
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    instructions = [getattr(torch.cpu, name, lambda: False) for name in asked]
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(supported) and any(has() for has in instructions)


def versions() -> dict[str, str]:
    """Versions of what makes a cohort what it is."""
    out = {"synthmed": __version__, "python": platform.python_version()}
    return out | {name: metadata.version(name) for name in _SHOWN}


def machine() -> dict[str, Any]:
    """Device, memory, disk, versions and optional parts, for `synthmed doctor`."""
    import torch

    from synthmed.store import home

    facts: dict[str, Any] = dict(versions())
    facts["cores"] = cores()
    facts["memory"] = f"{available_memory() / 2**30:.1f} GiB free"
    if torch.cuda.is_available():
        props = torch.cuda.get_device_properties(0)
        facts["device"] = f"cuda: {props.name}, {props.total_memory / 2**30:.0f} GiB"
    else:
        both = fast_bfloat16("cpu")
        facts["device"] = f"cpu ({'bfloat16 and float32' if both else 'float32'})"
    facts["disk"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"
    facts["home"] = f"{home()} (pseudonym key)"
    for name, text in _OPTIONAL.items():
        facts[name] = f"{'installed' if find_spec(name) else 'not installed'}: {text}"
    return facts


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes a process can still take, as the system tells; 0 where it does not."""
    if sys.platform != "linux":
        return 0
    with open("/proc/meminfo", encoding="ascii") as handle:
        rows: Mapping[str, str] = dict(line.split(":", 1) for line in handle)
    return int(rows["MemAvailable"].split()[0]) * 1024
