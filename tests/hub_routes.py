"""What the test Hub is asked and what it answers: one function per address."""

import base64
import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import parse_qs, quote, unquote, urlencode

from hub_repositories import Blob, HubError
from hub_rules import NO_METADATA, card_errors, is_repo_name, read_metadata


@dataclass(frozen=True)
class Token:
    user: str
    role: str  # read or write


@dataclass
class Request:
    """What a client asked, and later what it got."""

    method: str
    path: str  # quoted, without the query
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    token: Token | None = None
    storage: bool = False  # asked of the storage of large files, not of the Hub itself
    status: int = 0
    sent: int = 0  # bytes of the answer's body

    @property
    def user(self):
        return self.token and self.token.user

    @property
    def file(self):
        """The path in the repository of a file that this downloads or asks the headers of."""
        found = re.search(r"/resolve/[^/]+/(.+)", self.path)
        return unquote(found[1]) if found else None

    def json(self):
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, "Invalid JSON") from error


@dataclass
class Response:
    """An answer: JSON-like content, bytes, or a file in the store."""

    content: object = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


HUB, STORAGE = [], []
_PARTS = {
    "{repo}": r"(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)",
    "{page}": r"(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)",
    "{rev}": r"(?P<revision>[^/]+)",
    "{num}": r"(?P<num>\d+)",
}


def route(method, pattern, routes=HUB):
    """Register a function of the hub, the request and the parts of the address, unquoted."""

    def register(function):
        expression = pattern
        for name, part in _PARTS.items():
            expression = expression.replace(name, part)
        routes.append((method, re.compile(expression), function))
        return function

    return register


# Who may do what


def signed_in(request):
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    return request.user


def members(hub, namespace):
    """The users who may write in a namespace."""
    return hub.organizations.get(namespace, [namespace])


def find(hub, request, kind, repo_id):
    """A repository that the user may know of: others' private ones look like missing ones."""
    repository = hub.repositories.get((kind or "models", repo_id))
    if repository is None or (repository.private and request.user not in members(hub, repository.owner)):
        if request.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    return repository


def readable(hub, request, kind, repo_id):
    """A repository whose files the user may have."""
    repository = find(hub, request, kind, repo_id)
    if repository.gated and request.user not in {*members(hub, repository.owner), *repository.granted}:
        restricted = f"Access to {repository.kind.rstrip('s')} {repo_id} is restricted"
        if request.user is None:
            raise HubError(401, f"{restricted}. You must have access to it and be authenticated.", "GatedRepo")
        address = f"{hub.endpoint}/{_prefix(repository)}{repo_id}"
        message = f"{restricted} and you are not in the authorized list. Visit {address} to ask for access."
        raise HubError(403, message, "GatedRepo")
    return repository


def writable(hub, request, kind, repo_id, create_pr=False):
    """A repository that the user may change, or propose changes to."""
    repository = find(hub, request, kind, repo_id)
    signed_in(request)
    if request.token.role != "write":
        raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
    if not create_pr and request.user not in members(hub, repository.owner):
        raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
    return repository


def proposes(request, revision):
    """Whether a change goes to a pull request, which everybody may open."""
    return request.query.get("create_pr") in (["1"], ["true"]) or bool(revision and revision.startswith("refs/pr/"))


def _prefix(repository):
    return "datasets/" if repository.kind == "datasets" else ""


# Users and repositories


@route("GET", "/api/whoami-v2")
def whoami(hub, request):
    name = signed_in(request)
    orgs = [
        {"type": "org", "name": org, "roleInOrg": "admin"} for org, users in hub.organizations.items() if name in users
    ]
    access = {"displayName": "test", "role": request.token.role}
    return Response(
        {
            "type": "user",
            "id": name,
            "name": name,
            "fullname": name,
            "isPro": False,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": access},
        }
    )


