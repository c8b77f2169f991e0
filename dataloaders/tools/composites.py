"""Make composites: objects pasted on photographs, with exact boxes, masks and labels; any number, no download.

The photographs are those of `mirl.dataloaders.tools.demo`, public domain or CC0. The objects are items of Fashion-MNIST
(Zalando, MIT licence) if Debian's package dataset-fashion-mnist is installed, else glyphs of DejaVu Sans, which
matplotlib carries. A train and a val composite share no pixel of a photograph and no item of Fashion-MNIST.

Composites prove that a detector or a segmenter is put together rightly. They say nothing about how good an encoder is,
because the seams around pasted objects make the task too easy.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mirl.errors import UserError

STUFF = ("astronaut", "chelsea", "coffee", "rocket", "brick", "grass", "gravel")
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
GLYPHS = {
    "star": "★", "heart": "♥", "club": "♣", "spade": "♠", "telephone": "☎", "aeroplane": "✈", "umbrella": "☂",
    "sun": "☀", "notes": "♫", "flag": "⚑",
}  # fmt: skip
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SPLITS = {"train": (0.0, 0.6), "val": (0.6, 1.0)}  # share of a photograph's width, from left to right
CASES = ("plain", "empty", "crowd", "grey", "cut", "one_pixel", "wide", "tall", "tiny", "band")
"""A composite is ``plain`` or has one edge case: no object; a crowd of small objects as one region; a grey picture in
one channel; an object across the border; an object of a single visible pixel; a picture twice as wide, or as high; a
picture of 24 x 24 pixels; a band without labels.
"""
UNLABELLED = 0
_TINY = 24


@dataclass(frozen=True, kw_only=True)
class Instance:
    """An instance is an object. category: number of its class, from 0. mask: its visible pixels, bool [H, W].

    crowd: it is several objects at once.
    """

    category: int
    mask: np.ndarray
    crowd: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Return x, y, width and height of the mask in whole pixels, as in COCO."""
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        return (
            int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Composite:
    """A composite is one picture and its annotations.

    image: uint8 [H, W, 3], or [H, W] if it is grey. labels: uint8 [H, W]: 0 unlabelled, 1 + number of a class in
    `Composer.label_names`: first the photographs, then the objects.
    """

    image: np.ndarray
    labels: np.ndarray
    instances: tuple[Instance, ...]


class Composer:
    """A composer makes composites; with one composer each is a function of (split, number, case) alone.

    size: height and width in pixels. seed: another gives other composites. objects: the fewest and the most in a
    picture. share: the smallest and the largest side of an object, as a share of the picture's shorter side. fashion:
    the folder of Fashion-MNIST, None for glyphs; default: Debian's, if it exists. classes: of the objects, None for all
    ten. UserError for an argument that cannot be used.
    """

    def __init__(
        self,
        *,
        size: tuple[int, int] = (128, 128),
        seed: int = 0,
        objects: tuple[int, int] = (1, 6),
        share: tuple[float, float] = (0.25, 0.55),
        fashion: Path | None = FASHION_FOLDER,
        classes: Sequence[str] | None = None,
    ) -> None:
        if min(size) < _TINY:
            raise UserError(f"size is {size[0]}x{size[1]}: give composites of at least {_TINY} pixels a side")
        if not 0 <= objects[0] <= objects[1]:
            raise UserError(f"objects is {objects}: give the fewest and the most of a picture, e.g. 1 6")
        self.size, self.seed, self.objects, self.share = size, seed, objects, share
        self.fashion = fashion if fashion is not None and fashion.is_dir() else None
        known = FASHION if self.fashion else tuple(GLYPHS)
        self.names: tuple[str, ...] = known if classes is None else tuple(classes)
        if unknown := [name for name in self.names if name not in known]:
            raise UserError(f"classes has {unknown[0]!r}: choose from {', '.join(known)}")
        self.label_names: tuple[str, ...] = (*STUFF, *self.names)

    def make(self, split: str, number: int, case: str = "plain") -> Composite:
        """Make composite ``number`` of ``split`` ("train" or "val"). ValueError for an unknown split or case."""
        if case not in CASES:
            raise ValueError(f"case is {case!r}: choose one of {', '.join(CASES)}")
        rng = np.random.default_rng([self.seed, list(SPLITS).index(split), number, CASES.index(case)])
        height, width = _TINY_SIZE if case == "tiny" else self.size
        height, width = (2 * height if case == "tall" else height), (2 * width if case == "wide" else width)
        stuff = int(rng.integers(len(STUFF)))
        canvas = _Canvas(_background(STUFF[stuff], split, (height, width), rng), 1 + stuff)
        if case == "crowd":
            self._crowd(canvas, split, rng)
        count = 0 if case == "empty" else int(rng.integers(max(1, self.objects[0]), max(1, self.objects[1]) + 1))
        for index in range(count):
            self._paste(canvas, split, rng, cut=case == "cut" and index == 0)
        if case == "one_pixel":
            free = np.argwhere(canvas.owner < 0)
            top, left = free[rng.integers(len(free))]
            canvas.paste(
                np.full((1, 1, 3), 255, np.uint8), np.ones((1, 1), bool), top, left, int(rng.integers(len(self.names)))
            )
        return self._finish(canvas, case)

    def _crowd(self, canvas: _Canvas, split: str, rng: np.random.Generator) -> None:
        """Paste eight small objects of one class that touch, as one instance."""
        category, side = int(rng.integers(len(self.names))), max(6, min(canvas.size) // 6)
        top, left = (int(rng.integers(0, max(1, extent - 3 * side))) for extent in canvas.size)
        for index in range(8):
            pixels, alpha = self._object(category, split, side, rng)
            offset = divmod(index, 3)
            canvas.paste(
                pixels, alpha, top + offset[0] * side * 2 // 3, left + offset[1] * side * 2 // 3, category,
                crowd=True, again=index > 0,
            )  # fmt: skip

    def _paste(self, canvas: _Canvas, split: str, rng: np.random.Generator, *, cut: bool) -> None:
        """Paste one object that leaves half of every other object visible; give up after twelve vain trials."""
        category = int(rng.integers(len(self.names)))
        side = max(5, round(rng.uniform(*self.share) * min(canvas.size)))
        pixels, alpha = self._object(category, split, side, rng)
        for _ in range(12):
            top, left = (int(rng.integers(0, max(1, extent - side + 1))) for extent in canvas.size)
            if cut:
                top, left = (-side // 3, left) if rng.random() < 0.5 else (top, canvas.size[1] - side // 2)
            if canvas.leaves_room(alpha, top, left):
                canvas.paste(pixels, alpha, top, left, category)
                return

    def _object(self, category: int, split: str, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw one tinted object: pixels uint8 [h, w, 3] and silhouette bool [h, w], h and w at most ``side``."""
        if self.fashion is not None:
            grey, alpha = _fashion_item(self.fashion, FASHION.index(self.names[category]), split, side, rng)
        else:
            grey, alpha = _glyph(self.names[category], side, rng)
        tint_3 = rng.uniform(0.25, 1.0, 3)
        tint_3 /= tint_3.max()
        return (grey[..., None] * tint_3).astype(np.uint8), alpha

    def _finish(self, canvas: _Canvas, case: str) -> Composite:
        labels, instances = canvas.labels(len(STUFF)), canvas.instances()
        if case == "band":
            labels[: max(1, len(labels) // 8)] = UNLABELLED
        image = canvas.image
        if case == "grey":
            image = np.asarray(Image.fromarray(image).convert("L"))
        return Composite(image=image, labels=labels, instances=instances)


_TINY_SIZE = (_TINY, _TINY)


class _Canvas:
    """A canvas is a picture in the making: its pixels, and which object owns each."""

    def __init__(self, image: np.ndarray, stuff_label: int) -> None:
        self.image, self.size, self._stuff = image, image.shape[:2], stuff_label
        self.owner = np.full(self.size, -1, np.int32)
        self._pasted: list[tuple[int, bool, int]] = []  # category, crowd, visible pixels when it was pasted

    def _window(self, alpha: np.ndarray, top: int, left: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Return the place of an object on the canvas, and the part of the object that falls on the canvas."""
        (height, width), (rows, columns) = alpha.shape, self.size
        y0, x0, y1, x1 = max(0, top), max(0, left), min(rows, top + height), min(columns, left + width)
        return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))

    def leaves_room(self, alpha: np.ndarray, top: int, left: int) -> bool:
        """Say whether half of the pixels of each object so far, and of the new one, would be visible."""
        place, part = self._window(alpha, top, left)
        if 2 * alpha[part].sum() < alpha.sum():
            return False
        after = self.owner.copy()
        after[place][alpha[part]] = len(self._pasted)
        left_over = np.bincount(after[after >= 0], minlength=len(self._pasted) + 1)
        return all(2 * left_over[index] >= pixels for index, (_, _, pixels) in enumerate(self._pasted))

    def paste(
        self, pixels: np.ndarray, alpha: np.ndarray, top: int, left: int, category: int, *, crowd: bool = False,
        again: bool = False,
    ) -> None:  # fmt: skip
        """Paste pixels over the picture. ``again``: they belong to the object before."""
        place, part = self._window(alpha, top, left)
        self.image[place][alpha[part]] = pixels[part][alpha[part]]
        if not again:
            self._pasted.append((category, crowd, 0))
        index = len(self._pasted) - 1
        self.owner[place][alpha[part]] = index
        self._pasted[index] = (category, crowd, int((self.owner == index).sum()))

    def labels(self, stuff: int) -> np.ndarray:
        table = np.array([self._stuff, *(1 + stuff + category for category, _, _ in self._pasted)], np.uint8)
        return table[self.owner + 1]

    def instances(self) -> tuple[Instance, ...]:
        masks = [self.owner == index for index in range(len(self._pasted))]
        return tuple(
            Instance(category=category, mask=mask, crowd=crowd)
            for (category, crowd, _), mask in zip(self._pasted, masks, strict=True)
            if mask.any()
        )


@lru_cache(maxsize=len(STUFF))
def _photograph(name: str) -> np.ndarray:
    from skimage import data  # imported when needed: it costs half a second

    return np.asarray(Image.fromarray(getattr(data, name)()).convert("RGB"))


def _background(name: str, split: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Cut a random window of the split's part of a photograph, scaled to ``size``: uint8 [H, W, 3]."""
    whole = _photograph(name)
    low, high = (round(share * whole.shape[1]) for share in SPLITS[split])
    part = whole[:, low:high]
    scale = rng.uniform(0.5, 1.0) * min(part.shape[0] / size[0], part.shape[1] / size[1])
    height, width = (max(1, int(scale * extent)) for extent in size)
    top, left = (
        int(rng.integers(0, extent - side + 1)) for extent, side in zip(part.shape, (height, width), strict=False)
    )
    window = Image.fromarray(part[top : top + height, left : left + width])
    return np.array(window.resize((size[1], size[0]), Image.Resampling.BICUBIC))


@lru_cache(maxsize=2)
def _fashion(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read items uint8 [n, 28, 28] and their classes [n] of Fashion-MNIST's training or test set (IDX files)."""
    prefix = "train" if split == "train" else "t10k"
    parts = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        path = folder / f"{prefix}-{kind}-ubyte.gz"
        content = gzip.decompress(path.read_bytes())
        if int.from_bytes(content[:4], "big") != 0x800 + dimensions:
            raise UserError(f"{path} is no IDX file of Fashion-MNIST: install dataset-fashion-mnist again")
        shape = np.frombuffer(content, ">i4", count=dimensions, offset=4)
        parts.append(np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape))
    return parts[0], parts[1]


def _fashion_item(
    folder: Path, category: int, split: str, side: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    items, classes = _fashion(folder, split)
    members = np.flatnonzero(classes == category)
    item = Image.fromarray(items[members[rng.integers(len(members))]])
    grey = np.asarray(item.resize((side, side), Image.Resampling.BICUBIC))
    alpha = _filled(grey > 16)  # not filled, a dark shirt would have holes
    return _trimmed(np.maximum(grey, 48), alpha)


def _filled(mask: np.ndarray) -> np.ndarray:
    """Fill the holes of ``mask``, the pixels that cannot be reached from outside."""
    from skimage.measure import label

    parts = label(np.pad(~mask, 1, constant_values=True), connectivity=1)
    return (parts != parts[0, 0])[1:-1, 1:-1]


def _glyph(name: str, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a glyph, turned by up to 25 degrees and shaded from one side to the other."""
    drawn = Image.new("L", (2 * side, 2 * side))
    ImageDraw.Draw(drawn).text((side, side), GLYPHS[name], fill=255, font=_font(side), anchor="mm")
    drawn = drawn.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC)
    alpha = np.asarray(drawn) > 127
    shade = np.linspace(rng.uniform(110, 200), 255, alpha.shape[1])[None].repeat(alpha.shape[0], axis=0)
    grey, alpha = _trimmed(shade, alpha)
    scale = side / max(alpha.shape)
    size = (max(1, round(alpha.shape[1] * scale)), max(1, round(alpha.shape[0] * scale)))
    alpha = np.asarray(Image.fromarray(alpha).convert("L").resize(size, Image.Resampling.BILINEAR)) > 127
    grey = np.asarray(Image.fromarray(grey.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR))
    return grey, alpha


@lru_cache(maxsize=64)
def _font(side: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), side)


def _trimmed(pixels: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut empty rows and columns around the silhouette off both arrays."""
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return pixels[window], alpha[window]


def cases_of(count: int, cases: Sequence[str]) -> list[str]:
    """Return the case of each of ``count`` pictures: first those of ``cases``, then plain ones."""
    return [*cases[:count], *["plain"] * (count - len(cases))]
