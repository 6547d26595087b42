"""report.html: one page that needs nothing but itself, made of report.json and its images."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from synthmed.report.chart import chart
from synthmed.report.cited import cited
from synthmed.report.curves import WAYS, curves
from synthmed.report.glance import glance
from synthmed.report.viewer import cost, scripts
from synthmed.report.words import WORDS, direction, words
from synthmed.types import HALVES, WORST

MAX_PAGE_BYTES = 10_000_000
_TAG_BYTES = 2_000
"""Room for what stands round an image or the viewer: tag and caption."""

STATUS = {
    "pass": ("✓", "met"),
    "review": ("◐", "to be reviewed"),
    "fail": ("✕", "not met"),
    "inconclusive": ("?", "inconclusive"),
}
GROUP = {  # in the order of the page
    "memorization": "Memorization",
    "membership": "Membership",
    "audit": "Audit",
    "fidelity": "Fidelity",
    "utility": "Utility",
}


def render(report: Mapping[str, Any], content: Mapping[str, bytes]) -> str:
    """The page of a report, readable without a network and on paper.

    Args:
        report: the content of report.json.
        content: file name below report/ to PNG or .nii.gz; volumes, and then images, that would
            take the page past `MAX_PAGE_BYTES` are left to the files beside it, and the page says
            so.
    """
    volumes, images = report.get("volumes", []), report["images"]
    room = MAX_PAGE_BYTES - len(_page(report, [], [], content).encode())
    fitting = (
        volumes[:n]
        for n in range(len(volumes), 0, -1)
        if cost([content[v["file"]] for v in volumes[:n]]) <= room
    )
    kept: Sequence[Mapping[str, str]] = next(fitting, [])
    room -= cost([content[v["file"]] for v in kept])
    shown = []
    for image in images:
        room -= -(-len(content[image["file"]]) // 3) * 4 + _TAG_BYTES
        if room >= 0:
            shown.append(image)
    return _page(report, kept, shown, content)


def _page(
    report: Mapping[str, Any],
    volumes: Sequence[Mapping[str, str]],
    images: Sequence[Mapping[str, str]],
    content: Mapping[str, bytes],
) -> str:
    """The page with some of the volumes and images."""
    sources = {
        i["file"]: "data:image/png;base64," + base64.b64encode(content[i["file"]]).decode("ascii")
        for i in images
    }
    return (
        environment()
        .get_template("report.html")
        .render(
            r=report,
            volumes=volumes,
            images=[{**i, "source": sources[i["file"]]} for i in images],
            n_left_out=len(report["images"]) - len(images),
            n_volumes_left_out=len(report.get("volumes", [])) - len(volumes),
            glance=glance(report, number),
            slices=_worst_slices(report),
            curves=curves(report["estimates"]),
            viewer=scripts([content[v["file"]] for v in volumes]),
            ways=[said for _, said in WAYS],
        )
    )


@cache
def environment() -> Environment:
    """Templates of the installed package; values are escaped in .html and left alone in .md."""
    env = Environment(
        loader=PackageLoader("synthmed.report"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters.update(num=number, line=one_line, spoken=spoken)
    env.globals.update(words=words, direction=direction, chart=chart, cited=cited)
    env.globals.update(status_of=STATUS, group_of=GROUP, worst_slice=WORST)
    return env


def number(x: float | None) -> str:
    """Three significant digits with a true minus sign; a dash for null.

    >>> number(0.04567), number(12345.0)
    ('0.0457', '12,345')
    """
    if x is None:
        return "\N{EN DASH}"
    text = f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def one_line(x: Any) -> str:
    """Text without line breaks or Markdown marks that would begin something new."""
    plain = str(x).translate(str.maketrans("<>|`", "()/'"))
    return " ".join(plain.split())


def spoken(reason: str) -> str:
    """A reason of the decision, beginning with what an estimate is called in words.

    >>> spoken("copies_shipped: value 2 is above the limit 0.")
    'Copies in what ships (copies_shipped): value 2 is above the limit 0.'
    """
    subject, colon, rest = reason.partition(": ")
    name = subject.partition(" ")[0]
    if colon and name in WORDS:
        return f"{words(name).title} ({subject}): {rest}"
    return reason[:1].upper() + reason[1:]


def _worst_slices(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each estimate measured in subgroups, the subgroup where it is worst.

    Where the evidence itself says which one is (`WORST`), that stands, also without a value. Other
    slices (a region, a feature space, an attack) are parts of what was asked of everybody.
    """
    conditions = report["data"]["conditions"].items()
    subgroups = {f"{k}={part}" for k, v in conditions for part in v.get("categories", HALVES)}
    said = [e for e in report["estimates"] if e["slice"] == WORST]
    worst = {e["name"]: (math.inf, e) for e in said}
    for e in report["estimates"]:
        if e["value"] is None or e["slice"] not in subgroups:
            continue
        badness = {
            "lower": e["value"],
            "higher": -e["value"],
            "match": abs(e["value"] - (e["target"] or 0.0)),
        }[e["better"]]
        if e["name"] not in worst or badness > worst[e["name"]][0]:
            worst[e["name"]] = (badness, e)
    return [e for _, e in worst.values()]
