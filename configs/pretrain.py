"""Pre-training of the streaming backbone.

    python -m omnistream_jax.main --config=configs/pretrain.py[:RECIPE] [--workdir=DIR] [--config.field=value ...]

(no argument)   The quick start: a tiny model on the photographs, videos, rendered scenes and captions that come with
                the package. A CPU of 2 cores, 4 to 6 minutes, 2 GB. It promises pictures, not quality. Writes
                runs/quickstart.
learn           What is learned of geometry from the rendered scenes in 10 minutes on 2 cores: scores on held-out
                scenes in the last line of runs/learn/metrics.jsonl (docs/learning.md).
learn_ssl       What is learned of photographs by self-supervision alone, in 25 minutes of one shared core.
learn_captions  What is learned of descriptions, boxes and answers about rendered pictures, in 18 to 22 minutes of one
                shared core.
stage1          The paper's first stage (OmniStream, Sec. 4): ViT-L, 60,000 steps at 224 x 224, clips of 16 frames.
stage2          The paper's second stage: 120,000 steps at 512 x 512, from all that stage 1 has trained:
                --config.init.weights=runs/stage1 --config.self_supervision.gram.backbone=DINOV3_DIR
                --config.language.tokenizer=QWEN3_DIR
                (or from its exported backbone and decoder alone, with new heads and projector:
                --config.init.backbone=runs/stage1/model --config.init.decoder=runs/stage1/model/decoder).
no_video, no_geometry, no_caption
                The paper's ablations, of the quick start, or behind a comma of another recipe (stage1,no_video).

The paper's recipes need data and, as in the paper, DINOv3's and Qwen3-0.6B's weights to start from:

    --config.tasks.image_ssl.paths=DIR[,DIR...]    photographs: folders, or .txt lists of files
    --config.tasks.clip_ssl.paths=DIR[,DIR...]     videos, likewise
    --config.tasks.clip_geometry.paths=NAME:DIR[,NAME:DIR...]   posed RGB-D sets, as scannet:/data/scannet
    --config.tasks.caption.paths=NAME:DIR[,NAME:DIR...]         captioned images, as grit:/data/grit
    --config.init.backbone=DIR                     DINOv3 in the Hugging Face layout, or one of our exports
    --config.init.decoder=DIR                      Qwen3-0.6B in the Hugging Face layout, with its tokenizer

What a run would need elsewhere, without data or the devices (docs/plans.md):

    --config.job=plan --config.topology=h100:64    or v5e:16x16, ...

They train self-supervision, streaming geometry and vision-language alignment. A task of weight 0 is left out. The
paper's batches are split over all devices, the others use one; running the same command again goes on from the last
checkpoint.
"""

from ml_collections import ConfigDict

RECIPES = ("", "learn", "learn_ssl", "learn_captions", "stage1", "stage2")
# name -> the task that is left out
ABLATIONS = {"no_video": "clip_ssl", "no_geometry": "clip_geometry", "no_caption": "caption"}


def get_config(recipe: str = "") -> ConfigDict:
    """The config of a recipe, with every field that there is."""
    parts = recipe.split(",")
    without = [part for part in parts if part in ABLATIONS]
    kept = [part for part in parts if part not in ABLATIONS]
    recipe = kept[0] if kept else ""
    if len(kept) > 1 or recipe not in RECIPES:
        names = ", ".join(name or "(none)" for name in (*RECIPES, *ABLATIONS))
        raise ValueError(f"unknown recipe {','.join(parts)!r}; there are {names}")
    config = _paper()
    if recipe == "stage2":
        _second_stage(config)
    elif recipe == "learn":
        _learn(config)
    elif recipe == "learn_ssl":
        _learn_ssl(config)
    elif recipe == "learn_captions":
        _learn_captions(config)
    elif recipe == "":
        _quick_start(config)
    for part in without:
        config.tasks[ABLATIONS[part]].weight = 0.0
        config.name = f"{config.name}_{part}"
    return config


