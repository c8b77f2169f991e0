"""A model is described by one frozen dataclass, with the sizes of the paper and one clear message for each mistake.

Letters used throughout mirl.engine.models: B batch, N patches, K kept, M masked, D encoder width, E decoder width, G
segments, P patch side, C channels, Q = P * P * C pixels of a patch in (p, q, c) order.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

from mirl.errors import UserError
from mirl.settings import Section

VARIANTS = ("paper", "release")
STATISTICS = ("auto", "given", "grey")
HEAD_INITS = ("zero", "xavier")
# The release's head is a direction and a length, of which neither can be zero.
DEFAULT_HEAD_INIT = {"paper": "zero", "release": "xavier"}
OBJECTIVES = ("mirl", "mae", "truncated", "multi_decoder", "coarse_to_fine", "fine_to_coarse")
SINGLE_DECODER = ("mae", "truncated")
FREQUENCY = ("coarse_to_fine", "fine_to_coarse")
ATTENTION_BACKENDS = ("auto", "xformers", "sdpa", "math")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _setting(default: Any, text: str, **metadata: Any) -> Any:
    """Make a dataclass field with the help text of its command-line flag."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Describe a MIRL model and its pre-training objective (design of the paper, Eq. 1-8).

    Fields left None are filled in when the object is made: ``decoder_depth`` (2; 1 for vit_s_54 in the release; 8 for
    MAE, as published), ``mean`` and ``std`` (of ImageNet for three channels, 0.5 for any other number), ``statistics``
    ("given" where mean or std is given, else "auto"), ``head_init`` (`DEFAULT_HEAD_INIT`). The metadata ``before`` of a
    field is its value in configurations that were written before the field existed.
    Raises UserError naming the field, its value and the mend.
    """

    name: str = _setting("custom", "name of the model's size")
    depth: int = _setting(12, "blocks of the encoder")
    width: int = _setting(768, "width of the encoder's tokens (D)")
    heads: int = _setting(12, "attention heads of the encoder")
    mlp_ratio: float = _setting(4.0, "hidden width of an MLP, as a multiple of its width")
    patch_size: int = _setting(16, "side of a square patch in pixels (P)")
    image_height: int = _setting(224, "height of the images in pixels")
    image_width: int = _setting(224, "width of the images in pixels")
    channels: int = _setting(3, "channels of the images (C)")
    segments: int = _setting(2, "encoder segments, and decoders (G): 1 or even, dividing depth")
    decoder_width: int = _setting(512, "width of the decoders' tokens (E)")
    decoder_heads: int = _setting(16, "attention heads of the decoders")
    decoder_depth: int | None = _setting(None, "blocks of a decoder; none: 2, in MAE 8, in the release's vit_s_54 1")
    variant: str = _setting(
        "paper",
        "paper: DID in a decoder's first block, plain head, one mask token; "
        "release: DID in every block, weight-normed head, a mask token per decoder",
        choices=VARIANTS,
    )
    did: bool = _setting(True, "densely connected inputs: decoders attend to the latents of shallower segments (Eq. 8)")
    objective: str = _setting(
        "mirl",
        "mirl: pairs of decoders predict main component and residual (Eq. 6); mae: one decoder; "
        "truncated: the same on the first --truncated-depth blocks, the only ones built; multi_decoder: every decoder "
        "predicts the target alone; coarse_to_fine, fine_to_coarse: shallow decoders predict the one of its two "
        "frequency parts, deep decoders the other",
        choices=OBJECTIVES,
    )
    truncated_depth: int | None = _setting(
        None, "blocks that are built and pre-trained under objective truncated; fine-tuning has all of depth"
    )
    log_sigma: float = _setting(
        1.0, "width of the Laplacian of Gaussian that separates fine from coarse, in pixels (coarse_to_fine, ...)"
    )
    feature_loss: float = _setting(
        0.0, "weight of predicting an EMA teacher's features of the masked patches, beside the pixels; 0: off"
    )
    vgg_loss: float = _setting(
        0.0, "weight of the perceptual loss in the features of a VGG-16 (--vgg-weights), beside the pixels; 0: off"
    )
    mask_ratio: float = _setting(0.75, "share of patches hidden from the encoder")
    norm_pix: bool = _setting(True, "reconstruct pixels normalised patch by patch, rather than raw ones")
    mean: tuple[float, ...] = _setting(None, "mean of each channel, of values in [0, 1]")
    std: tuple[float, ...] = _setting(None, "standard deviation of each channel, of values in [0, 1]")
    statistics: str = _setting(
        None,
        "given: mean and std as they are; grey: their averages in all channels; auto: grey where the data set is grey",
        choices=STATISTICS,
        before="given",
    )
    head_init: str = _setting(
        None,
        "what the weights of the prediction heads begin as; zero: the first prediction is the mean of the target",
        choices=HEAD_INITS,
        before="xavier",
    )
    attention: str = _setting("auto", "attention backend", choices=ATTENTION_BACKENDS)
    drop_path: float = _setting(0.0, "largest rate of stochastic depth, rising linearly over the encoder's blocks")

    def check(self) -> None:
        self._fill_in()
        self._check_sizes()
        self._check_images()
        self._check_objective()

    def _fill_in(self) -> None:
        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.decoder_depth is None:
            shallow = (self.variant, self.name) == ("release", "vit_s_54")
            fill("decoder_depth", 8 if self.objective in SINGLE_DECODER else 1 if shallow else 2)
        if self.head_init is None:
            fill("head_init", DEFAULT_HEAD_INIT[self.variant] if self.variant in VARIANTS else "xavier")
        known = self.channels == len(IMAGENET_MEAN)
        default = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        default = {name: values if known else (0.5,) * self.channels for name, values in default.items()}
        if self.statistics is None:
            fill("statistics", "auto" if self.mean is None and self.std is None else "given")
        for name in default:
            values = default[name] if getattr(self, name) is None else getattr(self, name)
            fill(name, tuple(float(value) for value in values))
        if self.statistics == "auto" and {"mean": self.mean, "std": self.std} != default:
            fill("statistics", "given")
        if self.statistics == "grey":
            fill("mean", _one_for_all(self.mean))
            fill("std", _one_for_all(self.std))

    def _check_sizes(self) -> None:
        for name in (
            "depth", "width", "heads", "patch_size", "image_height", "image_width", "channels", "segments",
            "decoder_width", "decoder_heads", "decoder_depth",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}: give a whole number of 1 or more")
        if (self.truncated_depth is None) == (self.objective == "truncated"):
            raise UserError(
                f"objective is {self.objective!r} and truncated_depth is {self.truncated_depth}: the objective "
                "'truncated' needs the number of blocks to build, and no other has one"
            )
        if self.truncated_depth is not None and not 1 <= self.truncated_depth <= self.depth:
            raise UserError(f"truncated_depth is {self.truncated_depth}: give a number from 1 to depth ({self.depth})")
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            width_value, heads_value = getattr(self, width), getattr(self, heads)
            if width_value % heads_value:
                raise UserError(f"{width} is {width_value} and {heads} is {heads_value}: {heads} must divide {width}")
            if width_value % 4:
                raise UserError(f"{width} is {width_value}: 2-D sin-cos positions need a multiple of 4")
        if self.mlp_ratio <= 0 or min(self.mlp_width, self.decoder_mlp_width) < 1:
            raise UserError(f"mlp_ratio is {self.mlp_ratio}: give a positive number, e.g. 4")
        if self.segments > 1 and self.segments % 2:
            raise UserError(f"segments is {self.segments}: decoders work in pairs, give 1 or an even number")
        if self.depth % self.segments:
            divisors = [g for g in range(1, self.depth + 1) if self.depth % g == 0 and (g == 1 or g % 2 == 0)]
            raise UserError(
                f"segments is {self.segments} and depth is {self.depth}: segments must divide depth; "
                f"choose one of {', '.join(map(str, divisors))}"
            )
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path is {self.drop_path}: give a rate of at least 0 and below 1")

    def _check_images(self) -> None:
        for name in ("image_height", "image_width"):
            value = getattr(self, name)
            if value % self.patch_size:
                below = value // self.patch_size * self.patch_size
                nearest = [str(size) for size in (below, below + self.patch_size) if size]
                raise UserError(
                    f"{name} is {value} and patch_size is {self.patch_size}: {name} must be a multiple of patch_size, "
                    f"e.g. {' or '.join(nearest)}"
                )
        if self.norm_pix and self.patch_pixels < 2:
            raise UserError(
                f"norm_pix is True and a patch has {self.patch_pixels} pixel: raise patch_size or set norm_pix to False"
            )
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"mask_ratio is {self.mask_ratio}: give a share between 0 and 1, e.g. 0.75")
        if not 0 < self.num_kept < self.num_patches:
            raise UserError(
                f"mask_ratio is {self.mask_ratio}: it keeps {self.num_kept} of {self.num_patches} patches; "
                "at least one patch must be kept and one masked: change mask_ratio or the image size"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels:
                raise UserError(
                    f"{name} has {len(values)} values and channels is {self.channels}: give one per channel"
                )
        if min(self.std) <= 0:
            raise UserError(f"std is {self.std}: give positive values")

    def _check_objective(self) -> None:
        for name, choices in (
            ("variant", VARIANTS), ("objective", OBJECTIVES), ("attention", ATTENTION_BACKENDS),
            ("head_init", HEAD_INITS), ("statistics", STATISTICS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
        if (self.variant, self.head_init) == ("release", "zero"):
            raise UserError(
                "head_init is 'zero' and variant is 'release', whose weight-normed head cannot be zero: give xavier"
            )
        if self.objective in SINGLE_DECODER and (self.segments != 1 or self.did):
            raise UserError(
                f"objective is {self.objective!r}, segments is {self.segments} and did is {self.did}: "
                "it has one decoder and no DID, set segments to 1 and did to False"
            )
        if self.objective in ("multi_decoder", *FREQUENCY) and self.segments == 1:
            raise UserError(
                f"objective is {self.objective!r} and segments is 1: give an even number of segments, or use 'mae'"
            )
        for name in ("feature_loss", "vgg_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give a weight of zero or more")
            if getattr(self, name) and self.objective in FREQUENCY:
                raise UserError(
                    f"{name} is {getattr(self, name)} and objective is {self.objective!r}, whose decoders predict "
                    "parts of the image: use it with another objective"
                )
        if self.vgg_loss and self.channels != 3:
            raise UserError(f"vgg_loss is {self.vgg_loss} and channels is {self.channels}: VGG-16 sees three channels")
        # Below a third of a pixel the sampled filter is nothing but its own error; beyond a patch all is coarse.
        if not 1 / 3 <= self.log_sigma <= self.patch_size:
            raise UserError(f"log_sigma is {self.log_sigma}: give a width from 0.34 to patch_size ({self.patch_size})")

    @property
    def label(self) -> str:
        """Return the name of the size for people: "custom (...)" where fields of the named size have been changed.

        ``name`` stays what it is in configurations and checkpoints.
        """
        size = _SIZES[self.name] | {"mlp_ratio": 4.0, "patch_size": 16} if self.name in _SIZES else {}
        if self.objective in SINGLE_DECODER:  # it has its own decoder, whatever the size
            size = {field: value for field, value in size.items() if field not in _OF_DECODERS}
        changed = [f"{field} {value} -> {getattr(self, field)}" for field, value in size.items()
                   if getattr(self, field) != value]  # fmt: skip
        if not changed:
            return self.name
        first = [text.replace("_", " ") for text in changed[:2]]
        return f"custom ({self.name}, {', '.join(first)}{f', {len(changed) - 2} more' if len(changed) > 2 else ''})"

    @property
    def grid(self) -> tuple[int, int]:
        """Return the numbers of patches down and across."""
        return self.image_height // self.patch_size, self.image_width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Return N, the number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def num_kept(self) -> int:
        """Return K = int(N * (1 - mask_ratio))."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @property
    def num_masked(self) -> int:
        """Return M = N - K."""
        return self.num_patches - self.num_kept

    @property
    def patch_pixels(self) -> int:
        """Return Q, the pixels of a patch over all channels."""
        return self.patch_size**2 * self.channels

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def decoder_mlp_width(self) -> int:
        return int(self.decoder_width * self.mlp_ratio)

    @property
    def built_depth(self) -> int:
        """Count the blocks of the pre-trained encoder: all of ``depth``, or ``truncated_depth`` under ``truncated``."""
        return self.depth if self.truncated_depth is None else self.truncated_depth

    @property
    def segment_depth(self) -> int:
        """Count the blocks of one encoder segment, ``built_depth`` / G."""
        return self.built_depth // self.segments

    @property
    def did_blocks(self) -> int:
        """Count the blocks at the start of each decoder that attend to kv_g: none, one (paper) or all (release)."""
        if not self.did:
            return 0
        return 1 if self.variant == "paper" else self.decoder_depth


