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
        lines = [
            part.strip().rstrip(".") for part in (self.problem, self.fix[:1].upper() + self.fix[1:]) if part.strip()
        ]
        text = ". ".join(" ".join(line.split()) for line in lines)
        return text if text.endswith(("?", "!")) else text + "."


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main() and exit: 0, 2 after a UserError (one line, no traceback), 130 after Ctrl-C."""
    set_up_logging()
    script = Path(sys.argv[0]).name
    try:
        main()
    except UserError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted; files already written are complete", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) went away; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        reason = _NO_ROOM.get(error.errno)
        if reason is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{script}: error: {where}cannot be written ({reason}). Free some space and run again.", file=sys.stderr)
        sys.exit(2)


_NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "File too large"}
