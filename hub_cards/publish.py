"""`esmerge publish` on one page: a merged model's folder in, one commit on the Hub out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    RepoFile,
    constants,
    get_token,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from esmerge.errors import InputError, first_line
from esmerge.hub import LIBRARY
from hub_cards.card import CARD_FILE, Card, Choices, lost_edits, make_card, write_card
from hub_cards.contents import Upload, collect, stale_files
from hub_cards.hub_errors import LOG_IN, hub_errors
from hub_cards.merged_model import open_merged_model
from hub_cards.parents import Parent, why_unknown
from hub_cards.plan import Destination, Plan, Repository
from hub_cards.usage import loading_code


@dataclass(frozen=True)
class Published:
    """What became of it.

    Attributes:
        address: of the repository or pull request.
        code: the lines that load the model.
        commit: the new one, or the one that holds everything already; None after a dry run.
        sent: whether there was anything to send.
    """

    address: str
    code: str
    commit: str | None
    sent: bool


def publish(
    folder: Path,
    destination: Destination,
    choices: Choices,
    confirm: Callable[[Plan], bool],
    template: Path | None = None,
) -> Published | None:
    """Write the card of a merged model and put all of it into a repository, in one commit or not at all.

    Args:
        folder: of the model; its card is written there too, once `confirm` agrees.
        confirm: is shown what will be sent, and decides.

    Returns:
        None if `confirm` refused.

    Raises:
        InputError: if the model, the card or the destination is not fit for it, or the Hub refuses. Nothing of the
            model is published then, unless all of it is and only the answer or the tag is missing.
    """
    _check_destination(destination)
    model = open_merged_model(folder)
    if (token := get_token()) is None:
        raise InputError(f"nobody is logged in to the Hub: {LOG_IN}.")
    card = make_card(model, replace(choices, repo_id=destination.repo_id), template)
    uploads, left_out = collect(model, card, token)
    default = f"Publish {destination.repo_id.rpartition('/')[2]}, merged by esmerge"
    destination = replace(destination, message=destination.message or default)
    api = HfApi(**LIBRARY)
    with hub_errors(destination.repo_id):
        user = _writer(api, destination)
        _check_card(card)
        base_is_private = model.is_adapter and _check_base(api, card.base)
        _check_licence(card)
        repository = _look(api, destination, user)
        plan = _compare(destination, repository, uploads)
        notes = list(card.notes)
        if base_is_private and not repository.private:
            notes.append(f"the base {card.base.repo_id} is private, so nobody else can load this adapter of it.")
        plan = replace(plan, left_out=left_out, notes=notes)
        _check_tag(plan)
        _check_edits(api, plan, card)
        if not plan.is_empty or (destination.tag and destination.tag not in repository.tags):
            if not confirm(plan):
                return None
            write_card(folder, card)
        commit, revision = (repository.commit, repository.revision) if plan.is_empty else _send(api, plan)
        if destination.tag and destination.tag not in repository.tags:
            api.create_tag(destination.repo_id, tag=destination.tag, revision=commit)
    code = loading_code(model, destination.repo_id, destination.tag or revision)
    return Published(_address(api, destination, revision), code, commit, sent=not plan.is_empty)


def _check_destination(destination: Destination) -> None:
    """Raise `InputError` for what is wrong in itself."""
    repo_id = destination.repo_id
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id} is no name that the Hub accepts: {first_line(error)}.") from error
    if repo_id.count("/") != 1:
        raise InputError(f"{repo_id} does not say whose repository it is: write user/{repo_id}.")
    if destination.pull_request and destination.tag:
        raise InputError("a pull request cannot be tagged: leave out --tag, and tag the commit when it is merged.")
    if destination.pull_request and destination.revision not in (None, constants.DEFAULT_REVISION):
        raise InputError(f"a pull request is against {constants.DEFAULT_REVISION}: leave out --pr or --revision.")
    if destination.message is not None and not destination.message.strip():
        raise InputError("--message is empty: say what this commit brings, or leave it out.")


def _check_card(card: Card) -> None:
    """Let the Hub validate the card before anything is sent."""
    try:
        ModelCard(card.text).validate()
    except ValueError as error:
        raise InputError(f"the Hub does not accept the metadata of {CARD_FILE}: {_objections(str(error))}.") from error


def _check_base(api: HfApi, base: Parent) -> bool:
    """Whether an adapter's base is private; `InputError` if it is not on the Hub: nobody could load the adapter."""
    assert base.repo_id is not None
    try:
        return bool(api.model_info(base.repo_id, revision=base.commit).private)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at {base.commit}" if isinstance(error, RevisionNotFoundError) else ""
        raise InputError(
            f"the adapter's base {base.repo_id} is not on the Hub{at}: say what it is called there with --base-model "
            "user/base (or user/base@revision)."
        ) from error


def _check_licence(card: Card) -> None:
    """Raise `InputError` if the card states no licence: the specialists' alone would not be that of the whole."""
    if not card.has_licence:
        raise InputError(
            f"{why_unknown(card.base)}: find out what it allows, and say which licence this model has with --license."
        )


def _objections(answer: str) -> str:
    try:
        return "; ".join(str(error["message"]) for error in json.loads(answer)["errors"])
    except (ValueError, LookupError, TypeError):
        return " ".join(answer.split())


