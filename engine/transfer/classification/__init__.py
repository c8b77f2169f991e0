"""The fine-tuning of an encoder as a classifier: model, augmentation, task, evaluation, recipes."""
