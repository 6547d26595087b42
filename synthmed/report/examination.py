"""What the model showed of itself after training, for the restricted report.

Stage train leaves it in the model's folder examination/: figures.json (name to number),
remarks.json (what went wrong in training, a sentence each), a .tsv a table, a .png a picture, and
captions.json (picture to sentence). It is made of patients, so nothing of it is in the shareable
report.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from synthmed.report.images import Picture

FOLDER = "examination"
GROUP = "model"


def read(model: Path) -> dict[str, Any] | None:
    """Figures and tables of a model's folder, as report.json holds them; None without any.

    Args:
        model: RUN/private/model.

    Returns:
        `figures`, name to number, `remarks`, sentences, and `tables`, each with `name`, `columns`
        and `rows` of text.
    """
    folder = model / FOLDER
    if not (folder / "figures.json").is_file():
        return None
    tables = []
    for file in sorted(folder.glob("*.tsv")):
        with open(file, encoding="utf-8", newline="") as handle:
            columns, *rows = csv.reader(handle, delimiter="\t")
        tables.append({"name": file.stem, "columns": columns, "rows": rows})
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    said = folder / "remarks.json"
    remarks = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else []
    return {"figures": figures, "remarks": remarks, "tables": tables}


def pictures(model: Path) -> list[Picture]:
    """The pictures of a model's folder; one that has no caption is named by its file."""
    folder = model / FOLDER
    file = folder / "captions.json"
    captions = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return [
        Picture(
            f"images/model-{p.stem}.png", GROUP, "", captions.get(p.stem, p.stem), p.read_bytes()
        )
        for p in sorted(folder.glob("*.png"))
    ]
