"""Downloads from the Hugging Face hub, with errors that say what to do."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, cast

from hexmesh.errors import InvalidInput, NotReady

_REDUNDANT_FILES = ("*/*", "consolidated*.safetensors")
"""Folders with other formats, and a second copy of the weights that some models carry."""


def download(
    hub_id: str,
    patterns: Sequence[str],
    cache_dir: Path | None,
    progress: Callable[[int, int], None] | None,
    *,
    is_local_only: bool = False,
) -> Path:
    """The folder of a snapshot with the files that match `patterns`, complete. Blocks.

    Honours HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN. A broken transfer is resumed; files that are
    already there are not fetched again.
    """
    from huggingface_hub import errors, snapshot_download  # slow to import, and only this needs it

    # The hub library has changed its HTTP library before; its own error derives from that library's.
    transport_error = cast(type[Exception], errors.HfHubHTTPError.__bases__[0])
    try:
        return Path(
            snapshot_download(
                hub_id,
                cache_dir=cache_dir,
                allow_patterns=list(patterns),
                ignore_patterns=list(_REDUNDANT_FILES),
                token=os.environ.get("HF_TOKEN") or False,
                local_files_only=is_local_only,
                tqdm_class=_bar_class(progress),
            )
        )
    except errors.GatedRepoError as error:
        raise InvalidInput(
            f"the hub gives {hub_id!r} only to those who accepted its terms",
            code="model_is_gated",
            next_step="accept them on the model's page and set HF_TOKEN",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise InvalidInput(
            f"the hub has no model {hub_id!r}, or it is private",
            code="unknown_model",
            next_step="check the id, set HF_TOKEN for a private model, or give a folder",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(hub_id, error) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(hub_id) from error
        raise _broken_off(hub_id, error) from error
    except transport_error as error:
        raise _broken_off(hub_id, error) from error


def _unreachable(hub_id: str, error: Exception) -> NotReady:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return NotReady(
            f"HF_HUB_OFFLINE is set and the cache does not hold all of {hub_id!r}",
            code="hub_offline",
            next_step="unset HF_HUB_OFFLINE once, or give a folder",
        )
    return NotReady(
        f"the hub at {constants.ENDPOINT} cannot be reached and the cache does not hold all of {hub_id!r}",
        code="hub_unreachable",
        next_step="check the network and HF_ENDPOINT, or give a folder",
    )


def _broken_off(hub_id: str, error: Exception) -> NotReady:
    what = next(iter(str(error).splitlines()), type(error).__name__)
    return NotReady(
        f"the download of {hub_id!r} broke off: {what}",
        code="download_failed",
        next_step="start again: it goes on where it stopped",
    )


def _disk_full(hub_id: str) -> NotReady:
    return NotReady(
        f"the disk is full: {hub_id!r} does not fit into the hub's cache",
        code="disk_full",
        next_step="make room, or point HF_HOME to a larger disk",
    )


def _bar_class(progress: Callable[[int, int], None] | None) -> type[Any]:
    """A progress bar that draws nothing and reports bytes; the hub library makes several at once."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    lock, most = Lock(), [0]

    class ReportingBar(tqdm):  # type: ignore[misc]
        monitor_interval = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            drawn: bool | None = super().update(n)
            if progress is not None and self.unit == "B" and self.total:
                with lock:
                    if self.n > most[0]:
                        most[0] = int(self.n)
                        progress(most[0], int(self.total))
            return drawn

    return ReportingBar
