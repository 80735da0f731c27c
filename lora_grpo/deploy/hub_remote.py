"""One repository on the Hub: made, compared with what it should hold, committed to, and read back.

A manifest in the repository remembers what the last push wrote, so that a file that came from
somewhere else is not replaced without asking.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from lora_grpo.deploy.hub_files import Published, PushError, PushRefused
from lora_grpo.machine.terminal import chain

HUB = "huggingface.co"
MANIFEST = "push_manifest.json"
TOKENS = "https://huggingface.co/settings/tokens"
AGAIN = "run the same command again, files that arrived are not sent twice"
QUOTA_WORDS = ("quota", "storage limit", "storage space", "exceeded your")
QUOTA = (402, 413, 507)
STATUS = {
    402: "the Hub takes no more for {repo} ({said}): free storage there, or push fewer files",
    401: "the Hub does not know the token: make a new one ({tokens}), then `hf auth login`",
    403: "the token may not write to {repo} ({said}): use one with write access to it ({tokens}), "
    "or another --repo",
    404: "{repo} does not exist, or the token may not see it: check --repo and the token",
    409: "{repo} is taken or was changed meanwhile ({said}): look at it, and {again}",
    412: "{repo} was changed by somebody else during the push: {again}",
    429: "the Hub accepts no more requests for now: try {when}, {again}",
}
# Seconds, for one step of a request; huggingface_hub sets none for most.
TIMEOUT = {"connect": 15.0, "read": 60.0, "write": 60.0, "pool": 60.0}
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
    kind = status
    if status in QUOTA or any(word in said.lower() for word in QUOTA_WORDS):
        kind = 402
    elif status == 401 and isinstance(error, RepositoryNotFoundError):
        kind = 403
    failed = f"the Hub failed ({status}): {AGAIN}"
    refused = f"the Hub refused ({status} {said}): check --repo"
    if kind not in STATUS:
        return failed if status >= 500 else refused
    when = f"in {wait} seconds" if wait else "later"
    return STATUS[kind].format(
        repo=repo, said=said or status, tokens=TOKENS, again=AGAIN, when=when
    )


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
    set_client_factory(
        lambda: httpx.Client(follow_redirects=True, event_hooks={"request": [set_limit]})
    )
    host = httpx.URL(api.endpoint).host
    if host != HUB and not host.endswith("." + HUB):
        # Such a server may not speak Xet, which huggingface_hub does not ask before it tries.
        constants.HF_HUB_DISABLE_XET = True
    found = api.whoami()
    token = found.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PushError(
            f"the token {token.get('displayName', '')!r} of {found['name']} may only read: make "
            f"one with write access ({TOKENS}), then `hf auth login`"
        )


def set_limit(request: httpx.Request) -> None:
    asked = request.extensions.get("timeout", {})
    known = {name: seconds for name, seconds in asked.items() if seconds is not None}
    request.extensions["timeout"] = {**TIMEOUT, **known}


@dataclass(frozen=True)
class Upload:
    """A repository and the files that it should hold; `checked` is downloaded again whole."""

    repo: str
    files: list[Published]
    checked: str


@dataclass(frozen=True)
class Remote:
    """A repository before the push; one that does not exist has no commit and no files."""

    head: str | None
    private: bool
    files: dict[str, RepoFile]


def read_remote(api: HfApi, repo: str) -> Remote:
    """Return what a repository holds now."""
    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        return Remote(None, True, {})
    return Remote(info.sha, info.private, list_remote(api, repo, info.sha))


def list_remote(api: HfApi, repo: str, revision: str) -> dict[str, RepoFile]:
    """Return the files of a repository at a commit, by name."""
    found = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def list_questions(api: HfApi, upload: Upload, remote: Remote, public: bool) -> list[str]:
    """Return what the user must agree to before the push writes anything.

    Raises:
        PushRefused: the repository is public, and should not be.
    """
    if not remote.private and not public:
        raise PushRefused(
            f"{upload.repo} is public already, so that what is pushed there is public: add "
            "--public, or choose another --repo"
        )
    questions = []
    if remote.private and public:
        kind = "new" if remote.head is None else "private"
        questions.append(f"make the {kind} repository {upload.repo} public")
    if foreign := find_foreign(api, upload, remote):
        questions.append(f"replace {', '.join(foreign)} in {upload.repo}, not written by a push")
    return questions


def find_foreign(api: HfApi, upload: Upload, remote: Remote) -> list[str]:
    """Return the files to be replaced that no earlier push wrote as they are now."""
    replaced = [file.name for file in list_changed(upload, remote) if file.name in remote.files]
    if not replaced:
        return []
    known = MANIFEST in remote.files
    written = json.loads(fetch(api, upload.repo, MANIFEST, remote.head)) if known else {}
    return [
        name for name in replaced if content_hash(remote.files[name]) not in written.get(name, ())
    ]


def list_changed(upload: Upload, remote: Remote) -> list[Published]:
    return [file for file in upload.files if not is_same(remote.files.get(file.name), file)]


def is_same(remote: RepoFile | None, file: Published) -> bool:
    """Return whether the Hub lists exactly this content."""
    return (
        remote is not None
        and remote.size == file.size
        and content_hash(remote) == (file.sha256 if remote.lfs else file.blob_id)
    )


def content_hash(remote: RepoFile) -> str:
    """Return SHA-256 for a file in LFS, git's own hash for any other."""
    return remote.lfs.sha256 if remote.lfs else remote.blob_id


