"""The texts beside the report: README.md, MODEL_CARD.md, DATASHEET.md and croissant.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthmed.config import Condition
from synthmed.report.page import environment
from synthmed.store import file_sha256


def card(name: str, report: Mapping[str, Any]) -> str:
    """README.md, MODEL_CARD.md or DATASHEET.md, from the content of report.json."""
    return environment().get_template(name).render(r=report)


def croissant(
    report: Mapping[str, Any], release: Path, conditions: Mapping[str, Condition]
) -> dict[str, Any]:
    """croissant.json (Croissant 1.0): the table of subjects, typed, and the set of volumes.

    Args:
        report: the content of report.json.
        release: the release folder, with participants.tsv in place.
        conditions: the columns of participants.tsv after the first.
    """
    table = "participants.tsv"
    fields = [_field("participant_id", "sc:Text", table)] + [
        _field(n, "sc:Text" if c.kind == "categorical" else "sc:Float", table)
        for n, c in conditions.items()
    ]
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": report["title"],
        "description": (
            f"{report['cohort']['n_synthetic']} synthetic {report['data']['modality']} volumes "
            f"from a generative model; no image was acquired from a person. "
            f"Decision of the release policy: {report['decision']}."
        ),
        "license": report["data"]["license"],
        "version": "1.0.0",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": table,
                "name": table,
                "contentUrl": table,
                "encodingFormat": "text/tab-separated-values",
                "sha256": file_sha256(release / table),
            },
            {
                "@type": "cr:FileSet",
                "@id": "volumes",
                "name": "volumes",
                "encodingFormat": "application/gzip",
                "includes": "sub-*/*/*.nii.gz",
            },
        ],
        "recordSet": [
            {"@type": "cr:RecordSet", "@id": "participants", "name": "participants"}
            | {"field": fields}
        ],
    }


def _field(name: str, kind: str, table: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"participants/{name}",
        "name": f"participants/{name}",
        "dataType": kind,
        "source": {"fileObject": {"@id": table}, "extract": {"column": name}},
    }


_CONTEXT: Mapping[str, Any] = {  # the context that the Croissant 1.0 specification prescribes
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
