"""An adapter, and what was made of it, goes to the Hugging Face Hub, and is read back from there.

Nothing is made public or replaced without asking, and nothing is called done that is not there.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from lora_grpo.deploy.hub_files import PushError, PushRefused
from lora_grpo.export.command import export_model
from lora_grpo.export.config import QUANTS, ExportConfig, check_names, plain_name, split
from lora_grpo.machine.files import read_json
from lora_grpo.merge.command import MergeConfig, Report, merge_adapter, say
from lora_grpo.policy.adapter import check_adapter, hash_weights

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from lora_grpo.deploy.hub_files import Published
    from lora_grpo.deploy.hub_remote import Remote, Target

REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_])?")
LONGEST_NAME = 96
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
        longest = len(self.repo.partition("/")[2]) + len(MERGED)
        forbidden = ".." in self.repo or "--" in self.repo or self.repo.endswith(".git")
        if not REPO.fullmatch(self.repo) or forbidden:
            owner, _, name = self.repo.rpartition("/")
            raise ValueError(
                f"--repo {self.repo} is no repository name: give you/name, of letters, digits, "
                f"'-', '_' and '.', such as {plain_name(owner or 'you')}/{plain_name(name)}"
            )
        if longest > LONGEST_NAME:
            raise ValueError(
                f"--repo {self.repo}: the name may have {LONGEST_NAME - len(MERGED)} characters"
            )
        if self.gguf:
            check_names("--gguf", self.quants, QUANTS)

    @property
    def quants(self) -> tuple[str, ...]:
        """The types of GGUF files; they may be given with commas between them."""
        return split(self.gguf)


@dataclass(frozen=True)
class Made:
    """A folder that is made of the adapter before it is pushed, or that lies there already.

    `report` is the JSON file in it that says of which adapter it was made.
    """

    folder: Path
    suffix: str
    report: str
    make: Callable[[Report], object]

    def check(self, adapter_dir: Path) -> None:
        """Raise a ValueError for a folder that was made of another adapter."""
        if not self.folder.exists():
            return
        path = self.folder / self.report
        found = read_json(path) if path.is_file() else {}
        if not found.get("passed") or found.get("adapter_sha256") != hash_weights(adapter_dir):
            raise ValueError(
                f"{self.folder} was not made of {adapter_dir} as it is now: move it away, and the "
                "push makes it anew"
            )


def list_made(config: PushConfig) -> list[Made]:
    """Return the merged folder and the GGUF export, where they are asked for."""
    name, made = config.adapter_dir.resolve().name, []
    if config.merged:
        folder = Path("merged") / name

        def merge(report: Report, folder: Path = folder) -> None:
            merge_adapter(MergeConfig(config.adapter_dir, folder), report)

        made.append(Made(folder, MERGED, "merge_report.json", merge))
    if config.quants:
        folder = Path("exports") / "-".join((name, "gguf", *config.quants))

        def export(report: Report, folder: Path = folder) -> None:
            export_model(ExportConfig(config.adapter_dir, ("gguf",), config.quants, folder), report)

        made.append(Made(folder, GGUF, "export_report.json", export))
    return made


def push_to_hub(config: PushConfig, api: "HfApi | None" = None, report: Report = say) -> list[str]:
    """Push what the configuration asks for, and return the links; a dry run returns none.

    Raises:
        ValueError, OSError: what was given cannot be pushed, or a question was answered with no.
        PushError: the Hub failed, or does not hold what was sent.
    """
    from lora_grpo.deploy.hub_files import list_adapter, list_folder
    from lora_grpo.deploy.hub_remote import (
        Target,
        check_token,
        choose_transfer,
        limit_waiting,
        look,
        push_target,
    )

    check_adapter(config.adapter_dir, "push_to_hub.py")
    made = list_made(config)
    for part in made:
        part.check(config.adapter_dir)
    adapter = Target(
        config.repo, list_adapter(config.adapter_dir, config.repo), "adapter_config.json"
    )
    if config.dry_run:
        show_plan(config, adapter, made, report)
        return []
    api = api or connect()
    limit_waiting()
    choose_transfer(api.endpoint)
    with explained(config.repo):
        check_token(api)
    targets = [adapter]
    for part in made:
        if not part.folder.exists():
            part.make(report)
        files = list_folder(part.folder, config.repo + part.suffix)
        targets.append(Target(config.repo + part.suffix, files, part.report))
    remotes = []
    for target in targets:
        with explained(target.repo):
            remotes.append(look(api, target.repo))
    agree(api, config, list(zip(targets, remotes, strict=True)))
    links = []
    for target, remote in zip(targets, remotes, strict=True):
        with explained(target.repo):
            links.append(push_target(api, target, remote, config.public, report))
        report(f"done: {links[-1]}")
    return links


def show_plan(config: PushConfig, adapter: "Target", made: list[Made], report: Report) -> None:
    """Report the adapter's card, then every file with its size and repository."""
    from lora_grpo.deploy.hub_files import list_folder

    kind = "public" if config.public else "private"
    card = config.adapter_dir / "README.md"
    if card.is_file():
        sent = next(file for file in adapter.files if file.name == card.name)
        text = card.read_bytes() if sent.data is None else sent.data
        report(f"--- {card}\n{text.decode(errors='replace')}---")
    plans = [(adapter.repo, config.adapter_dir, adapter.files)]
    for part in made:
        repo = config.repo + part.suffix
        files = list_folder(part.folder, repo) if part.folder.exists() else None
        plans.append((repo, part.folder, files))
    for repo, folder, files in plans:
        if files is None:
            report(f"{repo} ({kind}): {folder}, which the push makes first")
            continue
        report(f"{repo} ({kind}): {len(files)} files of {folder}, {total(files)}")
        for file in files:
            report(f"  {file.size:>13,}  {file.name}{describe(file)}")
    report("dry run: nothing was sent, nobody was asked")


