"""A Hub on this machine: its HTTP API as huggingface_hub calls it, with faults on demand.

It keeps repositories in memory, checks sizes and hashes of what it is sent, and breaks where a test
says so: `faults` maps a part of a request, such as `POST preupload`, to what happens instead.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "a" * 30
SMALL = 4096


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*\n"}])
    titles: dict[int, str] = field(default_factory=dict)  # of commits that were pushed
    lfs: set[str] = field(default_factory=set)  # names that are stored as LFS

    @property
    def head(self) -> str:
        return self.sha(len(self.commits) - 1)

    def sha(self, index: int) -> str:
        return hashlib.sha1(f"{id(self)} {index}".encode()).hexdigest()

    def last_commit(self, name: str) -> dict[str, str]:
        index = len(self.commits) - 1
        while index and self.commits[index - 1].get(name) == self.commits[index][name]:
            index -= 1
        title = self.titles.get(index, "Edit on the website")
        return {"id": self.sha(index), "title": title, "date": "2026-01-01T00:00:00.000Z"}

    def at(self, revision: str) -> dict[str, bytes]:
        shas = {self.sha(index): files for index, files in enumerate(self.commits)}
        return shas.get(revision, self.commits[-1])


@dataclass
class Fault:
    """An answer in place of the right one, `times` times; `cut` closes the connection mid-body."""

    status: int = 500
    message: str = "broken"
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1000
    cut: bool = False


class Hub:
    """What the server knows, and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.role = "write"
        self.spoil: Callable[[dict[str, bytes]], None] | None = None
        self.url = ""

    def count(self, part: str) -> int:
        return sum(part in request for request in self.requests)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, status: int, value: object = None, headers: dict | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str = "", **headers: str) -> None:
        known = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self.reply(status, {"error": message}, known)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_any(self) -> None:
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        fault = next(
            (
                fault
                for part, fault in self.hub.faults.items()
                if all(word in request for word in part.split()) and fault.times > 0
            ),
            None,
        )
        if fault is not None:
            fault.times -= 1
            if fault.cut:
                self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.body()
            self.refuse(fault.status, fault.message, **fault.headers)
            return
        if "/lfs/" not in self.path:
            self.hub.tokens.add(self.headers.get("Authorization", ""))
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.body()
                self.refuse(401, "Invalid credentials in Authorization header")
                return
        self.route(self.path.partition("?")[0])

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def route(self, path: str) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            access = {"role": hub.role, "displayName": "mine"}
            self.reply(200, {"name": "me", "type": "user", "auth": {"accessToken": access}})
        elif path == "/api/validate-yaml":
            self.body()
            self.reply(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self.create(json.loads(self.body()))
        elif path.startswith("/lfs/"):
            self.store(path.rpartition("/")[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.batch(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([^/]+)(?:/([^/]+))?)?", path):
            self.repository(*found.groups())
        else:
            self.body()
            self.refuse(404, f"no such page {path}")

    def create(self, asked: dict) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not repo.startswith("me/"):
            self.refuse(403, f"You don't have the rights to create a model under {repo}")
        elif repo in self.hub.repositories:
            self.refuse(409, "You already created this model repo")
        else:
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.hub.repositories[repo] = Repository(private)
            self.reply(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def repository(self, repo: str, action: str | None, revision: str | None) -> None:
        held = self.hub.repositories.get(repo)
        if held is None:
            self.body()
            self.refuse(404, "Repository not found", "RepoNotFound")
        elif action in (None, "revision"):
            self.reply(200, {"id": repo, "sha": held.head, "private": held.private})
        elif action == "settings":
            asked = json.loads(self.body())
            held.private = asked.get("visibility", "private") == "private"
            self.reply(200, {"private": held.private})
        elif action == "tree":
            files = held.at(revision)
            self.reply(200, [self.entry(held, name, data) for name, data in files.items()])
        elif action == "preupload":
            asked = json.loads(self.body())["files"]
            self.reply(200, {"files": [self.mode(held, file) for file in asked]})
        elif action == "commit":
            self.commit(repo, held, [json.loads(line) for line in self.body().splitlines()])

    def entry(self, held: Repository, name: str, data: bytes) -> dict:
        found = {"type": "file", "path": name, "size": len(data), "oid": blob_id(data)}
        found |= {"lastCommit": held.last_commit(name)}
        if name in held.lfs:
            oid = hashlib.sha256(data).hexdigest()
            found |= {"lfs": {"oid": oid, "size": len(data), "pointerSize": 134}}
        return found

    def mode(self, held: Repository, file: dict) -> dict:
        large = file["size"] > SMALL or file["path"].endswith((".safetensors", ".gguf", ".png"))
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def batch(self, repo: str) -> None:
        objects = []
        for asked in json.loads(self.body())["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(found)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.refuse(400, "the content has another hash")
            return
        self.hub.objects[oid] = data
        self.reply(200, {})

    def commit(self, repo: str, held: Repository, lines: list[dict]) -> None:
        header, *operations = lines
        if header["value"].get("parentCommit", held.head) != held.head:
            self.refuse(412, "the parent commit is not the head")
            return
        files = dict(held.commits[-1])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                if len(self.hub.objects.get(value["oid"], b"")) != value["size"]:
                    self.refuse(400, f"{value['path']} was not uploaded")
                    return
                files[value["path"]] = self.hub.objects[value["oid"]]
                held.lfs.add(value["path"])
            else:
                files[value["path"]] = base64.b64decode(value["content"])
                held.lfs.discard(value["path"])
        if self.hub.spoil is not None:
            self.hub.spoil(files)
        held.commits.append(files)
        held.titles[len(held.commits) - 1] = header["value"]["summary"]
        url = f"{self.hub.url}/{repo}/commit/{held.head}"
        self.reply(200, {"success": True, "commitOid": held.head, "commitUrl": url})


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a Hub on a free port of the loopback while the block runs."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
