"""Frozen features, judged: small heads are trained on what a backbone sees, and scored.

    python -m omnistream_jax.main --config=configs/evaluate_probes.py:RECIPE --config.checkpoint=MODEL_DIR \\
      --config.output=DIR [--config.data=DIR] [--config.field=value ...]

imagenet        ImageNet-1K, linear classification: DATA/train and DATA/val, a folder a class
nyuv2           NYU Depth v2, linear depth: DATA as published with BTS, with its two lists
ade20k          ADE20K, linear segmentation: DATA/images and DATA/annotations
k400, ssv2      Kinetics-400 and Something-Something v2, attentive probe: DATA/{train,val}.csv of lines "path label"
world_objects   the shape of a thing in the embedded rendered world, linear: no data to download, 2 CPU cores, minutes
world_depth     its depth, linear; likewise
world_motion    what the moving thing of a clip does, attentive probe; likewise

MODEL_DIR is a backbone, WORKDIR/model of a training run for instance, or the released weights. The protocols are those
of DINOv3 (images) and V-JEPA 2 (videos), which the paper's Tables 10 and 11 name; what they and the paper do
differently is a field, and `preset` sets them all: "paper", or "dinov3" or "vjepa2", whose own evaluation it is.
All heads of a sweep (13 learning rates; 5 learning rates x 4 weight decays) are trained in one program on the same
features. Counts of the data are checked before anything is computed, and other counts than the published ones are
refused.

Batches are split over all devices, of many processes too (launch/README.md), which share what is scored; running the
same command again goes on from the last checkpoint, to the same bits.
Exit status: 0 scored, 1 a file is broken or the device cannot do it, 2 a field that cannot work.

OUTPUT/probe.json         every setting, versions, counts, the scores of all heads, the best one, and the paper's, where
                          the data are complete
OUTPUT/plots/*.png        the score of each learning rate, and what the protocol shows of the best head
OUTPUT/evaluations.json   the scores of all heads, during training too
OUTPUT/checkpoints        the heads and their optimisers while it runs
OUTPUT/features           where `augment` is False: the features of the training set, which are encoded once
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(recipe: str = "world_objects") -> ConfigDict:
    """The config of a recipe, with every field that there is."""
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
    config = _shared()
    config.name = recipe
    RECIPES[recipe](config)
    return config


def _shared() -> ConfigDict:
    """What all recipes have; a recipe sets the sizes and the optimisation, and adds fields of its own."""
    config = ConfigDict()
    config.job = "probe"
    config.name = ""
    config.probe = ""  # the protocol: imagenet, nyuv2, ade20k, action
    config.checkpoint = ""  # directory of the model, as omnistream_jax.load reads it
    config.output = ""  # directory of the results; made where it is missing
    config.data = ""  # directory of the data set; "embedded": the rendered world that comes with the package
    config.benchmark = ""  # of the paper's tables, whose figures are printed beside the result; "": none
    config.allow_incomplete = False  # use what is there of a data set; the numbers are not the published ones'
    config.seed = 0  # of the heads' start, dropout, the order of samples and random views; not of what is scored

    # presets: name -> the fields that it sets. A field that is None is the preset's; any other value stays.
    config.preset = ""
    config.presets = ConfigDict()

    # The sweep: every learning rate with every weight decay is a head. learning_rate_batch: the learning rates are
    # multiplied by batch / learning_rate_batch (0: they are as they are).
    config.learning_rates = placeholder(tuple)
    config.weight_decays = placeholder(tuple)
    config.learning_rate_batch = 0
    config.steps = placeholder(int)
    config.batch = placeholder(int)  # samples a step, over all devices

    # False: train on the view of the validation, without anything random. Features are then encoded once and kept in
    # OUTPUT/features; for small sets, which must fit the host's memory, of each process (twice while they are made).
    # The fields of random views do nothing then, nor do those of `loader` but `workers`.
    config.augment = True

    config.evaluate_every = 0  # steps; 0: at the end alone
    config.evaluate_batch = 32  # samples at once
    config.heads_at_once = 0  # whose gradients are computed side by side; 0: all. Fewer take less memory
    config.encode_batch = 0  # clips, whole ones, that pass the backbone at once, over all devices; 0: a whole batch
    config.checkpoint_every = 1_000  # steps
    config.log_every = 50  # steps
    config.time_unit = 0.0  # frame t has the time coordinate t / time_unit; 0: the model's own, 16 as released
    # Of the activations of the backbone and of the attentive probe; linear heads are always float32. auto: bfloat16 on
    # accelerators, float32 on a CPU.
    config.compute_dtype = "auto"

    # How many devices share the work in which way (sharding.py): data splits batches, fsdp also the backbone (but what
    # many processes score passes a whole copy on each device).
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})
    # As in configs/pretrain.py: processes that make batches, and what happens when samples or they fail. Samples to be
    # scored, and with augment False those to be trained on, are read by `workers` threads, one at least, and one that
    # cannot be read ends the run.
    config.loader = ConfigDict({"workers": 8, "prefetch": 2, "max_failed_fraction": 0.5, "max_restarts": 3})
    config.plots = True  # needs matplotlib, pip install -e '.[eval]'

    # Compiled programs, for the next start; "": none. JAX_COMPILATION_CACHE_DIR, where it is set, comes first.
    config.compilation_cache = "~/.cache/omnistream_jax/compilation"
    return config


def _set_presets(config: ConfigDict, presets: dict[str, dict]) -> None:
    """The presets of a recipe, the first of which is chosen; fields that they set are None until then."""
    config.presets = ConfigDict(presets)
    config.preset = next(iter(presets))
    for fields in presets.values():
        for name, value in fields.items():
            config[name] = placeholder(type(value))


def _imagenet(config: ConfigDict) -> None:
    """DINOv3's linear evaluation, with which the paper's Table 10 agrees in all that it says."""
    config.probe = "imagenet"
    config.benchmark = "imagenet"
    linear = {
        "learning_rates": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
        "weight_decays": (0.0,),
        "learning_rate_batch": 256,
        "steps": 12_500,
        "batch": 1_024,  # 128 on each of 8 GPUs
        "momentum": 0.9,
        "warmup_steps": 0,
        "features": "cls+mean",  # CLS token and mean of the patches, side by side; or cls, mean
        "size": 224,
        "resize": 256,  # short side of a validation image, before its central crop of `size`
    }
    _set_presets(config, {"paper": linear, "dinov3": linear})
    config.classes = 1_000
    config.evaluate_batch = 256


def _depth_augmentation() -> ConfigDict:
    """DINOv3's on NYU Depth v2, in this order."""
    augmentation = ConfigDict()
    augmentation.fixed_crop = (43, 45, 608, 472)  # left, top, right, bottom of 640 x 480; (): none
    augmentation.rotation = 2.5  # degrees, either way
    augmentation.rotation_probability = 0.5
    augmentation.flip_probability = 0.5
    augmentation.crop = (416, 544)  # height and width, at random; (): none
    augmentation.colour_probability = 0.5
    augmentation.gamma = (0.9, 1.1)  # the values' exponent; white is gamma_scale when they are raised to it
    augmentation.gamma_scale = 255.0
    augmentation.brightness = (0.75, 1.25)
    augmentation.colour = (0.9, 1.1)  # of each channel
    return augmentation