def push_files(api: HfApi, upload: Upload, remote: Remote, public: bool, report: Report) -> str:
    """Send what changed, read it back, and return the link; only then is it made public.

    Raises:
        PushError: the Hub does not hold what was sent.
        HfHubHTTPError, RuntimeError, httpx.HTTPError: the Hub or the way to it failed.
    """
    if remote.head is None:
        remote = make_repository(api, upload.repo, report)
    changed = list_changed(upload, remote)
    head = commit(api, upload, remote, changed, report) if changed else remote.head
    verify(api, upload, head)
    count = f"{len(upload.files)} files"
    report(
        f"{upload.repo}: {len(changed)} of {count} sent, all read back and compared"
        if changed
        else f"{upload.repo}: nothing to send, it holds all {count} already"
    )
    if public and remote.private:
        api.update_repo_settings(upload.repo, private=False)
        if api.repo_info(upload.repo).private:
            raise PushError(f"{upload.repo} holds all files, but the Hub keeps it private: {AGAIN}")
        report(f"made {upload.repo} public")
    return f"{api.endpoint}/{upload.repo}"


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


def commit(
    api: HfApi, upload: Upload, remote: Remote, changed: list[Published], report: Report
) -> str:
    """Send what changed and the manifest in one commit, and return the commit."""
    size = sum(file.size for file in changed)
    report(f"sending {len(changed)} files to {upload.repo}, {size / 1e6:.1f} MB")
    manifest = {file.name: [file.blob_id, file.sha256] for file in upload.files}
    operations = [
        CommitOperationAdd(file.name, str(file.path) if file.data is None else file.data)
        for file in changed
    ]
    operations.append(
        CommitOperationAdd(MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    )
    verb = "Update" if any(file.name in remote.files for file in changed) else "Upload"
    message = f"{verb} {len(changed)} files with lora-grpo"
    return api.create_commit(
        upload.repo, operations, commit_message=message, parent_commit=remote.head
    ).oid


def verify(api: HfApi, upload: Upload, revision: str) -> None:
    """Compare the listing at the commit with the files, and download one of them whole.

    Raises:
        PushError: something is missing or different.
    """
    held = list_remote(api, upload.repo, revision)
    faults = [
        f"{file.name} {'differs' if file.name in held else 'is missing'}"
        for file in upload.files
        if not is_same(held.get(file.name), file)
    ]
    expected = next(file for file in upload.files if file.name == upload.checked)
    if not faults and fetch(api, upload.repo, upload.checked, revision) != expected.read():
        faults.append(f"{upload.checked} comes back different")
    if faults:
        raise PushError(
            f"{upload.repo} does not hold what was sent ({'; '.join(faults[:5])}): push again"
        )


def fetch(api: HfApi, repo: str, name: str, revision: str) -> bytes:
    """Return a file as the Hub serves it, past any cache.

    Raises:
        PushError: it is not there.
    """
    with TemporaryDirectory() as folder:
        try:
            path = api.hf_hub_download(
                repo, name, revision=revision, local_dir=folder, force_download=True
            )
        except EntryNotFoundError as error:
            raise PushError(f"{repo} does not hold {name} after the push: push again") from error
        return Path(path).read_bytes()
