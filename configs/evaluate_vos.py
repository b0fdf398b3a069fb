"""Video object segmentation by label propagation: DAVIS-2017, or the embedded rendered world. Nothing is trained.

    python -m omnistream_jax.main --config=configs/evaluate_vos.py --config.checkpoint=MODEL_DIR \\
      --config.output=DIR --config.data=DAVIS_DIR [--config.preset=NAME] [--config.field=value ...]

    python -m omnistream_jax.main --config=configs/evaluate_vos.py:world --config.checkpoint=MODEL_DIR \\
      --config.output=DIR

MODEL_DIR is a backbone, WORKDIR/model of a training run for instance, or the released weights. DAVIS_DIR holds
JPEGImages/480p, Annotations/480p and ImageSets/2017/val.txt. The first frame's objects are followed through the video
by handing their labels from patch to similar patch. `world` does so on held-out clips of the rendered world that comes
with the package, small enough for a tiny model on 2 CPU cores.

preset    paper     480p, every video one stream through the key-value cache; the rest, which the paper leaves open, as
                    DINOv3's
          dinov3    DINOv3's notebook segmentation_tracking.ipynb: frames alone, short side 960
          dino      DINO's script eval_video_segmentation.py: frames alone, 832 x 480
A field that is None is the preset's; any other value stays. So `--config.preset=dino --config.features=stream` is
DINO's protocol over one stream.

Hardware: one device a process; many processes (launch/README.md) share the sequences. A CPU is enough for a tiny model;
for a ViT-L take a GPU: without a window the keys and values of 104 frames of 864 x 480 pixels take 20 GB in bfloat16,
and half as much again while they grow.

Expect a line a sequence, then a table with J&F, J and F in percent, the same of first masks that stay where they are,
and the paper's figure where it may be compared. Exit status: 0 scored, 1 a file is broken or the device cannot do it,
2 a field that cannot work.

OUTPUT/vos.json                           every setting, versions, counts, and all numbers, aggregate and per object
OUTPUT/predictions/SEQUENCE/NNNNN.png     indexed masks in DAVIS's colours, as other evaluators read them
OUTPUT/pictures/SEQUENCE.png              frames with the true and the predicted masks
OUTPUT/results/SEQUENCE.json              the numbers of one sequence, as soon as it is finished
OUTPUT/settings.json                      what the results were made with; other settings are refused here

Run the same command again after a stop: finished sequences are skipped. With --config.predictions=DIR instead of a
checkpoint, masks DIR/SEQUENCE/NNNNN.png of another program are scored.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

_DINO = {
    "features": "frame",  # frame: each alone; stream: a video is one stream
    "short_side": 480,  # of the frames that the model sees, in pixels
    "rounding": "down",  # of the long side, to a multiple of `multiple`; up: of both sides
    "multiple": 64,  # pixels; 0: the model's patch
    "interpolation": "bilinear",  # OpenCV's; bicubic: Pillow's
    "deviation": "dino",  # of colours: (0.228, 0.224, 0.225); imagenet: (0.229, 0.224, 0.225)
    "context": 7,  # frames that hand on their labels, besides the first
    "radius": 12,  # patches; 0: no limit
    "neighbourhood": "square",  # or circle, of that radius
    "top": 5,  # patches that hand on their labels, over all these frames together
    "temperature": 0.1,
    "upsampling": "bilinear",  # to the pixels that the model sees; nearest: to those of the truth
    "flat_channel": "wins",  # a label with the same weight everywhere; loses: it counts as nowhere
}
_DINOV3 = {
    "features": "frame",
    "short_side": 960,
    "rounding": "up",
    "multiple": 0,
    "interpolation": "bicubic",
    "deviation": "imagenet",
    "context": 7,
    "radius": 12,
    "neighbourhood": "circle",
    "top": 5,
    "temperature": 0.2,
    "upsampling": "nearest",
    "flat_channel": "loses",
}
PRESETS = {"paper": {**_DINOV3, "features": "stream", "short_side": 480}, "dinov3": _DINOV3, "dino": _DINO}


def get_config(recipe: str = "davis2017") -> ConfigDict:
    """The config of a recipe, davis2017 or world, with every field that there is."""
    if recipe not in ("davis2017", "world"):
        raise ValueError(f"unknown recipe {recipe!r}; there are davis2017, world")
    config = ConfigDict()
    config.job = "propagate"
    config.name = f"evaluate_vos_{recipe}"
    config.checkpoint = ""  # directory of the model, as omnistream_jax.load reads it
    config.predictions = ""  # instead of a checkpoint: directory of masks to score
    config.output = ""  # directory of the results; made where it is missing
    config.data = ""  # directory of DAVIS-2017; "embedded": clips of the rendered world, as `world` has them
    config.allow_incomplete = False  # take what is there of DAVIS-2017; its numbers are not the published ones

    config.presets = ConfigDict(PRESETS)
    config.preset = "paper"
    for name, value in _DINO.items():  # what they mean is told there
        config[name] = placeholder(type(value))

    # void pixels of the truth. background: as davis2017-evaluation; excluded: they count for nothing
    config.void = "background"

    config.window = 0  # frames that a frame of a stream sees, its own and the sinks included; 0: all
    config.sinks = 1  # first frames of a stream that stay visible for ever (with a window)
    config.time_unit = 0.0  # frame t of a stream has the time t / time_unit; 0: the model's own, 16 as released
    config.frames_per_step = 1  # frames that go to the device at once; changes speed and rounding only
    config.compute_dtype = "auto"  # of the activations; auto: bfloat16 on accelerators, float32 on a CPU

    # Read with "embedded" data alone: scenes of the world's held-out part, the frames of each, their side in pixels,
    # the world's seed, and what a thing must cover of a first frame to be followed.
    config.world = ConfigDict({"clips": 32, "frames": 8, "size": 192, "seed": 0, "min_share": 0.01})

    config.plots = True  # draw each sequence with its masks

    # Compiled programs, for the next start; "": none. JAX_COMPILATION_CACHE_DIR, where it is set, comes first.
    config.compilation_cache = "~/.cache/omnistream_jax/compilation"
    if recipe == "world":
        config.data = "embedded"
        config.short_side = config.world.get_oneway_ref("size")
        config.radius = 0  # the frame has few patches; features alone must tell the place
        config.frames_per_step = 8
    return config
