"""One repository on the Hub: made, compared with what it should hold, committed to, and listed
again.

A file whose last commit is not a push's came from somewhere else, and is not replaced without
asking.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, is_offline_mode, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash

from lora_grpo.deploy.hub_files import Published, PushError, PushRefused
from lora_grpo.machine.terminal import chain

SIGNATURE = "with lora-grpo"  # ends the message of each commit
TOKENS = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again, files that arrived are not sent twice"
QUOTA_WORDS = ("quota", "storage limit", "storage space", "exceeded your")
QUOTA = (402, 413, 507)
STATUS = {
    402: "the Hub takes no more for {repo} ({said}): free storage there, or push fewer files",
    401: "the Hub does not know the token: make a new one ({tokens}), then `hf auth login`",
    403: "the token may not write to {repo} ({said}): use one with write access to it ({tokens}), "
    "or another --repo",
    412: "{repo} was changed by somebody else during the push: {again}",
    429: "the Hub accepts no more requests for now: try {when}, {again}",
}
TIMEOUT = 60.0  # seconds without a byte; huggingface_hub asks most requests for no limit
Report = Callable[[str], None]


def explain(error: BaseException, repo: str) -> str:
    """Return a sentence for an error that huggingface_hub or its transport raised."""
    for cause in chain(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return f"no Hub token was found: run `hf auth login`, or set HF_TOKEN ({TOKENS})"
        if isinstance(cause, HfHubHTTPError):
            return explain_status(cause, repo)
        if isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout):
            return f"the Hub cannot be reached ({cause}): check the network, or HF_ENDPOINT"
        if isinstance(cause, httpx.TransportError):
            return f"the connection broke off ({cause or type(cause).__name__}): {AGAIN}"
    return f"{' '.join(str(error).split())}: {AGAIN}"


def explain_status(error: HfHubHTTPError, repo: str) -> str:
    """Return a sentence for what the Hub answered."""
    status, said = error.response.status_code, (error.server_message or "").strip()
    wait = error.response.headers.get("Retry-After")
    if status in QUOTA or any(word in said.lower() for word in QUOTA_WORDS):
        status = 402
    if status in STATUS:
        when = f"in {wait} seconds" if wait else "later"
        return STATUS[status].format(
            repo=repo, said=said or status, tokens=TOKENS, again=AGAIN, when=when
        )
    if status >= 500:
        return f"the Hub failed ({status}): {AGAIN}"
    return f"the Hub refused {repo} ({status} {said}): check --repo"


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn what the Hub or the network raises into a PushError."""
    try:
        yield
    except (PushError, PushRefused):
        raise
    except (OSError, RuntimeError, ValueError, httpx.HTTPError) as error:
        raise PushError(explain(error, repo)) from error


def connect(api: HfApi) -> None:
    """Check that there is a token that may write, with a time limit on every request.

    Raises:
        PushError: there is none, or HF_HUB_OFFLINE is set.
    """
    if is_offline_mode():
        raise PushError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it")
    hooks = {"request": [limit_time]}
    set_client_factory(lambda: httpx.Client(follow_redirects=True, event_hooks=hooks))
    found = api.whoami()
    token = found.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PushError(
            f"the token {token.get('displayName', '')!r} of {found['name']} may only read: make "
            f"one with write access ({TOKENS}), then `hf auth login`"
        )


def limit_time(request: httpx.Request) -> None:
    request.extensions["timeout"] = httpx.Timeout(TIMEOUT).as_dict()


@dataclass(frozen=True)
class Remote:
    """A repository before the push; one that does not exist has no commit and no files."""

    repo: str
    head: str | None
    private: bool
    files: dict[str, RepoFile]


def read_remote(api: HfApi, repo: str) -> Remote:
    """Return what a repository holds now."""
    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        return Remote(repo, None, True, {})
    return Remote(repo, info.sha, info.private, list_remote(api, repo, info.sha))


