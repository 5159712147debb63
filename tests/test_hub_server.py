"""The Hub that the tests talk to, as huggingface_hub's own client sees it."""

import base64
import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LARGE = bytes(range(256)) * (48 << 10)  # 12 MiB: two parts of 8 MiB


@pytest.fixture
def repo(api):
    return api.create_repo("owner/model").repo_id


def add(path, content):
    return CommitOperationAdd(path, content if isinstance(content, bytes) else content.encode())


def test_files_come_back_as_they_were_sent(api, repo, connected, tmp_path):
    (tmp_path / "large").write_bytes(LARGE)
    files = {"model.safetensors": LARGE, "notes.txt": b"text\n", "sub/config.json": b"{}", "empty.txt": b""}
    commit = api.create_commit(repo, [add(*file) for file in files.items()], commit_message="files")
    folder = Path(snapshot_download(repo))
    assert folder.name == commit.oid == api.model_info(repo).sha
    assert {path: (folder / path).read_bytes() for path in files} == files
    stored = {file.path: file for file in api.list_repo_tree(repo, recursive=True) if hasattr(file, "size")}
    assert stored["model.safetensors"].lfs.size == len(LARGE)
    assert stored["notes.txt"].lfs is None
    uploads = [request for request in connected.requests if request.method == "PUT"]
    assert [len(request.body) for request in uploads] == [8 << 20, 4 << 20]


def test_what_is_stored_is_not_sent_again(api, repo, connected):
    operations = [("model.safetensors", b"weights"), ("notes.txt", "text")]
    first = api.create_commit(repo, [add(*file) for file in operations], commit_message="first")
    connected.requests.clear()
    again = api.create_commit(repo, [add(*file) for file in operations], commit_message="again")
    assert again.oid == first.oid
    assert not [r for r in connected.requests if r.method == "PUT" or "/commit/" in r.path]


def test_deleting_and_history(api, repo):
    api.create_commit(repo, [add("a/1.txt", "1"), add("a/2.txt", "2"), add("b.txt", "b")], commit_message="add")
    api.create_commit(repo, [CommitOperationDelete("a/"), CommitOperationDelete("b.txt")], commit_message="remove")
    assert api.list_repo_files(repo) == [".gitattributes"]
    assert [commit.title for commit in api.list_repo_commits(repo)] == ["remove", "add", "initial commit"]
    with pytest.raises(EntryNotFoundError):
        api.delete_file("b.txt", repo)


def test_a_commit_on_an_outdated_parent_is_refused(api, repo):
    parent = api.model_info(repo).sha
    api.create_commit(repo, [add("a.txt", "a")], commit_message="first", parent_commit=parent)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        api.create_commit(repo, [add("b.txt", "b")], commit_message="second", parent_commit=parent)
    assert refused.value.response.status_code == 412
    assert api.list_repo_files(repo) == [".gitattributes", "a.txt"]


def test_branches_and_tags(api, repo):
    first = api.model_info(repo).sha
    api.create_branch(repo, branch="dev/one")
    second = api.create_commit(repo, [add("a.txt", "a")], commit_message="a", revision="dev/one").oid
    api.create_tag(repo, tag="v1", revision=second)
    refs = api.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first, "dev/one": second}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": second}
    for revision in ("v1", "dev/one", second, second[:7]):
        assert Path(hf_hub_download(repo, "a.txt", revision=revision)).read_text() == "a"
    with pytest.raises(HfHubHTTPError, match="exists already"):
        api.create_tag(repo, tag="v1")
    api.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="v1")