def _nyuv2(config: ConfigDict) -> None:
    """DINOv3's linear depth; the paper differs in the learning rate alone.

    Left out: in DINOv3 the backbone is in train mode for the first 1,600 steps, where its RoPE's coordinates are
    rescaled at random. Here it never is.
    """
    config.probe = "nyuv2"
    config.benchmark = "nyuv2"
    linear = {
        "learning_rates": (1e-3,),
        "weight_decays": (1e-4,),
        "steps": 38_400,
        "batch": 16,  # 2 on each of 8 GPUs
        "warmup_steps": 12_800,
        "start_divisor": 1_000.0,  # the first learning rate is the peak over it
        "end_divisor": 25_000.0,  # and the last one
        "beta1": (0.85, 0.95),  # of AdamW, from and to, after the warm-up; 0 during it
        "beta2": 0.99,
        "clip_norm": 35.0,
        "images_per_loss": 2,  # each GPU's SigLoss is that of its own 2 images; their mean is the loss
        "variance_from": 100,  # the first step at which SigLoss has its variance
        "bins": 256,
        "min_depth": 0.001,  # metres: the first and the last bin, and what is scored between
        "max_depth": 10.0,
        "crop": "eigen",  # of the scored pixels, as Eigen et al. cut them; or none
        "flip": True,  # score the mean over a picture and its mirror image
    }
    _set_presets(config, {"paper": linear, "dinov3": linear | {"learning_rates": (3e-4,)}})
    config.size = (480, 640)  # of all pictures, in pixels
    config.evaluate_batch = 16
    config.augmentation = _depth_augmentation()


