"""Small copies of volumes, and scripts that are what their digests say."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re

import nibabel as nib
import numpy as np
import pytest

from synthmed.report import viewer
from synthmed.report.page import render
from tests.report.test_page import PICTURE
from tests.report.test_page import report as whole_report  # noqa: F401


def read(content: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


def test_a_copy_has_the_volumes_grey_values_and_place() -> None:
    rng = np.random.default_rng(0)
    data = rng.random((20, 22, 24)).astype(np.float32)
    affine = np.diag([2.0, 3, 1, 1])
    affine[:3, 3] = 5, -7, 9
    content = viewer.small_copy(data, affine)
    image = read(content)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(image.affine, affine)
    top = np.percentile(data, viewer.TOP_PERCENT)
    expected = np.clip((data - data.min()) / (top - data.min()), 0, 1) * 255
    np.testing.assert_allclose(np.asarray(image.dataobj), expected, atol=0.51)
    assert content == viewer.small_copy(data, affine)
    assert content[4:8] == b"\0\0\0\0"  # no time in it


def test_a_large_volume_is_averaged_along_its_long_sides_alone() -> None:
    """A ramp in millimetres stays the same ramp: the centres of the new voxels are right."""
    shape = (200, 96, 30)
    affine = np.diag([0.5, 2, 4, 1])
    affine[:3, 3] = -50, 3, 7
    data = np.broadcast_to(np.arange(200.0)[:, None, None], shape)
    image = read(viewer.small_copy(data, affine))
    assert image.shape == (66, 96, 30)
    np.testing.assert_allclose(image.affine[:3, 0], [1.5, 0, 0])
    np.testing.assert_allclose(image.affine[:3, 3], [-50 + 0.5, 3, 7])
    grey = np.asarray(image.dataobj)[:, 0, 0].astype(float)
    assert np.corrcoef(grey, 1 + 3 * np.arange(66))[0, 1] > 0.9999


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_volume_is_black(value: float) -> None:
    image = read(viewer.small_copy(np.full((4, 5, 6), value), np.eye(4)))
    assert not np.asarray(image.dataobj).any()


def test_the_page_runs_what_its_policy_names_and_holds_it_unchanged(
    whole_report: dict,  # noqa: F811
) -> None:
    content = viewer.small_copy(np.ones((3, 3, 3)), np.eye(4))
    whole_report["volumes"] = [
        {"file": "viewer/a.nii.gz", "group": "synthetic", "part": "", "caption": "a <b>"}
    ]
    pictures = {i["file"]: PICTURE for i in whole_report["images"]}
    text = render(whole_report, {**pictures, "viewer/a.nii.gz": content})
    found = re.findall(r"<script(?: type=\"([\w/]+)\" id=\"[\w-]+\")?>(.*?)</script>", text, re.S)
    kinds = [kind for kind, _ in found]
    assert kinds == ["application/json", "text/plain", ""]
    digests = {
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for kind, s in found
        if kind != "application/json"
    }
    (policy,) = re.findall(r"script-src ([^\"]*)\"", text)
    assert set(policy.split()) == digests
    assert "'unsafe-inline'" not in policy and "'unsafe-eval'" not in text
    assert base64.b64encode(content).decode() in found[0][1]
    assert "BSD 2-Clause" in text and "a &lt;b&gt;" in text
    # the library goes nowhere without its licence, nor without those of what is bundled in it
    licence = found[1][1].split("*/")[0]
    for words in (
        "Copyright (c) 2021, Niivue",
        "Redistributions in binary form must reproduce the above copyright",
        'THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"',
        "EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.",
        "Permission is hereby granted, free of charge",
        "gl-matrix: Copyright",
        "Permission to use, copy, modify, and/or distribute",
    ):
        assert words in licence
    assert "<script" not in render(whole_report | {"volumes": []}, pictures)


def test_images_make_room_for_the_volumes() -> None:
    assert viewer.cost([]) == 0
    assert viewer.cost([b"\0" * 900]) - viewer.cost([b""]) == 1200