def test_pull_requests(api, repo, connected):
    api.create_commit(repo, [add("a.txt", "a"), add("b.txt", "b")], commit_message="start")
    stranger = HfApi(endpoint=connected.endpoint, token="hf_othersWriteToken")
    with pytest.raises(HfHubHTTPError, match="pass `create_pr=1`"):
        stranger.create_commit(repo, [add("a.txt", "A")], commit_message="push")
    opened = stranger.create_commit(repo, [add("a.txt", "A")], commit_message="better a", create_pr=True)
    assert opened.pr_revision == "refs/pr/1"
    stranger.create_commit(repo, [add("c.txt", "c")], commit_message="more", revision="refs/pr/1")
    api.create_commit(repo, [add("b.txt", "B")], commit_message="meanwhile")
    assert Path(hf_hub_download(repo, "a.txt")).read_text() == "a"
    assert Path(hf_hub_download(repo, "a.txt", revision="refs/pr/1")).read_text() == "A"
    assert [ref.ref for ref in api.list_repo_refs(repo, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    api.comment_discussion(repo, 1, "thanks")
    with pytest.raises(HfHubHTTPError):
        stranger.merge_pull_request(repo, 1)
    api.merge_pull_request(repo, 1)
    details = api.get_discussion_details(repo, 1)
    assert (details.status, details.merge_commit_oid) == ("merged", api.model_info(repo).sha)
    merged = [Path(hf_hub_download(repo, name)).read_text() for name in ("a.txt", "b.txt", "c.txt")]
    assert merged == ["A", "B", "c"]
    with pytest.raises(BadRequestError, match="closed"):
        api.create_commit(repo, [add("d.txt", "d")], commit_message="late", revision="refs/pr/1")


def test_conflicting_pull_requests_are_not_merged(api, repo):
    api.create_commit(repo, [add("a.txt", "a")], commit_message="start")
    api.create_commit(repo, [add("a.txt", "mine")], commit_message="change", create_pr=True)
    api.create_commit(repo, [add("a.txt", "theirs")], commit_message="meanwhile")
    assert api.get_discussion_details(repo, 1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match="conflicts"):
        api.merge_pull_request(repo, 1)


def test_permissions(api, connected, monkeypatch):
    repo = api.create_repo("owner/model").repo_id
    assert api.whoami()["name"] == "owner"
    assert api.create_repo("lab/model", private=True).repo_id == "lab/model"
    with pytest.raises(HfHubHTTPError, match="rights to create a model"):
        api.create_repo("other/model")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("owner/model")
    assert api.create_repo("owner/model", exist_ok=True).repo_id == repo
    reader = HfApi(endpoint=connected.endpoint, token="hf_ownersReadToken")
    with pytest.raises(HfHubHTTPError, match="write token"):
        reader.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=repo)
    assert reader.model_info("lab/model").private
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("lab/model")
    with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
        api.create_repo("owner/second")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info(repo, token="hf_wrong")
    other = HfApi(endpoint=connected.endpoint, token="hf_othersWriteToken")
    with pytest.raises(RepositoryNotFoundError):
        other.model_info("lab/model")
    with pytest.raises(HfHubHTTPError):
        other.delete_repo(repo)
    HfApi(endpoint=connected.endpoint, token="hf_ownersWriteToken").delete_repo(repo)
    with pytest.raises(RepositoryNotFoundError):
        other.model_info(repo)


def test_gated_repositories(api, repo, connected, monkeypatch):
    api.create_commit(repo, [add("config.json", "{}")], commit_message="config")
    api.update_repo_settings(repo, gated="auto")
    for token in ("hf_othersWriteToken", False):
        assert api.model_info(repo, token=token).gated == "auto"
        with pytest.raises(GatedRepoError, match="restricted"):
            hf_hub_download(repo, "config.json", token=token)
    api.grant_access(repo, "other")
    monkeypatch.setenv("HF_TOKEN", "hf_othersWriteToken")
    assert Path(hf_hub_download(repo, "config.json")).read_text() == "{}"


@pytest.mark.parametrize("name", ["a--b", "..", "-a", "name.git", "a" * 97])
def test_invalid_names_are_refused(connected, name):
    answer = httpx2.post(
        f"{connected.endpoint}/api/repos/create",
        json={"name": name},
        headers={"Authorization": "Bearer hf_ownersWriteToken"},
    )
    assert answer.status_code == 400


def test_commits_that_break_the_rules(api, repo, connected):
    def file(path, content):
        return {"key": "file", "value": {"path": path, "content": base64.b64encode(content).decode()}}

    head = api.model_info(repo).sha
    header = {"key": "header", "value": {"summary": "raw"}}
    pointer = {"path": "model.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 1}
    for line, reason in [
        ({"key": "lfsFile", "value": pointer}, "does not exist"),
        (file("model.safetensors", b"x"), "LFS"),
        (file("big.txt", b"a" * (10 << 20) + b"b"), "larger than 10 MiB"),
        (file("../a.txt", b"x"), "invalid"),
        (file("README.md", b"---\nlicense: mine\n---\n"), "license"),
        ({"key": "renamed", "value": {}}, "Invalid line"),
    ]:
        answer = httpx2.post(
            f"{connected.endpoint}/api/models/{repo}/commit/main",
            content="\n".join([json.dumps(header), json.dumps(line)]),
            headers={"Authorization": "Bearer hf_ownersWriteToken"},
        )
        assert answer.status_code == 400
        assert reason in answer.json()["error"]
    assert api.model_info(repo).sha == head


def test_bytes_that_do_not_match_their_hash_are_refused(connected):
    answer = httpx2.put(f"{connected.storage}/upload/{'0' * 64}?size=1", content=b"x")
    assert answer.status_code == 400
    assert httpx2.get(f"{connected.storage}/models/a/b/resolve/c/d?object={'0' * 64}").status_code == 403


CARD = "---\n{}\n---\n# A model\n"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("license: mine", "license"),
        ("datasets: [./data/smiles.txt]", "datasets"),
        ("base_model: /home/me/base", "base_model"),
        ("widget: {text: hi}", "widget"),
        ("tags: merge", "tags"),
        ("base_model_relation: child", "base_model_relation"),
        ("model-index: [{name: m, results: [{task: {type: t}, metrics: []}]}]", "dataset.type"),
        ("a: [", "YAML"),
    ],
)
def test_cards_with_wrong_metadata_are_refused(api, repo, metadata, reason):
    with pytest.raises(ValueError, match=reason):
        api.create_commit(repo, [add("README.md", CARD.format(metadata))], commit_message="card")
    assert api.list_repo_files(repo) == [".gitattributes"]


