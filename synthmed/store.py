"""The run folder: artifacts written whole or not at all, with a manifest of what made them.

An artifact is a folder in RUN/private. It is filled under a temporary name, its files are hashed
and synced, and it is renamed into place last: a folder with its final name is complete. A stage
whose recorded config part and input digests match is skipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from synthmed.errors import InputError, ResourceError, UsageError
from synthmed.types import SCHEMA_VERSION, Frozen

Kind = Literal["catalogue", "dataset", "model", "cohort", "screening", "evidence"]
FOLDER: Mapping[Kind, str] = {
    "catalogue": "ingest",
    "dataset": "prepare",
    "model": "model",
    "cohort": "sample",
    "screening": "screen",
    "evidence": "evaluate",
}
"""Which folder of RUN/private holds which artifact, in the order of the line."""


class Manifest(Frozen):
    """What an artifact is and what it was made from; no time in it, so that equal means equal.

    Args:
        config: digest of the config parts the stage depends on.
        inputs: name to digest of everything else it was made from.
        files: path to SHA-256 of every file of the artifact.
        facts: small results that later stages and the report read.
        stands_for: the digest it had before `forget` took something out of it that nothing later
            is made of; it still counts as that artifact.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    config: str
    inputs: Mapping[str, str]
    files: Mapping[str, str]
    facts: Mapping[str, Any] = {}
    stands_for: str | None = None

    def digest(self) -> str:
        """SHA-256 of the manifest: identifies the artifact and all it was made from."""
        content = self.model_dump(mode="json", exclude={"stands_for"})
        return self.stands_for or hashlib.sha256(canonical(content)).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A complete artifact on disk."""

    path: Path
    manifest: Manifest

    def digest(self) -> str:
        """Identifies the artifact and all it was made from."""
        return self.manifest.digest()


class Run:
    """A run folder; everything in it but release/ is private (umask 077).

    Args:
        path: the folder, made if missing.
    """

    def __init__(self, path: Path) -> None:
        os.umask(0o077)
        self.path = path
        try:
            (path / "private").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"run folder {path}: cannot be made ({error.strerror})",
                "Name another run folder.",
            ) from None

    @property
    def private(self) -> Path:
        """The folder of everything that stays in the hospital."""
        return self.path / "private"

    def folder(self, kind: Kind) -> Path:
        """Where the artifact of `kind` lies once it is complete."""
        return self.private / FOLDER[kind]

    def work(self, kind: Kind) -> Path:
        """A folder beside the artifact for what a killed stage goes on from; made if missing."""
        path = self.private / f"{FOLDER[kind]}.partial"
        path.mkdir(exist_ok=True)
        return path

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process off this run; released by the system if this one dies.

        Raises:
            ResourceError: another process holds it.
        """
        with locked(self.private / ".lock", f"run {self.path}", "name another run folder"):
            yield

    def manifest(self, kind: Kind) -> Manifest | None:
        """What the artifact of `kind` says it is; its files are not looked at.

        Raises:
            InputError: it comes from another version.
        """
        file = self.folder(kind) / "manifest.json"
        if not file.is_file():
            return None
        try:
            return Manifest.model_validate_json(file.read_bytes())
        except ValidationError:
            raise InputError(
                f"{file}: not a manifest this version can read",
                "Run with --overwrite to make the run anew.",
            ) from None

    def load(self, kind: Kind) -> Artifact | None:
        """The complete artifact of `kind`, or None; its kind is checked, its files are listed.

        Raises:
            InputError: it is there but was altered, or comes from another version.
        """
        path = self.folder(kind)
        manifest = self.manifest(kind)
        if manifest is None:
            return None
        file = path / "manifest.json"
        if manifest.kind != kind or manifest.schema_version != SCHEMA_VERSION:
            raise InputError(
                f"{file}: holds a {manifest.kind} of schema {manifest.schema_version}, "
                f"expected a {kind} of schema {SCHEMA_VERSION}",
                "Run with --overwrite to make the run anew.",
            )
        for name, sha in manifest.files.items():
            part = path / name
            if not part.is_file() or _known_sha256(part) != sha:
                raise InputError(
                    f"{part}: missing or altered since it was written",
                    "Run with --overwrite to make the run anew.",
                )
        return Artifact(path, manifest)

    def require(self, kind: Kind) -> Artifact:
        """The complete artifact of `kind`.

        Raises:
            UsageError: the stage that makes it has not run.
        """
        artifact = self.load(kind)
        if artifact is None:
            stage = "train" if kind == "model" else FOLDER[kind]
            raise UsageError(
                f"run {self.path}: nothing from the stage {stage} yet",
                f"Run `synthmed {stage} {self.path}` first, or `synthmed generate CONFIG`.",
            )
        return artifact

    @contextlib.contextmanager
    def writing(
        self, kind: Kind, config: str, inputs: Mapping[str, str], facts: dict[str, Any]
    ) -> Iterator[Path]:
        """A temporary folder that becomes the artifact of `kind` when the block ends well.

        `facts` may be filled inside the block. Whatever was there under the final name, and every
        later artifact, is removed first, so that nothing stale stands beside the new one.
        """
        temporary = self.private / f".{FOLDER[kind]}.new"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        files = {
            str(p.relative_to(temporary)): file_sha256(p)
            for p in sorted(temporary.rglob("*"))
            if p.is_file()
        }
        manifest = Manifest(kind=kind, config=config, inputs=inputs, files=files, facts=facts)
        write_json(temporary / "manifest.json", manifest.model_dump(mode="json"))
        for p in temporary.rglob("*"):
            sync(p)
        sync(temporary)
        self.discard(kind, keep_partial=True)
        temporary.rename(self.folder(kind))
        sync(self.private)
        self.remove(self.private / f"{FOLDER[kind]}.partial")

    def amend(
        self, kind: Kind, files: Mapping[str, str], facts: Mapping[str, Any], same: bool
    ) -> None:
        """Let an artifact's manifest say what it holds now, in one step; only `forget` does so.

        Args:
            files: path to SHA-256 of all that it holds from here on.
            facts: its facts from here on.
            same: what was made of it is still made of it.
        """
        there = self.manifest(kind)
        if there is not None:
            stands_for = there.digest() if same else None
            new = {"files": dict(files), "facts": dict(facts), "stands_for": stands_for}
            changed = there.model_copy(update=new)
            write_json(self.folder(kind) / "manifest.json", changed.model_dump(mode="json"))

    def holds(self, kind: Kind) -> bool:
        """Whether the artifact of `kind` is there, whole or begun."""
        # a folder without a manifest is what a failed ingest left to read: its refusals
        whole = (self.folder(kind) / "manifest.json").is_file()
        return whole or (self.private / f"{FOLDER[kind]}.partial").exists()

    def discard(self, first: Kind, keep_partial: bool = False) -> None:
        """Remove the artifact `first`, all later ones and the reports and release made of them.

        Args:
            first: the earliest artifact to go.
            keep_partial: let what `first` may be resumed from stand.
        """
        kinds = list(FOLDER)
        self.discard_release()
        for kind in reversed(kinds[kinds.index(first) :]):
            self.remove(self.folder(kind))
            if kind != first or not keep_partial:
                self.remove(self.private / f"{FOLDER[kind]}.partial")

    def discard_release(self) -> None:
        """Remove the release and both reports."""
        for name in ("release", "withheld", "private/report"):
            self.remove(self.path / name)

    def discard_damaged(self) -> None:
        """Remove everything from the first artifact on that is incomplete or was altered."""
        for kind in FOLDER:
            try:
                whole = self.load(kind) is not None
            except InputError:
                whole = False
            if not whole and self.folder(kind).exists():
                self.discard(kind)
                return

    def remove(self, path: Path) -> None:
        """Take a folder away in one step (rename, then delete): no half of it keeps its name."""
        if path.is_file():
            path.unlink()
        elif path.exists():
            doomed = self.private / f".removed-{path.name}"
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed)

    def record(self, version: str) -> None:
        """Write RUN/manifest.json: which artifacts there are, by digest, and who made them."""
        made = {kind: self.manifest(kind) for kind in FOLDER}
        manifests = {kind: there.digest() for kind, there in made.items() if there}
        released = [n for n in ("release", "withheld") if (self.path / n).is_dir()]
        write_json(
            self.path / "manifest.json",
            {
                "schema_version": SCHEMA_VERSION,
                "synthmed": version,
                "config": file_sha256(self.path / "config.yaml"),
                "artifacts": manifests,
                "cohort": released[0] if released else None,
            },
        )

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to RUN/log.jsonl; callers pass pseudonyms and numbers only."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event}
        text = json.dumps({**line, **fields}) + "\n"
        with open(self.path / "log.jsonl", "a+b") as handle:
            if handle.seek(0, os.SEEK_END):
                handle.seek(-1, os.SEEK_END)
                # a full disk or a kill may have cut the last line off
                text = text if handle.read(1) == b"\n" else f"\n{text}"
            handle.write(text.encode())

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines of that event in log.jsonl, the last one last."""
        file = self.path / "log.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        entries = [_entry(line) for line in lines]
        return [entry for entry in entries if entry.get("event") == event]

    def count(self, event: str) -> int:
        """How many lines of that event log.jsonl has."""
        return len(self.logged(event))


def _entry(line: str) -> dict[str, Any]:
    """A line of the log; empty for one that was cut off."""
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return entry


def canonical(value: Any) -> bytes:
    """JSON bytes that are equal exactly when the values are."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _known_sha256(path: Path) -> str:
    """SHA-256 of a file, worked out once a process while size and time of change stay."""
    about = path.stat()
    key = (str(path), about.st_size, about.st_mtime_ns)
    if key not in _HASHED:
        _HASHED[key] = file_sha256(path)
    return _HASHED[key]


