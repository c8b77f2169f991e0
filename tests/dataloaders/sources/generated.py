"""Trees and tars of awkward names, from a seed, with the account that a finder owes of them."""

from __future__ import annotations

import io
import os
import random
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

STEMS = (
    "plain", "a.b", "Screenshot 2024-03-01 at 10.02.02 PM", "trip 2019 05 12 001", "x 512 100 y", "café", "猫 1.2",
    "100%25", "two\nlines", "nel\u0085x", "line\u2028sep", "tab\tname", "::", " lead", "trail ", "IMG_1.jpg", "n01.tar",
    "back\\slash", "#hash", os.fsdecode(b"latin\xe9"), "'quoted'", "comma,0", "ünïcode" * 12,
)  # fmt: skip
IMAGE_NAMES = (".jpg", ".JPG", ".Jpeg", ".png", ".npy", ".jpg?width=1200", ".jpg.1", "", ".unknown", ".x y")
OTHER_NAMES = (".json", ".TXT", ".cls", "", ".unknown", ".mp4", ".jpg.part", ".HEIC")
HEIC = b"\0\0\0\x18ftypheic" + bytes(64)


def picture(form: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, form)
    return stream.getvalue()


@dataclass
class Tree:
    """images: relative names, sorted. left_out: how many other entries there are."""

    root: Path
    images: list[str] = field(default_factory=list)
    left_out: int = 0


def make_tree(root: Path, outside: Path, seed: int) -> Tree:
    """Files, folders and links at random; folders are named like files, and links leave the root and come back."""
    rng = random.Random(seed)
    tree = Tree(root)
    root.mkdir()
    outside.mkdir()
    folders = [""]
    for number in range(rng.randrange(20, 40)):
        folder, stem = rng.choice(folders), f"{number}{rng.choice(STEMS)}"
        place = root / folder
        kind = rng.choice(
            ["image", "image", "image", "other", "folder", "hidden", "linked", "cycle", "nowhere", "outside"]
        )
        name = stem
        if kind in ("image", "linked"):
            name += rng.choice(IMAGE_NAMES)
        if kind == "other":
            name += rng.choice(OTHER_NAMES)
        relative = f"{folder}/{name}" if folder else name
        if kind == "image":
            (place / name).write_bytes(picture())
            tree.images.append(relative)
        elif kind == "linked":
            target = outside / f"{number}"
            target.write_bytes(picture("PNG"))
            (place / name).symlink_to(target)
            tree.images.append(relative)
        elif kind == "other":
            if name.lower().endswith((".jpg", ".tar")):  # by chance a stem that ends so, without a suffix
                name, relative = f"{name}.json", f"{relative}.json"
            (place / name).write_bytes(HEIC)
            tree.left_out += 1
        elif kind == "folder":
            name, relative = (f"{text}{rng.choice(['.jpg', '.tar', ''])}" for text in (name, ""))
            relative = f"{folder}/{name}" if folder else name
            (place / name).mkdir()
            folders.append(relative)
        elif kind == "hidden":
            (place / f".{name}.jpg").write_bytes(picture())
            tree.left_out += 1
        elif kind == "cycle":
            (place / name).symlink_to(rng.choice([root, place]))
            tree.left_out += 1
        elif kind == "nowhere":
            (place / name).symlink_to(outside / "gone.jpg")
            tree.left_out += 1
        else:
            target = outside / f"{number}-folder.jpg"
            target.mkdir()
            (target / "in.jpg").write_bytes(picture())
            (place / name).symlink_to(target)
            tree.images.append(f"{relative}/in.jpg")
    tree.images.sort()
    return tree


@dataclass
class Shard:
    """images: {member: bytes} of those that must be found; members: how many there are, folders aside."""

    path: Path
    images: dict[str, bytes] = field(default_factory=dict)
    members: int = 0


FLAVOURS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_shard(path: Path, flavour: str, seed: int, stems: tuple[str, ...] = STEMS) -> Shard:
    """A tar of images with sidecars, hidden companions, links and folders among them."""
    rng = random.Random(seed)
    shard = Shard(path)

    def add(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data) if kind == tarfile.REGTYPE else 0
        info.linkname = "elsewhere" if kind == tarfile.SYMTYPE else ""
        tar.addfile(info, io.BytesIO(data) if kind == tarfile.REGTYPE else None)
        shard.members += kind != tarfile.DIRTYPE

    with tarfile.open(path, "w", format=FLAVOURS[flavour], encoding="utf-8", errors="surrogateescape") as tar:
        for number in range(rng.randrange(8, 24)):
            if number == 0 or rng.random() < 0.5:  # else several names that agree up to their first dot, side by side
                folder = rng.choice(["", "", "d.ir/", "../up/", "a//b/", "./", "IMG.jpg/"])
                start = f"{folder}{rng.choice(stems)}"
            stem = f"{start} {number}"
            if flavour != "gnu":  # ustar has no room for longer names; pax has, and is tried with them elsewhere
                stem = f"{stem[:55]} {number}"
            suffix = rng.choice(IMAGE_NAMES)
            data = picture() + str(number).encode()
            if rng.random() < 0.3:
                add(f"{stem}.json", b"{}")
            add(stem + suffix, data)
            shard.images[stem + suffix] = data
            if rng.random() < 0.3:
                add(f"{stem}.cls", b"1")
            if rng.random() < 0.2:
                add(f"{folder}._{number}.jpg", b"finder")
            if rng.random() < 0.2:
                add(f"folder {number}", b"", tarfile.DIRTYPE)
            if rng.random() < 0.2:
                add(f"{number} link.jpg", b"", tarfile.SYMTYPE)
            if rng.random() < 0.2:
                add(f"{number} note", b"no picture")
    return shard
