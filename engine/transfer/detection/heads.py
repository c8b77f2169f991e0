"""Mask R-CNN's heads are torchvision's, with the parts below replaced by those of detectron2 and mmdetection.

| what                    | torchvision               | here, as in detectron2 and mmdetection                        |
|-------------------------|---------------------------|---------------------------------------------------------------|
| `Proposals` box loss    | smooth L1, beta 1/9       | L1                                                            |
| `RegionHeads` box loss  | smooth L1, beta 1/9       | L1, or ten times GIoU of the decoded boxes (CAE)              |
| `AlignedPool`           | unaligned, 2 x 2 samples  | aligned, as many samples as the region needs                  |
| mask targets            | unaligned                 | aligned                                                       |
| proposals in training   | 2,000                     | 1,000                                                         |
| result masks            | pasted into whole images  | 28 x 28 probabilities; `evaluation.encode_mask` pastes one    |
| weights of another type | refused                   | all arithmetic in float32 (`in_float32`)                      |

Shapes: B images, R regions of all of them, K classes besides the background.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, generalized_box_iou_loss, roi_align

from mirl.engine.transfer.detection.pyramids import NAMES, ChannelNorm

GIOU_WEIGHT = 10.0
BOX_LOSSES = ("l1", "giou")
TERMS = ("objectness", "proposal_box", "class", "box", "mask")
PROPOSALS = 1000  # after NMS; before NMS each level has twice as many in training, and as many in evaluation


class _Conv32(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x.float(), self.weight.float(), _float(self.bias))


class _Deconv32(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None and isinstance(self.padding, tuple)
        return F.conv_transpose2d(
            x.float(), self.weight.float(), _float(self.bias), self.stride, self.padding, self.output_padding,
            self.groups, self.dilation,
        )  # fmt: skip


class _Linear32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), _float(self.bias))


_IN_FLOAT32: dict[type, type] = {nn.Conv2d: _Conv32, nn.ConvTranspose2d: _Deconv32, nn.Linear: _Linear32}


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def in_float32(module: nn.Module) -> None:
    """Let every layer inside ``module`` compute in float32, whatever the dtype of its weights.

    DeepSpeed casts all weights of a bfloat16 run, and neither NMS nor RoIAlign takes bfloat16. Parameters and names
    stay; under ZeRO-3 each layer still uses its own weights in its own forward pass, where they are gathered.
    """
    for layer in module.modules():
        if type(layer) in _IN_FLOAT32:
            layer.__class__ = _IN_FLOAT32[type(layer)]


class AlignedPool(MultiScaleRoIAlign):
    """Apply RoIAlign, aligned, to the level of the pyramid that fits a region's size, at known strides.

    Regions of sqrt(area) 14 P are taken from the third level, whose stride is the patch side P: 224 from stride 16.
    """

    def __init__(self, output_size: int, patch_size: int) -> None:
        super().__init__(list(NAMES[:4]), output_size, sampling_ratio=0)
        self.strides = tuple(patch_size * factor for factor in (0.25, 0.5, 1.0, 2.0))
        self._canonical = 14 * patch_size

    def levels_of(self, boxes_R4: Tensor) -> Tensor:
        """Return the level of each box, 0 to 3: [R], int64 (Eq. 1 of the FPN paper)."""
        sides_R = ((boxes_R4[:, 2] - boxes_R4[:, 0]) * (boxes_R4[:, 3] - boxes_R4[:, 1])).clamp(min=0).sqrt()
        return (2 + torch.log2(sides_R / self._canonical + 1e-8)).floor().clamp(0, 3).long()

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool maps by name over the boxes of each image: [R, channels, output_size, output_size]."""
        numbers = [torch.full_like(found[:, :1], number) for number, found in enumerate(boxes)]
        regions_R5 = torch.cat([torch.cat(numbers), torch.cat(boxes)], dim=1)
        levels_R = self.levels_of(regions_R5[:, 1:])
        maps = [x[name] for name in self.featmap_names]
        pooled = maps[0].new_zeros(len(regions_R5), maps[0].shape[1], *self.output_size)
        for level, (map_BDhw, stride) in enumerate(zip(maps, self.strides, strict=True)):
            (members,) = torch.where(levels_R == level)
            # A level without members is pooled too, so that every level has a part in the graph on every rank.
            part = roi_align(map_BDhw, regions_R5[members], self.output_size, 1 / stride, self.sampling_ratio, True)
            pooled = pooled.index_put((members,), part)
        return pooled


class Proposals(RegionProposalNetwork):
    """This region proposal network has the L1 loss for its boxes."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return objectness and box loss over the sampled anchors."""
        positive, negative = (torch.where(torch.cat(found))[0] for found in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        box = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        wanted = torch.cat(labels)[sampled]
        return (
            F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted),
            box / max(1, sampled.numel()),
        )


