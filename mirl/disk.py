"""Two calls that some file systems do not have, and that nothing depends on where they are missing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# S3 mounts, blobfuse, CIFS and NTFS answer a chmod with the first; older CIFS and some FUSE the fsync of a folder with
# one of the others.
_NO_CHMOD = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


def set_mode(path: Path | str, mode: int) -> None:
    """Set the permissions of ``path``, where the file system has any."""
    try:
        os.chmod(path, mode)
    except OSError as error:
        if error.errno not in _NO_CHMOD:
            raise


def sync(path: Path | str) -> None:
    """Bring a file, or the names in a folder, to the disk.

    A file that cannot be synced is an OSError. A folder is synced where the file system can do that.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)
