"""An adapter, and what was made from it, goes to the Hugging Face Hub, and is read back from there.

Nothing is made public or replaced without asking, and "done" is said only of what is there.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from lora_grpo.deploy.hub_files import PushRefused
from lora_grpo.export.command import export_model
from lora_grpo.export.config import QUANTS, ExportConfig, check_names, plain_name, split
from lora_grpo.machine.files import read_json
from lora_grpo.machine.folders import ADAPTER_FILE, EXPORT_FILE, MERGED_FILE
from lora_grpo.merge.command import MergeConfig, Report, merge_adapter, say
from lora_grpo.policy.adapter import check_adapter, hash_weights

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lora_grpo.deploy.hub_files import Published
    from lora_grpo.deploy.hub_remote import Remote, Upload

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
    public: bool = False
    """Make the repositories public; asks first."""
    dry_run: bool = False
    """Show the card, then list every file, its size, where it would go and whether it holds data of
    your own; contacts nothing."""
    yes: bool = False
    """Answer every question with yes, for scripts."""

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        owner, _, name = self.repo.rpartition("/")
        try:
            validate_repo_id(self.repo)
            validate_repo_id(self.repo + MERGED)
            why = "" if owner else "it has no owner"
        except HFValidationError as error:
            why = str(error)
        if why:
            raise ValueError(
                f"--repo {self.repo} is no repository name: give you/name, such as "
                f"{plain_name(owner or 'you')}/{plain_name(name)} ({why})"
            )
        if self.gguf:
            check_names("--gguf", self.quants, QUANTS)

    @property
    def quants(self) -> tuple[str, ...]:
        """The types of GGUF files; they may be given with commas between them."""
        return split(self.gguf)


@dataclass(frozen=True)
class Made:
    """A folder that is made from the adapter before it is pushed, or that exists already.

    `report` is the JSON file in it that says from which adapter it was made.
    """

    folder: Path
    repo: str
    report: str
    make: Callable[[Report], object]

    def check(self, adapter_dir: Path) -> None:
        """Raise a ValueError for a folder that was made from another adapter."""
        if not self.folder.exists():
            return
        path = self.folder / self.report
        found = read_json(path) if path.is_file() else {}
        if not found.get("passed") or found.get("adapter_sha256") != hash_weights(adapter_dir):
            raise ValueError(
                f"{self.folder} was not made from {adapter_dir} as it is now: move it away, and "
                "the push makes it anew"
            )


def list_made(config: PushConfig) -> list[Made]:
    """Return the merged folder and the GGUF export, where they are asked for."""
    adapter, name, made = config.adapter_dir, config.adapter_dir.resolve().name, []
    if config.merged:
        merged = Path("merged") / name
        made.append(
            Made(
                merged,
                config.repo + MERGED,
                MERGED_FILE,
                lambda report: merge_adapter(MergeConfig(adapter, merged), report),
            )
        )
    if config.quants:
        exported = Path("exports") / "-".join((name, "gguf", *config.quants))
        made.append(
            Made(
                exported,
                config.repo + GGUF,
                EXPORT_FILE,
                lambda report: export_model(
                    ExportConfig(adapter, ("gguf",), config.quants, exported), report
                ),
            )
        )
    return made


def push_to_hub(config: PushConfig, api: "HfApi | None" = None, report: Report = say) -> list[str]:
    """Push what the configuration asks for, and return the links; a dry run returns none.

    Raises:
        ValueError, OSError: what was given cannot be pushed, or a question was answered with no.
        PushError: the Hub failed, or does not hold what was sent.
    """
    from lora_grpo.deploy.hub_files import list_adapter, list_folder
    from lora_grpo.deploy.hub_remote import Upload, connect, explained, push_files, read_remote

    check_adapter(config.adapter_dir, "push_to_hub.py")
    made = list_made(config)
    for part in made:
        part.check(config.adapter_dir)
    uploads = [Upload(config.repo, list_adapter(config.adapter_dir, config.repo), ADAPTER_FILE)]
    if config.dry_run:
        show_plan(config, uploads[0].files, made, report)
        return []
    api = api or make_client()
    with explained(config.repo):
        connect(api)
    for part in made:
        if not part.folder.exists():
            part.make(report)
        uploads.append(Upload(part.repo, list_folder(part.folder, part.repo), part.report))
    remotes = []
    for upload in uploads:
        with explained(upload.repo):
            remotes.append(read_remote(api, upload.repo))
    pairs = list(zip(uploads, remotes, strict=True))
    agree(api, config, pairs)
    links = []
    for upload, remote in pairs:
        with explained(upload.repo):
            links.append(push_files(api, upload, remote, config.public, report))
        report(f"done: {links[-1]}")
    return links


def show_plan(
    config: PushConfig, files: "list[Published]", made: list[Made], report: Report
) -> None:
    """Report the adapter's card, then every file with its size and repository."""
    from lora_grpo.deploy.hub_files import CARD, describe_file, list_folder

    kind = "public" if config.public else "private"
    for card in (file for file in files if file.name == CARD):
        report(f"--- {card.path}\n{card.read().decode(errors='replace')}---")
    plans = [(config.repo, config.adapter_dir, files)]
    for part in made:
        found = list_folder(part.folder, part.repo) if part.folder.exists() else None
        plans.append((part.repo, part.folder, found))
    for repo, folder, listed in plans:
        if listed is None:
            report(f"{repo} ({kind}): {folder}, which the push makes first")
            continue
        size = sum(file.size for file in listed) / 1e6
        report(f"{repo} ({kind}): {len(listed)} files of {folder}, {size:.1f} MB")
        for file in listed:
            report(f"  {file.size:>13,}  {file.name}{describe_file(file)}")
    report("dry run: nothing was sent, no question was asked")


def make_client() -> "HfApi":
    """Return a client of the Hub, or of HF_ENDPOINT."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="lora-grpo")


def agree(api: "HfApi", config: PushConfig, pairs: "list[tuple[Upload, Remote]]") -> None:
    """Ask all questions, about every repository, before anything is written to one.

    Raises:
        PushRefused: a question was answered with no, or there is no terminal to ask on.
    """
    from lora_grpo.deploy.hub_remote import explained, list_questions

    for upload, remote in pairs:
        with explained(upload.repo):
            questions = list_questions(api, upload, remote, config.public)
        for question in questions:
            if not ask(config.yes, question):
                raise PushRefused(f"the answer to '{question}?' was no: nothing was pushed")


def ask(yes: bool, question: str) -> bool:
    """Ask on the terminal; without one, refuse unless --yes was given.

    Raises:
        PushRefused: there is no terminal.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise PushRefused(f"it would {question}, and there is no terminal to ask: add --yes")
    return input(f"{question}? [y/N] ").strip().lower() in ("y", "yes")