def _ade20k(config: ConfigDict) -> None:
    """DINOv3's linear segmentation, with which the paper's Table 10 agrees in all that it says."""
    config.probe = "ade20k"
    config.benchmark = "ade20k"
    linear = {
        "learning_rates": (1e-3,),
        "weight_decays": (1e-3,),
        "steps": 40_000,
        "batch": 16,  # 2 on each of 8 GPUs
        "warmup_steps": 1_500,
        "warmup_ratio": 1e-6,  # of the peak, where the warm-up begins
        "schedule_lag": 1,  # the learning rate does not move on after the very first step
        "beta1": 0.9,  # of AdamW
        "beta2": 0.999,
        "clip_norm": 0.0,  # none
        "loss_mean": "all",  # the loss of labelled pixels is divided by the number of all; or labelled
        "dropout": 0.1,  # of whole channels
        "size": 512,  # short side of a scored picture, in pixels
        "window": 512,  # slides over it
        "stride": 341,
        "best_evaluation": True,  # report the best of all evaluations, not the last
        "compute_dtype": "float32",  # fixed by DINOv3's own config of this protocol
    }
    _set_presets(config, {"paper": linear, "dinov3": linear})
    config.evaluate_every = 5_000
    config.evaluate_batch = 16  # windows
    augmentation = config.augmentation = ConfigDict()
    augmentation.short_side = 512  # of a picture, times `scale` at random
    augmentation.scale = (0.5, 2.0)
    augmentation.crop = 512  # side
    augmentation.category_ratio = 0.75  # share of a crop that one class may have; ten tries
    augmentation.flip_probability = 0.5
    augmentation.distortion = True  # of brightness, contrast, saturation and hue


def _k400(config: ConfigDict) -> None:
    """V-JEPA 2's attentive probe on Kinetics-400."""
    _action(config, dataset="k400", classes=400, segments=8, learning_rates=(1e-4, 3e-4), epoch_steps=964)


def _ssv2(config: ConfigDict) -> None:
    """V-JEPA 2's attentive probe on Something-Something v2."""
    _action(config, dataset="ssv2", classes=174, segments=2, learning_rates=(3e-4,), epoch_steps=660)


def _action(
    config: ConfigDict, dataset: str, classes: int, segments: int, learning_rates: tuple[float, ...], epoch_steps: int
) -> None:
    """V-JEPA 2's attentive probe. The paper's Table 11 names other learning rates, and no weight decay and batch."""
    config.probe = "action"
    config.benchmark = dataset
    config.dataset = dataset  # k400 or ssv2: what is expected in `data`
    config.classes = classes
    theirs = {
        "learning_rates": (5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
        "weight_decays": (0.01, 0.1, 0.4, 0.8),
        "steps": 20 * epoch_steps,  # 20 epochs
        "batch": 256,  # 4 on each of 64 GPUs
        "warmup_steps": 0,
        "size": 256,  # of a frame, in pixels
        "segments": segments,  # clips of a video, spread over it; the probe sees the tokens of all
        "frames": 16,  # of a clip
        "stride": 4,  # frames of the video from one to the next
        "views": 3,  # cuts of a held-out video along its longer side, scored apart
        "validation_window": "random",  # where a clip lies in its part of a held-out video; or middle
        # Ours: V-JEPA 2 logs the best head of each epoch and chooses none of them. The last epoch's; True: the best's.
        "best_evaluation": False,
    }
    _set_presets(config, {"paper": {**theirs, "learning_rates": learning_rates}, "vjepa2": theirs})
    config.short_side = 0  # to which held-out frames are resized; 0: size, or 256 / 224 of it for a single view
    config.validation_seed = 0  # draws those windows
    config.evaluate_every = epoch_steps
    config.evaluate_batch = 8
    config.encode_batch = 64
    # A batch of k400 takes 13 GB of the host's memory, of ssv2 3 GB, and each worker makes whole ones, one ahead.
    config.loader.update({"workers": 4, "prefetch": 1})
    config.heads_at_once = 1  # a head sees all clips' tokens: 20 side by side do not fit an accelerator
    _attentive(config, probe_heads=16, probe_depth=4, rand_augment="rand-m7-n4-mstd0.5-inc1", erase_probability=0.25)


def _attentive(
    config: ConfigDict, probe_heads: int, probe_depth: int, rand_augment: str, erase_probability: float
) -> None:
    """What all attentive probes have."""
    config.probe_heads = probe_heads  # of its attention
    config.probe_depth = probe_depth  # its blocks, the last of which pools
    config.initial_probe = ""  # file or directory of weights with which each head starts, V-JEPA 2's for instance
    config.remat = True  # keep the inputs of the probe's blocks alone for the backward pass: less memory, more time
    # clip: a frame sees those before it, as OmniStream's; frame: each is encoded alone, as an image model, DINOv3 for
    # instance, must be: in one clip its frames would see each other, which it never learned
    config.features = "clip"
    config.shuffle_frames = False  # the frames of each clip in a random order: what the probe can tell without time
    config.rand_augment = rand_augment  # of training clips; "": none
    config.crop_scale = (0.08, 1.0)  # of a training crop, as a share of the frame's area
    config.flip_probability = 0.0  # classes know left from right
    config.erase_probability = erase_probability  # of a box of noise


def _world(config: ConfigDict) -> None:
    """What the small recipes on the embedded world have in common."""
    config.data = "embedded"
    config.world_seed = 0  # of the scenes
    config.loader.update({"workers": 0, "prefetch": 4})


def _world_objects(config: ConfigDict) -> None:
    """A crop around a thing of the rendered world; its class is its shape."""
    _world(config)
    config.probe = "imagenet"
    config.update(
        {
            "learning_rates": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0, 2.0, 5.0, 10.0),
            "weight_decays": (0.0,),
            "learning_rate_batch": 256,
            "steps": 2_000,
            "batch": 128,
        }
    )
    config.momentum = 0.9
    config.warmup_steps = 0
    config.features = "cls+mean"
    config.size = 32  # of a crop, in pixels
    config.resize = 32
    config.augment = False
    config.scenes = 4_000  # of the world's train part; a crop of one thing of each
    config.heldout_scenes = 1_000
    config.render_size = 96  # of the frames that crops are cut out of, in pixels
    config.margin = 0.25  # on each side of the thing's box, as a share of it
    config.smallest = 12  # longer side of the smallest boxes, in pixels of the frame
    config.evaluate_batch = 256


