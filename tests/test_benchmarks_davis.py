"""DAVIS-2017 and the rendered world as sets for video object segmentation."""

import numpy as np
import pytest
from PIL import Image
from vos_cases import world_sequences, write_davis, write_png

from omnistream_jax.data.benchmarks.davis import SEQUENCES, open_davis
from omnistream_jax.data.benchmarks.mask_files import PALETTE, read_mask, write_mask
from omnistream_jax.data.benchmarks.world_masks import open_world
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.world import WorldClips


@pytest.fixture(scope="module")
def sequences():
    return world_sequences(frames=3, size=32)


@pytest.fixture
def tree(sequences, tmp_path):
    return write_davis(tmp_path / "DAVIS", sequences)


def test_the_published_numbers():
    frames, objects = (sum(numbers[place] for numbers in SEQUENCES.values()) for place in (0, 1))
    assert (len(SEQUENCES), frames, objects) == (30, 1_999, 61)
    assert list(SEQUENCES) == sorted(SEQUENCES)


def test_videos_are_read_as_they_lie(tree, sequences):
    for root in (tree, tree.parent):
        videos = open_davis(root, allow_incomplete=True)
        assert [video.name for video in videos.sequences] == [sequence.name for sequence in sequences]
        for video, sequence in zip(videos.sequences, sequences, strict=True):
            assert (len(video), video.size, video.objects) == (3, (32, 32), sequence.objects)
            np.testing.assert_array_equal(video.masks(), sequence.masks())
            assert np.abs(video.frame(1).astype(int) - sequence.frame(1)).mean() < 6
            assert video.frame_name(2) == "00002"
        counts = videos.settings()["counts"]
        assert (counts["sequences"], counts["expected_sequences"], counts["complete"]) == (2, 30, False)
        assert counts["objects"] == sum(sequence.objects for sequence in sequences)
        assert f"{sequences[0].name}: not among the published" in counts["differences"]


def test_another_number_of_sequences_frames_or_objects_is_refused(tree, sequences, monkeypatch):
    found = {sequence.name: (3, sequence.objects) for sequence in sequences}
    davis = "omnistream_jax.data.benchmarks.davis.SEQUENCES"
    monkeypatch.setattr(davis, found)
    assert open_davis(tree).counts["complete"]
    name, objects = sequences[1].name, sequences[1].objects
    monkeypatch.setattr(davis, found | {name: (4, objects)})
    with pytest.raises(
        DataError, match=rf"not as published: 2 of 2 sequences, 6 of 7 frames.*\({name}: 3 of 4 frames\)"
    ):
        open_davis(tree)
    monkeypatch.setattr(davis, found | {name: (3, objects + 1)})
    with pytest.raises(DataError, match=f"{name}: {objects} of {objects + 1} objects.*allow_incomplete=True"):
        open_davis(tree)
    monkeypatch.setattr(davis, found | {"judo": (34, 2)})
    with pytest.raises(DataError, match="judo: 0 of 34 frames; judo: 0 of 2 objects"):
        open_davis(tree)


def remove_mask(tree, name):
    (tree / "Annotations/480p" / name / "00001.png").unlink()


def damage_first_mask(tree, name):
    path = tree / "Annotations/480p" / name / "00000.png"
    path.write_bytes(path.read_bytes()[:60])


def empty_first_mask(tree, name):
    write_png(tree / "Annotations/480p" / name / "00000.png", np.zeros((32, 32), np.uint8))


def colour_mask(tree, name):
    Image.new("RGB", (32, 32)).save(tree / "Annotations/480p" / name / "00000.png")


def no_list(tree, name):
    (tree / "ImageSets/2017/val.txt").unlink()


def no_frames(tree, name):
    (tree / "ImageSets/2017/val.txt").write_text("judo\n")


def twice(tree, name):
    (tree / "ImageSets/2017/val.txt").write_text(f"{name}\n{name}\n")


