"""The package cv2 with a single thread: a data worker has one core."""

import cv2

cv2.setNumThreads(0)

__all__ = ["cv2"]
