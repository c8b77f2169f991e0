"""Choose which part of a sample in a tar shard is the image, and which is its label.

As in WebDataset a sample is a run of members whose names agree up to the first dot, and the text after the dot names
the part: 0001.jpg, 0001.depth.png and 0001.cls are three parts of 0001. A dot can also belong to the name, as in
"Screenshot at 10.02.02 PM.png".

The rule looks at the pieces between the first and the last dot. They name a part if each is a word of ASCII letters,
digits, _ and - that begins with a letter or _. Otherwise the pieces up to the last one that is no such word belong to
the sample's name. If a sample has several image parts, the one whose extension has no dot is taken. If there is not
exactly one such part, the shard is refused and the parts are named; `mirl make-index --image-part` settles it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

from mirl.dataloaders.sources.index_format import Part
from mirl.dataloaders.sources.kinds import image_extensions

EACH = "each"
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_IMAGES = image_extensions()


class AmbiguousSample(Exception):
    """Several parts could be the image; `extensions` are those of the parts."""

    def __init__(self, name: str, extensions: list[str]) -> None:
        super().__init__(f"sample {name!r} has {len(extensions)} image parts ({', '.join(extensions)})")
        self.name, self.extensions = name, extensions


@dataclass
class Chosen:
    """These come from one run of members. images: (part, extension, part of the label). left_out: (part, reason)."""

    images: list[tuple[Part, str, Part | None]] = field(default_factory=list)
    left_out: list[tuple[Part, str]] = field(default_factory=list)


def is_image(extension: str) -> bool:
    """Say whether a part's extension, in lower case and with any number of dots, is an image's."""
    return extension.rpartition(".")[2] in _IMAGES


def choose_images(parts: list[Part], image_part: str | None = None) -> Chosen:
    """Choose the images among the members of one WebDataset sample.

    image_part: the extension of the part to take, after the first dot of the name, or "each" for every image part;
    None: by the rule of this module. AmbiguousSample if the rule does not tell.
    """
    if image_part is None and (simple := _only_plain_image(parts)) is not None:
        return simple
    chosen = Chosen()
    label = next((part for part in parts if part.extension == "cls"), None)
    if image_part == EACH:
        groups = [[part] for part in parts]
        extensions = [[part.extension] for part in parts]
    elif image_part is not None:
        for part in parts:
            if part.extension == image_part:
                chosen.images.append((part, part.extension, label))
            else:
                chosen.left_out.append((part, f".{part.extension} beside --image-part {image_part}"))
        return chosen
    else:
        groups, extensions = _samples(parts)
    labels = _labels(parts) if len(groups) > 1 else {}
    for group, names in zip(groups, extensions, strict=True):
        taken = _image_of(group, names)
        own = next((part for part, name in zip(group, names, strict=True) if name == "cls"), None)
        for number, (part, name) in enumerate(zip(group, names, strict=True)):
            if number == taken:
                stem = part.name.rpartition(".")[0]
                chosen.images.append((part, name, own or labels.get(stem) or label))
            else:
                beside = " beside the image" if is_image(name) else ""
                chosen.left_out.append((part, f".{name}{beside}"))
    return chosen


def _only_plain_image(parts: list[Part]) -> Chosen | None:
    """Choose if no extension has a dot and at most one is an image's, as in nearly all samples; else return None."""
    image = label = None
    left_out = []
    for part in parts:
        extension = part.extension
        if "." in extension:
            return None
        if extension in _IMAGES:
            if image is not None:
                return None
            image = part
            continue
        if extension == "cls":
            if label is not None:
                return None
            label = part
        left_out.append((part, _reason(extension)))
    return Chosen([(image, image.extension, label)] if image is not None else [], left_out)


@lru_cache(maxsize=4096)
def _reason(extension: str) -> str:
    return f".{extension}"


def _samples(parts: list[Part]) -> tuple[list[list[Part]], list[list[str]]]:
    """Group the parts of one WebDataset sample by the rest of its name behind the first dot. Returns extensions too."""
    groups: list[list[Part]] = []
    extensions: list[list[str]] = []
    current: dict[str, int] = {}
    for part in parts:
        stem, extension = _split(part)
        number = current.get(stem)
        if number is None or extension in extensions[number]:  # a second member of one name is an image of its own
            number = current[stem] = len(groups)
            groups.append([])
            extensions.append([])
        groups[number].append(part)
        extensions[number].append(extension)
    return groups, extensions


def _split(part: Part) -> tuple[str, str]:
    """Split the text after the first dot of a member's name into (rest of the sample's name, extension)."""
    pieces = part.extension.split(".")
    if len(pieces) == 1:
        return "", part.extension
    first = len(pieces) - 1
    while first > 0 and _WORD.fullmatch(pieces[first - 1]):
        first -= 1
    original = part.name.rpartition("/")[2].split(".")[1:]  # the index has extensions in lower case
    return ".".join(original[:first]), ".".join(pieces[first:])


def _labels(parts: list[Part]) -> dict[str, Part]:
    return {part.name.rpartition(".")[0]: part for part in parts if part.extension.rpartition(".")[2] == "cls"}


def _image_of(group: list[Part], extensions: list[str]) -> int | None:
    images = [number for number, name in enumerate(extensions) if is_image(name)]
    if len(images) < 2:
        return images[0] if images else None
    plain = [number for number in images if "." not in extensions[number]]
    if len(plain) == 1:
        return plain[0]
    folder, separator, base = group[0].name.rpartition("/")
    name = folder + separator + base.partition(".")[0]
    raise AmbiguousSample(name, [group[number].extension for number in images])
