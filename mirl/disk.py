"""Make two calls that some file systems do not have. Nothing depends on them if they are missing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# S3 mounts, blobfuse, CIFS and NTFS refuse a chmod with one of _NO_CHMOD. Older CIFS and some FUSE file systems refuse
# the fsync of a folder with one of _NO_FOLDER_SYNC.
_NO_CHMOD = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


def set_mode(path: Path | str, mode: int) -> None:
    """Set the permissions of ``path`` if the file system has any."""
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in _NO_CHMOD:
            raise


def sync(path: Path | str) -> None:
    """Bring a file, or the names in a folder, to the disk.

    A file that cannot be synced is an OSError. A folder is synced if the file system can sync folders.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