def _writer(api: HfApi, destination: Destination) -> str:
    """The name of the user that the token belongs to, who has to be one that can write there."""
    found = api.whoami()
    name, namespace = str(found["name"]), destination.repo_id.partition("/")[0]
    access = found.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise InputError(f"the token of {name} can only read: {LOG_IN}.")
    names = [name, *(str(organization["name"]) for organization in found.get("orgs", []))]
    proposes = destination.pull_request or (destination.revision or "").startswith("refs/pr/")
    if namespace.lower() not in [own.lower() for own in names] and not proposes:
        raise InputError(
            f"{destination.repo_id} belongs to {namespace}, and you are {' or '.join(names)}: publish as "
            f"{name}/{destination.repo_id.partition('/')[2]}, or propose it to them with --pr."
        )
    return name


def _look(api: HfApi, destination: Destination, user: str) -> Repository:
    """The repository as it is now, at the branch or pull request that the files are for."""
    repo_id = destination.repo_id
    try:
        info = api.repo_info(repo_id)
    except RepositoryNotFoundError:
        if destination.pull_request:
            raise
        return Repository(False, destination.private, destination.revision is None, None, _named(destination.revision))
    if destination.private and not info.private:
        raise InputError(
            f"{repo_id} exists and is public: leave out --private, or make it private first "
            f"({api.endpoint}/{repo_id}/settings)."
        )
    refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    commits = {ref.name: ref.target_commit for ref in refs.branches}
    commits |= {ref.ref: ref.target_commit for ref in refs.pull_requests or []}
    revision = _named(destination.revision)
    if destination.pull_request:
        revision = _own_pull_request(api, destination, user)
    elif revision is not None and revision not in commits and revision.startswith("refs/"):
        raise InputError(f"{repo_id} has no {revision}: check --revision.")
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if revision in tags:
        raise InputError(f"--revision {revision} is a tag of {repo_id}, which stays where it is: give a branch.")
    commit = commits.get(revision or constants.DEFAULT_REVISION, info.sha)
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return Repository(True, bool(info.private), (revision or "main") in commits, commit, revision, files, tags)


def _named(revision: str | None) -> str | None:
    return None if revision == constants.DEFAULT_REVISION else revision


def _own_pull_request(api: HfApi, destination: Destination, user: str) -> str | None:
    """The reference of the user's open pull request with the same title, which goes on instead of opening another."""
    found = api.get_repo_discussions(
        destination.repo_id, author=user, discussion_type="pull_request", discussion_status="open"
    )
    own = [
        discussion.num
        for discussion in found
        if discussion.is_pull_request
        and (discussion.author, discussion.title) == (user, destination.message)
        and discussion.status in ("open", "draft")
    ]
    return f"refs/pr/{max(own)}" if own else None


def _compare(destination: Destination, repository: Repository, uploads: Sequence[Upload]) -> Plan:
    added = [upload for upload in uploads if upload.path not in repository.files]
    changed = [
        upload
        for upload in uploads
        if upload.path in repository.files and not _is_same(upload, repository.files[upload.path])
    ]
    return Plan(
        destination,
        repository,
        added,
        changed,
        stale_files(list(repository.files), [upload.path for upload in uploads]),
        len(uploads) - len(added) - len(changed),
    )


def _is_same(upload: Upload, there: RepoFile) -> bool:
    if upload.size != there.size:
        return False
    if there.lfs is None:
        return git_hash(upload.read()) == there.blob_id
    return upload.operation.upload_info.sha256.hex() == there.lfs.sha256


def _check_tag(plan: Plan) -> None:
    tag, repository = plan.destination.tag, plan.repository
    if tag is not None and tag in repository.tags and not (plan.is_empty and repository.tags[tag] == repository.commit):
        raise InputError(
            f"{plan.destination.repo_id} has a tag {tag} already, for commit {repository.tags[tag][:12]}: choose "
            "another, or delete that one first."
        )


def _check_edits(api: HfApi, plan: Plan, card: Card) -> None:
    """Raise `InputError` if somebody edited the card in the repository, and not here."""
    if not any(upload.path == CARD_FILE for upload in plan.changed):
        return
    repo_id = plan.destination.repo_id
    there = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=plan.repository.commit))
    if lost := lost_edits(there.read_text(encoding="utf-8", errors="replace"), card.text):
        at = f" --revision {plan.repository.revision}" if plan.repository.revision else ""
        raise InputError(
            f"{CARD_FILE} of {repo_id} was edited on the Hub ({', '.join(lost)}), which would be lost: get it with "
            f"`hf download {repo_id} {CARD_FILE}{at} --local-dir DIR`, and publish again, which keeps those edits."
        )


def _send(api: HfApi, plan: Plan) -> tuple[str, str | None]:
    """Make the commit; returns its hash and the branch or pull request that it is on, None for main."""
    destination, repository = plan.destination, plan.repository
    revision, parent = repository.revision, repository.commit
    if not repository.exists:
        api.create_repo(destination.repo_id, private=destination.private, exist_ok=True)
        parent = api.repo_info(destination.repo_id).sha
    if revision is not None and not repository.branch_exists:
        api.create_branch(destination.repo_id, branch=revision, revision=parent, exist_ok=True)
    if not (plan.added or plan.changed or plan.removed):
        assert parent is not None
        return parent, revision
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(upload.operation for upload in (*plan.added, *plan.changed)),
        *(CommitOperationDelete(path) for path in plan.removed),
    ]
    opens = destination.pull_request and revision is None
    assert destination.message is not None
    made = api.create_commit(
        destination.repo_id,
        operations,
        commit_message=destination.message,
        revision=revision,
        create_pr=opens,
        parent_commit=parent,
    )
    return made.oid, made.pr_revision if opens else revision


def _address(api: HfApi, destination: Destination, revision: str | None) -> str:
    address = f"{api.endpoint}/{destination.repo_id}"
    if revision is None:
        return address
    number = revision.removeprefix("refs/pr/")
    return f"{address}/discussions/{number}" if number != revision else f"{address}/tree/{revision}"
