"""
A small Hub on loopback, for the real clients: what `huggingface_hub` needs to create repositories and branches, to
upload through git LFS and to download, with tokens, and with failures on request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "user"
TOKEN = "hf_secret"
LFS_SUFFIXES = (".safetensors", ".bin")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
KIND = "(models|datasets)"
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


@dataclass
class Repo:
    """Branches are names of commits, and commits hold all files, as bytes or as the name of an LFS object."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes | str]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes | str]) -> str:
        sha = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


@dataclass
class Failure:
    """
    What goes wrong with the next requests whose method and path match: an error status, or ("cut") a body that ends in
    the middle.
    """

    method: str
    path: str
    how: int | str
    times: int


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message or code)
        self.status = status
        self.code = code


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: list[Failure] = []
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self.shutdown()
        self.server_close()

    def fail(self, method: str, path: str, how: int | str, times: int = 1) -> None:
        self.failures.append(Failure(method, path, how, times))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repos[repo].commits[self.repos[repo].branches[revision]]
        return {path: self.content(entry) for path, entry in commit.items()}

    def content(self, entry: bytes | str) -> bytes:
        return entry if isinstance(entry, bytes) else self.objects[entry]


def route(method: str, path: str) -> Callable:
    """Registers a function for requests. Its arguments are the handler and the groups of the path."""

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(path), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        self.body = self._read_body()
        self.server.requests.append(f"{self.command} {path}")
        self.failure = self._next_failure(path)
        try:
            if self.failure is not None and self.failure.how != "cut":
                raise Refused(self.failure.how, "Failure", "The server fails, as it was told to.")
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(path)
                if match and method in (self.command, self.command.replace("HEAD", "GET")):
                    return function(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
            raise Refused(404, "NotFound", f"The server knows no {self.command} {path}.")
        except Refused as error:
            self.send_json({"error": str(error)}, error.status, {"X-Error-Code": error.code})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _next_failure(self, path: str) -> Failure | None:
        for failure in self.server.failures:
            if failure.times > 0 and failure.method == self.command and failure.path in path:
                failure.times -= 1
                return failure
        return None

    def repo(self, name: str, write: bool = False) -> Repo:
        repo = self.server.repos.get(name)
        signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if (write or repo is None or repo.private) and not signed_in:
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repo

    def commit(self, repo: Repo, revision: str) -> str:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send_bytes(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.failure is not None and self.failure.how == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@route("GET", "/api/whoami-v2")
def whoami(handler: Handler) -> None:
    if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
        raise Refused(401, "Unauthorized", "Invalid username or password.")
    handler.send_json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


@route("POST", "/api/repos/create")
def create_repo(handler: Handler) -> None:
    if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
        raise Refused(401, "Unauthorized", "Invalid username or password.")
    request = json.loads(handler.body)
    name = f"{request.get('organization') or USER}/{request['name']}"
    answer = {"url": f"{handler.server.url}/{name}", "id": name}
    if name in handler.server.repos:
        return handler.send_json({**answer, "error": "You already created this model repo"}, 409)
    repo = Repo(private=request.get("private") or request.get("visibility") == "private")
    repo.commit("main", {".gitattributes": b""})
    handler.server.repos[name] = repo
    handler.send_json(answer)


@route("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)")
def create_branch(handler: Handler, repo: str, branch: str) -> None:
    model = handler.repo(repo, write=True)
    if branch in model.branches:
        raise Refused(409, "Conflict", f"Reference {branch} exists")
    start = json.loads(handler.body).get("startingPoint", "main")
    model.branches[branch] = handler.commit(model, start)
    handler.send_json({})


@route("POST", "/api/validate-yaml")
def validate_yaml(handler: Handler) -> None:
    """As the Hub does, this refuses a base model that cannot be on it, such as a folder."""
    card = json.loads(handler.body)["content"]
    metadata = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    base_model = yaml.safe_load(metadata[1]).get("base_model") if metadata else None
    if base_model is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model):
        message = f'"base_model" with value "{base_model}" is not valid. Use a model id from https://hf.co/models.'
        return handler.send_json({"errors": [{"message": message}], "warnings": []}, 400)
    handler.send_json({"errors": [], "warnings": []})


@route("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)")
def preupload(handler: Handler, repo: str, revision: str) -> None:
    handler.commit(handler.repo(repo, write=True), revision)
    paths = [file["path"] for file in json.loads(handler.body)["files"]]
    modes = ["lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths]
    files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in zip(paths, modes)]
    handler.send_json({"files": files})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(handler: Handler, repo: str) -> None:
    handler.repo(repo, write=True)
    objects = []
    for entry in json.loads(handler.body)["objects"]:
        answer = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] not in handler.server.objects:
            answer["actions"] = {"upload": {"href": f"{handler.server.url}/lfs/{entry['oid']}"}}
        objects.append(answer)
    handler.send_json({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_upload(handler: Handler, oid: str) -> None:
    if hashlib.sha256(handler.body).hexdigest() != oid:
        raise Refused(400, "BadDigest")
    handler.server.objects[oid] = handler.body
    handler.send_json({})


@route("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)")
def commit(handler: Handler, repo: str, revision: str) -> None:
    model = handler.repo(repo, write=True)
    files = dict(model.commits[handler.commit(model, revision)])
    for line in handler.body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            if value["oid"] not in handler.server.objects:
                raise Refused(400, "LfsMissing", f"{value['path']} was not uploaded")
            files[value["path"]] = value["oid"]
        elif operation["key"] == "deletedFile":
            files.pop(value["path"], None)
    sha = model.commit(revision, files)
    handler.send_json({"commitOid": sha, "commitUrl": f"{handler.server.url}/{repo}/commit/{sha}"})


@route("GET", f"/api/{KIND}/{REPO}(/revision/(?P<revision>[^/]+))?")
def repo_info(handler: Handler, repo: str, revision: str) -> None:
    model = handler.repo(repo)
    sha = handler.commit(model, revision or "main")
    siblings = [{"rfilename": path} for path in model.commits[sha]]
    handler.send_json({"id": repo, "sha": sha, "private": model.private, "tags": [], "siblings": siblings})


@route("GET", f"/api/{KIND}/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
def tree(handler: Handler, repo: str, revision: str, folder: str) -> None:
    model = handler.repo(repo)
    files = model.commits[handler.commit(model, revision)]
    inside = {path: handler.server.content(entry) for path, entry in files.items() if path.startswith(folder)}
    if not inside:
        raise Refused(404, "EntryNotFound", f"{folder} does not exist")
    handler.send_json([describe(path, content) for path, content in inside.items()])


def describe(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@route("POST", f"/api/datasets/{REPO}/paths-info/(?P<revision>[^/]+)")
def paths_info(handler: Handler, repo: str, revision: str) -> None:
    dataset = handler.repo(repo)
    files = dataset.commits[handler.commit(dataset, revision)]
    asked = parse_qs(handler.body.decode())["paths"]
    handler.send_json([describe(path, handler.server.content(files[path])) for path in asked if path in files])


@route("GET", f"/(datasets/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(handler: Handler, repo: str, revision: str, path: str) -> None:
    model = handler.repo(repo)
    sha = handler.commit(model, revision)
    entry = model.commits[sha].get(path)
    headers = {"X-Repo-Commit": sha}
    if entry is None:
        return handler.send_json({"error": "Entry not found"}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
    content = handler.server.content(entry)
    oid = entry if isinstance(entry, str) else hashlib.sha1(content).hexdigest()
    headers |= {"ETag": f'"{oid}"', "X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
    handler.send_bytes(content, headers=headers)
