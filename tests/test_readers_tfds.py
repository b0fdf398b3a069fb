"""TensorFlow Datasets without TensorFlow: what its own writer prepared is read back."""

import io
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from tar_cases import photograph

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.tfds import open_tfds
from omnistream_jax.data.ssl import SelfSupervisedData

tfds = pytest.importorskip("tensorflow_datasets")

NAMES = ("astronaut", "coffee", "china", "dog")
FRAMES = np.random.default_rng(0).integers(0, 255, (6, 12, 16, 3), dtype=np.uint8)


def _build(name, features, examples):
    """A builder of the examples, named as TFDS would have it."""

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    members = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": info,
        "_split_generators": lambda self, manager: {"train": self._generate_examples()},
        "_generate_examples": lambda self: iter(enumerate(examples)),
        "__module__": __name__,
    }
    return type(name, (tfds.core.GeneratorBasedBuilder,), members, skip_registration=True)


def _png(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    features = tfds.features
    pictures = [{"image": io.BytesIO(photograph(name)), "label": n % 2} for n, name in enumerate(NAMES)]
    classes = {"image": features.Image(), "label": features.ClassLabel(names=["cat", "dog"])}
    clips = [{"video": [_png(frame) for frame in frames]} for frames in (FRAMES, FRAMES[::-1])]
    builders = [
        _build("Photographs", classes, pictures),
        _build("Clips", {"video": features.Sequence(features.Image(shape=(12, 16, 3)))}, clips),
        _build("Numbers", {"x": features.Scalar(np.int64)}, [{"x": 1}]),
    ]
    for builder in builders:
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def _rng():
    return np.random.default_rng(0)


def test_photographs_are_read_back(root):
    source = pickle.loads(pickle.dumps(open_tfds(root, name="photographs")))
    assert (len(source), source.max_frames, source.labels) == (4, 1, ("cat", "dog"))
    photographs = {name: np.asarray(Image.open(io.BytesIO(photograph(name)))) for name in NAMES}
    seen = {}
    for index in range(4):
        frames = source.sample(index, _rng()).frames
        seen[next(name for name, each in photographs.items() if np.array_equal(each, frames[0]))] = source.label(index)
    assert seen == {"astronaut": 0, "coffee": 1, "china": 0, "dog": 1}
    assert "tensorflow" not in sys.modules
    with pytest.raises(DataError, match=r"example 0: a photograph has 1 frame"):
        source.sample(0, _rng(), frames=2)


def test_photographs_train(root):
    source = open_tfds(root, name="photographs:1.0.0", split="train[:50%]")
    assert len(source) == 2
    data = SelfSupervisedData(sources=(source,), global_batch_size=2, global_size=32, local_size=16)
    assert data.dataset(0, 0, 1)[0]["global_crops"].shape == (2, 2, 1, 32, 32, 3)


def test_videos_are_read_back(root):
    source = open_tfds(root, name="clips")
    assert (len(source), source.max_frames, source.label(0)) == (2, None, None)
    frames = source.sample(0, _rng(), 6, (1, 1)).frames
    assert np.array_equal(frames, FRAMES) or np.array_equal(frames, FRAMES[::-1])  # TFDS shuffles what it writes
    assert source.sample(0, _rng(), 2, (2, 3)).frames.shape == (2, 12, 16, 3)
    with pytest.raises(DataError, match=r"tfds clips \(train\), example 0: has 6 frames"):
        source.sample(0, _rng(), 7, (1, 1))


def test_what_cannot_be_read_is_said(root):
    with pytest.raises(DataError, match=r"tfds nothing in .*: cannot be opened"):
        open_tfds(root, name="nothing")
    with pytest.raises(DataError, match=r"has no split 'test', only train"):
        open_tfds(root, "test", name="photographs")
    with pytest.raises(DataError, match=r"has no pictures or videos named 'image', only x"):
        open_tfds(root, name="numbers")
    with pytest.raises(DataError, match=r"has no pictures or videos named 'label', only"):
        open_tfds(root, name="photographs", feature="label")


def test_tfrecords_are_refused(root, tmp_path):
    folder = tmp_path / "photographs"
    shutil.copytree(root / "photographs", folder)
    info = folder / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"tfds photographs in .*: expected ArrayRecord or Parquet files"):
        open_tfds(tmp_path, name="photographs")
