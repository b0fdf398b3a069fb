"""Features of many videos and image folders: one safetensors file each, an index, and a list of what failed.

    python -m omnistream_jax.main --config=configs/extract.py --config.input=DIR_OR_LIST --config.output=DIR \\
      --config.checkpoint=MODEL_DIR [--config.field=value ...]

Hardware: a CPU, a GPU or a TPU; all local devices of a process are used, one video each, so give at least as many
`workers` as devices. Decoding takes a core a worker. Memory does not grow with a video's length as long as `window` is
set; the output's disk needs room for the features, and for those of the open videos twice.

Expect a line every few seconds with frames/s and the time left, then a summary that says how much of the time went
into waiting for decoding (raise `workers` where that is most of it). Exit status: 0 all done, 1 some items failed,
2 a field that cannot work.

OUTPUT/NAME.safetensors   NAME is the item's path in the input, with odd signs replaced. Tensors: `times` float64 [T],
                          seconds since the item's start; `patches` [T, h, w, D], `cls` [T, D], `registers` [T, R, D],
                          `camera` [T, D] after the final norm; the same as `layer_7.patches` ... of the blocks in
                          `layers`, before it. The header's metadata has item, source, settings and the model's sha256.
OUTPUT/index.jsonl        a line a finished item: item, file, frames, size (source's [height, width]), seconds, bytes
OUTPUT/failed.jsonl       a line a failed item: item, reason; absent where nothing failed
OUTPUT/settings.json      what the features were made with; other settings in this directory are refused

Run the same command again after a stop: finished items are skipped, failed ones are tried again, and the files are the
same as those of a run that was not stopped. Several processes share the work by `process_index` and `process_count`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every field that there is."""
    config = ConfigDict()
    config.job = "extract"
    config.name = "extract"
    config.input = ""  # a folder tree, a .txt list (a video or a folder of pictures a line), or one video
    config.output = ""  # directory of the features; made where it is missing
    config.checkpoint = ""  # directory of the model, as omnistream_jax.load reads it

    config.frame_rate = 0.0  # frames per second that are taken, the nearest to each moment; 0: every frame
    config.image_rate = 30.0  # frames per second of image folders, whose pictures are taken in the order of their names
    config.height = 224  # of the frames that the model sees, in pixels; a multiple of the patch size
    config.width = 224  # likewise
    config.resize = "crop"  # crop: proportions are kept and the middle is cut out; stretch: both sides scaled

    config.window = 64  # frames that a frame sees, its own and the sinks included; 0: all, memory grows with the video
    config.sinks = 1  # first frames of a video that stay visible for ever (with a window)
    config.chunk = 16  # frames that go to the device at once
    config.compute_dtype = "auto"  # of the activations; auto: bfloat16 on accelerators, float32 on a CPU

    config.tokens = ("patches", "cls")  # what is stored: patches, cls, registers, camera
    config.aspect_ratio = False  # tell the camera token each source's height / width
    config.final = True  # store the tokens after the final norm
    config.layers = ()  # store the tokens of these blocks too, 0-based, before the final norm; (): of none
    config.dtype = "float16"  # of the stored features: float16, bfloat16, float32

    config.workers = 2  # processes that decode, an item each; as many items are open on the devices
    config.prefetch = 4  # decoded chunks that may wait for the devices
    config.log_seconds = 5.0  # between two lines on the terminal
    config.process_index = 0  # this process among process_count: item i goes to process i % process_count
    config.process_count = 0  # processes that share the work; 0: those of jax.distributed, or else one

    # Compiled programs, for the next start; "": none. JAX_COMPILATION_CACHE_DIR, where it is set, comes first.
    config.compilation_cache = "~/.cache/omnistream_jax/compilation"
    return config
