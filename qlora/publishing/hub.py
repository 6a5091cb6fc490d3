"""`qlora publish`: results of a run to repositories on the Hugging Face Hub.

A repository changes in one commit, whole or not at all. What was uploaded before an interruption is not sent again, nor
is what the repository has already. The token is that of HF_TOKEN or of `hf auth login`, which huggingface_hub reads.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from qlora.artifacts import exclusive, write_text
from qlora.errors import GateFailed, Problem, QloraError, UserError
from qlora.facts import RunFacts
from qlora.publishing.card import Origin, model_card
from qlora.publishing.export import available, facts_license, lay_out, require_whole, write_measured
from qlora.publishing.manifest import write_manifest
from qlora.recipe import Publish, Recipe
from qlora.reporting.console import StageProgress, console
from qlora.verdict import verdict

SUFFIXES = {"gptq": "", "merged": "-merged", "adapter": "-adapter"}
STAGING = ".publish"
WEIGHTS = (".safetensors", ".safetensors.index.json")
"""What a checkpoint must not have of an earlier one: readers would load both."""


@dataclass(frozen=True)
class Upload:
    """A repository, and the folder that it is to hold."""

    kind: str
    repo: str
    folder: Path

    @property
    def files(self) -> dict[str, int]:
        """Sizes by path."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in found}


def require_publishable(facts: RunFacts, force: bool) -> None:
    """Raise GateFailed unless the verdict is to ship, or `force`."""
    found = verdict(facts)
    if found.ship or force:
        return
    unmeasured = Problem("nothing was measured: no rows were held out", "data.eval", "name a file of rows in data.eval")
    note = Problem("it is not published", fix="--force publishes it all the same, and its model card says so first")
    raise GateFailed([*(found.reasons or (unmeasured,)), note])


@contextlib.contextmanager
def staged(facts: RunFacts, section: Publish, force: bool, license: str | None) -> Iterator[list[Upload]]:
    """The folders to publish, laid out in the run's directory for as long as the block takes.

    Raises as `available` and `require_whole` do.
    """
    kinds = available(facts, section.what)
    with StageProgress("publish") as progress:
        require_whole(facts, kinds, progress.update)
    repos = {kind: section.repo + SUFFIXES[kind] for kind in kinds}
    origin = Origin(license, repos, forced=force and not verdict(facts).ship)
    root = facts.dirs.root / STAGING
    shutil.rmtree(root, ignore_errors=True)  # of a run that was killed
    try:
        uploads = []
        for kind in kinds:
            known = lay_out(facts, kind, root / kind)
            write_measured(facts, root / kind)
            write_text(root / kind / "README.md", model_card(facts, kind, origin))
            write_manifest(root / kind, {"run": facts.recipe.name}, known)
            uploads.append(Upload(kind, repos[kind], root / kind))
        yield uploads
    finally:
        shutil.rmtree(root, ignore_errors=True)


def show(uploads: Sequence[Upload], section: Publish, facts: RunFacts) -> None:
    """Print what would be sent where, and what of the data goes with it."""
    seen = "private" if section.private else "public"
    for upload in uploads:
        table = Table(box=None, pad_edge=False, title_justify="left", title_style="")
        table.title = escape(f"\n{upload.repo} ({seen}, {section.revision or 'main'}): {upload.kind}")
        table.add_column("file")
        table.add_column("size", justify="right")
        for name, size in upload.files.items():
            table.add_row(escape(name), _size(size))
        table.add_row("in all", _size(sum(upload.files.values())), style="bold")
        console().print(table)
    if prompts := len((facts.contract or {}).get("golden", [])):
        note = f"contract.json holds {prompts} held-out prompts with answers; evaluate.golden: 0 leaves them out"
        console().print(f"\n{note}")


