"""Files that exist when they are needed and are complete once they have their name."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from utils.errors import UserError
from utils.options import suggest


def require_file(path: Path | str | None, option: str, what: str) -> Path:
    """Return the path of a file that exists and is not empty, or raise UserError.

    option: "--vae"; what: "the VAE's weights", as in "--vae is missing: give the VAE's weights".
    """
    if path is None or str(path) == "":
        raise UserError(f"{option} is missing", f"give {what}: {option} PATH")
    path = Path(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())[:3]
        inside = f", e.g. {path / files[0]}" if files else ""
        raise UserError(f"{option} {path}: is a folder, not a file", f"name a file in it{inside}")
    if not path.is_file():
        near = suggest(path.name, (file.name for file in path.parent.iterdir())) if path.parent.is_dir() else ""
        fix = near or ("check the path" if path.parent.is_dir() else f"there is no folder {path.parent} either")
        raise UserError(f"{option} {path}: no such file", fix)
    if path.stat().st_size == 0:
        raise UserError(f"{option} {path}: the file is empty", "copy or download it again")
    if not os.access(path, os.R_OK):
        raise UserError(f"{option} {path}: there is no permission to read it", "change its permissions")
    return path


def require_writable_folder(folder: Path, option: str) -> Path:
    """Return a folder in which files can be made, after making it where it is missing, or raise UserError."""
    blocking = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if blocking.exists() and not blocking.is_dir():
        raise UserError(f"{option} {folder}: {blocking} is a file, not a folder", "choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex[:8]}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{option} {folder}: cannot be written to ({error.strerror})", "choose another folder"
        ) from None
    return folder


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; afterwards flush that file to the disk and give it its real name.

    When the body fails, the temporary file is removed and whatever had the name before is untouched. The temporary
    name keeps the suffix, because encoders choose their format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:100]}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # Some writers (safetensors) make files that only their owner may read.
        os.chmod(temporary, mode)
        # Windows flushes only handles that are open for writing.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # People know the file by its own name; a full disk has none at all where a library writes to an open file.
        if error.errno and error.filename in (None, str(temporary), temporary):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
