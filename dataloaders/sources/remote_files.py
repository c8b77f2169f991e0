"""Describe, list and download files behind s3:// and http(s):// by fsspec.

A server's error becomes one of three exceptions: an OSError of a moment, after which the caller tries again with the
patience that a file system gets; `Changed`, if the file is no longer the one that was asked for; or a UserError.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from mirl.dataloaders.errors import one_line
from mirl.dataloaders.sources.containers import needed
from mirl.dataloaders.sources.paths import shown
from mirl.errors import UserError

_BLOCK = 2**23  # bytes of an S3 request
_CHUNK = 2**20
_CONNECT_S, _READ_S = 15, 30
_MOMENTS = frozenset([408, 425, 429, *range(500, 600)])
_GONE, _FORBIDDEN, _OTHER_VERSION = (404, 410), (401, 403), (412, 416)
_OF_NETWORK = ("ConnectionError", "TimeoutError", "HTTPClientError", "ClientError", "IncompleteRead", "FSTimeoutError")
T = TypeVar("T")


class Changed(Exception):
    """The file is not the one that was asked for, because it was written again."""


@dataclass(frozen=True)
class RemoteFile:
    """A remote file is told by its server. tag: of this version, its ETag or else the time of its last change."""

    url: str
    size: int
    tag: str

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return urlsplit(self.url).path.rpartition("/")[2]


def describe(url: str) -> RemoteFile:
    """Ask the server to describe a file. UserError if it does not exist, is forbidden, or has no stated size."""
    info = _asked(url, lambda: _system(url).info(url, **({"refresh": True} if _is_s3(url) else {})))
    return _described(url, info)


def list_folder(url: str) -> Iterator[RemoteFile]:
    """List the files at any depth below an S3 prefix, sorted by name. UserError for an address of the web."""
    if not _is_s3(url):
        raise UserError(
            f"{shown(url)} is no .tar, and the web has no folders: name the shards, {shown(url)}/shard-{{000..099}}.tar"
        )
    prefix = url.rstrip("/") + "/"
    found = _asked(url, lambda: _system(url).find(prefix, detail=True, refresh=True))
    for name in sorted(found):
        yield _described(f"s3://{name}", found[name])


class Download:
    """A download appends a remote file to a local one, piece by piece.

    Bytes that came before a connection broke are kept, and the next piece follows them. If a server sends the whole
    file whatever part it is asked for, the download begins again.
    """

    def __init__(self, remote: RemoteFile, file: IO[bytes]) -> None:
        self.remote, self.file = remote, file
        self._whole_only = False

    def more(self) -> None:
        """Append one byte or more. OSError of a moment if nothing came that can be kept, `Changed`, or UserError."""
        remote, before = self.remote, self.file.tell()
        if _is_s3(remote.url):
            end = min(before + _BLOCK, remote.size)
            block = _asked(remote.url, lambda: _system(remote.url).cat_file(remote.url, start=before, end=end))
            if len(block) != end - before:
                raise OSError(errno.EIO, f"{end - before} bytes were asked for and {len(block)} came")
            _write(self.file, block)
            return
        asyn = needed("fsspec.asyn", "remote", "http(s):// places", "fsspec")
        system = _system(remote.url)
        try:
            _asked(remote.url, lambda: asyn.sync(system.loop, self._stream, system, before))
        except OSError:
            if self._whole_only:
                self._begin_again()
            if self.file.tell() <= before:
                raise
        if self.file.tell() <= before:
            raise OSError(errno.EIO, f"the server ended after {self.file.tell()} of {remote.size} bytes")

    async def _stream(self, system: Any, start: int) -> None:
        """Take the file from byte ``start`` on, as long as the connection holds."""
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        if self.remote.tag.startswith('"'):  # a strong ETag; weak ones begin with W/
            headers["If-Match"] = self.remote.tag
        session = await system.set_session()
        async with session.get(system.encode_url(self.remote.url), headers=headers) as response:
            response.raise_for_status()
            place = response.headers.get("Content-Range", "")
            if start and not (response.status == 206 and place.startswith(f"bytes {start}-")):
                self._whole_only = True
                self._begin_again()
            async for chunk in response.content.iter_chunked(_CHUNK):
                if self.file.tell() + len(chunk) > self.remote.size:
                    raise Changed
                _write(self.file, chunk)

    def _begin_again(self) -> None:
        self.file.seek(0)
        self.file.truncate()


def _write(file: IO[bytes], data: bytes) -> int:
    try:
        return file.write(data)
    except OSError as error:
        raise UserError(
            f"the cache {shown(file.name)} cannot be written ({error.strerror}): set MIRL_CACHE to a folder with room"
        ) from None


def _described(url: str, info: dict[str, Any]) -> RemoteFile:
    if info.get("type") == "directory":
        raise UserError(f"{shown(url)} does not exist: check the address")
    size = info.get("size")
    if size is None:
        raise UserError(f"{shown(url)} has no stated size (Content-Length): give a server that states it")
    tag = info.get("ETag") or info.get("Last-Modified") or info.get("LastModified") or ""
    return RemoteFile(url, int(size), str(tag))


def _is_s3(url: str) -> bool:
    return url.startswith("s3:")


def _system(url: str) -> Any:
    return _open_system(urlsplit(url).scheme, os.getpid())


@lru_cache(maxsize=8)
def _open_system(scheme: str, process: int) -> Any:
    """Open fsspec's file system of a scheme. We wait and try again ourselves, so it is told to do neither for long."""
    if scheme == "s3":
        s3fs = needed("s3fs", "remote", "s3:// places")
        system = s3fs.S3FileSystem(
            config_kwargs={"connect_timeout": _CONNECT_S, "read_timeout": _READ_S, "retries": {"max_attempts": 0}},
            skip_instance_cache=True,
        )
        system.retries = 1
        return system
    aiohttp = needed("aiohttp", "remote", "http(s):// places")
    fsspec = needed("fsspec", "remote", "http(s):// places")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
    return fsspec.filesystem("http", client_kwargs={"timeout": timeout, "trust_env": True}, skip_instance_cache=True)


