"""One repository on the Hub: made, compared with what is to lie there, committed to, and read back.

A manifest in the repository remembers what the last push wrote, so that a file that came from
somewhere else is not replaced without asking.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from lora_grpo.push_end import PushError, PushRefused
from lora_grpo.push_files import Published

MANIFEST = "push_manifest.json"
# What the Hub makes itself in a new repository.
MADE_BY_THE_HUB = (".gitattributes",)
Ask = Callable[[str], bool]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A repository and the files that it is to hold; `checked` is fetched back whole."""

    repo: str
    files: list[Published]
    checked: str


def push_target(api: HfApi, target: Target, public: bool, ask: Ask, report: Report) -> str:
    """Bring a repository to hold the target's files, and return its link once it does.

    Raises:
        PushRefused: what it would replace or make public was not agreed to.
        PushError: the Hub does not hold what was sent.
        HfHubHTTPError, RuntimeError, httpx.HTTPError: the Hub or the way to it failed.
    """
    head = open_repository(api, target.repo, public, ask, report)
    held = list_remote(api, target.repo, head)
    changed = [file for file in target.files if not is_same(held.get(file.name), file)]
    if changed:
        agree_to_replace(api, target, head, held, changed, ask)
        head = commit(api, target, head, held, changed, report)
    verify(api, target, head)
    link = f"{api.endpoint}/{target.repo}"
    count = f"{len(target.files)} files"
    report(
        f"{target.repo}: {len(changed)} of {count} sent, all read back and compared"
        if changed
        else f"{target.repo}: nothing to send, all {count} are there already"
    )
    return link


def open_repository(api: HfApi, repo: str, public: bool, ask: Ask, report: Report) -> str:
    """Make the repository, or check that one that is there may be written to as asked; return the
    commit that it is at."""
    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        if public and not ask(f"make a new public repository {repo}"):
            raise PushRefused(f"{repo} was not made public, and nothing was pushed") from None
        api.create_repo(repo, private=not public)
        report(f"made {'public' if public else 'private'} repository {repo}")
        return api.repo_info(repo).sha
    if not info.private and not public:
        raise PushRefused(
            f"--repo {repo} is public already, so that what is pushed there is public: add "
            "--public, or choose another --repo"
        )
    if info.private and public:
        if not ask(f"make the private repository {repo} public"):
            raise PushRefused(f"{repo} was not made public, and nothing was pushed")
        api.update_repo_settings(repo, private=False)
        report(f"made {repo} public")
    return info.sha


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


def agree_to_replace(
    api: HfApi,
    target: Target,
    head: str,
    held: dict[str, RepoFile],
    changed: list[Published],
    ask: Ask,
) -> None:
    """Ask before a file is replaced that no earlier push wrote as it is now."""
    written = read_manifest(api, target.repo, head) if MANIFEST in held else {}
    strange = [
        file.name
        for file in changed
        if file.name in held
        and file.name not in MADE_BY_THE_HUB
        and identity(held[file.name]) not in written.get(file.name, ())
    ]
    if strange and not ask(f"replace {', '.join(strange)} in {target.repo}, not written by a push"):
        raise PushRefused(f"nothing was replaced in {target.repo}, and nothing was pushed to it")


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
    head: str,
    held: dict[str, RepoFile],
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
    verb = "Update" if any(file.name in held for file in changed) else "Upload"
    message = f"{verb} {len(changed)} files with lora-grpo"
    return api.create_commit(
        target.repo, operations, commit_message=message, parent_commit=head
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