def _one_for_all(values: tuple[float, ...]) -> tuple[float, ...]:
    """Put the average of ``values`` in the place of each."""
    return values if len(set(values)) == 1 else (round(sum(values) / len(values), 6),) * len(values)


# Table 1 and Table 3 of the paper.
_SIZES: dict[str, dict[str, int]] = {
    "vit_s": {"depth": 12, "width": 384, "heads": 12, "segments": 2, "decoder_width": 384, "decoder_heads": 12},
    "vit_b": {"depth": 12, "width": 768, "heads": 12, "segments": 2, "decoder_width": 512, "decoder_heads": 16},
    "vit_l": {"depth": 24, "width": 1024, "heads": 16, "segments": 2, "decoder_width": 512, "decoder_heads": 16},
    "vit_s_54": {"depth": 54, "width": 384, "heads": 12, "segments": 6, "decoder_width": 384, "decoder_heads": 12},
    "vit_b_24": {"depth": 24, "width": 768, "heads": 12, "segments": 4, "decoder_width": 512, "decoder_heads": 16},
    "vit_b_48": {"depth": 48, "width": 768, "heads": 12, "segments": 6, "decoder_width": 512, "decoder_heads": 16},
}
MODEL_NAMES = tuple(_SIZES)
_OF_DECODERS = ("segments", "decoder_width", "decoder_heads")
SIZE_FIELDS = ("depth", "width", "heads", "mlp_ratio", "patch_size", *_OF_DECODERS)


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """Return the configuration of a size of the paper, with single fields replaced.

    Objectives ``mae`` and ``truncated`` also set ``segments=1`` and ``did=False``, unless they are given.
    Raises UserError on an unknown name or field.
    """
    if name not in _SIZES:
        close = difflib.get_close_matches(name, MODEL_NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"model is {name!r}: {hint}choose one of {', '.join(MODEL_NAMES)}")
    known = {item.name for item in dataclasses.fields(ModelConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"fields are {', '.join(sorted(known))}"
        raise UserError(f"a model has no field {unknown[0]!r}: {hint}")
    values: dict[str, Any] = {"name": name, **_SIZES[name]}
    if overrides.get("objective") in SINGLE_DECODER:
        values |= {"segments": 1, "did": False}
    return ModelConfig(**(values | overrides))
