"""One repository on the Hub: made, compared with what is to lie there, committed to, and read back.

A manifest in the repository remembers what the last push wrote, so that a file that came from
somewhere else is not replaced without asking.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, constants, set_client_factory
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory

from lora_grpo.deploy.hub_files import Published, PushError, PushRefused

TOKENS = "https://huggingface.co/settings/tokens"
QUOTA_WORDS = ("quota", "storage limit", "storage space", "exceeded your")
AGAIN = "run the same command again, files that arrived are not sent twice"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it, down to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException, repo: str) -> str:
    """Return a sentence for an error that huggingface_hub or its transport raised."""
    for cause in chain(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return f"no Hub token was found: run `hf auth login`, or set HF_TOKEN ({TOKENS})"
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it"
        if isinstance(cause, HfHubHTTPError):
            return explain_status(cause, repo)
    for cause in chain(error):
        if isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout):
            return f"the Hub cannot be reached ({cause}): check the network, or HF_ENDPOINT"
        if isinstance(cause, httpx.TransportError):
            return f"the connection broke off ({cause or type(cause).__name__}): {AGAIN}"
    return f"{' '.join(str(error).split())}: {AGAIN}"


def explain_status(error: HfHubHTTPError, repo: str) -> str:
    """Return a sentence for what the Hub answered."""
    status = error.response.status_code
    said = (error.server_message or "").strip()
    if status in (402, 413, 507) or any(word in said.lower() for word in QUOTA_WORDS):
        return (
            f"the Hub takes no more for {repo} ({said or status}): free storage there, or push "
            "fewer files"
        )
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub does not know the token: make a new one ({TOKENS}), then `hf auth login`"
    if status in (401, 403):
        return (
            f"the token may not write to {repo} ({said or status}): use one with write access to "
            f"it ({TOKENS}), or another --repo"
        )
    if status == 404:
        return f"{repo} is not there, or the token may not see it: check --repo and the token"
    if status == 409:
        return (
            f"{repo} is taken or was changed meanwhile ({said or status}): look at it, and {AGAIN}"
        )
    if status == 412:
        return f"{repo} was changed by somebody else during the push: {AGAIN}"
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} seconds" if wait else "later"
        return f"the Hub answers no more requests for now: try {when}, {AGAIN}"
    if status >= 500:
        return f"the Hub failed ({status}): {AGAIN}"
    return f"the Hub refused ({status} {said}): check --repo"


# Seconds: for one step of a request, and for all that the Hub asks to wait in one push.
TIMEOUT = {"connect": 15.0, "read": 60.0, "write": 60.0, "pool": 60.0}
LONGEST_WAIT = 60.0
HUB = "huggingface.co"


def asked_wait(response: httpx.Response) -> float:
    """Return the seconds that an answer asks to wait before the next try."""
    if response.status_code not in (429, 503):
        return 0.0
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    seconds = response.headers.get("Retry-After", "").strip()
    return float(seconds) if seconds.isdigit() else 0.0


def limit_waiting() -> None:
    """Give every request a time limit, and fail once the waits asked for come to a minute."""
    left = LONGEST_WAIT

    def set_limit(request: httpx.Request) -> None:
        # Some calls of huggingface_hub ask for no limit, over the client's own.
        asked = request.extensions.get("timeout", {})
        known = {name: seconds for name, seconds in asked.items() if seconds is not None}
        request.extensions["timeout"] = {**TIMEOUT, **known}

    def count_wait(response: httpx.Response) -> None:
        nonlocal left
        left -= asked_wait(response)
        if left < 0:
            response.read()
            hf_raise_for_status(response)

    def make_client() -> httpx.Client:
        client = default_client_factory()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], set_limit],
            "response": [*hooks["response"], count_wait],
        }
        return client

    set_client_factory(make_client)


def choose_transfer(endpoint: str) -> None:
    """Send files by plain LFS to a server that is not the Hub itself: it may not speak Xet, which
    huggingface_hub does not ask first, and hf_xet then tries for minutes."""
    host = httpx.URL(endpoint).host
    if host != HUB and not host.endswith("." + HUB):
        constants.HF_HUB_DISABLE_XET = True


MANIFEST = "push_manifest.json"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A repository and the files that it is to hold; `checked` is fetched back whole."""

    repo: str
    files: list[Published]
    checked: str


def check_token(api: HfApi) -> None:
    """Raise a PushError unless there is a token that may write."""
    found = api.whoami()
    token = found.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise PushError(
            f"the token {token.get('displayName', '')!r} of {found['name']} may only read: make "
            "one with write access at https://huggingface.co/settings/tokens, then `hf auth login`"
        )


@dataclass(frozen=True)
class Remote:
    """A repository as it is before the push; one that is not there has no commit and no files."""

    head: str | None
    private: bool
    files: dict[str, RepoFile]


def look(api: HfApi, repo: str) -> Remote:
    """Return what lies in a repository now."""
    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        return Remote(None, True, {})
    return Remote(info.sha, info.private, list_remote(api, repo, info.sha))


def list_questions(api: HfApi, target: Target, remote: Remote, public: bool) -> list[str]:
    """Return what the user must agree to before the push writes anything.

    Raises:
        PushRefused: the repository is public, and was not to be.
    """
    if not remote.private and not public:
        raise PushRefused(
            f"{target.repo} is public already, so that what is pushed there is public: add "
            "--public, or choose another --repo"
        )
    questions = []
    if remote.private and public:
        kind = "new" if remote.head is None else "private"
        questions.append(f"make the {kind} repository {target.repo} public")
    if strange := find_strange(api, target, remote):
        questions.append(f"replace {', '.join(strange)} in {target.repo}, not written by a push")
    return questions


