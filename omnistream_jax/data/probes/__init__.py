"""Labelled images and clips for probes on frozen features, in the layouts in which they are published."""
