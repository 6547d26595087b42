"""PACS for tests: Debian's Orthanc, and a tiny service that lies, in a network of their own.

Orthanc 1.10 listens on all interfaces whatever its config says, so it runs where there is none but
loopback; the calling thread, and all it starts, is moved there and back.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pydicom
import pytest

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
HTTP, DICOM = 8042, 4242
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of sched.h


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Move this thread into a network namespace with a loopback and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("the program ip is not installed")
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before:
        if libc.unshare(_NEW_NETWORK) != 0:
            pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield
        finally:
            gc.collect()  # while the test's own filters of warnings hold
            if libc.setns(before.fileno(), _NEW_NETWORK) != 0:
                raise OSError(ctypes.get_errno(), "cannot return to the network")


def require_orthanc() -> None:
    """Skip, and say what is missing, where Orthanc cannot be run."""
    if shutil.which("Orthanc") is None or not PLUGIN.is_file():
        pytest.skip("Debian's packages orthanc and orthanc-dicomweb are not installed")


@dataclass
class Orthanc:
    """A running one; `process` may be killed and started again on the same data."""

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Orthanc:
        """Start it, and wait until it answers."""
        config = {
            "StorageDirectory": str(self.folder),
            "IndexDirectory": str(self.folder),
            "Plugins": [str(PLUGIN)],
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "DicomCheckCalledAet": True,
            "DicomAet": "ARCHIVE",
            **self.settings,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "orthanc.json"
        file.write_text(json.dumps(config))
        log = open(self.folder / "log", "wb")  # noqa: SIM115 (the process holds it)
        words = ["Orthanc", "--verbose", str(file)]
        self.process = subprocess.Popen(words, stdout=log, stderr=log)
        log.close()
        for _ in range(150):
            try:
                self.asked("/system")
                return self
            except urllib.error.HTTPError:
                return self
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def stop(self) -> None:
        """End it, at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def asked(self, path: str, body: bytes | None = None) -> bytes:
        """An answer of its own interface."""
        request = urllib.request.Request(f"http://127.0.0.1:{HTTP}{path}", data=body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: bytes = answer.read()
        return content

    def put(self, folder: Path) -> None:
        """Store every file of a folder."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.asked("/instances", path.read_bytes())

    def log(self) -> str:
        """What it has written down so far."""
        return (self.folder / "log").read_text(errors="replace")


@dataclass
class Liar:
    """A DICOMweb service over files in memory, which may be told to do it wrong.

    Args:
        folder: DICOM files; they are grouped by the UIDs in them.
        token: asked for as a bearer token where it is not empty.
        change: (path, full answer as status, headers, body) to the answer that is given.
    """

    folder: Path
    token: str = ""
    change: Callable[
        [str, tuple[int, dict[str, str], bytes]], tuple[int, dict[str, str], bytes]
    ] = lambda path, answer: answer
    asked: list[str] = field(default_factory=list)
    authorized: list[str] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    port: int = 0

    def __post_init__(self) -> None:
        self.files: dict[tuple[str, str, str], tuple[bytes, Any]] = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            ds = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            uids = str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID), str(ds.SOPInstanceUID)
            self.files[uids] = path.read_bytes(), ds

    @property
    def address(self) -> str:
        """For `data.source`."""
        return f"dicomweb+http://127.0.0.1:{self.port}/rs"

    @contextlib.contextmanager
    def running(self, context: Any = None) -> Iterator[Liar]:
        """Serve, with TLS where a context is given."""
        liar = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                liar.asked.append(self.path)
                liar.hosts.append(self.headers.get("Host", ""))
                liar.authorized.append(self.headers.get("Authorization", ""))
                status, headers, body = liar.answer(self.path, self.headers)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)
                if "Connection" in headers or "Content-Length" in headers:
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                pass

        server = Server(("127.0.0.1", self.port), Handler)
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, path: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        """What it says to a request."""
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return self.change(path, (401, {}, b""))
        parts = urlsplit(path)
        words = parts.path.split("/")[1:]
        if words[0] != "rs":
            return self.change(path, (404, {"Content-Type": "text/html"}, b"<html>nothing</html>"))
        uids, level = words[2::2], (len(words) - 1 + 1) // 2
        if len(words) == 7:
            content = self.files[uids[0], uids[1], uids[2]][0]
            return self.change(path, (200, *multipart([content])))
        keys = (
            ["StudyInstanceUID", "PatientID"],
            ["SeriesInstanceUID", "Modality", "SeriesDescription", "ProtocolName"],
            ["SOPInstanceUID", "SOPClassUID"],
        )[level - 1]
        items = {}
        for own, (_, ds) in self.files.items():
            if list(own[: level - 1]) == uids:
                items[own[level - 1]] = {
                    f"{ds[k].tag:08X}": {"vr": ds[k].VR, "Value": [str(ds[k].value)]}
                    for k in keys
                    if k in ds
                }
        asked = parse_qs(parts.query)
        offset, limit = int(asked["offset"][0]), int(asked["limit"][0])
        page = json.dumps(list(items.values())[offset : offset + limit]).encode()
        return self.change(path, (200, {"Content-Type": "application/dicom+json"}, page))


def multipart(
    contents: Sequence[bytes], end: bytes = b"--", boundary: str = "b0undary"
) -> tuple[dict[str, str], bytes]:
    """Headers and body of a multipart answer; `end` is what follows its last boundary."""
    mark = b"--" + boundary.encode()
    body = b"".join(
        mark + b"\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n"
        for content in contents
    )
    kind = f'multipart/related; type="application/dicom"; boundary="{boundary}"'
    return {"Content-Type": kind}, body + mark + end