def describe(file: "Published") -> str:
    """Return what of a user's own a file holds, and what was changed in it."""
    from lora_grpo.deploy.hub_files import CARD, OWN_DATA

    sampled = file.name != CARD or file.path.with_name("eval_items.jsonl").is_file()
    notes = [f"your own: {OWN_DATA[file.name]}"] if file.name in OWN_DATA and sampled else []
    notes += ["without local paths"] if file.data is not None else []
    return f"  ({'; '.join(notes)})" if notes else ""


def total(files: "list[Published]") -> str:
    return f"{sum(file.size for file in files) / 1e6:.1f} MB"


def connect() -> "HfApi":
    """Return a client of the Hub, or of HF_ENDPOINT."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(library_name="lora-grpo")


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn what the Hub or the network raises into a sentence."""
    import httpx

    from lora_grpo.deploy.hub_remote import explain

    try:
        yield
    except (PushError, PushRefused):
        raise
    except (OSError, RuntimeError, ValueError, httpx.HTTPError) as error:
        raise PushError(explain(error, repo)) from error


def agree(api: "HfApi", config: PushConfig, pairs: "list[tuple[Target, Remote]]") -> None:
    """Ask all that is to be asked, of every repository, before anything is written to one.

    Raises:
        PushRefused: a question was answered with no, or there is nobody to ask.
    """
    from lora_grpo.deploy.hub_remote import list_questions

    for target, remote in pairs:
        with explained(target.repo):
            questions = list_questions(api, target, remote, config.public)
        for question in questions:
            if not ask(config.yes, question):
                raise PushRefused(f"the answer to '{question}?' was no: nothing was pushed")


def ask(yes: bool, question: str) -> bool:
    """Ask on the terminal; without one, refuse unless --yes was given.

    Raises:
        PushRefused: there is nobody to ask.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise PushRefused(f"it would {question}, and there is no terminal to ask: add --yes")
    return input(f"{question}? [y/N] ").strip().lower() in ("y", "yes")
