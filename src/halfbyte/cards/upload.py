"""`halfbyte push`: the checkpoint to the hub, weights first, card last, and only what was proven.

Refused, with what to do next: no quantize record, no card, no verify record or one with a failed check, weights whose sizes
are not the recorded ones. The card goes last, because until it is there nobody finds the repository.

huggingface_hub streams and resumes large folders itself (2.x: `upload_folder` commits in batches and skips what is already
there), so an interrupted push is continued by running it again. Left out: what was not written by halfbyte or carried over
by it, dot files and the work folder of an unfinished job; `dry_run` names them.

The catch: the card was written before the repository had a name. The program on it is told the repository's while it is
uploaded; the file on disk stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cards.evidence import Evidence, gather
from halfbyte.cards.usage import addressed_to
from halfbyte.cards.writing import CARD
from halfbyte.errors import CheckFailed, HalfbyteError, OutputError, UsageError
from halfbyte.records import FOLDER

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def push(
    out: str | Path, repo: str, *, private: bool = False, dry_run: bool = False, message: str | None = None
) -> dict[str, Any]:
    """Upload the checkpoint in `out` to the model repository `repo`, made if it is not there.

    private  create the repository as private (an existing one keeps its visibility)
    dry_run  only say what would go; touches no network
    message  of the commit

    returns  {"repo", "dry_run", "files": [{"name", "bytes"}], "bytes", "left_out": [names], "url": None if dry}
    raises   UsageError (repo, out), OutputError (no records, no card, changed weights), CheckFailed (not verified),
             HalfbyteError (login, rights, network)
    """
    folder = Path(out)
    if not _REPO.fullmatch(repo):
        raise UsageError(f"{repo!r} is not a repository name", where="REPO", todo="write it as org/name")
    check_ready(folder)
    evidence = gather(folder)
    check_verified(evidence)
    files, left_out = manifest(evidence)
    result: dict[str, Any] = {
        "repo": repo,
        "dry_run": dry_run,
        "files": [{"name": name, "bytes": (folder / name).stat().st_size} for name in files],
        "left_out": left_out,
        "url": None,
    }
    result["bytes"] = sum(entry["bytes"] for entry in result["files"])
    if not dry_run:
        result["url"] = _upload(
            folder, repo, files, private=private, message=message or f"{folder.resolve().name}: NF4 checkpoint"
        )
    return result


def check_ready(folder: Path) -> None:
    """Raises OutputError unless `folder` holds a finished checkpoint with its card."""
    if not folder.is_dir():
        raise UsageError("is not a folder", where=str(folder), todo="name the folder of a checkpoint")
    if not (folder / FOLDER / "quantize.json").is_file():
        raise OutputError(
            "no quantize record: not a halfbyte checkpoint", where=str(folder), todo="run halfbyte quantize"
        )
    if not (folder / CARD).is_file():
        raise OutputError(f"no {CARD}", where=str(folder), todo=f"run halfbyte card {folder}")


def check_verified(evidence: Evidence) -> None:
    """Raises CheckFailed unless the verify record has passed checks and no failed one."""
    todo = f"run halfbyte verify {evidence.folder}, then halfbyte card {evidence.folder}"
    record = evidence.verify
    if record is None:
        raise CheckFailed("these weights were never verified", where=str(evidence.folder), todo=todo)
    failed = [f"{check['id']} {check['title']}: {check['detail']}" for check in evidence.failed_checks]
    if failed:
        raise CheckFailed("verification failed: " + "; ".join(failed), where=str(evidence.folder), todo=todo)
    if record.get("passed") is not True or not any(check["status"] == "passed" for check in record["checks"]):
        raise CheckFailed("the verify record proves nothing: no check passed", where=str(evidence.folder), todo=todo)


def manifest(evidence: Evidence) -> tuple[list[str], list[str]]:
    """(files that go, names that stay), both sorted: records decide, not the folder's contents.

    raises OutputError if a recorded file is not there or is a link
    """
    quantize, folder = evidence.quantize, evidence.folder
    records = [f"{FOLDER}/{path.name}" for path in (folder / FOLDER).glob("*.json") if not path.name.startswith(".")]
    wanted = {*quantize["files"], *quantize.get("companions", {}), CARD, *records}
    for name in wanted:
        path = folder / name
        if not path.is_file() or path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
            raise OutputError(
                "recorded, but no plain file in the folder", where=str(path), todo="run halfbyte quantize again"
            )
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted(wanted), sorted(present - wanted)


def _upload(folder: Path, repo: str, files: list[str], *, private: bool, message: str) -> str:
    """Create the repository, send the files, then the card; returns the repository's address."""
    text = addressed_to((folder / CARD).read_text(encoding="utf-8"), repo)
    with clear_errors(repo):
        api = hub()
        url = str(api.create_repo(repo, repo_type="model", private=private or None, exist_ok=True))
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type="model",
            commit_message=message,
            allow_patterns=[_literal(name) for name in files if name != CARD],
        )
        api.upload_file(
            path_or_fileobj=text.encode(),
            path_in_repo=CARD,
            repo_id=repo,
            repo_type="model",
            commit_message=f"{message}: card",
        )
    return url


def hub() -> HfApi:
    """The client; a seam, so that tests need no network."""
    from huggingface_hub import HfApi

    return HfApi(library_name="halfbyte")


def _literal(name: str) -> str:
    """A pattern that matches exactly `name` (huggingface_hub reads names as shell patterns)."""
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextmanager
def clear_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub and the network raise into one sentence with what to do next."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError:
        raise HalfbyteError(
            "no login for the hub on this machine", where=repo, todo="hf auth login, then push again"
        ) from None
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        todo = {
            401: "hf auth login, then push again",
            403: "use a token with write access to this organisation",
            404: "check the name of the organisation",
        }.get(status or 0, "push again: what is already there is not sent twice")
        raise HalfbyteError(f"the hub says {status or 'no'}: {_first_line(error)}", where=repo, todo=todo) from None
    except Exception as error:  # the client and its HTTP library raise a dozen kinds: all mean the same to the reader
        raise HalfbyteError(
            f"upload broke off: {_first_line(error)}",
            where=repo,
            todo="push again: what is already there is not sent twice",
        ) from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
