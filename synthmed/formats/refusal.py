"""Why a file or series is refused: one code and one sentence each, in our own words.

Messages of the libraries below are never passed on: they hold file names and header values.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping

import pydicom

REASONS: Mapping[str, str] = {
    # files
    "not_an_image": "Neither NIfTI nor DICOM by its content.",
    "outside_source": "It points outside the source folder, which is not read.",
    "unreadable": "The system refuses to read it.",
    "not_requested": "The config asks for another modality, format or part of the source.",
    "not_fetched": "The PACS lists it and does not give it whole.",
    "not_in_table": "No table names it, so whose it is and its labels are unknown.",
    "table_unreadable": "The table cannot be read.",
    "header_unreadable": "The header is damaged or not of a known kind.",
    "truncated": "The file is cut short or damaged.",
    "reader_died": "The program broke down over it, twice.",
    "oversized": "It holds or claims more than the reader's limit.",
    # voxels and geometry
    "not_finite": "It holds NaN or infinite voxels; one is enough to refuse it.",
    "geometry_invalid": "Its place in space is unknown: no finite, invertible affine.",
    "not_3d": "It is not one three-dimensional volume.",
    "too_small": "It has too few voxels on a side.",
    "not_a_slice": "It has several voxels along the axis along which data.grid has 1.",
    "constant": "All its voxels are equal.",
    "complex_or_rgb": "Complex and colour images are not read.",
    # labels and people
    "patient_missing": "It does not say whose scan it is.",
    "forgotten": "Its patient was forgotten (synthmed forget) and is not taken in again.",
    "label_missing": "A label is missing.",
    "label_unknown": "A label is not among the declared values.",
    "label_out_of_range": "A label lies outside the declared range.",
    "label_ambiguous": "Several rows of the table give this patient different labels.",
    # channels and scans
    "brain_not_found": "Its brain cannot be told from the rest, so its face cannot be removed.",
    "channel_missing": "A file of this scan is not there.",
    "channel_ambiguous": "What a channel of its session is cannot be told: several fit.",
    "channels_disagree": "The channels of this scan differ in shape or place.",
    "mask_not_integers": "A mask holds values that are not whole numbers.",
    "duplicate_scan": "Another scan holds exactly the same voxels.",
    # DICOM
    "not_mr_image": "Not an MR image (another kind of DICOM object).",
    "enhanced_unsupported": "A multi-frame file of a kind that is not read.",
    "mosaic_unsupported": "A mosaic whose layout is not told.",
    "localizer": "A localizer, not a volume.",
    "two_patients": "One series names more than one patient.",
    "mixed_orientation": "Its slices are not parallel.",
    "mixed_matrix": "Its slices differ in matrix, pixel size or pixel format.",
    "mixed_series": "Its slices are of several images, studies or frames of reference.",
    "no_pixel_spacing": "Its pixel size is missing or not positive.",
    "no_pixels": "It holds no pixel data.",
    "single_slice": "A single slice, not a volume.",
    "too_few_slices": "Too few slices to tell whether they are evenly spaced.",
    "duplicate_positions": "Several slices lie at one position.",
    "is_4d": "A series of several volumes; data.volumes: split makes a scan of each.",
    "missing_slices": "Slices are missing from the stack.",
    "uneven_slices": "Its slices are not evenly spaced.",
    "gantry_tilt": "A tilted stack; data.tilted: resample shifts its slices back.",
    "rgb": "A colour image.",
    "photometric_unsupported": "Only MONOCHROME2 pixels are read.",
    "rescale_invalid": "Its rescale slope or intercept is not a usable number.",
    "compressed_unsupported": "Its compression cannot be decoded.",
    "burned_in": "Text is drawn into its pixels, or may be.",
    "identity_left": "A name or number of its patient would be left in it.",
    "engine_failed": "dcm2niix does not make the volume of it that its headers describe.",
}
"""Reason code to the sentence that explains it in quarantine.tsv."""


class Refused(Exception):
    """A file, series or scan that is not used.

    Args:
        code: a key of `REASONS`.
        detail: a sentence more, in our own words: no header value that could name somebody.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(code)
        self.code, self.detail = code, detail

    @property
    def explanation(self) -> str:
        """The code's sentence and what is particular."""
        return f"{REASONS[self.code]} {self.detail}".rstrip()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom and nibabel from printing: their warnings and logs quote header values.

    One inside another does nothing: what it sets is costly for each of thousands of files.
    """
    disabled = logging.root.manager.disable
    settings = pydicom.config.settings
    reading = settings.reading_validation_mode
    if disabled >= logging.CRITICAL and reading == pydicom.config.IGNORE:
        yield
        return
    logging.disable(logging.CRITICAL)
    settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.reading_validation_mode = reading
        logging.disable(disabled)
