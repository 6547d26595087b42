"""What an installed package holds: configs, workflows, report templates, licence."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from synthmed import __version__
from synthmed.configfile import shipped_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this working tree, built without a network."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    assert file.name == f"synthmed-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(file)


@pytest.mark.parametrize("name", ["configs", "pipelines"])
def test_the_wheel_ships_every_config_and_workflow(wheel: zipfile.ZipFile, name: str) -> None:
    here = {p.name: p.read_bytes() for p in (ROOT / name).iterdir() if p.is_file()}
    place = f"synthmed/_shipped/{name}/"
    there = {n.removeprefix(place): n for n in wheel.namelist() if n.startswith(place)}
    assert here.keys() == there.keys()
    assert all(wheel.read(there[n]) == content for n, content in here.items())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    parts = [p for p in (ROOT / "synthmed").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert {str(p.relative_to(ROOT)) for p in parts} <= set(names)
    assert any("/templates/" in n and n.endswith(".html") for n in names)
    vendor = {f"synthmed/report/vendor/{n}" for n in ("niivue.js", "LICENSES.txt", "README.md")}
    assert vendor <= set(names)
    assert {n.split("/")[0] for n in names} == {"synthmed", f"synthmed-{__version__}.dist-info"}


def test_the_wheel_names_its_command_licence_and_version(wheel: zipfile.ZipFile) -> None:
    about = f"synthmed-{__version__}.dist-info"
    assert "synthmed = synthmed.cli:main" in wheel.read(f"{about}/entry_points.txt").decode()
    assert wheel.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    metadata = wheel.read(f"{about}/METADATA").decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


def test_shipped_folders_exist_in_a_checkout() -> None:
    assert (shipped_folder("pipelines") / "cohort.smk").is_file()
    assert (shipped_folder("configs") / "quickstart.yaml").is_file()


def test_licence_and_changelog() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in licence
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changes.startswith("# Changelog")
    headings = re.findall(r"^## \[(.+?)\]", changes, re.MULTILINE)
    assert headings, "no version has a heading"
    assert headings[0] in ("Unreleased", __version__)
