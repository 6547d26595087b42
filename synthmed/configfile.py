"""A config's file: read, override, validate, print, and name the field at fault.

`load` reads a file (or the name of a shipped config), applies `--set` overrides and validates;
every error names the path of the field.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from synthmed.config import Condition, Config
from synthmed.errors import UsageError
from synthmed.formats import address
from synthmed.metrics import Metric
from synthmed.metrics.spaced import Feature


def shipped_folder(name: Literal["configs", "pipelines"]) -> Path:
    """The folder of shipped configs or pipelines, in a wheel or in a checkout."""
    packaged = Path(str(files("synthmed"))) / "_shipped" / name
    return packaged if packaged.is_dir() else Path(str(files("synthmed"))).parent / name


def find(name: str) -> Path:
    """The config file called `name`: a path, or the stem of a shipped config.

    Raises:
        UsageError: there is neither, with the shipped names listed.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(shipped_folder("configs").glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    raise UsageError(
        f"config {name}: no such file", f"Give a path, or a shipped one: {', '.join(shipped)}."
    )


class _DuplicateKey(Exception):
    def __init__(self, key: str, first: int, second: int) -> None:
        where = f"line {first}" if first == second else f"lines {first} and {second}"
        super().__init__(f"the key {key} stands twice, at {where}")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key stands once: YAML 1.2 says so, PyYAML keeps the last silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; raises where it names a key twice."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            # a merge (`<<: *defaults`) is no key of its own, and is there to be overridden
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in seen:
                    raise _DuplicateKey(key.value, seen[key.value], line)
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """YAML text as values.

    Raises:
        ValueError: not valid YAML, or a key stands twice; the message names the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"not valid YAML{where}") from None
    except _DuplicateKey as error:
        raise ValueError(f"{error}; keep one of them") from None


def load(path: Path, overrides: Iterable[str] = (), values: Mapping[str, Any] = {}) -> Config:
    """Read and validate a config.

    Args:
        path: a YAML file.
        overrides: `a.b=value` strings of `--set`, the value parsed as YAML.
        values: dotted path to value, for what the command line sets by its own options.

    Raises:
        UsageError: unreadable, not YAML, unknown or wrong field; one line a fault, with its path.
    """
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"config {path}: not a UTF-8 text file") from None
    except ValueError as error:
        raise UsageError(f"config {path}: {error}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"config {path}: empty, or not a mapping of keys")
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {item}: expected a.b=value")
        try:
            _put(tree, key, parse(text))
        except ValueError as error:
            raise UsageError(f"--set {item}: {error}") from None
    for key, value in values.items():
        _put(tree, key, value)
    return validate(tree, str(path))


def validate(tree: Mapping[str, Any], where: str) -> Config:
    """The config in `tree`, or a `UsageError` that names each faulty field (`where`: the file)."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = [_explain(fault) for fault in error.errors(include_url=False)]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise UsageError(f"config {where}: " + "; ".join(faults[:3]) + more) from None


def dump(config: Config) -> str:
    """The resolved config as YAML, which reproduces the run."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=False), sort_keys=False)


def source_folder(config: Config) -> Path | None:
    """`data.source` with `~` and environment variables resolved; null where it is an address.

    Raises:
        UsageError: it names a variable that is not set.
    """
    if address.is_address(config.data.source):
        return None
    return _folder(config.data.source, "data.source", "the cohort, or pass --input FOLDER")


def table_file(config: Config) -> Path | None:
    """`data.table` as a file of its own, which it is where the source is an address; or null."""
    if config.data.table is None:
        return None
    return _folder(config.data.table, "data.table", "the table")


def masks_folder(config: Config) -> Path | None:
    """`sample.masks` likewise; null where there is none."""
    if config.sample.masks is None:
        return None
    return _folder(config.sample.masks, "sample.masks", "the label maps, or pass --masks FOLDER")


def init_folder(config: Config) -> Path | None:
    """The model's folder in what `train.init` names, a run or that folder; null for neither."""
    if config.train.init is None:
        return None
    path = _folder(config.train.init, "train.init", "the run to start from")
    return path / "private" / "model" if (path / "private").is_dir() else path


def _folder(text: str, key: str, what: str) -> Path:
    resolved = os.path.expanduser(os.path.expandvars(text))
    if missing := re.search(r"\$\{?(\w+)", resolved):
        raise UsageError(
            f"{key}: environment variable {missing[1]} is not set",
            f"Set it to the folder that holds {what}.",
        )
    return Path(resolved)


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value by its dotted path, making the mappings on the way."""
    *parents, last = dotted.split(".")
    node = tree
    for name in parents:
        child = node.get(name)
        if not isinstance(child, dict):
            child = node[name] = {}
        node = child
    node[last] = value


def _explain(fault: Any) -> str:
    """One validation fault as `path: what is wrong (what it could be)`."""
    loc = [str(p) for p in fault["loc"]]
    # a discriminated union puts its tag into the path, which the user did not write
    path = ".".join(p for i, p in enumerate(loc) if not _is_tag(loc, i))
    kind = fault["type"]
    if kind == "extra_forbidden":
        known = _known_fields(loc[:-1])
        close = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
        return f"{path}: unknown key{hint}"
    if kind == "missing":
        hint = " (null says: no protection)" if path == "privacy" else ""
        return f"{path}: missing{hint}"
    if kind == "union_tag_invalid":
        return f"{path}.{fault['ctx']['discriminator'].strip(chr(39))}: unknown name " + (
            f"{fault['ctx']['tag']!r}; known: {fault['ctx']['expected_tags']}"
        )
    if kind == "union_tag_not_found":
        known = sorted(_tags(_union_at(loc)))
        return f"{path}.{fault['ctx']['discriminator'].strip(chr(39))}: missing; known: " + (
            ", ".join(map(repr, known))
        )
    message = str(fault["msg"]).removeprefix("Value error, ")
    given = fault.get("input")
    shown = f" (given {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{path}: {message}{shown}" if path else message


def _is_tag(loc: list[str], i: int) -> bool:
    """Whether a part of a validation path is the name of a union's member, not a key."""
    return loc[i] in _tags(_union_at(loc[:i]))


def _union_at(loc: list[str]) -> Any:
    """The discriminated union whose member stands at a path, or None."""
    if loc[:1] == ["backbone"]:
        here = _annotation_at(loc)
        return None if isinstance(here, type) else here
    # a condition has its own name, and a metric its place in the list, in between
    many = {
        "data.conditions": Condition,
        "evaluate.metrics": Metric,
        "evaluate.features": Feature,
    }
    return many.get(".".join(loc[:2])) if len(loc) == 3 else None


def _tags(annotation: Any) -> set[str]:
    """The discriminators of the config parts in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = [annotation.model_fields.get(d) for d in ("name", "kind")]
        return {f.default for f in fields if f is not None and not f.is_required()}
    return {t for a in getattr(annotation, "__args__", ()) for t in _tags(a)}


def _known_fields(loc: list[str]) -> list[str]:
    """Field names of the config part at a validation path."""
    return sorted(getattr(_model_in(_annotation_at(loc), ""), "model_fields", {}))


def _annotation_at(loc: list[str]) -> Any:
    """What stands at a validation path: a config part, or a union or a container of some."""
    here: Any = Config
    for name in loc:
        member = _model_in(here, name)
        if member is not here and name in _tags(here):
            here = member
        elif member is not None and name in member.model_fields:
            here = member.model_fields[name].annotation
    return here


def _model_in(annotation: Any, tag: str) -> Any:
    """The config part inside an annotation; `tag` picks a member of a discriminated union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    members = [m for a in getattr(annotation, "__args__", ()) if (m := _model_in(a, tag))]
    for member in members:
        for discriminator in ("name", "kind"):
            field = member.model_fields.get(discriminator)
            if field is not None and field.default == tag:
                return member
    return members[0] if members else None