def push_target(api: HfApi, target: Target, remote: Remote, public: bool, report: Report) -> str:
    """Bring a repository to hold the target's files, and return its link once it does; only then
    is it made public.

    Raises:
        PushError: the Hub does not hold what was sent.
        HfHubHTTPError, RuntimeError, httpx.HTTPError: the Hub or the way to it failed.
    """
    if remote.head is None:
        remote = make_repository(api, target.repo, report)
    changed = list_changed(target, remote)
    head = commit(api, target, remote, changed, report) if changed else remote.head
    verify(api, target, head)
    count = f"{len(target.files)} files"
    report(
        f"{target.repo}: {len(changed)} of {count} sent, all read back and compared"
        if changed
        else f"{target.repo}: nothing to send, all {count} are there already"
    )
    if public and remote.private:
        make_public(api, target.repo, report)
    return f"{api.endpoint}/{target.repo}"


def make_repository(api: HfApi, repo: str, report: Report) -> Remote:
    """Make a private repository.

    Raises:
        PushError: the Hub did not keep it private.
    """
    api.create_repo(repo, private=True)
    remote = look(api, repo)
    if not remote.private:
        raise PushError(
            f"the Hub made {repo} public though private was asked for, and no file was sent: make "
            f"it private at {api.endpoint}/{repo}/settings, or push with --public"
        )
    report(f"made private repository {repo}")
    return remote


def make_public(api: HfApi, repo: str, report: Report) -> None:
    api.update_repo_settings(repo, private=False)
    if api.repo_info(repo).private:
        raise PushError(f"all files are in {repo}, but the Hub keeps it private: push again")
    report(f"made {repo} public")


def list_changed(target: Target, remote: Remote) -> list[Published]:
    return [file for file in target.files if not is_same(remote.files.get(file.name), file)]


def list_remote(api: HfApi, repo: str, revision: str) -> dict[str, RepoFile]:
    """Return the files of a repository at a commit, by name."""
    found = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def is_same(remote: RepoFile | None, file: Published) -> bool:
    """Tell whether the Hub lists just this content: SHA-256 for LFS, git's own hash otherwise."""
    if remote is None or remote.size != file.size:
        return False
    return remote.lfs.sha256 == file.sha256 if remote.lfs else remote.blob_id == file.blob_id


def identity(remote: RepoFile) -> str:
    return remote.lfs.sha256 if remote.lfs else remote.blob_id


def find_strange(api: HfApi, target: Target, remote: Remote) -> list[str]:
    """Return the files to be replaced that no earlier push wrote as they are now."""
    held = remote.files
    replaced = [file.name for file in list_changed(target, remote) if file.name in held]
    if not replaced:
        return []
    written = read_manifest(api, target.repo, remote.head) if MANIFEST in held else {}
    return [name for name in replaced if identity(held[name]) not in written.get(name, ())]


def read_manifest(api: HfApi, repo: str, revision: str) -> dict[str, list[str]]:
    return json.loads(fetch(api, repo, MANIFEST, revision))


def fetch(api: HfApi, repo: str, name: str, revision: str) -> bytes:
    """Return a file as the Hub serves it, past any cache.

    Raises:
        PushError: it is not there.
    """
    with TemporaryDirectory() as folder:
        try:
            return Path(
                api.hf_hub_download(
                    repo, name, revision=revision, local_dir=folder, force_download=True
                )
            ).read_bytes()
        except EntryNotFoundError as error:
            raise PushError(f"{repo} does not hold {name} after the push: push again") from error


def commit(
    api: HfApi,
    target: Target,
    remote: Remote,
    changed: list[Published],
    report: Report,
) -> str:
    """Send what changed in one commit, the manifest with it, and return the commit."""
    size = sum(file.size for file in changed)
    report(f"sending {len(changed)} files to {target.repo}, {size / 1e6:.1f} MB")
    manifest = {file.name: [file.blob_id, file.sha256] for file in target.files}
    text = (json.dumps(manifest, indent=2) + "\n").encode()
    operations = [
        CommitOperationAdd(file.name, str(file.path) if file.data is None else file.data)
        for file in changed
    ]
    operations.append(CommitOperationAdd(MANIFEST, text))
    verb = "Update" if any(file.name in remote.files for file in changed) else "Upload"
    message = f"{verb} {len(changed)} files with lora-grpo"
    return api.create_commit(
        target.repo, operations, commit_message=message, parent_commit=remote.head
    ).oid


def verify(api: HfApi, target: Target, revision: str) -> None:
    """Compare the listing at the commit with the files, and fetch one back whole.

    Raises:
        PushError: something is missing or different.
    """
    held = list_remote(api, target.repo, revision)
    faults = [
        f"{file.name} {'differs' if file.name in held else 'is missing'}"
        for file in target.files
        if not is_same(held.get(file.name), file)
    ]
    expected = next(file for file in target.files if file.name == target.checked)
    wanted = expected.path.read_bytes() if expected.data is None else expected.data
    if not faults and fetch(api, target.repo, target.checked, revision) != wanted:
        faults.append(f"{target.checked} comes back different")
    if faults:
        raise PushError(
            f"{target.repo} does not hold what was sent ({'; '.join(faults[:5])}): push again"
        )
