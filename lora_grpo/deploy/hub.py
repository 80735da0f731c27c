"""An adapter, and what was made from it, goes to the Hugging Face Hub.

Nothing is made public or replaced without asking, and "done" is said only of what is there.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from lora_grpo.deploy.hub_files import SAMPLES, PushRefused, describe_own_data, list_files
from lora_grpo.export.command import export_model
from lora_grpo.export.config import QUANTS, ExportConfig, check_names, plain_name, split
from lora_grpo.machine.files import read_json
from lora_grpo.machine.folders import EXPORT_FILE, MERGED_FILE
from lora_grpo.merge.command import MergeConfig, Report, merge_adapter, say
from lora_grpo.policy.adapter import check_adapter, hash_weights

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MERGED, GGUF = "-merged", "-GGUF"


@dataclass(frozen=True)
class PushConfig:
    """Push an adapter to the Hugging Face Hub, into a private repository unless told otherwise.

    The token comes from `hf auth login` or HF_TOKEN, never from a flag.
    """

    adapter_dir: Positional[Annotated[Path, arg(metavar="ADAPTER_DIR")]]
    """An adapter directory, such as adapters/<run>."""
    repo: str
    """Repository of the adapter, you/name; merged weights go to you/name-merged, GGUF files to
    you/name-GGUF."""
    merged: bool = False
    """Also push the merged model: merged/<run>, made first where it is not there."""
    gguf: tuple[str, ...] = ()
    """Also push GGUF files of these types, such as q8_0,q4_k_m: exports/<run>-gguf-<types>, made
    first where they are not there."""
    samples: bool = True
    """Push questions and completions too: completions.jsonl, eval_items.jsonl, report.html and the
    samples in the card."""
    public: bool = False
    """Make the repositories public; asks first."""
    dry_run: bool = False
    """List every file, its size, where it would go and whether it holds data of your own; contacts
    nothing."""
    yes: bool = False
    """Answer every question with yes, for scripts."""

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo)
            validate_repo_id(self.repo + MERGED)
            why = "" if "/" in self.repo else "it has no owner"
        except HFValidationError as error:
            why = str(error)
        if why:
            raise ValueError(
                f"--repo {self.repo} is no repository name: give you/name, such as "
                f"you/{plain_name(self.repo.rpartition('/')[2])} ({why})"
            )
        if self.gguf:
            check_names("--gguf", self.quants, QUANTS)

    @property
    def quants(self) -> tuple[str, ...]:
        """The types of GGUF files; they may be given with commas between them."""
        return split(self.gguf)


@dataclass(frozen=True)
class Part:
    """A folder and its repository: the adapter's, or one that `make` writes where it is not there
    yet, with a report in it that says from which adapter it was made."""

    folder: Path
    repo: str
    report: str = ""
    make: Callable[[Report], object] | None = None

    def check(self, adapter_dir: Path) -> None:
        """Raise a ValueError for a folder that was made from another adapter."""
        if self.make is None or not self.folder.exists():
            return
        path = self.folder / self.report
        found = read_json(path) if path.is_file() else {}
        if not found.get("passed") or found.get("adapter_sha256") != hash_weights(adapter_dir):
            raise ValueError(
                f"{self.folder} was not made from {adapter_dir} as it is now: move it away, and "
                "the push makes it anew"
            )


def list_parts(config: PushConfig) -> list[Part]:
    """Return the adapter directory, and the merged folder and GGUF export where asked for."""
    adapter, name, quants = config.adapter_dir, config.adapter_dir.resolve().name, config.quants
    merged, exported = Path("merged") / name, Path("exports") / "-".join((name, "gguf", *quants))

    def merge(report: Report) -> None:
        merge_adapter(MergeConfig(adapter, merged), report)

    def export(report: Report) -> None:
        export_model(ExportConfig(adapter, ("gguf",), quants, exported), report)

    parts = [Part(adapter, config.repo)]
    if config.merged:
        parts.append(Part(merged, config.repo + MERGED, MERGED_FILE, merge))
    if quants:
        parts.append(Part(exported, config.repo + GGUF, EXPORT_FILE, export))
    return parts


def push_to_hub(config: PushConfig, api: "HfApi | None" = None, report: Report = say) -> list[str]:
    """Push what the configuration asks for, and return the links; a dry run returns none.

    Raises:
        ValueError, OSError: what was given cannot be pushed, or a question was answered with no.
        PushError: the Hub failed, or does not hold what was sent.
    """
    from lora_grpo.deploy.hub_remote import (
        connect,
        explained,
        list_questions,
        push_files,
        read_remote,
    )

    check_adapter(config.adapter_dir, "push_to_hub.py")
    parts = list_parts(config)
    for part in parts:
        part.check(config.adapter_dir)
    if config.dry_run:
        show_plan(config, parts, report)
        return []
    api = api or make_client()
    with explained(config.repo):
        connect(api)
    folders = []
    for part in parts:
        if not part.folder.exists():
            part.make(report)
        folders.append(list_files(part.folder, part.repo, config.samples))
    remotes, links = [], []
    for part in parts:
        with explained(part.repo):
            remotes.append(read_remote(api, part.repo))
    pairs = list(zip(folders, remotes, strict=True))
    for files, remote in pairs:  # all questions before anything is written to any of them
        for question in list_questions(files, remote, config.public):
            ask(config.yes, question)
    for files, remote in pairs:
        report(f"{remote.repo}: {describe_own_data(files)}")
        with explained(remote.repo):
            links.append(push_files(api, files, remote, config.public, report))
        if not config.samples and (left := [name for name in SAMPLES if name in remote.files]):
            report(f"{links[-1]} still holds {', '.join(left)} of an earlier push: delete it there")
        report(f"done: {links[-1]}")
    return links


def show_plan(config: PushConfig, parts: list[Part], report: Report) -> None:
    """Report every file with its size and repository, and which of them hold the user's data."""
    kind = "public" if config.public else "private"
    for part in parts:
        if not part.folder.exists():
            report(f"{part.repo} ({kind}): {part.folder}, which the push makes first")
            continue
        files = list_files(part.folder, part.repo, config.samples)
        size = sum(file.size for file in files) / 1e6
        report(f"{part.repo} ({kind}): {len(files)} files of {part.folder}, {size:.1f} MB")
        for file in files:
            report(f"  {file.size:>13,}  {file.name}{file.describe()}")
        report(f"  {describe_own_data(files)}")
    report("dry run: nothing was sent, no question was asked")


def make_client() -> "HfApi":
    """Return a client of the Hub, or of HF_ENDPOINT."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="lora-grpo")


def ask(yes: bool, question: str) -> None:
    """Ask on the terminal, unless --yes was given.

    Raises:
        PushRefused: the answer was no, or there is no terminal.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise PushRefused(f"it would {question}, and there is no terminal to ask: add --yes")
    if input(f"{question}? [y/N] ").strip().lower() not in ("y", "yes"):
        raise PushRefused(f"the answer to '{question}?' was no: nothing was pushed")