def outside(tree, name):
    (tree / "ImageSets/2017/val.txt").write_text("../secret\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_mask, r"00001\.png: there is no such file; expected the annotation of .*00001\.jpg"),
        (damage_first_mask, r"00000\.png: expected a mask: a PNG of one 8-bit channel"),
        (empty_first_mask, r"00000\.png: shows no object"),
        (colour_mask, r"00000\.png: expected a mask.*mode RGB"),
        (no_list, r"holds no ImageSets/2017/val\.txt of DAVIS-2017"),
        (no_frames, "DAVIS-2017 has no frames here: 0 of 30 sequences"),
        (twice, r"val\.txt: names a sequence twice"),
        (outside, r"val\.txt: '\.\./secret' is no name of a folder"),
    ],
)
def test_a_broken_layout_is_one_clear_error(tree, sequences, damage, message):
    damage(tree, sequences[0].name)
    with pytest.raises(DataError, match=message):
        open_davis(tree, allow_incomplete=True)


def test_a_frame_or_mask_that_does_not_fit_is_named_when_it_is_read(tree, sequences):
    name = sequences[0].name
    write_png(tree / "Annotations/480p" / name / "00002.png", np.zeros((32, 30), np.uint8))
    (tree / "JPEGImages/480p" / name / "00001.jpg").write_bytes(b"no picture")
    Image.new("RGB", (48, 32)).save(tree / "JPEGImages/480p" / name / "00002.jpg")
    video = open_davis(tree, allow_incomplete=True).sequences[0]
    with pytest.raises(DataError, match=r"00002\.png: 30 x 32 pixels, expected 32 x 32"):
        video.mask(2)
    with pytest.raises(DataError, match=r"00001\.jpg: expected a whole image file"):
        video.frame(1)
    with pytest.raises(DataError, match=r"00002\.jpg: 48 x 32 pixels, expected 32 x 32"):
        video.frame(2)


def test_void_is_no_object(tree, sequences):
    mask = sequences[0].mask(0).copy()
    mask[:2] = 255
    write_png(tree / "Annotations/480p" / sequences[0].name / "00000.png", mask)
    assert open_davis(tree, allow_incomplete=True).sequences[0].objects == sequences[0].objects


# Masks as files


def test_masks_are_indexed_files_in_the_colours_of_davis(tmp_path):
    """The palette's first colours as DAVIS's own annotations have them."""
    assert PALETTE[:6].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]
    assert PALETTE[[8, 255]].tolist() == [[64, 0, 0], [224, 224, 192]]
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    write_mask(tmp_path / "mask.png", mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), mask)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), PALETTE[mask])
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]
    with pytest.raises(ValueError, match=r"mask: int64 \[8, 32\], expected uint8"):
        write_mask(tmp_path / "other.png", mask.astype(np.int64))


# The world


def test_the_worlds_objects_are_what_the_first_frame_shows():
    videos = open_world(clips=6, frames=4, size=48, min_share=0.02)
    world = WorldClips("heldout", 6, frames=4, size=48)
    assert videos.counts["scenes"] == 6
    assert videos.counts["sequences"] == len(videos.sequences) > 2
    left_out = 0
    for sequence in videos.sequences:
        clip = world.clip(int(sequence.name.removeprefix("scene_")))
        shares = [(clip.ids[0] == thing + 1).mean() for thing in range(len(clip.scene.things))]
        followed = [thing + 1 for thing, share in enumerate(shares) if share >= 0.02]
        left_out += len(shares) - len(followed)
        assert sequence.objects == len(followed)
        for number, thing in enumerate(followed, 1):
            np.testing.assert_array_equal(sequence.masks() == number, clip.ids == thing)
        np.testing.assert_array_equal(sequence.frame(3), clip.images[3])
    assert left_out > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clips": 0}, "length is 0, expected 1 or more"),
        ({"frames": 2}, r"world\.frames: 2, expected 3 or more"),
        ({"size": 8}, "size is 8, expected 16 to 1024"),
        ({"min_share": 0.0}, r"world\.min_share: 0\.0, expected a share"),
        ({"clips": 1, "frames": 3, "size": 16, "min_share": 0.9}, r"world\.min_share: 0\.9, but no thing"),
    ],
)
def test_a_world_that_cannot_be_is_one_clear_error(fields, message):
    with pytest.raises(DataError, match=message):
        open_world(**{"clips": 2, "frames": 3, "size": 32} | fields)
