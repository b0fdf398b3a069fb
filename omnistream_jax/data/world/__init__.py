"""An embedded world: rendered rooms in which everything is known, for learning that can be measured with no download.

textures   crops of the embedded real photographs, apart for train and held-out
render     the ray tracer
motion     the motion classes
placing    nothing touches, nothing is hidden
scenes     a scene of (seed, split, index)
clips      frames with depth, ids, poses, rays and boxes
language   captions and questions
sources    WorldClips, WorldVideos and WorldCaptions, which training and evaluation read
"""

from omnistream_jax.data.world.motion import MOTIONS
from omnistream_jax.data.world.sources import WorldCaptions, WorldClips, WorldVideos

__all__ = ["MOTIONS", "WorldCaptions", "WorldClips", "WorldVideos"]