class RegionHeads(RoIHeads):
    """Box and mask head give losses in training, and boxes, classes, scores and small masks in evaluation."""

    box_loss = "l1"

    def forward(  # type: ignore[override]  # torchvision's is annotated for TorchScript
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return what torchvision's returns, but "masks" of a result is float32 [n, 1, 28, 28], not pasted."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        proposals, matched, labels, regression_targets = self.select_training_samples(proposals, targets)
        logits_RK, deltas_R4K = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        losses = {
            "class": F.cross_entropy(logits_RK, torch.cat(labels)),
            "box": self._box_loss(deltas_R4K, proposals, torch.cat(labels), torch.cat(regression_targets)),
        }
        positive = [torch.where(found > 0)[0] for found in labels]
        boxes = [found[chosen] for found, chosen in zip(proposals, positive, strict=True)]
        masks_RK = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        wanted, classes = [], []
        for target, box, found, chosen in zip(targets or [], boxes, matched, positive, strict=True):
            wanted.append(mask_targets(target["masks"], box, found[chosen], masks_RK.shape[-1]))
            classes.append(target["labels"][found[chosen]])
        losses["mask"] = mask_loss(masks_RK, torch.cat(wanted), torch.cat(classes))
        return [], losses

    def _box_loss(self, deltas_R4K: Tensor, proposals: list[Tensor], labels_R: Tensor, targets_R4: Tensor) -> Tensor:
        (positive,) = torch.where(labels_R > 0)
        deltas_P4 = deltas_R4K.unflatten(1, (-1, 4))[positive, labels_R[positive]]
        if self.box_loss == "l1":
            total = F.l1_loss(deltas_P4, targets_R4[positive], reduction="sum")
        else:
            anchors_P4 = torch.cat(proposals)[positive]
            found, wanted = (
                self.box_coder.decode_single(deltas, anchors_P4) for deltas in (deltas_P4, targets_R4[positive])
            )
            total = GIOU_WEIGHT * generalized_box_iou_loss(found, wanted, reduction="sum")
        return total / max(1, labels_R.numel())

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        regions = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        boxes, scores, labels = self.postprocess_detections(*self.box_predictor(regions), proposals, image_shapes)
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
        masks = maskrcnn_inference(logits, labels)
        return [
            {"boxes": box, "labels": label, "scores": score, "masks": mask}
            for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True)
        ]


def mask_targets(masks_nHW: Tensor, boxes_R4: Tensor, matched_R: Tensor, side: int) -> Tensor:
    """Cut the matched masks to each box, in ``side`` x ``side`` places: float32 0 or 1, [R, side, side]."""
    regions_R5 = torch.cat([matched_R[:, None].to(boxes_R4), boxes_R4], dim=1)
    masks_n1HW = masks_nHW[:, None].to(boxes_R4)
    return (roi_align(masks_n1HW, regions_R5, (side, side), 1.0, 0, True)[:, 0] >= 0.5).to(boxes_R4)


def mask_loss(logits_RK: Tensor, wanted_RSS: Tensor, labels_R: Tensor) -> Tensor:
    """Return binary cross-entropy of the mask of each region's own class; without regions 0, with the same graph."""
    if not len(labels_R):
        return logits_RK.sum() * 0
    rows_R = torch.arange(len(labels_R), device=labels_R.device)
    return F.binary_cross_entropy_with_logits(logits_RK[rows_R, labels_R], wanted_RSS)


def build_proposals(patch_size: int, channels: int, convolutions: int, proposals: int = PROPOSALS) -> Proposals:
    """Build the network with anchors of side 2 P to 32 P, 8 times the stride of their level, in three aspect ratios.

    convolutions: before the predictions. proposals: regions that are left of an image.
    """
    sides = tuple((8 * patch_size * factor / 4,) for factor in (1, 2, 4, 8, 16))
    anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * len(sides))  # type: ignore[arg-type]  # sides may be floats
    return Proposals(
        anchors, RPNHead(channels, anchors.num_anchors_per_location()[0], convolutions), 0.7, 0.3, 256, 0.5,
        {"training": 2 * proposals, "testing": proposals}, {"training": proposals, "testing": proposals}, 0.7,
    )  # fmt: skip


def build_region_heads(patch_size: int, channels: int, classes: int, *, box_loss: str, regions: int) -> RegionHeads:
    """Build the heads: four convolutions and a linear layer for boxes, four and a deconvolution for masks, LayerNorm.

    A norm over a batch does not survive a rank without regions. classes: besides the background. regions: sampled from
    each image in training.
    """
    pool, mask_pool = AlignedPool(7, patch_size), AlignedPool(14, patch_size)
    predictor = FastRCNNPredictor(4 * channels, 1 + classes)
    nn.init.normal_(predictor.cls_score.weight, std=0.01)  # as in detectron2 and mmdetection
    nn.init.normal_(predictor.bbox_pred.weight, std=0.001)
    for layer in (predictor.cls_score, predictor.bbox_pred):
        nn.init.zeros_(layer.bias)
    heads = RegionHeads(
        pool, FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], ChannelNorm), predictor,
        0.5, 0.5, regions, 0.25, None, 0.05, 0.5, 100,
        mask_pool, MaskRCNNHeads(channels, (channels,) * 4, 1, ChannelNorm),
        MaskRCNNPredictor(channels, channels, 1 + classes),
    )  # fmt: skip
    heads.box_loss = box_loss
    return heads


def image_list(images_BCHW: Tensor, sizes: list[tuple[int, int]]) -> ImageList:
    """Return a padded batch in the form that the proposals take."""
    return ImageList(images_BCHW, sizes)
