"""Files that exist when they are needed and are complete once they have their name."""

import contextlib
import errno
import io
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.options import suggest

try:
    import fcntl
except ImportError:  # Windows, which refuses to delete files that are open
    fcntl = None

_UNFINISHED = re.compile(r"\..*\.[0-9a-f]{8}\.unfinished")
_ABANDONED = 60  # seconds without a change; where there are no locks


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


def require_safetensors_output(path: Path, option: str) -> None:
    """Raise UserError for a path that no safetensors file can be written to, after making its folder."""
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{option} {path}: not a .safetensors file", "give the name the suffix .safetensors")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder, not a file", "name a file in it")
    require_writable_folder(path.absolute().parent, option)


def require_writable_folder(folder: Path, option: str) -> Path:
    """Return a folder in which files can be made, after making it where it is missing, or raise UserError."""
    blocking = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    if blocking.exists() and not blocking.is_dir():
        raise UserError(f"{option} {folder}: {blocking} is a file, not a folder", "choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = _unfinished_name(folder / "probe")
        probe.touch()
        probe.unlink(missing_ok=True)
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
            raise OSError(error.errno, error.strerror, str(path)) from error  # PyAV's own cannot be changed
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file under a temporary name, which `remove_leftovers` knows, and rename it once it is on the disk.

    Raises UserError with the bytes needed and free where the disk is full, else OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, file = _claim(path)
    try:
        with file:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
            if fcntl:  # locked until it has its name
                os.replace(temporary, path)
        if not fcntl:
            os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path, sum(map(len, parts))) from error
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def disk_full(path: Path, needed: int) -> UserError:
    """Return the error of a file of so many bytes that there is no room for."""
    free = shutil.disk_usage(path.parent).free
    return UserError(
        f"{path}: {needed:,} bytes are needed, but the disk has {free:,} free",
        "free some space and run again with --skip_existing; the files before it are complete",
    )


def remove_leftovers(folder: Path, dry_run: bool = False) -> list[Path]:
    """Remove the unfinished files that a killed process left in a folder, and return them; not what one still writes.

    dry_run: only return them.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError):  # that of a lock that is held above all
                if fcntl is None:
                    if time.time() - path.stat().st_mtime < _ABANDONED:
                        continue
                    if not dry_run:
                        path.unlink()
                else:
                    with open(path, "rb+") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if not dry_run:
                            path.unlink()
                found.append(path)
    return found


def _unfinished_name(path: Path) -> Path:
    return path.with_name(f".{path.stem[:100]}.{uuid.uuid4().hex[:8]}.unfinished")


def _claim(path: Path) -> tuple[Path, io.FileIO]:
    """Return a new temporary file beside `path`, and it opened and locked, so that nobody takes it for a leftover."""
    while True:
        temporary = _unfinished_name(path)
        file = open(temporary, "xb", buffering=0)  # noqa: SIM115
        if fcntl is None:
            return temporary, file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(temporary.stat(), os.fstat(file.fileno())):
                return temporary, file
        except (BlockingIOError, FileNotFoundError):
            pass  # removed by another process before it was locked
        except OSError:  # a file system without locks: its leftovers stay
            return temporary, file
        file.close()