def _asked(url: str, ask: Callable[[], T]) -> T:
    """Return the answer of ``ask``; its errors become one of the three exceptions of this module."""
    try:
        return ask()
    except (UserError, Changed):
        raise
    except Exception as error:  # fsspec, aiohttp and botocore raise many types
        raise _meaning(url, error) from error


def _meaning(url: str, error: Exception) -> Exception:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    status = next((code for one in chain if (code := _status(one)) is not None), None)
    names = {base.__name__ for one in chain for base in type(one).__mro__}
    told = shown(one_line(next((one for one in chain if not isinstance(one, FileNotFoundError)), error)))
    if status in _OTHER_VERSION:
        return Changed()
    if status in _GONE:
        return UserError(f"{shown(url)} does not exist ({status}): check the address")
    if status in _FORBIDDEN or "PermissionError" in names:
        return UserError(f"{shown(url)} may not be read ({status or told}): {_credentials(url)}")
    if "NoCredentialsError" in names or "PartialCredentialsError" in names:
        return UserError(f"{shown(url)} needs credentials ({told}): {_credentials(url)}")
    if "ClientSSLError" in names or "SSLError" in names:
        return UserError(f"{shown(url)} has a certificate that is not trusted ({told}): check the address")
    if status in _MOMENTS or (status is None and names & set(_OF_NETWORK)):
        return OSError(errno.EIO, told)
    if "FileNotFoundError" in names:
        return UserError(f"{shown(url)} does not exist: check the address")
    if isinstance(error, OSError) and status is None and error.errno in (errno.EIO, errno.EREMOTEIO, errno.EBUSY):
        return OSError(errno.EIO, told)
    return UserError(f"{shown(url)} cannot be read ({told}): check the address")


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of aiohttp or botocore carries."""
    if isinstance(status := getattr(error, "status", None), int):
        return status
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None


def _credentials(url: str) -> str:
    if not _is_s3(url):
        return "give an address that needs no login, or a signed one"
    return (
        "export AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (FSSPEC_S3_ANON=true for a public bucket), "
        "and AWS_ENDPOINT_URL for a server other than Amazon's"
    )
