"""De-identifiers side by side on one planted file, in docs/benchmarks.md.

    python tests/benchmarks/deidentifiers.py

Every element of PS3.15 table E.1-1 with a value that can be recognised, at the top and in a
sequence that the table does not name; then strings in places that no table names. Orthanc (Debian's
package, with unshare to keep it off the network) takes part where it is installed.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from synthmed.deid.clean import Cleaner
from synthmed.deid.pseudonyms import Pseudonyms
from synthmed.formats.refusal import quiet
from tests.benchmarks.cohorts import publish
from tests.deid import canaries
from tests.formats import make

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- deidentifiers:begin -->", "<!-- deidentifiers:end -->"
PORT = 8042
Tool = Callable[[Path, Path], None]


def synthmed(source: Path, target: Path) -> None:
    """This package."""
    with quiet():
        target.write_bytes(Cleaner(Pseudonyms(bytes(32))).clean(pydicom.dcmread(source))[1])


def dicom_anonymizer(source: Path, target: Path, table: str = "dicomfields_2026c") -> None:
    """dicom-anonymizer with one of its tables."""
    from dicomanonymizer.simpledicomanonymizer import (  # type: ignore[import-untyped]
        anonymize_dicom_file,
        initialize_actions,
    )

    rules = lambda: initialize_actions(table)  # noqa: E731
    anonymize_dicom_file(str(source), str(target), base_rules_gen=rules)


def its_default(source: Path, target: Path) -> None:
    """The same with the table that it takes by itself."""
    dicom_anonymizer(source, target, "dicomfields_2023")


def orthanc(source: Path, target: Path) -> None:
    """Orthanc's /anonymize, in a network namespace of its own."""
    words = ["unshare", "-n", sys.executable, str(Path(__file__)), "--inside", str(source)]
    subprocess.run([*words, str(target)], check=True, capture_output=True, timeout=120)


def inside(source: Path, target: Path) -> None:
    """What runs in the namespace: a server, one file there, a clean one back."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "orthanc.json")
        config.write_text(
            json.dumps({"StorageDirectory": folder, "IndexDirectory": folder, "HttpPort": PORT,
                        "DicomServerEnabled": False, "Plugins": []})
        )  # fmt: skip
        server = subprocess.Popen(["Orthanc", str(config)], stderr=subprocess.DEVNULL)
        try:
            for _ in range(100):
                try:
                    asked("/system")
                    break
                except OSError:
                    time.sleep(0.2)
            stored = json.loads(asked("/instances", source.read_bytes()))
            target.write_bytes(asked(f"/instances/{stored['ID']}/anonymize", b"{}"))
        finally:
            server.terminate()
            server.wait()


def asked(path: str, body: bytes | None = None) -> bytes:
    """An answer of the server."""
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data=body)
    with urllib.request.urlopen(request, timeout=30) as answer:
        content: bytes = answer.read()
    return content


TOOLS: dict[str, Tool] = {
    "synthmed": synthmed,
    "dicom-anonymizer, 2026c": dicom_anonymizer,
    "dicom-anonymizer, its default": its_default,
    "Orthanc": orthanc,
}


# --- what is planted and what is left -------------------------------------------------------------


def planted_file(folder: Path, plant: Callable[[Dataset], None]) -> Path:
    """One slice with canaries."""
    data = make.voxels(0)[..., :1]
    make.series(folder / "a", data, np.diag([-2.0, 1.5, 3, 1]), lambda k, ds: plant(ds))
    (path,) = (folder / "a").iterdir()
    return Path(path)


def unchanged(tool: Tool, depth: int) -> str:
    """How many elements of the table come out as they went in, of how many."""
    with tempfile.TemporaryDirectory() as place:
        source = planted_file(Path(place), lambda ds: canaries.plant(ds, depth))
        target = Path(place, "clean.dcm")
        try:
            tool(source, target)
            found = pydicom.dcmread(target)
        except Exception as error:  # whatever a tool raises, it could not
            print(type(error).__name__, str(error)[:200], file=sys.stderr)
            return "cannot"
    for _ in range(depth):
        if not found.get(canaries.UNNAMED):
            found = Dataset()
            break
        found = found[canaries.UNNAMED].value[0]
    tags = [t for t in canaries.tags() if depth or t.element]
    left = sum(t in found and found[t].value == canaries.planted(t).value for t in tags)
    return f"{left} of {len(tags)}"


def left_in(tool: Tool, place: str) -> str:
    """Whether a string planted in a place is in the bytes that come out."""
    with tempfile.TemporaryDirectory() as folder:
        source = planted_file(Path(folder), lambda ds: canaries.plant_beside(ds, place))
        target = Path(folder, "clean.dcm")
        if place == "preamble":
            content = source.read_bytes()
            source.write_bytes(canaries.PREAMBLE + content[128:])
        try:
            tool(source, target)
            content = target.read_bytes().lower()
            bits = pydicom.dcmread(io.BytesIO(target.read_bytes())).PixelData
        except Exception as error:  # whatever a tool raises, it could not
            print(type(error).__name__, str(error)[:200], file=sys.stderr)
            return "cannot"
    hidden = place.startswith("bits") and max(np.frombuffer(bits[:240], "<u2")) >= 1 << 12
    return "left" if hidden or any(n in content for n in canaries.LEFT) else "gone"


def table(tools: Sequence[str]) -> str:
    """Elements of the table unchanged, then each place."""
    rows = [
        ["unchanged elements of E.1-1", *(unchanged(TOOLS[t], 0) for t in tools)],
        ["the same, in a sequence", *(unchanged(TOOLS[t], 1) for t in tools)],
    ]
    places = [*canaries.PLACES, "preamble"]
    rows += [[place, *(left_in(TOOLS[t], place) for t in tools)] for place in places]
    lines = ["| | " + " | ".join(tools) + " |", "|---|" + "---|" * len(tools)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and put it into the page."""
    parser = argparse.ArgumentParser(description="De-identifiers side by side.")
    parser.add_argument("--inside", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/benchmarks.md")
    options = parser.parse_args(arguments)
    if options.inside:
        inside(*options.inside)
        return 0
    tools = list(TOOLS)
    versions = f"dicom-anonymizer {version('dicom-anonymizer')}"
    if shutil.which("Orthanc"):
        said = subprocess.run(["Orthanc", "--version"], capture_output=True, text=True, check=True)
        versions += f", Orthanc {said.stdout.split()[1]}"
    else:
        tools.remove("Orthanc")
    text = f"`python tests/benchmarks/deidentifiers.py`, {versions}:\n\n{table(tools)}"
    publish(options.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
