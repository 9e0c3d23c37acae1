"""The one place where logging is set up."""

import logging
import sys

from tqdm import tqdm


class _ThroughTqdm(logging.Handler):
    """Writes log lines above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    """Bare text for information, the level in front of anything worse."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the project's log lines to standard error, and only the warnings of the libraries below it."""
    handler = _ThroughTqdm()
    handler.setFormatter(_Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for package in ("wan", "dataset", "networks", "modules", "utils", "__main__"):
        logging.getLogger(package).setLevel(level)
