"""Streaming geometry on published benchmarks: video depth (Sintel, Bonn, KITTI), camera pose (Sintel, TUM, ScanNet).

    python -m omnistream_jax.main --config=configs/evaluate_geometry.py --config.checkpoint=MODEL_DIR \\
      --config.output=DIR --config.benchmarks.sintel_depth=SINTEL_DIR [--config.benchmarks.NAME=DIR ...]

MODEL_DIR is a backbone with geometry heads, WORKDIR/model of a training run for instance. The data sets are not
downloaded; the modules in omnistream_jax/data/benchmarks say in which layouts, prepared or as published, each is read.
The protocol is CUT3R's, which OmniStream's Table 3 names: its sequences and frames, sizes, alignments and averages.
Sequences and frames are counted before anything is computed, and other counts than the published ones are refused.

Hardware: one device a process; many processes (launch/README.md) share the sequences. A CPU is enough for a tiny model;
for a ViT-L take a GPU: without a window the keys and values of 110 frames of 512 x 384 pixels take 10 GB in bfloat16,
and half as much again while they grow.
On the host one sequence is in memory at a time; 110 depth maps of 640 x 480 are scored in about 3 GB.

Expect a line a sequence, then a table with AbsRel and delta < 1.25 (x 100) of each depth benchmark, ATE, RPE
(translation) and RPE (rotation, degrees) of each pose benchmark, and CUT3R's published depth where it may be compared.
Exit status: 0 all scored, 1 a sequence could not be scored or a file is broken, 2 a field that cannot work.

OUTPUT/geometry.json                        every setting, versions, counts, and all numbers, aggregate and per sequence
OUTPUT/results/BENCHMARK/SEQUENCE.json      the same of one sequence, as soon as it is finished
OUTPUT/plots/BENCHMARK/SEQUENCE.png         frames, truth, aligned prediction and error; or both trajectories
OUTPUT/settings.json                        what the results were made with; other settings are refused here

Run the same command again after a stop: finished sequences are skipped, those without a score are tried again. Further
benchmarks may be added to an OUTPUT; geometry.json is always of those that the last command names.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field that there is."""
    config = ConfigDict()
    config.job = "evaluate"
    config.name = "evaluate_geometry"
    config.checkpoint = ""  # directory of the model, as omnistream_jax.load_geometry reads it
    config.output = ""  # directory of the results; made where it is missing

    config.benchmarks = ConfigDict()  # the folder of each data set; "": leave it out
    config.benchmarks.sintel_depth = ""
    config.benchmarks.bonn_depth = ""
    config.benchmarks.kitti_depth = ""
    config.benchmarks.sintel_pose = ""
    config.benchmarks.tum_pose = ""
    config.benchmarks.scannet_pose = ""
    config.allow_incomplete = False  # evaluate what is there of a benchmark; its numbers are not the published ones

    # Of the depth of a sequence to its truth. scale: one factor, as in Table 3; scale&shift: CUT3R's other fit, minutes
    # a sequence; metric: none, for models in metres.
    config.align = "scale"
    config.pose_source = "camera"  # camera: the camera head's; rays: solved from the ray maps
    config.long_side = 512  # of the frames that the model sees, in pixels

    config.window = 0  # frames that a frame sees, its own and the sinks included; 0: all
    config.sinks = 1  # first frames of a sequence that stay visible for ever (with a window)
    config.time_unit = 0.0  # frame t has the time coordinate t / time_unit; 0: the model's own, 16 as released
    config.frames_per_step = 1  # frames that go to the device at once; changes speed and rounding only
    config.compute_dtype = "auto"  # of the activations; auto: bfloat16 on accelerators, float32 on a CPU

    config.plots = True  # draw each sequence; needs matplotlib, pip install -e '.[eval]'

    # Compiled programs, for the next start; "": none. JAX_COMPILATION_CACHE_DIR, where it is set, comes first.
    config.compilation_cache = "~/.cache/omnistream_jax/compilation"
    return config