def test_a_card_is_read_back(api, repo):
    card = ModelCard(CARD.format("license: apache-2.0\nbase_model: [owner/a, lab/b]\ntags: [merge]"))
    card.validate()
    card.push_to_hub(repo)
    with pytest.raises(Exception, match="license"):
        ModelCard(CARD.format("license: mine")).validate()
    assert ModelCard.load(repo).data.base_model == ["owner/a", "lab/b"]
    assert api.model_info(repo).card_data.license == "apache-2.0"
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        api.create_commit(repo, [add("README.md", "# no metadata")], commit_message="card")


def test_ranges_and_listings_in_pages(api, repo, connected):
    files = [add(f"{i}/{i}.txt", f"{i}") for i in range(5)]
    api.create_commit(repo, [*files, add("model.safetensors", b"0123456789")], commit_message="files")
    connected.page = 3
    assert len(api.list_repo_files(repo)) == 7
    assert len(list(api.list_repo_tree(repo, recursive=True))) == 12
    assert [entry.path for entry in api.list_repo_tree(repo, "3")] == ["3/3.txt"]
    assert [info.path for info in api.get_paths_info(repo, ["1/1.txt", "2", "missing"])] == ["1/1.txt", "2"]
    address = f"{connected.endpoint}/{repo}/resolve/main/model.safetensors"
    for wanted, status, content in [("2-4", 206, b"234"), ("-3", 206, b"789"), ("8-", 206, b"89"), ("10-", 416, b"")]:
        answer = httpx2.get(address, headers={"Range": f"bytes={wanted}"}, follow_redirects=True)
        assert (answer.status_code, answer.content) == (status, content)


def test_faults(api, repo, connected):
    connected.fail(method="PUT", status=503, skip=1)
    api.create_commit(repo, [add("model.safetensors", LARGE)], commit_message="with a failure in its middle")
    assert [r.status for r in connected.requests if r.method == "PUT"] == [200, 503, 200]
    connected.fail(method="GET", path="model.safetensors", cut=11 << 20)
    assert Path(hf_hub_download(repo, "model.safetensors")).read_bytes() == LARGE
    downloads = [r for r in connected.requests if r.method == "GET" and r.storage]
    assert [(r.status, r.sent) for r in downloads] == [(200, 11 << 20), (206, 2 << 20)]
    connected.fail(path="/revision/|/owner/model$", drop=True, times=9)
    with pytest.raises(Exception, match="disconnected"):
        api.model_info(repo)


def test_dataset_with_datasets(api, connected, tmp_path):
    import datasets

    commit = connected.add({"train.jsonl": b'{"text": "a"}\n{"text": "b"}\n'}, "owner/data", kind="datasets")
    path = hf_hub_download("owner/data", "train.jsonl", repo_type="dataset", revision=commit)
    assert Path(path).read_bytes().count(b"\n") == 2
    loaded = datasets.load_dataset("json", data_files=path, cache_dir=tmp_path)["train"]
    assert loaded["text"] == ["a", "b"]


@pytest.fixture
def by_hand():
    """The server as a program, and the environment that it prints."""
    program = Path(__file__).parent / "hub_server.py"
    server = subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    export, *variables = server.stdout.readline().split()
    assert export == "export"
    yield server, dict(variable.split("=", 1) for variable in variables)
    server.kill()
    server.communicate()


def test_by_hand(by_hand):
    server, environment = by_hand
    endpoint, headers = environment["HF_ENDPOINT"], {"Authorization": f"Bearer {environment['HF_TOKEN']}"}
    assert httpx2.get(f"{endpoint}/api/whoami-v2", headers=headers).json()["name"] == "owner"
    httpx2.post(f"{endpoint}/_control/faults", json={"path": "/api/models", "status": 500})
    assert [httpx2.get(f"{endpoint}/api/models").status_code for _ in range(2)] == [500, 200]
    asked = httpx2.get(f"{endpoint}/_control/requests").json()
    assert [(request["path"], request["user"]) for request in asked] == [
        ("/api/whoami-v2", "owner"),
        *[("/api/models", None)] * 2,
    ]
    server.send_signal(signal.SIGINT)
    assert server.wait(10) == 0