@route("POST", "/api/repos/create")
def create(hub, request):
    wanted = request.json()
    kind = f"{wanted.get('type') or 'model'}s"
    if kind not in ("models", "datasets"):
        raise HubError(501, f"This Hub has no {kind}.")
    namespace, name = wanted.get("organization") or signed_in(request), wanted.get("name")
    if not isinstance(name, str) or not is_repo_name(name) or len(f"{namespace}/{name}") > 96:
        raise HubError(400, f"Invalid repo name: {name} - repo name must be alphanumeric, with - _ . inside")
    _own(request, hub, namespace, kind)
    repo_id = f"{namespace}/{name}"
    url = f"{hub.endpoint}/{'datasets/' if kind == 'datasets' else ''}{repo_id}"
    if (kind, repo_id) in hub.repositories:
        raise HubError(409, f"You already created this {kind[:-1]} repo", content={"url": url})
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    hub.create(repo_id, kind, private)
    return Response({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def delete(hub, request):
    wanted = request.json()
    kind = f"{wanted.get('type') or 'model'}s"
    namespace = wanted.get("organization") or signed_in(request)
    repository = find(hub, request, kind, f"{namespace}/{wanted.get('name')}")
    _own(request, hub, namespace, kind)
    del hub.repositories[kind, repository.id]
    return Response(b"OK")


def _own(request, hub, namespace, kind):
    if signed_in(request) not in members(hub, namespace) or request.token.role != "write":
        raise HubError(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{namespace}"')


@route("PUT", "/api/{repo}/settings")
def settings(hub, request, kind, repo_id):
    repository, wanted = writable(hub, request, kind, repo_id), request.json()
    if wanted.get("gated", False) not in (False, "auto", "manual") or wanted.get("visibility", "public") not in (
        *("public", "private"),
    ):
        raise HubError(400, "Invalid settings")
    repository.gated = wanted.get("gated", repository.gated)
    if "visibility" in wanted:
        repository.private = wanted["visibility"] == "private"
    return Response({"private": repository.private, "gated": repository.gated})


@route("POST", "/api/{repo}/user-access-request/grant")
def grant(hub, request, kind, repo_id):
    writable(hub, request, kind, repo_id).granted.add(request.json().get("user"))
    return Response({})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request):
    card = request.json().get("content", "")
    if errors := card_errors(card):
        content = {"errors": [{"message": error} for error in errors], "warnings": []}
        return Response(content, 400)
    warnings = [] if read_metadata(card) else [{"message": NO_METADATA}]
    return Response({"errors": [], "warnings": warnings})


# What is in a repository


@route("GET", "/api/(?P<kind>models|datasets)")
def listing(hub, request, kind):
    author, search = (request.query.get(name, [""])[0] for name in ("author", "search"))
    found = [
        repository
        for (kind_, repo_id), repository in sorted(hub.repositories.items())
        if kind_ == kind
        and author in ("", repository.owner)
        and search.lower() in repo_id.lower()
        and (not repository.private or request.user in members(hub, repository.owner))
    ]
    return _paged(hub, request, [_info(repository, repository.commit("main"), blobs=False) for repository in found])


@route("GET", "/api/{repo}(?:/revision/{rev})?")
def info(hub, request, kind, repo_id, revision):
    repository = find(hub, request, kind, repo_id)
    return Response(_info(repository, repository.commit(revision or "main"), "blobs" in request.query))


def _info(repository, commit, blobs):
    card = commit.files.get("README.md")
    metadata = read_metadata(card.content.decode()) if card else {}
    tags = metadata.get("tags") or []
    siblings = []
    for path, blob in sorted(commit.files.items()):
        details = {key: value for key, value in _entry(path, blob).items() if key in ("size", "lfs")}
        if "lfs" in details:
            details["lfs"] = {**details["lfs"], "sha256": blob.sha256}
        siblings.append({"rfilename": path, **({**details, "blobId": blob.oid} if blobs else {})})
    return {
        "id": repository.id,
        "author": repository.owner,
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": repository.created,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "siblings": siblings,
        **({"cardData": json.loads(json.dumps(metadata, default=str))} if metadata else {}),
        **{key: metadata[key] for key in ("pipeline_tag", "library_name") if key in metadata},
    }


def _entry(path, blob):
    entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    return entry


def _entries(commit, folder, recursive):
    """Files and folders below a folder ("" is the root)."""
    folders = set()
    for path, blob in sorted(commit.files.items()):
        if folder and not path.startswith(f"{folder}/"):
            continue
        for parent in reversed(PurePosixPath(path).relative_to(folder or ".").parents):
            name = (PurePosixPath(folder) / parent).as_posix()
            if parent.name and name not in folders and (recursive or len(parent.parts) == 1):
                folders.add(name)
                yield {"type": "directory", "oid": commit.id, "size": 0, "path": name}
        if recursive or "/" not in path[len(folder) :].lstrip("/"):
            yield _entry(path, blob)


@route("GET", "/api/{repo}/tree/{rev}(?:/(?P<path>.+))?")
def tree(hub, request, kind, repo_id, revision, path):
    commit = find(hub, request, kind, repo_id).commit(revision)
    entries = list(_entries(commit, path or "", request.query.get("recursive") in (["true"], ["True"], ["1"])))
    if path and not entries:
        raise HubError(404, f'{path} does not exist on "{revision}"', "EntryNotFound", **{"X-Repo-Commit": commit.id})
    if request.query.get("expand") in (["true"], ["True"], ["1"]):
        last = {"id": commit.id, "title": commit.title, "date": commit.date}
        entries = [{**entry, "lastCommit": last} for entry in entries]
    return _paged(hub, request, entries)


def _paged(hub, request, entries):
    start = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if start + hub.page < len(entries):
        query = urlencode({**request.query, "cursor": [start + hub.page]}, doseq=True)
        headers["Link"] = f'<{hub.endpoint}{request.path}?{query}>; rel="next"'
    return Response(entries[start : start + hub.page], headers=headers)


@route("POST", "/api/{repo}/paths-info/{rev}")
def paths_info(hub, request, kind, repo_id, revision):
    commit = find(hub, request, kind, repo_id).commit(revision)
    paths = _form(request).get("paths", [])
    folders = {entry["path"]: entry for entry in _entries(commit, "", True) if entry["type"] == "directory"}
    known = {**folders, **{path: _entry(path, blob) for path, blob in commit.files.items()}}
    if len(paths) > 1000:
        raise HubError(413, "too many parameters")
    return Response([known[path] for path in paths if path in known])


def _form(request):
    if "json" in request.headers.get("content-type", ""):
        return request.json()
    return parse_qs(request.body.decode())


@route("GET", "/api/{repo}/refs")
def refs(hub, request, kind, repo_id):
    repository = find(hub, request, kind, repo_id)
    found = {"refs/heads/": [], "refs/tags/": [], "refs/pr/": []}
    for ref, commit in sorted(repository.refs.items()):
        start = next(start for start in found if ref.startswith(start))
        found[start].append({"name": ref.removeprefix(start), "ref": ref, "targetCommit": commit})
    content = {"branches": found["refs/heads/"], "tags": found["refs/tags/"], "converts": []}
    return Response(content | ({"pullRequests": found["refs/pr/"]} if "include_prs" in request.query else {}))


@route("GET", "/api/{repo}/commits/{rev}")
def commits(hub, request, kind, repo_id, revision):
    history = find(hub, request, kind, repo_id).history(revision)
    return _paged(
        hub,
        request,
        [
            {
                "id": commit.id,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in history
        ],
    )


@route("GET", "/{page}/resolve/{rev}/(?P<path>.+)")
def resolve(hub, request, kind, repo_id, revision, path):
    repository = readable(hub, request, kind, repo_id)
    commit = repository.commit(revision)
    headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
    blob = commit.files.get(path)
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", **headers)
    if blob.sha256 is None:
        return Response(
            blob.content, headers={**headers, "ETag": f'"{blob.oid}"', "Content-Type": "text/plain; charset=utf-8"}
        )
    name = quote(PurePosixPath(path).name)
    address = f"{hub.storage}/{repository.kind}/{repo_id}/resolve/{commit.id}/{quote(path)}"
    location = f"{address}?object={blob.sha256}&filename={name}"
    linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "Location": location}
    return Response(b"", 302, {**headers, **linked, "ETag": f'"{blob.oid}"'})


@route("GET", "/(?:models|datasets)/.+/resolve/.+", STORAGE)
def stored(hub, request):
    oid = request.query["object"][0]
    if not hub.store.has(oid):
        raise HubError(403, "AccessDenied")
    return Response(hub.store.path(oid), headers={"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


# Changes


@route("POST", "/api/{repo}/preupload/{rev}")
def preupload(hub, request, kind, repo_id, revision):
    repository = writable(hub, request, kind, repo_id, proposes(request, revision))
    commit, answers = repository.commit(revision), []
    wanted = request.json()
    ignored = [line.strip() for line in wanted.get("gitIgnore", "").splitlines() if line.strip()]
    for file in wanted["files"]:
        path, size, sample = file["path"], file["size"], base64.b64decode(file.get("sample", ""))
        large = repository.is_large(revision, path, size, sample)
        answer = {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": any(PurePosixPath(path).match(pattern) for pattern in ignored),
        }
        if path in commit.files:
            answer["oid"] = commit.files[path].etag
        answers.append(answer)
    return Response({"files": answers, "commitOid": commit.id})


@route("POST", r"/{page}\.git/info/lfs/objects/batch")
def lfs_batch(hub, request, kind, repo_id):
    wanted = request.json()
    revision = wanted.get("ref", {}).get("name")
    # Whether the upload ends in a pull request is known only when it is committed.
    repository = writable(hub, request, kind, repo_id, create_pr=True)
    if wanted.get("operation") != "upload" or wanted.get("hash_algo", "sha256") != "sha256":
        raise HubError(400, "Only uploads of objects named by their sha256 are possible.")
    if revision is not None:
        repository.commit(revision)
    objects = []
    for object_ in wanted["objects"]:
        oid, size = object_["oid"], object_["size"]
        answer = {"oid": oid, "size": size}
        if not re.fullmatch("[0-9a-f]{64}", oid) or not isinstance(size, int) or size < 0:
            answer["error"] = {"code": 422, "message": "Invalid oid or size"}
        elif not hub.store.has(oid):
            upload = {"href": f"{hub.storage}/upload/{oid}?size={size}", "header": {}}
            if size > hub.part_bytes and "multipart" in wanted.get("transfers", []):
                number = hub.store.start(oid, size)
                upload["href"] = f"{hub.endpoint}/api/complete_multipart?upload={number}"
                upload["header"] = {
                    "chunk_size": str(hub.part_bytes),
                    **{
                        f"{part:05d}": f"{hub.storage}/upload/{oid}/{number}/{part}"
                        for part in range(1, -(-size // hub.part_bytes) + 1)
                    },
                }
            verify = {"href": f"{hub.endpoint}{request.path.removesuffix('batch')}verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return Response({"transfer": "multipart", "objects": objects})


@route("PUT", "/upload/(?P<oid>[0-9a-f]{64})", STORAGE)
def upload(hub, request, oid):
    hub.store.put(oid, int(request.query["size"][0]), request.body)
    return Response(b"", headers={"ETag": f'"{oid[:32]}"'})


@route("PUT", r"/upload/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)/(?P<part>\d+)", STORAGE)
def upload_part(hub, request, oid, number, part):
    etag = hub.store.put_part(int(number), int(part), request.body)
    return Response(b"", headers={"ETag": f'"{etag}"'})


@route("POST", "/api/complete_multipart")
def complete_multipart(hub, request):
    wanted = request.json()
    hub.store.complete(int(request.query["upload"][0]), wanted["oid"], wanted["parts"])
    return Response({"success": True})


@route("POST", r"/{page}\.git/info/lfs/objects/verify")
def lfs_verify(hub, request, kind, repo_id):
    writable(hub, request, kind, repo_id, create_pr=True)
    wanted = request.json()
    if not hub.store.has(wanted["oid"]) or hub.store.path(wanted["oid"]).stat().st_size != wanted["size"]:
        raise HubError(404, "Object does not exist or has another size")
    return Response({})


@route("POST", "/api/{repo}/commit/{rev}")
def commit(hub, request, kind, repo_id, revision):
    repository = writable(hub, request, kind, repo_id, proposes(request, revision))
    header, operations = None, []
    for line in request.body.splitlines():
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                content = base64.b64decode(value["content"], validate=True)
                operations.append(("add", value["path"], Blob(len(content), content)))
            elif key == "lfsFile":
                blob = Blob(value["size"], sha256=value["oid"])
                operations.append(("add", value["path"], blob))
            elif key in ("deletedFile", "deletedFolder"):
                operations.append(("delete" if key == "deletedFile" else "delete folder", value["path"]))
            else:
                raise ValueError(key)
        except (ValueError, KeyError, TypeError) as error:
            raise HubError(400, f"Invalid line in the commit: {error}") from error
    if not header or not header.get("summary"):
        raise HubError(400, "The commit has no header with a summary")
    made, pull_request = repository.change(
        revision,
        operations,
        header["summary"],
        header.get("description", ""),
        request.user,
        parent=header.get("parentCommit"),
        create_pr="create_pr" in request.query,
    )
    address = f"{hub.endpoint}/{_prefix(repository)}{repo_id}"
    return Response(
        {
            "success": True,
            "commitOid": made.id,
            "commitUrl": f"{address}/commit/{made.id}",
            "hookOutput": "",
            **({"pullRequestUrl": f"{address}/discussions/{pull_request.num}"} if pull_request else {}),
        }
    )


@route("POST", "/api/{repo}/tag/{rev}")
def create_tag(hub, request, kind, repo_id, revision):
    repository, name = writable(hub, request, kind, repo_id), request.json().get("tag", "")
    if not re.fullmatch(r"[\w.][\w./-]*", name):
        raise HubError(400, f"Invalid tag name: {name}")
    target = repository.commit(revision).id
    if f"refs/tags/{name}" in repository.refs:
        raise HubError(409, f"Tag reference exists already: {name}")
    repository.refs[f"refs/tags/{name}"] = target
    return Response({})


@route("POST", "/api/{repo}/branch/{rev}")
def create_branch(hub, request, kind, repo_id, revision):
    repository = writable(hub, request, kind, repo_id)
    target = repository.commit(request.json().get("startingPoint") or "main").id
    if f"refs/heads/{revision}" in repository.refs:
        raise HubError(409, f"Reference already exists: {revision}")
    repository.refs[f"refs/heads/{revision}"] = target
    return Response({})


@route("DELETE", "/api/{repo}/tag/{rev}")
def delete_tag(hub, request, kind, repo_id, revision):
    if writable(hub, request, kind, repo_id).refs.pop(f"refs/tags/{revision}", None) is None:
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return Response({})


# Discussions and pull requests


def _discussion(repository, discussion):
    return {
        "num": discussion.num,
        "title": discussion.title,
        "status": discussion.status,
        "isPullRequest": discussion.pull_request,
        "createdAt": discussion.created,
        "author": {"name": discussion.author},
        "repo": {"name": repository.id, "type": repository.kind[:-1]},
    }


@route("GET", "/api/{repo}/discussions")
def discussions(hub, request, kind, repo_id):
    repository = find(hub, request, kind, repo_id)
    found = [_discussion(repository, discussion) for discussion in reversed(repository.discussions.values())]
    start = int(request.query.get("p", ["0"])[0]) * hub.page
    return Response({"discussions": found[start : start + hub.page], "count": len(found), "start": start})


@route("POST", "/api/{repo}/discussions")
def open_discussion(hub, request, kind, repo_id):
    repository, wanted = writable(hub, request, kind, repo_id, create_pr=True), request.json()
    if len(wanted.get("title", "")) < 3:
        raise HubError(400, "Title must be at least 3 characters long")
    base = repository.commit("main").id if wanted.get("pullRequest") else None
    discussion = repository.discuss(wanted["title"], request.user, wanted.get("description", ""), base)
    if base:
        discussion.status = "draft"
    return Response({"num": discussion.num, "pullRequest": bool(base)})


@route("GET", "/api/{repo}/discussions/{num}")
def discussion(hub, request, kind, repo_id, num):
    repository = find(hub, request, kind, repo_id)
    found = repository.discussion(int(num))
    content = {**_discussion(repository, found), "events": found.events}
    if found.pull_request:
        changes = {"base": "refs/heads/main"} | ({"mergeCommitId": found.merged} if found.merged else {})
        content |= {"changes": changes, "filesWithConflicts": repository.conflicts(found)}
    return Response(content)


@route("POST", "/api/{repo}/discussions/{num}/comment")
def comment(hub, request, kind, repo_id, num):
    repository = writable(hub, request, kind, repo_id, create_pr=True)
    event = repository.comment(repository.discussion(int(num)), request.user, request.json()["comment"])
    return Response({"newMessage": event})


@route("POST", "/api/{repo}/discussions/{num}/status")
def set_status(hub, request, kind, repo_id, num):
    repository, status = writable(hub, request, kind, repo_id), request.json()["status"]
    if status not in ("open", "closed"):
        raise HubError(400, "The status must be open or closed")
    return Response({"newStatus": repository.set_status(repository.discussion(int(num)), status, request.user)})


@route("POST", "/api/{repo}/discussions/{num}/merge")
def merge(hub, request, kind, repo_id, num):
    repository = writable(hub, request, kind, repo_id)
    repository.merge(repository.discussion(int(num)), request.user)
    return Response({})


# For people, and for control of the server from other processes


@route("POST", "/_control/faults")
def add_fault(hub, request):
    """Settings of a `Fault` in JSON; [] takes all back."""
    wanted = request.json()
    if wanted:
        hub.fail(**wanted)
    else:
        hub.faults.clear()
    return Response({})


@route("GET", "/_control/requests")
def requests(hub, request):
    hidden = ("headers", "body", "token")
    return Response(
        [
            {name: value for name, value in dataclasses.asdict(asked).items() if name not in hidden}
            | {"user": asked.user}
            for asked in hub.requests
        ]
    )


@route("GET", r"/{page}(?:/tree/{rev}|/discussions/{num})?")
def page(hub, request, kind, repo_id, revision, num):
    """What a browser shows: the card and the files."""
    repository = find(hub, request, kind, repo_id)
    commit = repository.commit(revision or (f"refs/pr/{num}" if num else "main"))
    card = commit.files.get("README.md")
    files = "\n".join(f"{blob.size:>12}  {path}" for path, blob in sorted(commit.files.items()))
    text = f"{repo_id} at {commit.id}\n\n{files}\n\n{card.content.decode() if card else ''}"
    return Response(text.encode(), headers={"Content-Type": "text/plain; charset=utf-8"})
