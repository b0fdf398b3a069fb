"""Probes: small heads trained on frozen features, and scored by the protocol of the benchmark.

base           what a probe is: its data, its head, its loss, its schedule, its metrics
engine         the train step of all heads at once, encoding, batches for evaluation
steps          what a step is made of: frames, or features of a file
optimizers     SGD and AdamW of one head, as the protocols have them
schedules      learning rates, and AdamW's first beta, by step
feature_cache  features that are encoded once and kept
sweep_report   which head is reported
sweep_plots    scores over learning rates, confusion of classes

imagenet       classes of pictures, also of the rendered world's things
nyuv2, ade20k  depth and segmentation, by `dense`, `dense_plots` and `windows`
action         classes of videos, by the attentive probe
"""
