"""Root without being root: the same program again, in user, network and mount namespaces of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from tools.netlab.namespaces import why_unavailable

_MARK = "HEXMESH_LAB_UNSHARED"
_MOUNT_AND_RUN = 'mount -t tmpfs tmpfs /run && exec "$@"'


def can_unshare() -> bool:
    """Whether this user may make such namespaces, and is not in them already."""
    if os.environ.get(_MARK) or shutil.which("unshare") is None:
        return False
    return subprocess.run(unshared(["true"]), capture_output=True).returncode == 0


def unshared(command: Sequence[str]) -> list[str]:
    """`command` as root of namespaces of its own, with an empty /run for `ip netns`."""
    return ["unshare", "-Urnm", "sh", "-c", _MOUNT_AND_RUN, "sh", "env", f"{_MARK}=1", *command]


def become_able() -> None:
    """Replace this process by the same one in namespaces of its own, if a lab needs that and it helps."""
    if why_unavailable() is not None and os.geteuid() != 0 and can_unshare():
        command = unshared([sys.executable, *sys.orig_argv[1:]])
        os.execvp(command[0], command)
