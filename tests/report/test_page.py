"""The page: self-contained, in order, safe with hostile text, the same bytes every time."""

from __future__ import annotations

import copy
import html
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from synthmed.report.cards import card
from synthmed.report.chart import chart
from synthmed.report.cited import cited
from synthmed.report.images import legend
from synthmed.report.mosaic import png
from synthmed.report.page import MAX_PAGE_BYTES, render
from synthmed.report.words import WORDS, words

HOSTILE = "<script>alert('x')</script><img src=http://evil.example/x>\"'&{{ 7*7 }}"
PICTURE = png(np.zeros((4, 4), np.uint8))


def estimate(name: str, group: str, **fields: Any) -> dict[str, Any]:
    rule = {"text": "value at most 0.2", "side": "at_most", "limit": 0.2, "review": None}
    return {
        "name": name,
        "group": group,
        "slice": None,
        "value": 0.1,
        "ci": [0.05, 0.15],
        "unit": "1",
        "n": 60,
        "better": "lower",
        "target": None,
        "floor": 0.0,
        "ceiling": 0.5,
        "method": "Counted",
        "seed": 1,
        "note": "",
        "n_holdout": 60,
        "status": "pass",
        "rules": [rule],
        **fields,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    line = {"estimate": "mmd2", "slice": None, "rule": "value at most 0.2"}
    return {
        "schema_version": 1,
        "report": "shareable",
        "title": "Demo",
        "decision": "REVIEW",
        "reasons": ["First reason.", "Second reason."],
        "cohort": {
            "n_patients": 100,
            "n_scans": 120,
            "n_train": 40,
            "n_holdout": 60,
            "n_synthetic": 30,
            "n_dropped": 1,
        },
        "privacy": None,
        "estimates": [
            estimate("mmd2", "fidelity"),
            estimate("mmd2", "fidelity", slice="sex=F", value=0.3),
            estimate("mmd2", "fidelity", slice="sex=M", value=0.2),
            estimate("copied_patients", "memorization", ci=None, floor=None, ceiling=None),
            estimate("membership_auc", "membership", better="match", target=0.5, rules=[]),
            estimate("auc_tstr", "utility", status="inconclusive", value=None, ci=None),
            estimate("my_new_score", "fidelity", status="fail"),
        ],
        "policy": [
            {**line, "status": "pass", "reason": "mmd2: fine."},
            {**line, "status": "inconclusive", "reason": "auc_tstr: not computed."},
        ],
        "identifier_scan": {"n_searched": 3, "n_findings": 0, "findings": None},
        "signature": None,
        "data": {
            "modality": "T1w",
            "conditions": {"sex": {"kind": "categorical", "categories": ["F", "M"]}},
            "masks": [],
            "given_masks": [],
            "backbone": "cvae",
            "license": "CC0",
            "governance": {
                "legal_basis": None,
                "ethics_number": None,
                "recipient": None,
                "licence": None,
            },
        },
        "images": [
            {"file": "images/synthetic-0001.png", "group": "synthetic", "part": "", "caption": "c"}
        ],
        "provenance": {
            "synthmed": "0",
            "versions": {"torch": "2"},
            "digests": {"model": "ab" * 32},
            "seed": 1,
            "n_resamples": 500,
            "init": None,
        },
    }


def page(report: dict[str, Any]) -> str:
    return render(report, {i["file"]: PICTURE for i in report["images"]})


class Seen(HTMLParser):
    """Tags, attributes and ids of a page, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_nothing_is_loaded_from_anywhere(report: dict[str, Any]) -> None:
    text = page(report)
    seen = Seen(text)
    for tag, attributes in seen.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), value
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|url\(|@import", text)
    policies = [
        a["content"] for t, a in seen.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_sections_stand_in_order(report: dict[str, Any]) -> None:
    ids = [a["id"] for t, a in Seen(page(report)).tags if t == "section"]
    order = "decision privacy fidelity utility inconclusive use volumes evidence policy methods"
    assert ids == [*order.split(), "provenance"]
    report["estimates"] = [e for e in report["estimates"] if e["group"] != "utility"]
    assert 'id="utility"' not in page(report)


def test_every_link_and_id_holds(report: dict[str, Any]) -> None:
    tags = Seen(page(report)).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {str(a["href"])[1:] for t, a in tags if t == "a"}
    assert targets <= set(ids)
    assert all(a.get("alt") for t, a in tags if t == "img")
    assert sum(t == "h1" for t, _ in tags) == 1


def test_decision_and_first_reason_come_first(report: dict[str, Any]) -> None:
    body = page(report).split("<main>")[1]
    first = body.index("First reason.")
    assert body.index("REVIEW") < first < body.index('class="pairs glance"')
    assert "1 more line is not met" in body[first : first + 80]
    assert body.index("No formal guarantee") < body.index('id="h-policy"')
    assert body.index('id="h-policy"') < body.index("Second reason.")


def test_a_reason_begins_in_words(report: dict[str, Any]) -> None:
    report["reasons"] = ["mmd2_excess [worst subgroup, sex=F]: upper bound 0.4 is above the limit."]
    said = "what two groups of real people show (mmd2_excess [worst subgroup, sex=F]): upper bound"
    assert said in html.unescape(page(report))
    assert "more line" not in page(report)


def test_what_everybody_asks_about_is_on_the_first_screen_in_the_house(
    report: dict[str, Any],
) -> None:
    """Copies and membership, also where the policy asks about neither."""
    report["estimates"] = [
        estimate("authenticity_excess", "memorization", value=0.0, ci=None),
        estimate("copies", "memorization", value=0.02, ci=[0.0, 0.05], rules=[]),
        estimate("membership_auc", "membership", value=0.7, ci=[0.6, 0.8], rules=[]),
        estimate("membership_auc", "membership", slice="attack=x", value=0.9, rules=[]),
    ]
    said = first_screen(page(report))["Privacy"]
    assert "Samples that copy a patient: 0.02 [0, 0.05]" in said
    assert said.count("0.7 [0.6, 0.8]") == 1 and "0.9" not in said


def test_hostile_text_is_shown_and_not_run(report: dict[str, Any]) -> None:
    hostile = copy.deepcopy(report)
    hostile["title"] = hostile["data"]["modality"] = hostile["data"]["license"] = HOSTILE
    hostile["reasons"] = [HOSTILE]
    hostile["data"]["conditions"] = {HOSTILE: {"kind": "categorical", "categories": [HOSTILE]}}
    hostile["data"]["governance"]["recipient"] = HOSTILE
    hostile["provenance"]["versions"] = {HOSTILE: HOSTILE}
    hostile["provenance"]["init"] = {
        "backbone": HOSTILE, "title": HOSTILE, "modality": HOSTILE, "privacy": None,
        "weights": "ab" * 32, "n_taken": 3, "n_fresh": 1,
    }  # fmt: skip
    hostile["signature"] = {"name": HOSTILE, "reason": HOSTILE, "when": "2026-01-01"}
    hostile["images"][0]["caption"] = hostile["images"][0]["part"] = HOSTILE
    for e in hostile["estimates"]:
        e["method"] = e["note"] = e["unit"] = HOSTILE
    for v in hostile["policy"]:
        v["reason"] = v["rule"] = v["estimate"] = HOSTILE
    text = page(hostile)
    assert [t for t, _ in Seen(text).tags].count("script") == 0
    assert [t for t, _ in Seen(text).tags].count("img") == 1
    assert "&lt;script&gt;" in text
    assert "{{ 7*7 }}" in text
    for name in ("README.md", "MODEL_CARD.md", "DATASHEET.md"):
        assert "<" not in card(name, hostile)


def test_outlines_are_explained_by_name_and_colour(report: dict[str, Any]) -> None:
    assert "Outlines:" not in page(report)
    report["data"]["masks"] = legend({"tumour": {"core": 1, "oedema": 2}, "roi": {"a": 1}})
    text = page(report)
    for entry in report["data"]["masks"]:
        assert f"{entry['mask']}: {entry['label']}" in text
        assert f"background: {entry['colour']}" in text
    assert len({e["colour"] for e in report["data"]["masks"]}) == 3
    assert "was given" not in text
    compared = "its images; the masks drawn with them were not"
    assert compared in text
    report["data"]["given_masks"] = ["roi"]
    assert "The model was given roi" in page(report) and compared in page(report)
    report["data"]["given_masks"] = ["roi", "tumour"]
    assert compared not in page(report)


def test_same_report_same_bytes(report: dict[str, Any]) -> None:
    assert page(report) == page(copy.deepcopy(report))


def test_a_page_never_outgrows_its_bound(report: dict[str, Any]) -> None:
    report["images"] = [
        {**report["images"][0], "file": f"images/synthetic-{i:04d}.png"} for i in range(12)
    ]
    big = {i["file"]: PICTURE + b"\0" * 1_000_000 for i in report["images"]}
    text = render(report, big)
    assert len(text.encode()) < MAX_PAGE_BYTES
    assert "more images lie beside this page" in text


def test_volumes_that_do_not_fit_are_left_beside_the_page(report: dict[str, Any]) -> None:
    """As many as fit, in their order, and the images after them."""
    report["volumes"] = [
        {"file": f"viewer/{i}.nii.gz", "group": "synthetic", "part": "", "caption": f"scan {i}"}
        for i in range(3)
    ]
    content = {v["file"]: bytes(2_500_000) for v in report["volumes"]}
    content |= {i["file"]: PICTURE for i in report["images"]}
    text = render(report, content)
    assert len(text.encode()) < MAX_PAGE_BYTES
    assert text.count('<button type="button" aria-pressed') == 2
    assert "1 more scan lies beside this page in the folder viewer" in text
    assert "beside this page in the folder images" not in text


def test_estimates_without_a_name_in_the_table_are_shown(report: dict[str, Any]) -> None:
    assert "my_new_score" not in WORDS
    assert "My new score" in page(report)
    assert words("copies").title in {w.title for w in WORDS.values()}


def test_the_worst_subgroup_is_named(report: dict[str, Any]) -> None:
    part = page(report).split("<h3>Worst subgroup</h3>")[1].split("</table>")[0]
    assert "sex=F" in part
    assert "sex=M" not in part


def test_parts_that_are_no_subgroup_are_not_the_worst_one(report: dict[str, Any]) -> None:
    report["estimates"].append(estimate("mmd2", "fidelity", slice="features=x", value=0.9))
    part = page(report).split("<h3>Worst subgroup</h3>")[1].split("</table>")[0]
    assert "sex=F" in part and "features=x" not in part


def first_screen(text: str) -> dict[str, str]:
    """Question to answer, as text, of the lines beside the decision."""
    box = text.split('class="pairs glance"')[1].split("</dl>")[0]
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", box, re.S)
    plain = [[html.unescape(re.sub("<[^>]+>", "", part)) for part in pair] for pair in found]
    return {title: answer for title, answer in plain}


def test_the_first_screen_answers_in_order(report: dict[str, Any]) -> None:
    """The shareable page has no slice of a subgroup but the one that the policy asks about."""
    report["estimates"] = [
        estimate(
            "copied_patients", "memorization", value=0.0, ci=[0.0, 0.07], status="inconclusive"
        ),
        estimate("copies_shipped", "memorization", value=0.0),
        estimate("coverage", "fidelity", value=0.71, ci=None, floor=0.93, status="review"),
        estimate("recall", "fidelity", value=0.9),
        estimate("vendi", "fidelity", value=3.0, rules=[], status="inconclusive"),
        estimate(
            "mmd2_excess", "fidelity", slice="worst subgroup", value=0.4, ci=[0.2, 0.6],
            status="fail", note="worst of 3: sex=F; too few people to judge: sex=X.",
        ),
    ]  # fmt: skip
    text = page(report)
    lines = first_screen(text)
    order = ["Privacy", "Fidelity", "Utility", "Worst subgroup", "Inconclusive", "Use"]
    assert list(lines) == order
    assert text.index("First reason.") < text.index('class="pairs glance"') < text.index("<nav")
    assert lines["Privacy"] == (
        "? inconclusive no formal guarantee; Patients copied: 0 [0, 0.07], best attainable 0; "
        "1 of 2 met; no identifier found."
    )
    assert lines["Fidelity"] == (
        "◐ to be reviewed Coverage: 0.71, best attainable 0.93; 1 of 2 met."
    )
    assert lines["Utility"] == "the policy asks nothing about it."
    assert lines["Worst subgroup"].startswith("✕ not met Distance beyond")
    assert lines["Worst subgroup"].endswith(
        "0.4 [0.2, 0.6], best attainable 0; worst of 3: sex=F; too few people to judge: sex=X."
    )
    assert lines["Inconclusive"] == "1 of 2 lines: mmd2."
    part = text.split("<h3>Worst subgroup</h3>")[1].split("</section>")[0]
    assert "worst subgroup" in part and "worst of 3: sex=F" in part
    report["identifier_scan"]["n_findings"] = 2
    assert first_screen(page(report))["Privacy"].startswith("✕ not met")


def test_the_first_screen_names_the_subgroup_it_speaks_of(report: dict[str, Any]) -> None:
    ask = {"status": "fail", "value": -0.4, "ci": None}
    report["estimates"] = [
        estimate("auc_tstr_minus_trtr", "utility", value=0.0, ci=None, status="pass"),
        estimate("auc_tstr_minus_trtr", "utility", slice="sex=F", **ask),
    ]
    report["policy"][1] |= {"slice": "sex=M"}
    lines = first_screen(page(report))
    assert "[sex=F]: \N{MINUS SIGN}0.4" in lines["Utility"]
    assert lines["Inconclusive"] == "1 of 2 lines: mmd2 [sex=M]."


def test_a_worst_subgroup_without_a_value_is_no_silence(report: dict[str, Any]) -> None:
    few = "too few people to judge: sex=F (fewer than 10 held-out)"
    report["estimates"] = [
        estimate(
            "mmd2_excess", "fidelity", slice="worst subgroup", value=None, ci=None,
            status="inconclusive", note=few,
        )
    ]  # fmt: skip
    line = first_screen(page(report))["Worst subgroup"]
    assert line.startswith("? inconclusive") and line.endswith(f"no value; {few}.")
    report["estimates"] = []
    assert first_screen(page(report))["Worst subgroup"] == "the policy asks nothing about it."
    report["data"]["conditions"] = {}
    assert first_screen(page(report))["Worst subgroup"] == "no labels to tell subgroups by."


def test_the_text_to_cite_tells_what_the_report_tells(report: dict[str, Any]) -> None:
    text = cited(report)
    assert text.startswith("30 synthetic T1w scans were generated with the backbone cvae")
    assert "120 scans of 100 patients, split by patient: 40 to learn from, 60 held out" in text
    assert "share of training patients copied, before the filter 0.1" in text
    assert "No formal privacy guarantee applies." in text
    assert "1 of 2 lines of the release policy were met. Decision: REVIEW." in text
    assert text in page(report)
    # neither a figure that is not in the report, nor one without a value
    assert "coverage" not in text and "AUC of a classifier" not in text
    report["signature"] = {"name": "A", "when": "now", "reason": "r"}
    assert cited(report).endswith("Decision: REVIEW, signed for release by a named person.")


def test_the_text_to_cite_takes_no_convention_for_a_measurement(report: dict[str, Any]) -> None:
    report["estimates"] = [
        estimate("copied_patients", "memorization", value=0.0, ci=[0.0, 0.04]),
        estimate("membership_auc", "membership", value=0.85, ci=None, floor=0.5),
        estimate("coverage", "fidelity", value=0.8, ci=None, floor=0.93),
    ]
    text = cited(report)
    assert "before the filter 0 [0, 0.04]" in text
    assert "AUC of membership inference 0.85 (guessing 0.5)" in text
    assert "coverage 0.8 (0.93 of real training patients)" in text
    assert "for real patients" not in text


def test_of_a_cohort_from_elsewhere_only_what_is_known_is_said(report: dict[str, Any]) -> None:
    """Nobody here knows how it was made: not by which model, from whom, nor with what promise."""
    own = page(report)
    assert "the model was trained without differential privacy" in own
    assert "never saw those held out" in own
    report["data"]["backbone"] = None
    text = page(report)
    for claim in (
        "trained without differential",
        "never saw",
        "learned from the training",
        "split",
    ):
        assert claim not in text
    assert "how this cohort was made is not known here" in text
    assert "40 taken for those learned from, 60 for held out" in cited(report)
    assert "No formal privacy guarantee is known." in text


def test_copies_are_explained_as_they_are_found(report: dict[str, Any]) -> None:
    """Since everybody plays in the null, held-out people are no longer all of it."""
    text = page(report)
    assert "than held-out people are to anybody" not in text
    assert "any real patient, trained on or held out" in text
    report["cohort"]["n_holdout"] = 0
    assert "better than that among all other patients" in page(report)


def test_an_estimate_without_a_rule_is_not_called_inconclusive(report: dict[str, Any]) -> None:
    report["estimates"] = [estimate("vendi", "fidelity", rules=[], status="inconclusive")]
    panel = page(report).split('id="e-vendi"')[1].split("</article>")[0]
    assert "no rule" in panel
    assert "inconclusive" not in panel


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"value": -0.2, "ci": [-0.4, 0.1]},
        {"value": 0.0, "ci": None, "floor": 0.0, "ceiling": 0.0, "rules": []},
        {"value": 1e6, "ci": [1e5, 1e7]},
        {"better": "match", "target": 0.5},
    ],
)
def test_all_marks_lie_on_the_chart(fields: dict[str, Any]) -> None:
    e = estimate("x", "fidelity", **fields)
    c = chart(e)
    assert c is not None
    marks = [c.value, c.floor, c.ceiling, c.target, *(c.ci or ()), *c.limits]
    assert all(0 <= m <= 100 for m in marks if m is not None)
    assert c.low <= e["value"] <= c.high
    value = c.low + (c.value or 0) / 100 * (c.high - c.low)
    assert value == pytest.approx(e["value"], abs=1e-3 * (c.high - c.low))


def test_no_chart_without_a_value() -> None:
    assert chart(estimate("x", "fidelity", value=None)) is None


def test_what_the_model_shows_stands_on_the_restricted_page(report: dict[str, Any]) -> None:
    assert 'id="model"' not in page(report), "a report made before there was an examination"
    report["examination"] = None
    assert 'id="model"' not in page(report)
    report["examination"] = {
        "figures": {"psnr_train": 28.25},
        "remarks": ["COLLAPSED: " + HOSTILE],
        "tables": [{"name": "latents", "columns": ["unit", "kl_nats"], "rows": [["3", HOSTILE]]}],
    }
    report["images"].append(
        {"file": "images/model-latents.png", "group": "model", "part": "", "caption": HOSTILE}
    )
    seen = Seen(page(report))
    assert [a["id"] for t, a in seen.tags if t == "section" and a["id"] == "model"] == ["model"]
    assert [t for t, _ in seen.tags].count("script") == 0
    part = page(report).split('id="model"')[1].split("</section>")[0]
    said = ("COLLAPSED: &lt;script&gt;", "A row for each number of the code")
    for expected in ("psnr_train", "28.2", "Latents", "kl nats", *said):
        assert expected in part
    assert part.count("<img") == 1
    assert ("a", {"href": "#model"}) in seen.tags