def _world_depth(config: ConfigDict) -> None:
    """Linear depth on the rendered world: the head and the loss of nyuv2, whole frames, every pixel known."""
    _world(config)
    config.probe = "nyuv2"
    config.update(
        {
            "learning_rates": (1e-2, 3e-2, 1e-1, 3e-1),
            "weight_decays": (1e-4,),
            "steps": 1_000,
            "batch": 16,
        }
    )
    config.warmup_steps = 100
    config.start_divisor = 1_000.0
    config.end_divisor = 25_000.0
    config.beta1 = (0.85, 0.95)
    config.beta2 = 0.99
    config.clip_norm = 35.0
    config.images_per_loss = 2
    config.variance_from = 100
    config.bins = 256
    config.min_depth = 0.1  # metres
    config.max_depth = 10.0
    config.crop = "none"
    config.flip = True
    config.augment = False
    config.augmentation = _depth_augmentation()  # where `augment` is True
    config.augmentation.fixed_crop = ()
    config.augmentation.crop = ()
    config.augmentation.rotation_probability = 0.0
    config.frames = 1  # of a clip; the backbone sees those before
    config.size = 64  # of the frames, in pixels
    config.scenes = 1_000  # of the world's train part
    config.heldout_scenes = 250
    config.evaluate_batch = 64


def _world_motion(config: ConfigDict) -> None:
    """Attentive probe on what the moving thing of a rendered scene does: 11 classes, which time alone tells apart."""
    _world(config)
    config.probe = "action"
    config.update({"learning_rates": (3e-3, 1e-3), "weight_decays": (0.01,), "steps": 800, "batch": 32})
    config.warmup_steps = 0
    config.augment = False
    config.size = 32  # of a frame, in pixels
    config.frames = 8  # of a clip, spread over the whole motion
    config.scenes = 2_200  # of the world's train part
    config.heldout_scenes = 550
    config.validation_seed = 0  # draws the order of the frames, where they are shuffled
    config.evaluate_every = 200
    config.evaluate_batch = 110
    config.best_evaluation = False  # report the best of all evaluations, not the last
    _attentive(config, probe_heads=8, probe_depth=2, rand_augment="", erase_probability=0.0)
    config.remat = False


RECIPES = {
    "imagenet": _imagenet,
    "nyuv2": _nyuv2,
    "ade20k": _ade20k,
    "k400": _k400,
    "ssv2": _ssv2,
    "world_objects": _world_objects,
    "world_depth": _world_depth,
    "world_motion": _world_motion,
}
