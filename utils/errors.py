"""Errors that people cause and can mend, and how a script ends."""

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from utils.logs import set_up_logging

logger = logging.getLogger(__name__)


class UserError(Exception):
    """What the user supplied is wrong: one line with the option, key or file, what is wrong, and the fix.

    problem: "--blocks_to_swap 40: t2v-14B has 40 blocks", without a full stop; fix: "use 39 or fewer".
    """

    def __init__(self, problem: str, fix: str = ""):
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        parts = (" ".join(part.split()).rstrip(".") for part in (self.problem, self.fix[:1].upper() + self.fix[1:]))
        return " ".join(part if part.endswith(("?", "!")) else f"{part}." for part in parts if part)


def first_line(error: BaseException, secret: str | None = None, most: int = 160) -> str:
    """Return the first line of an error, cut, and without a secret that it may repeat."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (line.replace(secret, "...") if secret else line)[:most]


class Stopped(Exception):
    """A run ended before its time, as it was told to, and has said how to go on."""

    def __init__(self, line: str, code: int):
        super().__init__(line, code)
        self.line, self.code = line, code


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main() and exit: 0, 130 after Ctrl-C, 2 after an error that people can mend.

    Those take one line without a traceback: a UserError, a file that cannot be read or written, too little GPU memory,
    what torch.compile cannot do.
    """
    set_up_logging()
    try:
        main()
    except BrokenPipeError:
        # The reader of our output (head, less) went away; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        code = explain(error)
        if code is None:
            raise
        sys.exit(code)


def explain(error: BaseException) -> int | None:
    """Print in one line why a script ends and return its exit code; None, without a line, for a fault of our own."""
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted; files already written are complete", 130)
    if isinstance(error, Stopped):
        return _say(error.line, error.code)
    if isinstance(error, UserError):
        return _say(f"error: {error}", 2)
    if isinstance(error, OSError) and error.errno in _FILE_ERRORS:
        problem, fix = _FILE_ERRORS[error.errno]
        return explain(UserError(f"{error.filename}: {problem}" if error.filename else problem, fix))
    if isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError":  # torch's; --help is not to wait
        problem = str(error).partition(". GPU ")[0]  # what follows counts the memory of every process
        return explain(UserError(f"not enough GPU memory ({problem})", "see docs/memory.md for what saves some"))
    if any(base.__module__.startswith(_COMPILERS) for base in type(error).__mro__):
        fix = "run without --compile and --dynamo_backend; with TORCHDYNAMO_VERBOSE=1 torch says more"
        return explain(UserError(f"a block of the DiT could not be compiled ({_compiler_said(error)})", fix))
    return None


def _say(line: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return code


_COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch")


def _compiler_said(error: Exception) -> str:
    """Return the one line that says most: of a compiler's output the first, else the one below "raised:", or the first.

    All that torch says is pages, with the generated code and the whole command of the compiler.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    heads = [number for number, line in enumerate(lines[:-1]) if line == "Output:" or line.endswith(" raised:")]
    return lines[heads[-1] + 1 if heads else 0][:300]


_FREE_SPACE = "free some space and run again"
_FILE_ERRORS = {  # what is wrong, and the fix
    errno.ENOSPC: ("cannot be written (the disk is full)", _FREE_SPACE),
    errno.EDQUOT: ("cannot be written (the quota is used up)", _FREE_SPACE),
    errno.EFBIG: ("cannot be written (the file would be too large)", _FREE_SPACE),
    errno.EACCES: ("there is no permission to read or write it", "change its permissions or choose another path"),
    errno.EPERM: ("there is no permission to read or write it", "change its permissions or choose another path"),
    errno.EROFS: ("cannot be written (the file system is read-only)", "choose another path"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", "choose another path"),
    errno.EISDIR: ("is a folder, but a file is to go there", "choose another path"),
    errno.EEXIST: ("is a file, but a folder is needed there", "choose another path"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EIO: ("the disk reports an error", "copy the file from elsewhere or check the disk"),
}
