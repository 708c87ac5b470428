"""A Hub on the loopback, and what the tests of both fetching stages share."""

import hashlib
import json
import random
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.conftest import cpu_params

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPLITS = ("train", "validation", "test")
COLUMNS = {"question": "question", "chosen": "chosen", "rejected": "rejected", "score": "delta_score", "system": None}
ROWS = [
    {"question": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}", "delta_score": i / 8, "id": str(i)} for i in range(5)
]
LARGE = (".safetensors", ".parquet", ".gz")


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub that a download at a pinned commit asks for: repository info, file tree, files.

    Large files are answered as the Hub does: a redirect to another place, which serves ranges.
    """

    # {"models/owner/name": {file: bytes}}, at COMMIT only; and all that was asked for.
    repositories: dict[str, dict[str, bytes]]
    asked: list[str]
    # Files whose connection is cut after so many bytes, so many times; files that arrive with other bytes; repositories for a token.
    cut: dict[str, list[int]]
    corrupt: set[str]
    gated: set[str]

    def log_message(self, *arguments: object) -> None:
        pass

    def send(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    @staticmethod
    def entries(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
        """The files in a folder, and the folders in it where it is not read recursively."""
        inside = [name for name in sorted(files) if name.startswith(folder and f"{folder}/")]
        skip = len(folder) + 1 if folder else 0
        folders = {name[: name.index("/", skip)] for name in inside if "/" in name[skip:]}
        found: list[dict[str, object]] = [
            {"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)
        ]
        for name in inside:
            if recursive or "/" not in name[skip:]:
                entry = {"type": "file", "path": name, "size": len(files[name]), "oid": git_blob(files[name])}
                if name.endswith(LARGE):
                    sha256 = hashlib.sha256(files[name]).hexdigest()
                    entry |= {"oid": "0" * 40, "lfs": {"oid": sha256, "size": len(files[name]), "pointerSize": 130}}
                found.append(entry)
        return found

    def may_read(self, name: str) -> bool:
        return name not in self.gated or self.headers.get("Authorization") == "Bearer hf_good"

    def answer(self) -> None:
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        self.asked.append(f"{self.command} {path} {self.headers.get('Range') or ''}".strip())
        if path.startswith("/storage/"):
            return self.send_range(path.removeprefix("/storage/"))
        posted = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        for name, files in self.repositories.items():
            if path in (f"/api/{name}", f"/api/{name}/revision/{COMMIT}"):
                info = {"id": name.split("/", 1)[1], "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                return self.send_json(info)
            tree = f"/api/{name}/tree/{COMMIT}"
            if path == tree or path.startswith(f"{tree}/"):
                return self.send_json(
                    self.entries(files, path.removeprefix(tree).strip("/"), "recursive=true" in query.lower())
                )
            if path == f"/api/{name}/paths-info/{COMMIT}":
                return self.send_json(
                    [entry for entry in self.entries(files, "", True) if entry["path"] in parse_qs(posted)["paths"]]
                )
            if path == f"/api/{name}/auth-check":
                return self.send_json({}) if self.may_read(name) else self.send(401, X_Error_Code="GatedRepo")
            resolve = f"/{name.removeprefix('models/')}/resolve/{COMMIT}/"
            if path.startswith(resolve) and not self.may_read(name):
                return self.send(401, X_Error_Code="GatedRepo")
            if path.startswith(resolve) and path.removeprefix(resolve) in files:
                file = path.removeprefix(resolve)
                body = files[file]
                if file.endswith(LARGE):
                    linked = {"X_Linked_Size": str(len(body)), "X_Linked_Etag": f'"{hashlib.sha256(body).hexdigest()}"'}
                    return self.send(302, Location=f"/storage/{name}:{file}", X_Repo_Commit=COMMIT, **linked)  # type: ignore[arg-type]
                return self.send(200, body, ETag=f'"{git_blob(body)}"', X_Repo_Commit=COMMIT)
            if path.startswith((resolve, f"/api/{name}/")):
                return self.send(404, X_Error_Code="EntryNotFound" if path.startswith(resolve) else "RevisionNotFound")
        return self.send(404, X_Error_Code="RepoNotFound")

    def send_range(self, place: str) -> None:
        name, file = place.split(":")
        body = self.repositories[name][file]
        if file in self.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if asked else {}
        if self.command == "GET" and self.cut.get(file):
            stop = self.cut[file].pop(0)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:stop])
            self.close_connection = True
            return
        self.send(206 if asked else 200, body[start:], **headers)

    do_GET = do_HEAD = do_POST = answer


def choose(
    section: str, source: str, revision: str | None, splits: dict[str, str] | None = None, **others: Any
) -> None:
    """Writes a params.yaml (JSON is YAML) that selects this source; splits that are not given are the first one given."""
    chosen: dict[str, Any] = {"source": source, "revision": revision}
    if section == "data":
        chosen |= {"config": None, "format": "plain", "columns": COLUMNS, "choice": None, "mixed_with": []} | others
    else:
        chosen |= {"chat_template": None} | others
    if splits:
        chosen["splits"] = dict.fromkeys(SPLITS, next(iter(splits.values()))) | splits
    Path("params.yaml").write_text(json.dumps(cpu_params(**{section: chosen})))


MB = 1 << 20
LARGE_FILE = random.Random(0).randbytes(25 * MB)  # the Hub's client keeps what came in pieces of 10 MB


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def asked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their question under another name."""
    return [{("asked" if name == "question" else name): value for name, value in row.items()} for row in rows]
