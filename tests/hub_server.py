"""A Hub to test with: speaks the HTTP protocol of huggingface.co to its real clients, over loopback.

`python tests/hub_server.py` prints the environment that the clients need and serves until Ctrl-C. In tests, the fixture
`hub` runs it in a thread. What it does not imitate is listed in `tests/README.md`.
"""

import argparse
import contextlib
import json
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import hub_routes
from hub_repositories import Blob, HubError, Repository, Store
from hub_routes import Request, Response, Token

PIECE = 1 << 20


# Three tokens of two users; `lab` is an organization of the first.
TOKENS = {
    "hf_ownersWriteToken": Token("owner", "write"),
    "hf_ownersReadToken": Token("owner", "read"),
    "hf_othersWriteToken": Token("other", "write"),
}
ORGANIZATIONS = {"lab": ["owner"]}


@dataclass
class Fault:
    """What goes wrong, for requests of a method whose path (or file's name) matches a pattern.

    Attributes:
        status: answered instead of what was asked for.
        cut: bytes of the answer's body after which the connection is cut.
        drop: the connection is cut before any answer.
        delay: seconds before the answer.
        skip: how many matching requests pass first; times: how many are hit then.
    """

    method: str = "GET|HEAD|POST|PUT|DELETE"
    path: str = ".*"
    status: int | None = None
    message: str = "Service Unavailable"
    cut: int | None = None
    drop: bool = False
    delay: float = 0.0
    skip: int = 0
    times: int = 1

    def strikes(self, request):
        if self.times <= 0 or not re.fullmatch(self.method, request.method) or not re.search(self.path, request.path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Hub:
    """The server: its state, what it was asked, and what shall go wrong.

    Attributes:
        endpoint: where it listens.
        requests: all so far, in order.
        repositories: by kind (`models` or `datasets`) and id.
        page: entries of a listing per answer; part_bytes: of an upload in parts, which larger files need.
    """

    def __init__(self, port=0):
        self.store = Store()
        self.repositories = {}
        self.tokens, self.organizations = dict(TOKENS), dict(ORGANIZATIONS)
        self.requests, self.faults = [], []
        self.page, self.part_bytes = 1000, 8 << 20
        self.lock = threading.RLock()
        # Large files lie on another origin, as a content network does: clients treat such redirects differently.
        self._servers = [_server(self, port, storage=False), _server(self, 0, storage=True)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self.store.close()

    def environment(self, home=None, token="hf_ownersWriteToken"):
        """What a client's process needs to talk to this Hub; a token of None is that of nobody."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        if home is not None:
            variables["HF_HOME"] = str(home)
        return variables | {"HF_TOKEN": token} if token else variables

    def create(self, repo_id, kind="models", private=False):
        with self.lock:
            repository = Repository(kind, repo_id, self.store, private)
            return self.repositories.setdefault((kind, repo_id), repository)

    def add(self, source, repo_id, kind="models", private=False, gated=False, revision="main", leave_out=()):
        """Put a folder, or a mapping of paths to bytes, into a repository without HTTP; returns the commit's hash.

        Args:
            leave_out: names of files; the README.md that PEFT writes names a local base, which the Hub refuses.
        """
        repository = self.repositories.get((kind, repo_id)) or self.create(repo_id, kind, private)
        repository.gated = gated
        if not isinstance(source, dict):
            source = {
                file.relative_to(source).as_posix(): file for file in sorted(Path(source).rglob("*")) if file.is_file()
            }
        operations = []
        for path, content in source.items():
            if path in leave_out:
                continue
            size = content.stat().st_size if isinstance(content, Path) else len(content)
            if size and repository.is_large(revision, path, size, b""):
                blob = Blob(size, sha256=self.store.add(content))
            else:
                blob = Blob(size, content.read_bytes() if isinstance(content, Path) else content)
            operations.append(("add", path, blob))
        return repository.change(revision, operations, "Upload", "", repository.owner)[0].id

    def fail(self, **settings):
        """Let something go wrong: the settings of a `Fault`."""
        self.faults.append(Fault(**settings))

    def downloaded(self, whole=True):
        """Names of the files whose contents were sent; unless `whole`, also those of which only a range was."""
        return {
            request.file
            for request in self.requests
            if request.method == "GET" and request.file and request.sent and (not whole or request.status == 200)
        }

    def answer(self, request):
        """The answer to a request, by the routes."""
        request.token = self._token(request)
        for method, pattern, function in hub_routes.STORAGE if request.storage else hub_routes.HUB:
            if (found := pattern.fullmatch(request.path)) and request.method in (
                method,
                "HEAD" if method == "GET" else "",
            ):
                groups = {name: value and unquote(value) for name, value in found.groupdict().items()}
                return function(self, request, **groups)
        raise HubError(404, "Not Found")

    def _token(self, request):
        authorization = request.headers.get("authorization")
        if authorization is None:
            return None
        if request.storage:
            raise HubError(400, "Only one auth mechanism allowed")  # its addresses are signed
        token = self.tokens.get(authorization.removeprefix("Bearer "))
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return token


def _server(hub, port, storage):
    handler = type("BoundHandler", (_Handler,), {"hub": hub, "storage": storage})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes, which would wait 40 ms for one another
    hub: Hub
    storage: bool

    def handle_any(self):
        parts = urlsplit(self.path)
        request = Request(
            self.command,
            parts.path,
            parse_qs(parts.query, keep_blank_values=True),
            {name.lower(): value for name, value in self.headers.items()},
            b"",
            storage=self.storage,
        )
        control = parts.path.startswith("/_control/")
        with self.hub.lock:
            if not control:
                self.hub.requests.append(request)
            fault = None if control else self._fault(request)
        try:
            if fault is not None and fault.delay:
                time.sleep(fault.delay)
            if fault is not None and fault.drop:
                self.close_connection = True
                return
            request.body = self._body()
            try:
                if fault is not None and fault.status:
                    raise HubError(fault.status, fault.message)
                response = self.hub.answer(request)
            except HubError as error:
                response = _refusal(error)
            self._send(request, response)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def _fault(self, request, size=None):
        """What goes wrong before an answer, or while `size` bytes of one are sent."""
        for fault in self.hub.faults:
            if (fault.cut is None) == (size is None) and (size is None or size > fault.cut) and fault.strikes(request):
                return fault
        return None

    def _body(self):
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _send(self, request, response):
        content, status = response.content, response.status
        headers = {"X-Request-Id": f"Root=1-{len(self.hub.requests):08x}", **response.headers}
        if not isinstance(content, bytes | Path):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json; charset=utf-8"
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        start, stop = 0, size
        if status == 200 and "Accept-Ranges" in headers and (given := request.headers.get("range")):
            start, stop = _range(given, size)
            if start >= stop:
                status, content, stop, start = 416, b"", 0, 0
                headers["Content-Range"] = f"bytes */{size}"
            else:
                status = 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        request.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": headers.get("Content-Length", str(stop - start))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.hub.lock:
            fault = self._fault(request, stop - start)
        if fault is not None:
            stop = start + fault.cut
            self.close_connection = True
        if isinstance(content, bytes):
            self.wfile.write(content[start:stop])
            request.sent = stop - start
            return
        with content.open("rb") as stream:
            stream.seek(start)
            while piece := stream.read(min(PIECE, stop - start - request.sent)):
                self.wfile.write(piece)
                request.sent += len(piece)

    def log_message(self, *_):
        """Silence: `Hub.requests` is the log."""


def _refusal(error):
    headers = {"X-Error-Message": re.sub(r"\s+", " ", error.message)}
    if error.code:
        headers["X-Error-Code"] = error.code
    return Response({"error": error.message, **error.body.pop("content", {})}, error.status, {**headers, **error.body})


def _range(given, size):
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", given)
    if not found or not any(found.groups()):
        return 0, size
    if not found[1]:
        return max(size - int(found[2]), 0), size
    return int(found[1]), min(int(found[2]) + 1, size) if found[2] else size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="by default a free one")
    parser.add_argument("--home", type=Path, help="HF_HOME for the clients, by default their own")
    parser.add_argument("--add", nargs=2, action="append", default=[], metavar=("FOLDER", "REPO_ID"))
    options = parser.parse_args()
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)  # also where a script started this in the background
    with Hub(options.port) as hub:
        for folder, repo_id in options.add:
            hub.add(Path(folder), repo_id)
        exports = " ".join(f"{name}={value}" for name, value in hub.environment(options.home).items())
        with contextlib.suppress(KeyboardInterrupt):
            sys.stdout.write(f"export {exports}\n")
            sys.stdout.flush()
            threading.Event().wait()


if __name__ == "__main__":
    main()
