"""Live: a video file, a webcam or a network stream through the model, frame by frame: features, geometry, answers.

    python -m omnistream_jax.main --config=configs/stream.py --config.input=FILE|0|/dev/videoN|rtsp://...|http://... \\
      --config.checkpoint=MODEL_DIR --config.output=DIR [--config.field=value ...]

A camera:       --config.input=0 --config.drop_frames=True
A file like it: --config.realtime=True --config.drop_frames=True; without the two, every frame as fast as it goes.
Geometry:       --config.geometry.enabled=True, with a checkpoint that has the heads (WORKDIR/model of a training).
A question:     --config.question="What is on the table?", with a checkpoint that has a decoder. It is answered at the
                end, and with --config.answer.every=30 after every 30 frames; no frame is encoded for it again.

Hardware: a CPU, a GPU or a TPU, one device; decoding takes a core beside it. With a `window`, memory and the time for a
frame stay the same for ever, those of geometry and answers included. Pictures need `pip install -e '.[viz]'` (Rerun)
unless `record` and `viewer` are off; no display is needed unless `viewer` is on.

Expect one line about compiling (a second start loads the programs from `compilation_cache`), then a line every
`log_seconds` with frames, frames/s, latency and dropped frames, and a summary at the end. Ctrl-C, or SIGTERM, ends a
run in order: its files are finished. Exit status: 0 done or stopped so, 1 the source cannot be read on (what was read
is kept), 2 a field that cannot work.

OUTPUT/stream.rrd     for `rerun OUTPUT/stream.rrd`, on the timelines "frame" and "time": image, features (one pixel a
                      patch), latency/step and latency/capture_to_result in milliseconds, dropped frames so far; with
                      geometry world/camera (its pose and intrinsics; its depth below it), world/path, world/points
OUTPUT/features.mp4   the frames, and beside them their patches' features as colours (three principal components), and
                      depth: red is near, blue is far
OUTPUT/summary.json   the summary: frames, dropped, rate, percentiles of latency, peak memory, compiling, why it ended;
                      of the geometry the points, the side of their voxels, and points that could not be used; of the
                      answers the last, their number and time

With a question:

OUTPUT/answers.jsonl  a line an answer: "frame" and "time" in seconds after which it was asked, "question", "answer",
                      "frames" that the decoder was shown (by index), "seconds" that it took. Also on the terminal, and
                      in stream.rrd as the text log "answer". Boxes in it are in thousandths of the width and height
                      of the frame as the model sees it, after `resize` (omnistream_jax/data/boxes.py)

With geometry, in metres (see `metres_per_unit`), in the first camera's axes: x right, y down, z ahead:

OUTPUT/depth/000000.png                 16-bit, in millimetres as ScanNet has it; 0 is not known
OUTPUT/depth/000000-000063.safetensors  "depth" and "confidence" float32 [frames, height, width], "index", "time"
OUTPUT/trajectory.txt                   camera-to-world poses in TUM's format, for `evo` and others
OUTPUT/intrinsics.json                  a 3 x 3 matrix a frame, in pixels
OUTPUT/points.ply                       the point cloud, coloured; one point a voxel

All are written aside and replace those of an earlier run; the recording, the video and the geometry's files grow with
the stream.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field that there is."""
    config = ConfigDict()
    config.job = "stream"
    config.name = "stream"
    config.input = ""  # a video file; 0 or /dev/videoN, a webcam; an address such as rtsp://... or http://...
    config.checkpoint = ""  # directory of the model, as omnistream_jax.load reads it
    config.output = ""  # directory of what is written; made where it is missing

    config.height = 224  # of the frames that the model sees, in pixels; a multiple of the patch size
    config.width = 224  # likewise
    config.resize = "crop"  # crop: proportions are kept and the middle is cut out; stretch: both sides scaled
    config.frame_rate = 0.0  # frames per second that are taken, the nearest to each moment; 0: every frame
    config.realtime = False  # play a file at its own speed, like a camera
    config.drop_frames = False  # take the newest frame and drop those that the model had no time for; else all wait
    config.max_frames = 0  # end after so many; 0: with the input

    config.window = 64  # frames that a frame sees, its own and the sinks included; 0: all, time and memory grow
    config.sinks = 1  # first frames of the stream that stay visible for ever (with a window)
    config.compute_dtype = "auto"  # of the activations; auto: bfloat16 on accelerators, float32 on a CPU
    config.cache_dtype = "auto"  # of the keys and values: float32, bfloat16, float16, int8; auto: as compute_dtype

    config.geometry = _geometry()

    config.question = ""  # asked of the stream; the checkpoint must have a decoder; "": nothing is
    config.answer = ConfigDict(  # read only with a question
        {
            "every": 0,  # frames from one answer to the next, and one at the end; 0: only that
            # Frames that the decoder is shown: the newest, and some of the past, evenly spread. 1: the newest alone,
            # as in training on pictures; what came before is in its features all the same.
            "max_frames": 16,
            "max_tokens": 128,  # of an answer
        }
    )

    config.pca_frames = 16  # first frames that fix the colours; their pictures are drawn once all of them are there
    config.record = True  # write stream.rrd
    config.video = True  # write features.mp4
    config.viewer = False  # open the Rerun viewer beside; needs a display
    config.log_seconds = 5.0  # between two lines on the terminal

    # Compiled programs, for the next start; "": none. JAX_COMPILATION_CACHE_DIR, where it is set, comes first.
    config.compilation_cache = "~/.cache/omnistream_jax/compilation"
    return config


def _geometry() -> ConfigDict:
    """Depth, camera and points; read only where `enabled`."""
    geometry = ConfigDict()
    geometry.enabled = False  # the checkpoint must have geometry heads
    geometry.pose_source = "camera"  # camera: the camera head's; rays: solved from the ray maps
    # Metres in a unit of the model. One trained on lengths relative to each clip knows no metres, and 1 says nothing;
    # summary.json tells the units.
    geometry.metres_per_unit = 1.0
    geometry.depth_png = True  # write depth/*.png
    geometry.depth_tensors = True  # write depth/*.safetensors: 0.4 MB a frame of 224 x 224 pixels
    geometry.shard_frames = 64  # frames in one of them
    geometry.trajectory = True  # write trajectory.txt
    geometry.intrinsics = True  # write intrinsics.json
    geometry.points = True  # collect points, and write points.ply
    geometry.point_options = ConfigDict(
        {
            "voxel": 0.02,  # side of a voxel at first, metres
            "max_points": 1_000_000,  # when there would be more, the side doubles
            "min_confidence": 0.0,  # pixels below it are left out; the heads' confidence is 1 or more
            "confidence_quantile": 0.0,  # in each frame, this share of the pixels is left out, the least confident
            "every": 1,  # frames from one that gives points to the next
            "stride": 2,  # pixels from one that gives a point to the next, along rows and columns
        }
    )
    geometry.shown_every = 30  # frames from one drawing of the points in Rerun to the next; the last is always drawn
    geometry.shown_points = 100_000  # points drawn at most, chosen by chance
    return geometry
