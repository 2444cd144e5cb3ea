"""A Hugging Face hub on the loopback interface: what streaming a dataset needs of its HTTP interface, with faults."""

import hashlib
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves the dataset org/name at one commit; any other repository is unknown (404) or has a status of its own."""

    def __init__(self, files: dict[str, bytes], statuses: dict[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.statuses = statuses
        """HTTP status of every request whose path contains the key."""
        self.faults: list[str] = []
        """What goes wrong with the next answers that carry data: "" (nothing), unavailable, truncate, drop or stall."""
        self.seen_faults: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub(files: dict[str, bytes] | None = None, statuses: dict[str, int] | None = None) -> Iterator[FakeHub]:
    """Runs a hub; set HF_ENDPOINT to its ``url`` and HF_HUB_OFFLINE to 0 in the process that uses it."""
    with FakeHub(files or {}, statuses or {}) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(self.path.split("?")[0])
        api, resolve = "/api/datasets/org/name", f"/datasets/org/name/resolve/{COMMIT}/"
        files = self.server.files
        for name, status in self.server.statuses.items():
            if name in path:
                return self._send(status, b"", {})
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in files]
            self._send_json({"id": "org/name", "sha": COMMIT, "private": False, "siblings": siblings})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self._send_json(self._entries(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")))
        elif path.startswith(f"{api}/paths-info/"):
            self._send_json([entry for name in json.loads(body)["paths"] for entry in self._entries(name, itself=True)])
        elif path.removeprefix(resolve) in files:
            self._send_file(files[path.removeprefix(resolve)])
        else:
            kind = "Revision" if "/revision/" in path else "Entry" if "/resolve/" in path else "Repo"
            self._send(404, b"", {"X-Error-Code": f"{kind}NotFound"})

    do_POST = do_HEAD = do_GET

    def _entries(self, folder: str, itself: bool = False) -> list[dict[str, Any]]:
        """What lies directly in a folder, or (``itself``) the file or folder of that name."""
        entries = {}
        for name, content in self.server.files.items():
            depth = len(folder.split("/")) if folder else 0
            shown = "/".join(name.split("/")[: depth + (not itself)])
            if name == folder or name.startswith(f"{folder}/") or not folder:
                kind = {"type": "file", "size": len(content)} if shown == name else {"type": "directory"}
                entries[shown] = {"path": shown, "oid": hashlib.sha1(content).hexdigest(), **kind}
        return list(entries.values())

    def _send(self, status: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        length = len(content) if length is None else length
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD" or "Range" not in self.headers:
            return self._send(200, content, headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last or len(content)) + 1]
        half = part[: len(part) // 2]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault:
            self.server.seen_faults.append(fault)
        if fault == "unavailable":
            self._send(503, b"", {})
        elif fault == "truncate":  # the answer claims to be complete and is not
            self._send(206, half, headers)
        elif fault:  # drop: the connection ends in the middle of the answer; stall: so it does after a silence
            self._send(206, half, headers, length=len(part))
            time.sleep(4 if fault == "stall" else 0)
            self.close_connection = True
        else:
            self._send(206, part, headers)
