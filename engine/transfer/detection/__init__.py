"""Detection and instance segmentation by Mask R-CNN from a pre-trained encoder: model, COCO data, evaluation, run."""
