"""What the daemon writes on stderr while it runs: lines for people, or one JSON object a line.

`hexmesh.progress` carries what the person who typed `hexmesh join` wants to see. A record may bring an
`event` (`extra={"event": "mesh_founded"}`), a stable name for machines.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import TextIO

from daemon.config import LogFormat

PROGRESS = "hexmesh.progress"

_DIM, _YELLOW, _RED, _RESET = "\x1b[2m", "\x1b[33m", "\x1b[31m", "\x1b[0m"


def set_up_logging(log_format: LogFormat) -> None:
    """Send hexmesh's INFO and everybody's WARNING to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    is_json = log_format == "json"
    handler.setFormatter(JsonLines() if is_json else TextLines(colours=wants_colours(sys.stderr)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("hexmesh").setLevel(logging.INFO)


def wants_colours(stream: TextIO) -> bool:
    """Whether a person looks at the stream, and has not asked for plain text."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


class TextLines(logging.Formatter):
    """`12:30:01 joined mesh 7f3a...`; other loggers than the progress one are named."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        message = printable(record.getMessage())
        if record.name != PROGRESS:
            message = f"{record.name} {message}"
        if record.levelno >= logging.WARNING:
            message = self._coloured(
                _RED if record.levelno >= logging.ERROR else _YELLOW, f"{record.levelname} {message}"
            )
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        return f"{self._coloured(_DIM, clock)} {message}"

    def _coloured(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_RESET}" if self._colours else text


def printable(text: str) -> str:
    """On one line and without escape sequences: parts of it may have been chosen by others."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class JsonLines(logging.Formatter):
    """`{"ts", "level", "logger", "event", "message"}` and, with a traceback, `"exception"`."""

    def format(self, record: logging.LogRecord) -> str:
        ts = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, object] = {
            "ts": ts,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", None),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