def _paper() -> ConfigDict:
    config = ConfigDict()
    config.job = "train"
    # Of job "plan", which compiles every program of a step for devices that are not here, and tells what they need:
    # h100:64 (also h200, a100), v5e:16x16 (also v6e; v5p:4x4x8) or cpu:8 (topology.py). No data, no weights.
    config.topology = ""
    config.name = "stage1"  # without --workdir the run lies in runs/NAME
    config.seed = 0  # 0 to 2 ** 32 - 1
    config.steps = 60_000  # 0: no training; scores and exports the weights that init names, or random ones

    # Sizes: tiny, small, base, large (models/presets.py). patch_size 0 is the preset's. dtype auto: bfloat16 on
    # accelerators. remat: what a block keeps for its backward pass: none (nothing is computed again), dots (products
    # are kept), block (its input alone: the least memory, a third more time), or auto, the fastest. layer_scale:
    # LayerScale's value and kernel_std the standard deviation of kernels at the start of training from scratch.
    config.model = ConfigDict(
        {
            "preset": "large",
            "patch_size": 0,
            "rope": "dinov3",
            "time_unit": 16.0,
            "dtype": "auto",
            "remat": "auto",
            "layer_scale": 0.01,
            "kernel_std": 0.02,
        }
    )
    # How many devices share the work in which way (sharding.py): data splits batches; fsdp splits batches and
    # parameters; tensor splits heads, MLPs, prototypes and the vocabulary. -1: all that are left over; without it, one
    # process may use fewer devices than there are.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    # Directories or hub ids; "": from scratch. The decoder is Qwen3 in the Hugging Face layout. weights: another run's
    # --workdir, or one of its checkpoints, from whose EMA teacher all parts of the model start (parts: those named, as
    # ("backbone",)); the optimiser and the steps begin anew.
    config.init = ConfigDict({"backbone": "", "decoder": "", "weights": "", "parts": ()})

    # Adam as in the paper. Where it is silent, as DINOv3: the norm of each module's gradient is clipped at clip_norm
    # (0: not), and the heads' prototypes wait for freeze_prototypes_steps. factors: of the learning rate of parts of
    # the parameters, as (("backbone", 0.1), ("geometry/camera", 0.5)). kind: adam, or muon (muon.py): for the matrices
    # of the transformers, and Adam for the rest. docs/learning.md says what it gains there.
    config.optimizer = ConfigDict(
        {
            "peak": 1e-4,
            "warmup_steps": 4_000,
            "final": 0.0,
            "beta1": 0.9,
            "beta2": 0.999,
            "clip_norm": 3.0,
            "freeze_prototypes_steps": 1_250,
            "factors": (),
            "kind": "adam",
        }
    )

    config.self_supervision = ConfigDict(
        {
            "prototypes": 65_536,
            "head_hidden": 2_048,
            "head_bottleneck": 256,
            "prototype_std": 0.02,
            "student_temperature": 0.1,
            "teacher_temperature": (0.04, 0.07),
            "teacher_warmup_steps": 37_500,
            "teacher_momentum": (0.994, 1.0),
            "local_weight": 0.5,
            "koleo_weight": 0.1,
            "rope_jitter": 2.0,
            # The Gram teacher is the pre-trained backbone of gram.backbone, or else of init; without either,
            # copies of the EMA teacher, the first after first_snapshot steps (the term is off before), then every
            # snapshot_every (0: never). size: side of its crops in pixels where it is not the student's (0).
            "gram": {"weight": 1.0, "backbone": "", "size": 0, "first_snapshot": 10_000, "snapshot_every": 10_000},
        }
    )

    # Depth, rays and cameras of posed clips. layers: the four blocks that feed the dual DPT; () is Depth
    # Anything 3's choice. gradient_scales: 1, or VGGT's 4. point_norm: l1, or VGGT's l2. units: clip, lengths are
    # divided by the clip's mean distance to its first camera; metres, they stay, and data that is not metric teaches
    # no length.
    config.geometry = ConfigDict(
        {
            "layers": (),
            "features": 256,
            "out_channels": (256, 512, 1_024, 1_024),
            "units": "clip",
            "alpha": 0.2,
            "gradient_scales": 1,
            "point_norm": "l1",
            "ray_confidence": False,
            "weights": {"depth": 1.0, "ray": 1.0, "point": 1.0, "camera": 1.0},
            "rope_jitter": 2.0,
        }
    )

    # The decoder of captions. tokenizer: "embedded", or a directory, hub id or JSON file of one with Qwen3's
    # chat tokens; "": that of init.decoder. decoder: tiny, 0.6b, 1.7b, ... (models/qwen3.py), and other values than the
    # preset's where they are not 0, or "auto" (tied: yes or no, whether logits are made with the embedding); a
    # vocabulary_size of 0 is the tokenizer's. init.decoder must be of these. kernel_std: standard deviation of the
    # projector's kernels, and of the decoder's where it starts from scratch. chunk: tokens of a device whose logits are
    # held at once. rope_jitter: of the pictures, as in self_supervision.
    config.language = ConfigDict(
        {
            "tokenizer": "",
            "decoder": {
                "preset": "0.6b",
                "vocabulary_size": 151_936,
                "width": 0,
                "depth": 0,
                "heads": 0,
                "kv_heads": 0,
                "head_width": 0,
                "hidden": 0,
                "rope_theta": 0.0,
                "norm_eps": 0.0,
                "max_length": 0,
                "tied": "auto",
            },
            "kernel_std": 0.02,
            "chunk": 256,
            "rope_jitter": 2.0,
        }
    )

    # One entry a task; weight 0 leaves it out. Batch sizes are samples a step over all devices.
    # micro_batches: the batch is taken in so many parts, one after the other, for less memory and the same gradient;
    # self-supervision compares the samples of a batch with each other and allows 1 alone.
    # paths: folders or .txt lists, or data sets as NAME:DIR (data/registry.py), separated by commas; "embedded" is what
    # comes with the package. path_weights: their shares; (): by the square root of their sizes. short_side: videos are
    # decoded to it (0: as they are). frame_rate: the unit of stride is 1 / frame_rate seconds (0: a frame).
    image = {
        "kind": "image",
        "weight": 0.1,
        "paths": "",
        "path_weights": (),
        "batch_size": 1_024,
        "micro_batches": 1,
        "global_size": 224,
        "local_size": 96,
        "local_crops": 2,
    }
    clip = {**image, "kind": "clip", "batch_size": 64, "frames": 16, "stride": (1, 4)}
    clip |= {"short_side": 0, "frame_rate": 0.0}
    # paths of posed clips are data sets as NAME:DIR. stride: smallest and largest distance between a clip's frames, of
    # all its sources; (): 1 to CUT3R's largest of each. crop_scale: smallest and largest side of the crop, as shares of
    # the largest one. colour: brightness, contrast, saturation and hue change at random.
    posed = {
        "kind": "posed",
        "weight": 1.0,
        "paths": "",
        "path_weights": (),
        "batch_size": 64,
        "micro_batches": 1,
        "frames": 16,
        "stride": (),
        "height": 224,
        "width": 224,
        "crop_scale": (0.8, 1.0),
        "colour": True,
    }
    # paths of captions as of posed clips. A sample is a row: captions_per_row images of size x size pixels and their
    # texts, of max_tokens tokens together; longer answers are cut. 256 captions a step. texts_per_image: at most so
    # many texts about an image, the record's own and others that follow from it (GRIT, BLIP3-OCR) or come with it (the
    # world; RefCOCO and SA-1B have none); texts do not see each other.
    captioned = {
        "kind": "captioned",
        "weight": 1.0,
        "paths": "",
        "path_weights": (),
        "batch_size": 64,
        "micro_batches": 1,
        "captions_per_row": 4,
        "texts_per_image": 1,
        "max_tokens": 512,
        "size": 224,
    }
    config.tasks = ConfigDict({"image_ssl": image, "clip_ssl": clip, "clip_geometry": posed, "caption": captioned})

    # An unreadable sample is replaced by another of its source, counted and told; a source that fails in a larger
    # share of its last 100 samples stops the run. Workers that die are started anew, max_restarts times in a row.
    config.loader = ConfigDict({"workers": 8, "prefetch": 2, "max_failed_fraction": 0.5, "max_restarts": 3})
    # Compiled programs, for the next start; "": none. JAX_COMPILATION_CACHE_DIR, where it is set, comes first.
    config.compilation_cache = "~/.cache/omnistream_jax/compilation"
    # Pictures for TensorBoard as the evaluation's below, also during training (0: at the end alone). A profile of
    # `steps` steps from `start` on, in WORKDIR/profile (0: none); `kill -USR1 PID` profiles the next 5 at any time.
    config.log_every = 50
    config.pictures_every = 0
    config.profile = ConfigDict({"start": 10, "steps": 0})
    # A step with a loss or gradient that is not finite makes no update; more than so many in a row stop the run.
    config.max_nonfinite_steps = 10
    # Exit status after SIGTERM, 3 to 125, for the scheduler to start the job again (75: EX_TEMPFAIL).
    config.requeue_exit_code = 75
    # Of a run of many processes (launch/README.md). start_seconds: how long they wait for each other at the start.
    # heartbeat_seconds: when one has not been heard of for so long, the others end. step_deadline_seconds: a step that
    # takes longer, its save included, ends the process with all stacks printed (0: none); the first, which compiles,
    # and one with evaluators have ten times as long.
    config.distributed = ConfigDict({"start_seconds": 300, "heartbeat_seconds": 100, "step_deadline_seconds": 900.0})
    config.checkpoint = ConfigDict({"every": 1_000, "keep_last": 3, "keep_every": 20_000})
    # At the end, on held-out frames that come with the package: features.png of a clip of so many frames at this side,
    # and patch retrieval at the side of the global crops; with geometry, depth and cameras of so many rendered scenes;
    # with captions, captions.png, and so many descriptions, boxes and answers each about rendered scenes.
    config.evaluation = ConfigDict(
        {
            "picture_frames": 8,
            "picture_size": 224,
            "retrieval_size": 224,
            "geometry_scenes": 32,
            "geometry_size": 224,
            "caption_records": 32,
        }
    )
    # Accuracy of the backbone's features (the EMA teacher's, where there is one) on labelled pictures: before the first
    # step, every so many steps (0: never) and after the last, as knn_top1 and linear_top1 in percent, with the seconds
    # that it took, all of one device, as evaluators_seconds. paths: world, things of the rendered world by their shape;
    # or a folder with train/CLASS/ and val/CLASS/. At most so many images of each, size x size, decoded at the start
    # and held in memory. knn: DINO's weighted neighbours, each of `neighbours` (features: cls, mean or cls+mean);
    # linear: the best of several learning rates, for a batch of 256, on CLS and mean of the patches.
    config.evaluators = ConfigDict(
        {
            "every": 0,
            "names": ("knn", "linear"),
            "paths": "world",
            "size": 224,
            "train_images": 10_000,
            "test_images": 2_000,
            "neighbours": (20,),
            "temperature": 0.07,
            "knn_features": "cls",
            "learning_rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
            "linear_steps": 500,
        }
    )
    return config


