"""Live: a video file, a webcam or a network stream through the model, frame by frame, with pictures of its features.

    python -m omnistream_jax.main --config=configs/stream.py --config.input=FILE|0|/dev/videoN|rtsp://...|http://... \\
      --config.checkpoint=MODEL_DIR --config.output=DIR [--config.field=value ...]

A camera:       --config.input=0 --config.drop_frames=True
A file like it: --config.realtime=True --config.drop_frames=True; without the two, every frame as fast as it goes.

Hardware: a CPU, a GPU or a TPU, one device; decoding takes a core beside it. With a `window`, memory and the time for a
frame stay the same for ever. Pictures need `pip install -e .[viz]` (Rerun) unless `record` and `viewer` are off; no
display is needed unless `viewer` is on.

Expect one line about compiling (a second start loads the programs from `compilation_cache`), then a line every
`log_seconds` with frames, frames/s, latency and dropped frames, and a summary at the end. Ctrl-C, or SIGTERM, ends a
run in order: its files are finished. Exit status: 0 done or stopped so, 1 the source cannot be read on (what was read
is kept), 2 a field that cannot work.

OUTPUT/stream.rrd     for `rerun OUTPUT/stream.rrd`, on the timelines "frame" and "time": image, features (one pixel a
                      patch), latency/step and latency/capture_to_result in milliseconds, dropped frames so far
OUTPUT/features.mp4   the frames, and beside them their patches' features as colours (three principal components)
OUTPUT/summary.json   the summary: frames, dropped, rate, percentiles of latency, peak memory, compiling, why it ended

All are written aside and replace those of an earlier run when this one ends; the recording and the video grow with it.
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
    config.cache_dtype = "auto"  # of the keys and values: float32, bfloat16, int8; auto: as compute_dtype

    config.pca_frames = 16  # first frames that fix the colours; their pictures are drawn once all of them are there
    config.record = True  # write stream.rrd
    config.video = True  # write features.mp4
    config.viewer = False  # open the Rerun viewer beside; needs a display
    config.log_seconds = 5.0  # between two lines on the terminal

    # Compiled programs, for the next start; "": none. JAX_COMPILATION_CACHE_DIR, where it is set, comes first.
    config.compilation_cache = "~/.cache/omnistream_jax/compilation"
    return config
