"""Files and states to Hugging Face while a run goes on, and a state from there to go on with."""

import logging
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError, first_line
from utils.options import option, suggest

logger = logging.getLogger(__name__)

KINDS = ("model", "dataset", "space")


@dataclass(frozen=True)
class HubOptions:
    """Hugging Face"""

    huggingface_repo_id: str | None = option(
        None, "upload each saved file to this repository, owner/name; made where it is not there"
    )
    huggingface_repo_type: str | None = option(None, "what it is (default: model)", choices=KINDS)
    huggingface_path_in_repo: str | None = option(None, "folder in it (default: none)")
    huggingface_token: str | None = option(
        None, "token that may write; the environment variable HF_TOKEN is better, or `hf auth login`", secret=True
    )
    huggingface_repo_visibility: str | None = option(
        None, "of a repository that is made (default: private)", choices=("public", "private")
    )
    save_state_to_huggingface: bool = option(False, "upload states as well")
    resume_from_huggingface: bool = option(
        False, "--resume names a state there, as owner/name/path[:revision[:repository type]]"
    )
    async_upload: bool = option(False, "upload beside the training, which waits for what is left at its end")


def _api(options: HubOptions):
    from huggingface_hub import HfApi  # takes a second

    return HfApi(token=options.huggingface_token)


def check_hub(options: HubOptions, saves_states: bool) -> None:
    """Raise UserError for a repository that cannot be reached; make one that is not there."""
    repository = options.huggingface_repo_id
    if repository is None:
        for name in ("huggingface_path_in_repo", "save_state_to_huggingface", "async_upload"):
            if getattr(options, name):
                logger.warning("--%s: ignored without --huggingface_repo_id", name)
        return
    if options.save_state_to_huggingface and not saves_states:
        logger.warning("--save_state_to_huggingface: there are no states without --save_state")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--huggingface_repo_id {repository}: is not of the form owner/name")
    from huggingface_hub.errors import RepositoryNotFoundError

    api, kind = _api(options), options.huggingface_repo_type or "model"
    private = options.huggingface_repo_visibility != "public"
    try:
        try:
            api.repo_info(repository, repo_type=kind)
        except RepositoryNotFoundError:  # also where the token must not see it: then making it fails
            api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
            logger.info("made the %s repository %s at Hugging Face", "private" if private else "public", repository)
    except Exception as error:
        raise UserError(
            f"--huggingface_repo_id {repository}: cannot be reached ({reason(error, options)})",
            "check the name, the network and the token: HF_TOKEN, or `hf auth login`",
        ) from None


def resumed_from(options: HubOptions, resume: str | None) -> str | None:
    """Return --resume, or with --resume_from_huggingface the folder that the state it names was downloaded to."""
    if not options.resume_from_huggingface:
        return resume
    form = "owner/name/path[:revision[:repository type]]"
    reference, *more = (resume or "").split(":")
    owner, _, path = reference.partition("/")
    name, _, path = path.partition("/")
    if not (owner and name and path.strip("/")) or len(more) > 2:
        given = f"--resume {resume}" if resume else "--resume is missing"
        raise UserError(f"{given}: --resume_from_huggingface needs a state there", f"write {form}")
    revision, kind = (*more, None, None)[:2]
    if kind and kind not in KINDS:
        raise UserError(f"--resume {resume}: {kind} is no type of repository", suggest(kind, KINDS) or ", ".join(KINDS))
    api, folder = _api(options), path.strip("/")
    where = {"repo_type": kind or "model", "revision": revision or None}
    try:
        every = api.list_repo_files(f"{owner}/{name}", **where)
        files = [file for file in every if file.rpartition("/")[0] == folder]
        if files:
            logger.info("downloading %s from %s/%s", folder, owner, name)
            places = [Path(api.hf_hub_download(f"{owner}/{name}", file, **where)) for file in files]
            return str(places[0].parent)
    except Exception as error:
        raise UserError(
            f"--resume {resume}: cannot be downloaded ({reason(error, options)})",
            "check the name, the network and the token: HF_TOKEN, or `hf auth login`",
        ) from None
    states = sorted({file.rpartition("/")[0] for file in every if "-state/" in file})
    fix = suggest(folder, states) or (f"there are {', '.join(states)}" if states else "it holds no state at all")
    raise UserError(f"--resume {resume}: there is no {folder} in {owner}/{name}", fix)


class Uploads:
    """Uploads files one after the other. One that fails never ends a run: it is tried again at the end.

    Beside the training with --async_upload; wait_for() is to be called before a file is deleted.
    """

    def __init__(self, options: HubOptions, warn: Callable[..., None] = logger.warning):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # they would break the run's own
        self.options, self.warn = options, warn
        self.failed: dict[Path, str] = {}
        self._pending: dict[Path, threading.Event] = {}
        self._queue: queue.Queue[Path] | None = None
        if options.async_upload:
            self._queue = queue.Queue()
            # Not one that Python waits for: a second Ctrl-C is to end the process.
            threading.Thread(target=self._work, daemon=True).start()

    def add(self, path: Path) -> None:
        """Upload a file or a folder, or see to it that it is uploaded."""
        if self._queue is None:
            self._upload(path)
        else:
            self._pending[path] = threading.Event()
            self._queue.put(path)

    def wait_for(self, path: Path) -> None:
        """Return once a path that was to be uploaded can be deleted."""
        if path in self._pending:
            self._pending[path].wait()

    def finish(self) -> None:
        """Wait for all that is on its way, try once more what has failed, and tell what has failed for good."""
        for uploaded in list(self._pending.values()):
            uploaded.wait()
        for path in list(self.failed):
            self._upload(path, told=True)
        for path, why in self.failed.items():
            self.warn("%s is not at Hugging Face (%s); upload it by hand", path, why)

    def _work(self) -> None:
        while True:
            path = self._queue.get()
            self._upload(path)
            self._pending[path].set()

    def _upload(self, path: Path, told: bool = False) -> None:
        self.failed.pop(path, None)
        options = self.options
        target = "/".join(filter(None, [(options.huggingface_path_in_repo or "").strip("/"), path.name]))
        where = {"repo_id": options.huggingface_repo_id, "repo_type": options.huggingface_repo_type or "model"}
        try:
            api = _api(options)
            if path.is_dir():
                api.upload_folder(folder_path=path, path_in_repo=target, **where)
            else:
                api.upload_file(path_or_fileobj=path, path_in_repo=target, **where)
            logger.info("uploaded %s to %s", target, options.huggingface_repo_id)
        except Exception as error:
            self.failed[path] = reason(error, options)
            if not told:
                self.warn("%s could not be uploaded (%s); it is tried again at the end", path, self.failed[path])


def reason(error: BaseException, options: HubOptions) -> str:
    return first_line(error, options.huggingface_token, 200).rstrip(".")