_HASHED: dict[tuple[str, int, int], str] = {}


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(file: Path, what: str, elsewhere: str) -> Iterator[None]:
    """Hold a file, made with mode 0600, that one process at a time may hold.

    The system releases it if the process dies. Where a share's locks are mandatory nobody can read
    or write what is locked, so it is a file of its own.

    Args:
        file: for this alone.
        what: is in use, for the message.
        elsewhere: what else can be done, for the same.

    Raises:
        ResourceError: another process holds it, or it cannot be made.
    """
    try:
        held = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ResourceError(
            f"{what}: cannot be written ({error.strerror})", f"{elsewhere.capitalize()}."
        ) from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"{what} is in use by another process", f"Wait for it to end, or {elsewhere}."
            ) from None
        except OSError as error:
            raise ResourceError(
                f"{what}: the file system keeps no locks ({error.strerror})",
                f"{elsewhere.capitalize()}, on a file system that does.",
            ) from None
        yield
    finally:
        os.close(held)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, sync, rename."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.rename(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def home() -> Path:
    """SYNTHMED_HOME (default ~/.local/share/synthmed), made with mode 0700.

    Raises:
        UsageError: it is no absolute path, by which each working folder had a key of its own.
        ResourceError: it cannot be made.
    """
    path = Path(os.environ.get("SYNTHMED_HOME") or "~/.local/share/synthmed").expanduser()
    if not path.is_absolute():
        raise UsageError(
            f"SYNTHMED_HOME {path}: is no absolute path",
            "Relative to the working folder it would be another key and ledger in each.",
        )
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ResourceError(
            f"SYNTHMED_HOME {path}: cannot be made ({error.strerror})",
            "Set SYNTHMED_HOME to a folder only you can read.",
        ) from None
    return path
