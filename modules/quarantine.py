"""The media files that could not be used, as quarantine.jsonl beside the caches that they have none of."""

import json
from collections.abc import Mapping
from pathlib import Path

from utils.files import atomic_path

NAME = "quarantine.jsonl"
NO_CAPTION = "has no caption"


def write_quarantine(folder: Path, failed: Mapping[Path, str], captions_only: bool = False) -> None:
    """List what failed, one JSON object {"path", "reason"} a line, in place of what a run before has listed.

    captions_only: the run has looked at captions alone; what is listed for another reason stays. An empty list is no
    file.
    """
    path = folder / NAME
    entries = {str(media): reason for media, reason in failed.items()}
    if captions_only:
        entries |= {media: reason for media, reason in _listed(path).items() if not reason.endswith(NO_CAPTION)}
    if not entries:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"path": media, "reason": entries[media]}, ensure_ascii=False) for media in sorted(entries)]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _listed(path: Path) -> dict[str, str]:
    """Return {media file: reason} of a list; lines that are not this project's are passed over."""
    listed = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            listed[str(entry["path"])] = str(entry["reason"])
        except (ValueError, TypeError, KeyError):
            continue
    return listed
