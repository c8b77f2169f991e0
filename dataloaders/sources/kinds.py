"""Tell what one file is: an image, a tar shard, or something else with the reason why it is left out.

A known suffix, in upper or lower case, decides without opening the file, since a data set may hold a million files on a
network disk. Whether such an image is whole is for its decoder to say. Any other file is judged by its first bytes, so
a picture counts whatever its name is. Only files come here, no folders.
"""

from __future__ import annotations

import os
import re

from mirl.dataloaders.sources.patience import is_of_a_moment
from mirl.dataloaders.sources.tar_header import is_header

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif")
ARRAY_SUFFIXES = (".npy",)
IMAGE, SHARD = "image", "shard"
DICOM = "DICOM"  # a reason to leave a file out, unless its frames are the images
HEAD_BYTES = 512

_IMAGES = frozenset(IMAGE_SUFFIXES + ARRAY_SUFFIXES)
# These suffixes tell enough: annotations and the like lie beside images in millions, and are not worth an open().
_OTHERS = """
    .txt .json .jsonl .xml .csv .tsv .md .rst .html .htm .py .sh .yaml .yml .toml .ini .cfg .idx .cls .lst .list .log
    .mat .h5 .hdf5 .npz .pkl .pickle .pyd .pt .pth .safetensors .parquet .arrow .db .sqlite .pdf .svg .mp4 .avi .mov
    .dcm .dicom .nii .mkv .webm .wav .mp3 .flac .doc .docx .xls .xlsx .url
"""
ARCHIVES = "archives (unpack them)"
_REASONS = {
    "backup or unfinished copies": ".bak .orig .part .partial .crdownload .download .tmp .temp .swp .filepart .aria2",
    "camera raw (convert to TIFF or PNG)": ".dng .nef .cr2 .cr3 .arw .raf .orf .rw2 .pef .srw",
    "slide scans (cut them into tiles)": ".svs .ndpi .scn .mrxs .bif",
    ARCHIVES: ".gz .tgz .bz2 .xz .zst .zip .7z .rar .lz4",
}
_REASON_OF = {suffix: suffix for suffix in _OTHERS.split()} | {
    suffix: reason for reason, suffixes in _REASONS.items() for suffix in suffixes.split()
}
_MAGIC = (
    (b"\xff\xd8\xff", "jpg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
    (b"II+\0", "tif"),
    (b"MM\0+", "tif"),
    (b"\x93NUMPY", "npy"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
)
_NOT_DECODED = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"v/1\x01", "OpenEXR"),
)
_ARCHIVES = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!")
_PIXMAP = re.compile(rb"P[1-6]\s+[0-9#]")
_HEIF_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"])
_BITMAP_HEADERS = frozenset([12, 40, 52, 56, 64, 108, 124])


def kind_by_name(name: str) -> str | None:
    """Return IMAGE, SHARD or the reason to leave the file out if its suffix tells; None: look at its first bytes."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in _IMAGES:
        return IMAGE
    if suffix == ".tar":
        return SHARD
    if name.endswith("~"):
        return "backup or unfinished copies"
    return _REASON_OF.get(suffix)


def kind_by_content(head: bytes, name: str) -> str:
    """Return IMAGE, SHARD or the reason to leave the file out, by its first HEAD_BYTES bytes."""
    if head[128:132] == b"DICM":  # looked for first, because the bytes before it may begin as a TIFF does
        return DICOM
    if image_format(head) is not None:
        return IMAGE
    if head[257:262] == b"ustar" or (len(head) == HEAD_BYTES and is_header(head)):  # the oldest tars have no mark
        return SHARD
    if not head:
        return "empty"
    if head.startswith(_ARCHIVES):
        return ARCHIVES
    if (known := _undecoded_format(head)) is not None:
        return f"{known} (convert to JPEG or PNG)"
    suffix = os.path.splitext(name)[1].lower()
    return suffix if re.fullmatch(r"\.[a-z0-9_]{1,10}", suffix) else "of no known image format"


def kind_of_file(path: str | os.PathLike[str], name: str) -> str:
    """Return IMAGE, SHARD or the reason to leave the file out. The file is opened if its suffix does not tell.

    OSError if the file system fails for a moment: such a failure says nothing of the file.
    """
    known = kind_by_name(name)
    if known is not None:
        return known
    try:
        return kind_by_content(read_head(path), name)
    except OSError as error:
        if is_of_a_moment(error):
            raise
        return f"unreadable ({error.strerror})"


def read_head(path: str | os.PathLike[str]) -> bytes:
    """Read the first HEAD_BYTES bytes of a file."""
    with open(path, "rb", buffering=0) as file:
        return file.read(HEAD_BYTES)


def image_format(head: bytes) -> str | None:
    """Return the usual suffix, without a dot, of a picture or array that begins like this; None if none is known."""
    for magic, suffix in _MAGIC:
        if head.startswith(magic):
            return suffix if suffix != "jp2" or _pillow_has("jpg_2000") else None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp" and _is_avif(head):
        return "avif" if _pillow_has("avif") else None
    if head[:2] == b"BM" and head[6:10] == bytes(4) and int.from_bytes(head[14:18], "little") in _BITMAP_HEADERS:
        return "bmp"
    return "ppm" if _PIXMAP.match(head) else None


def image_extensions() -> frozenset[str]:
    """Return the suffixes, without a dot and in lower case, by which a member of a tar is an image."""
    return frozenset([*(suffix[1:] for suffix in _IMAGES), "avif", "jp2"])


def is_text(head: bytes) -> bool:
    """Say whether a file begins as text does: no control characters but white space."""
    return not any(byte < 32 and byte not in b"\t\n\v\f\r" for byte in head)


def _is_avif(head: bytes) -> bool:
    box = head[8 : max(16, min(int.from_bytes(head[:4], "big"), 64))]
    return any(box[at : at + 4] in (b"avif", b"avis") for at in range(0, len(box), 4))


def _undecoded_format(head: bytes) -> str | None:
    if head[4:8] == b"ftyp":
        if _is_avif(head):
            return "AVIF"
        return "HEIC" if head[8:12] in _HEIF_BRANDS else None
    return next((known for magic, known in _NOT_DECODED if head.startswith(magic)), None)


def _pillow_has(feature: str) -> bool:
    from PIL import features  # imported only when such a file is met

    return bool(features.check(feature))