def _second_stage(config: ConfigDict) -> None:
    config.name = "stage2"
    config.steps = 120_000
    config.model.remat = "block"
    for task in (config.tasks.image_ssl, config.tasks.clip_ssl):
        task.update({"global_size": 512, "local_size": 224})
    config.tasks.clip_geometry.update({"height": 512, "width": 512})
    # An image takes 1,024 tokens, so that packing would cost more in attention than it saves in padding.
    config.tasks.caption.update({"size": 512, "batch_size": 256, "captions_per_row": 1, "max_tokens": 256})
    config.evaluation.update({"picture_size": 512, "retrieval_size": 512, "geometry_size": 512})


def _quick_start(config: ConfigDict) -> None:
    config.name = "quickstart"
    config.steps = 330
    config.model.preset = "tiny"
    config.mesh.data = 1  # its batches are too small to split
    # A few hundred steps are enough only if the targets are sharp and the teacher is quick from the start: few, large
    # and fixed prototypes, one teacher temperature, gradients as they are.
    config.optimizer.update({"peak": 2e-3, "warmup_steps": 30, "clip_norm": 0.0, "freeze_prototypes_steps": 1_000_000})
    config.self_supervision.update(
        {
            "prototypes": 256,
            "head_hidden": 256,
            "head_bottleneck": 32,
            "prototype_std": 0.177,
            "teacher_temperature": (0.04, 0.04),
            "teacher_momentum": (0.95, 0.99),
        }
    )
    config.self_supervision.gram.update({"first_snapshot": 100, "snapshot_every": 50})
    for task in (config.tasks.image_ssl, config.tasks.clip_ssl):
        task.update({"paths": "embedded", "weight": 1.0, "global_size": 96, "local_size": 48})
    config.tasks.image_ssl.batch_size = 16
    config.tasks.clip_ssl.update({"batch_size": 4, "frames": 4})
    config.geometry.update({"features": 16, "out_channels": (16, 16, 32, 32), "rope_jitter": 1.0})
    posed = {"paths": "embedded", "batch_size": 2, "frames": 4, "height": 64, "width": 64}
    config.tasks.clip_geometry.update(posed)
    config.language.update({"tokenizer": "embedded", "kernel_std": 0.08, "rope_jitter": 1.0})
    config.language.decoder.update({"preset": "tiny", "vocabulary_size": 0})
    captioned = {"paths": "embedded", "batch_size": 1, "captions_per_row": 2, "max_tokens": 160, "size": 64}
    config.tasks.caption.update(captioned)
    config.tasks.caption.weight = 0.1  # few captions a step: their gradient is noise to what the pictures show
    config.loader.update({"workers": 0, "prefetch": 4})
    config.distributed.step_deadline_seconds = 0.0  # a laptop may sleep
    config.log_every = 10
    config.checkpoint.update({"every": 100, "keep_last": 2, "keep_every": 0})
    config.evaluation.update({"retrieval_size": 96, "geometry_scenes": 8, "geometry_size": 64})
    config.evaluation.caption_records = 8
    config.evaluators.update({"size": 64, "train_images": 1_000, "test_images": 500})


