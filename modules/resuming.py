"""Long prompt files: a line that fails costs no other, and --skip_existing goes on where a run was stopped."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from modules.outputs import Result, load_latent
from modules.prompts import Request
from utils.errors import UserError
from wan.auto_swap import ran_out_of_memory

logger = logging.getLogger(__name__)


class Failures:
    """Those of several requests that could not be made, while the others go on."""

    def __init__(self, count: int):
        self.count = count
        self.problems: list[str] = []

    @contextlib.contextmanager
    def attempt(self, request: Request) -> Iterator[None]:
        """Note what keeps the body from making a request, but let through what would keep all others from it too."""
        try:
            yield
        except (UserError, RuntimeError) as error:
            if self.count == 1 or not (isinstance(error, UserError) or ran_out_of_memory(error)):
                raise
            # The error holds the tensors of the attempt, so that only its text is kept.
            problem = error.problem if isinstance(error, UserError) else str(error).partition(". GPU ")[0]
            self.problems.append(f"'{request.prompt[:60]}' (seed {request.seed}): {problem}")
            logger.error("not made, the others go on: %s", self.problems[-1])

    def end(self) -> None:
        """Raise UserError if there were any."""
        if self.problems:
            raise UserError(
                f"{len(self.problems)} of {self.count} videos were not made: {'; '.join(self.problems)}",
                "the others are complete; --skip_existing leaves them out in another run",
            )


def stem_of(file: Path, described: Mapping[str, Any]) -> str:
    """Return the name of a line's result, the same in every run that would make the same of it."""
    # Not of what has no effect on the result: where files are, how memory is saved.
    said = {name: value for name, value in described.items() if name not in ("software", "options")}
    text = json.dumps(said, sort_keys=True, ensure_ascii=False)
    return f"{file.stem}_{described['seeds']}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def with_latents_kept(results: Sequence[Result]) -> list[Result]:
    """Return results whose latents are files until they are decoded: a stopped run has not made them in vain."""
    return [
        replace(result, waiting=None if result.files.latent else result.files.beside("_latent.safetensors"))
        for result in results
    ]


def left_to_make(
    requests: Sequence[Request], results: Sequence[Result]
) -> tuple[list[Request], list[Result], list[tuple[Tensor, Result]]]:
    """Return the requests whose files are not there, with their results, and what only has to be decoded."""
    made, waiting, left = 0, [], []
    for request, result in zip(requests, results, strict=True):
        if all(path.exists() for path in result.last_files()):
            made += 1
        elif latent := _latent_of(result):
            waiting.append((latent[0], result))
        else:
            left.append((request, result))
    logger.info("--skip_existing: %d are there, %d only to be decoded, %d to be made", made, len(waiting), len(left))
    return [request for request, _ in left], [result for _, result in left], waiting


def _latent_of(result: Result) -> tuple[Tensor, Mapping[str, Any]] | None:
    path = result.files.latent or result.waiting
    return load_latent(path) if path is not None and path.exists() else None