def publish(recipe: Recipe, *, force: bool, dry_run: bool, agreed: bool) -> None:
    """Show what is sent where, and send it, the run being up to date. `agreed`: without asking.

    Raises GateFailed, UserError, NotAsWritten, and QloraError for what the Hub refuses.
    """
    section = require_section(recipe)
    facts = replace(RunFacts.read(recipe.run_dir), recipe=recipe)  # gates are those of today
    require_publishable(facts, force)
    if not dry_run:
        with _hub_errors(section.repo):
            _log_in()
    known = facts_license(facts, None if dry_run else _license_on_hub)
    with exclusive(recipe.run_dir), staged(facts, section, force, known) as uploads:
        show(uploads, section, facts)
        if dry_run or not (agreed or _confirmed()):
            console().print(f"\nNothing was sent{': this was a dry run' if dry_run else ''}.")
            return
        for upload in uploads:
            with _hub_errors(upload.repo):
                address = send(upload, section)
            console().print(f"{upload.kind}: {address}", markup=False)


def require_section(recipe: Recipe) -> Publish:
    """Raises UserError where the recipe says nothing of publishing."""
    if recipe.publish is None:
        fix = "add publish: {repo: OWNER/NAME} to the recipe, or publish.repo=OWNER/NAME to the command"
        raise UserError("the recipe does not say where to publish", "publish.repo", fix)
    return recipe.publish


def send(upload: Upload, section: Publish) -> str:
    """Make the repository hold the folder; returns the address of the commit.

    Files that are there already are not sent; weights of an earlier checkpoint that this one has not are removed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, revision = HfApi(), section.revision or "main"
    api.create_repo(upload.repo, private=section.private, exist_ok=True)
    if section.private and not api.repo_info(upload.repo).private:
        fix = "set publish.private: false, make it private, or name another"
        raise UserError(f"{upload.repo} is public, and publish.private is true", "publish.repo", fix)
    if section.revision is not None:
        api.create_branch(upload.repo, branch=section.revision, exist_ok=True)
    there = set(api.list_repo_files(upload.repo, revision=revision))
    stale = sorted(name for name in there - upload.files.keys() if "/" not in name and name.endswith(WEIGHTS))
    operations = [CommitOperationAdd(name, str(upload.folder / name)) for name in upload.files]
    removals = [CommitOperationDelete(name) for name in stale]
    message = f"{upload.kind} of {section.repo.partition('/')[2]}, by qlora"
    commit = api.create_commit(upload.repo, [*removals, *operations], commit_message=message, revision=revision)
    return str(commit.commit_url)


def _log_in() -> None:
    """Raise QloraError unless the Hub knows the token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        fix = "set HF_TOKEN, or log in with `hf auth login`; the token needs write access"
        raise QloraError("there is no token for the Hub", "HF_TOKEN", fix) from None


def _license_on_hub(base: str) -> str | None:
    """As the base's card has it; None if the Hub does not say."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        card = HfApi().model_info(base).card_data
    except (HfHubHTTPError, httpx.HTTPError, OSError):
        return None
    found = card.get("license") if card is not None else None
    return found if isinstance(found, str) else None


@contextlib.contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """What the Hub refuses as errors that say what to do. Their texts have no headers, and so no token."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    again = "the same command goes on where this one stopped"
    try:
        yield
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else 0
        fixes = {401: "log in with `hf auth login`, or set another HF_TOKEN", 403: "the token needs write access to it"}
        raise QloraError(f"the Hub refuses: {_line(error)}", repo, fixes.get(code, again)) from None
    except (httpx.HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise QloraError(f"the Hub cannot be reached: {_line(cause)}", repo, again) from None


def _line(error: BaseException) -> str:
    """The first line of what an error says; addresses without their queries, which are signed."""
    text = re.sub(r"\?[^\s'\"]+", "", str(error))
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def _confirmed() -> bool:
    import click

    if not sys.stdin.isatty():
        raise UserError("nobody is there to agree to this", "command line", "add --yes, or --dry-run to look only")
    return click.confirm("\nSend this?")


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