def _learn(config: ConfigDict) -> None:
    _quick_start(config)
    config.name = "learn"
    config.steps = 1_500
    # Kernels of 0.02 hardly pass a signal on at this width; the camera head's ReLUs die at the rate of the rest.
    config.model.update({"patch_size": 8, "kernel_std": 0.08, "layer_scale": 1.0})
    config.optimizer.update({"peak": 1e-3, "warmup_steps": 100, "clip_norm": 1.0})
    config.optimizer.factors = (("geometry/camera", 0.2),)
    config.self_supervision.gram.weight = 0.0
    for task in (config.tasks.image_ssl, config.tasks.clip_ssl, config.tasks.caption):
        task.weight = 0.0
    config.geometry.update({"features": 8, "out_channels": (8, 8, 16, 16)})
    clips = {"batch_size": 8, "frames": 8, "stride": (2, 2), "height": 32, "width": 32}
    config.tasks.clip_geometry.update(clips)
    config.loader.workers = 1
    config.log_every = 50
    config.checkpoint.every = 500
    config.evaluation.update({"geometry_scenes": 96, "geometry_size": 32})
    config.evaluators.size = 32


def _learn_ssl(config: ConfigDict) -> None:
    _learn(config)
    config.name = "learn_ssl"
    config.steps = 2_500
    config.optimizer.factors = ()
    config.tasks.clip_geometry.weight = 0.0
    config.tasks.image_ssl.update({"weight": 1.0, "global_size": 64, "local_size": 32})


def _learn_captions(config: ConfigDict) -> None:
    _learn(config)
    config.name = "learn_captions"
    config.steps = 5_000
    config.tasks.clip_geometry.weight = 0.0
    # With Adam in place of Muon it takes two to three times the steps (docs/learning.md), and a backbone at the rate of
    # the decoder left the decoder blind. The larger kernels let the tokens of a random backbone tell where they are.
    config.model.kernel_std = 0.12
    factors = (("backbone", 0.3), ("projector", 0.5))
    config.optimizer.update({"kind": "muon", "peak": 2e-3, "beta2": 0.99, "factors": factors})
    config.language.decoder.depth = 2
    # Several texts about a picture share the work on it.
    captions = {"batch_size": 4, "captions_per_row": 1, "texts_per_image": 4, "max_tokens": 288}
    config.tasks.caption.update({**captions, "size": 48, "weight": 1.0})
    config.log_every = 100
    config.checkpoint.every = 2_000
    config.evaluation.caption_records = 96
