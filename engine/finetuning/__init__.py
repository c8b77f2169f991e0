"""A pre-trained encoder put to use: the classifier, its augmentation and learning rates, evaluation, and probes of
frozen features.
"""
