"""This room detects and segments instances by Mask R-CNN on a pre-trained encoder: model, data, evaluation, run."""