def list_remote(api: HfApi, repo: str, revision: str) -> dict[str, RepoFile]:
    """Return the files of a repository at a commit, by name, with the last commit of each."""
    found = api.list_repo_tree(repo, recursive=True, expand=True, revision=revision)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def list_questions(files: list[Published], remote: Remote, public: bool) -> list[str]:
    """Return what the user must agree to before the push writes anything.

    Raises:
        PushRefused: the repository is public, and should not be.
    """
    if not remote.private and not public:
        raise PushRefused(
            f"{remote.repo} is public already, so that what is pushed there is public: add "
            "--public, or choose another --repo"
        )
    questions = []
    if remote.private and public:
        kind = "new" if remote.head is None else "private"
        questions.append(f"make the {kind} repository {remote.repo} public")
    changed = list_changed(files, remote.files)
    foreign = [file.name for file in changed if is_foreign(remote.files.get(file.name))]
    if foreign:
        questions.append(f"replace {', '.join(foreign)} in {remote.repo}, not written by a push")
    return questions


def is_foreign(held: RepoFile | None) -> bool:
    """Return whether a file is on the Hub that no push wrote as it is."""
    last = held.last_commit if held else None
    return held is not None and not (last and last.title.endswith(SIGNATURE))


def list_changed(files: list[Published], held: dict[str, RepoFile]) -> list[Published]:
    """Return the files that the Hub does not list with exactly their content."""
    return [file for file in files if not is_same(held.get(file.name), file)]


def is_same(remote: RepoFile | None, file: Published) -> bool:
    if remote is None or remote.size != file.size:
        return False
    # SHA-256 for a file in LFS, git's own hash for any other, which is small.
    if remote.lfs:
        return remote.lfs.sha256 == file.sha256
    return remote.blob_id == git_hash(file.read())


def push_files(
    api: HfApi, files: list[Published], remote: Remote, public: bool, report: Report
) -> str:
    """Send what changed, compare the Hub's listing with the files, and return the link; only then
    is it made public.

    Raises:
        PushError: the Hub does not hold what was sent.
        HfHubHTTPError, RuntimeError, httpx.HTTPError: the Hub or the way to it failed.
    """
    if remote.head is None:
        remote = make_repository(api, remote.repo, report)
    count = f"{len(files)} files"
    if changed := list_changed(files, remote.files):
        held = list_remote(api, remote.repo, commit(api, remote, changed, report))
        if wrong := [file.name for file in list_changed(files, held)]:
            raise PushError(
                f"{remote.repo} does not hold what was sent, {', '.join(wrong)} differs or is "
                "missing: push again"
            )
        report(f"{remote.repo}: {len(changed)} of {count} sent, all compared with its listing")
    else:
        report(f"{remote.repo}: nothing to send, it holds all {count} already")
    if public and remote.private:
        api.update_repo_settings(remote.repo, private=False)
        report(f"made {remote.repo} public")
    return f"{api.endpoint}/{remote.repo}"


def make_repository(api: HfApi, repo: str, report: Report) -> Remote:
    """Make a private repository.

    Raises:
        PushError: the Hub did not keep it private.
    """
    api.create_repo(repo, private=True)
    remote = read_remote(api, repo)
    if not remote.private:
        raise PushError(
            f"the Hub made {repo} public though private was asked for, and no file was sent: make "
            f"it private at {api.endpoint}/{repo}/settings, or push with --public"
        )
    report(f"made private repository {repo}")
    return remote


def commit(api: HfApi, remote: Remote, files: list[Published], report: Report) -> str:
    """Send files in one commit on top of what was seen of the repository, and return its id."""
    size = sum(file.size for file in files) / 1e6
    report(f"sending {len(files)} files to {remote.repo}, {size:.1f} MB")
    operations = [
        CommitOperationAdd(file.name, str(file.path) if file.data is None else file.data)
        for file in files
    ]
    message = f"Upload {len(files)} files {SIGNATURE}"
    return api.create_commit(
        remote.repo, operations, commit_message=message, parent_commit=remote.head
    ).oid
