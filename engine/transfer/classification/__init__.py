"""This room fine-tunes an encoder as a classifier: model, augmentation, task, evaluation, recipes."""
