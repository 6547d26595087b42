"""Every option of a config, in docs/config.md: written from the classes that read it.

python tests/config_page.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from synthmed.config import Config

PAGE = Path(__file__).resolve().parents[1] / "docs" / "config.md"
HEAD = """\
# Every option

Written from the code by `python tests/config_page.py`. A config is one YAML file; what it leaves
out has the default below, and `synthmed check CONFIG` prints it with every default filled in.
`--set data.holdout=0.3` changes one value for a call. A key that is not here is an error.

Where to begin: [your own data](own-data.md), [the choice of a backbone](backbones.md),
[privacy](privacy.md), [what figures mean](evidence.md).
"""
Schema = Mapping[str, Any]


def page() -> str:
    """The whole page."""
    root = Config.model_json_schema()
    return HEAD + "".join(_section("", root, root["$defs"], {}))


def _section(
    path: str, part: Schema, known: Mapping[str, Schema], told: dict[str, str]
) -> Iterator[str]:
    """A part of the config and, after it, the parts inside it.

    Args:
        path: of the part.
        part: its schema.
        known: of all parts, by name.
        told: docstring to the path where it stands already.
    """
    prose, args = _read(part.get("description", ""))
    yield f"\n{'##' if path.count('.') == 0 else '###'} {_title(path, _kind(part))}\n"
    if (before := told.setdefault(part["description"], path)) != path:
        yield f"\nAs `{before}`.\n"
        return
    if prose:
        yield f"\n{prose}\n"
    rows, inside = [], []
    for name, field in part.get("properties", {}).items():
        if "const" in field:
            continue  # what the title says
        default = "required" if name in part.get("required", ()) else _default(field)
        rows.append((f"`{name}`", _values(field, known), default, args.get(name, "")))
        below = ".".join(filter(None, (path, name)))
        inside += [(below + more, ref) for more, ref in _refs(field)]
    if rows:
        explained = any(row[3] for row in rows)
        columns = ("key", "value", "default", "what it is")[: 4 if explained else 3]
        yield f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
        for row in rows:
            yield f"| {' | '.join(row[: len(columns)])} |\n"
    for below, name in inside:
        yield from _section(below, known[name], known, told)


def _title(path: str, kind: str) -> str:
    if not path:
        return "The parts"
    return f"`{path}`" + (f", `{kind}`" if kind else "")


def _kind(part: Schema) -> str:
    """The one value that tells a part from its alternatives."""
    for name, field in part["properties"].items():
        if "const" in field:
            return f"{name}: {field['const']}"
    return ""


def _read(docstring: str) -> tuple[str, dict[str, str]]:
    """Prose, and what each field is."""
    prose, _, rest = docstring.partition("\nArgs:\n")
    end = re.search(r"\n(?=\S)", rest)
    indented, after = (rest[: end.start()], rest[end.end() :]) if end else (rest, "")
    args = {
        m[1]: " ".join(m[2].split())
        for m in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", indented, re.M)
    }
    if "Raises:" not in after:
        prose = f"{prose.rstrip()}\n\n{after}"
    return prose.strip(), {k: v.replace("|", "\\|") for k, v in args.items()}


def _refs(field: Schema) -> Iterator[tuple[str, str]]:
    """(path below the field, name) of each part that it may hold."""
    if "$ref" in field:
        yield "", field["$ref"].rpartition("/")[2]
    for key in ("anyOf", "oneOf"):
        for option in field.get(key, ()):
            yield from _refs(option)
    if "items" in field:
        yield from ((f"[]{more}", ref) for more, ref in _refs(field["items"]))
    for inner in _values_of_mapping(field):
        yield from ((f".NAME{more}", ref) for more, ref in _refs(inner))


def _values_of_mapping(field: Schema) -> list[Schema]:
    found = list(field.get("patternProperties", {}).values())
    more = field.get("additionalProperties")
    return found + ([more] if isinstance(more, dict) else [])


def _values(field: Schema, known: Mapping[str, Schema]) -> str:
    """What a field may be, in words."""
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(dict.fromkeys(_values(option, known) for option in field[key]))
    if "$ref" in field:
        part = known[field["$ref"].rpartition("/")[2]]
        return f"`{kind}`" if (kind := _kind(part)) else "a part"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "prefixItems" in field:
        each = list(dict.fromkeys(_values(item, known) for item in field["prefixItems"]))
        return f"[{len(field['prefixItems'])} of: {', '.join(each)}]"
    if "items" in field:
        return f"list of: {_values(field['items'], known)}"
    if inner := _values_of_mapping(field):
        return f"NAME: {_values(inner[0], known)}"
    names = {"boolean": "`true`, `false`", "string": "text", "null": "null", "object": "mapping"}
    kind = field.get("type", "anything")
    return names.get(kind, f"{kind}{_range(field)}")


def _range(field: Schema) -> str:
    """Its bounds, ` from 4 to 512` or ` above 0, below 1`."""
    low, high = (
        next(((words[k], f"{field[k]:.15g}") for k in words if k in field), ("", ""))
        for words in (_LOW, _HIGH)
    )
    if (low[0], high[0]) == ("at least", "at most"):
        return f" from {low[1]} to {high[1]}"
    return ",".join(f" {word} {bound}" for word, bound in (low, high) if word)


_LOW = {"minimum": "at least", "exclusiveMinimum": "above"}
_HIGH = {"maximum": "at most", "exclusiveMaximum": "below"}


def _default(field: Schema) -> str:
    value = field.get("default")
    whole = value and (isinstance(value, dict) or (isinstance(value, list) and _is_parts(value)))
    if whole:
        return "see below"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _is_parts(value: list[Any]) -> bool:
    return any(isinstance(item, dict) for item in value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
