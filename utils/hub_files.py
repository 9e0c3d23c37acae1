"""Files on the Hugging Face hub, named as hf://owner/repo/path/file, by way of its client's cache."""

import logging
import re
from pathlib import Path

from utils.errors import UserError
from utils.options import suggest

logger = logging.getLogger(__name__)

# Path("hf://a/b") has one slash left; a revision may stand behind the repository's name.
_NAME = re.compile(r"hf:/+(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")
_SHARD = re.compile(r"(?P<stem>.*-)\d{5}-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


def is_remote(path: Path) -> bool:
    """Return whether a path is a file on the hub."""
    return path.as_posix().startswith("hf:/")


def local_path(path: Path, option: str) -> Path:
    """Return where a file of the hub lies on this machine, downloaded if need be with all parts of its kind.

    Other paths come back as they are. Offline mode (HF_HUB_OFFLINE=1) and the cache's place (HF_HOME) are the client's.
    """
    if not is_remote(path):
        return path
    match = _NAME.fullmatch(path.as_posix())
    if match is None:
        raise UserError(f"{option} {path.as_posix()}: not the name of a file on the hub", "write hf://owner/repo/file")
    name = match["file"]
    if shard := _SHARD.fullmatch(name):
        count = int(shard["count"])
        for number in range(1, count + 1):
            part = f"{shard['stem']}{number:05d}-of-{count:05d}{shard['suffix']}"
            download(match["repo"], part, match["revision"], option)
    return download(match["repo"], name, match["revision"], option)


def download(repo: str, name: str, revision: str | None, option: str, folder: Path | None = None) -> Path:
    """Return the local path of a file in a repository, in the cache or, where one is given, in a folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{option} hf://{repo}/{name}"
    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_dir=folder))
    except LocalEntryNotFoundError:
        raise UserError(
            f"{where}: is not in the cache, and the hub cannot be reached",
            "connect, unset HF_HUB_OFFLINE, or give the path of a local file",
        ) from None
    except EntryNotFoundError:
        raise UserError(f"{where}: no such file there", _nearest(repo, name, revision)) from None
    except GatedRepoError:
        raise UserError(f"{where}: asks for consent first", f"log in and accept at huggingface.co/{repo}") from None
    except RevisionNotFoundError:
        raise UserError(f"{where}: there is no revision {revision}", "leave it out for the newest") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{where}: no such repository, or not for you", "check its name; `hf auth login` shows private ones"
        ) from None
    except Exception as error:  # of the client's HTTP library, which is not the same in all its versions
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{where}: the download failed ({reason})", "run it again, it goes on from there") from None


def _nearest(repo: str, name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repo, revision=revision)
    except Exception:  # the answer is a hint at most
        return f"see huggingface.co/{repo}"
    same = [file for file in files if file.endswith(f"/{name.rsplit('/', 1)[-1]}")]
    return f"did you mean hf://{repo}/{same[0]}?" if same else suggest(name, files) or f"see huggingface.co/{repo}"
