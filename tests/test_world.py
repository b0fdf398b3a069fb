"""The embedded world: what is rendered agrees with geometry, masks, labels and words that are worked out anew here."""

import dataclasses
import itertools
import pickle
import re
import warnings

import numpy as np
import pytest
from world_cases import assert_reprojects

from omnistream_jax.data.boxes import parse_boxes, without_boxes
from omnistream_jax.data.errors import DataError
from omnistream_jax.data.ssl import SelfSupervisedData
from omnistream_jax.data.world import MOTIONS, WorldCaptions, WorldClips, WorldVideos
from omnistream_jax.data.world.clips import VISIBLE_SHARE, render_clip
from omnistream_jax.data.world.language import NUMBERS, clip_caption, clip_questions, frame_questions, noun
from omnistream_jax.data.world.motion import about_y
from omnistream_jax.data.world.render import Room, Solid, Surface, render
from omnistream_jax.data.world.scenes import COLOURS, build_scene
from omnistream_jax.data.world.textures import world_textures

SPLITS = ("train", "heldout")
BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")
PLAIN = Surface(0, (1.0, 1.0, 1.0), 50.0)


@pytest.fixture(scope="module")
def clips():
    """Scenes of both splits, 8 frames of 96 x 96, with all that is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NaN in a picture warns when it is rounded
        return [WorldClips(split, 12, frames=8).clip(index) for split in SPLITS for index in range(12)]


def depth_of(*solids, row, column, size=100):
    room = Room(np.array([-3.0, -2.0, -4.0]), np.array([3.0, 2.0, 4.0]), (PLAIN,) * 6)
    intrinsics = np.array([[50.0, 0, size / 2], [0, 50, size / 2], [0, 0, 1]])
    picture = render(room, np.array([0, -1.8, 0]), solids, world_textures("train").texels, intrinsics, np.eye(4), size)
    return picture.depth[row, column], picture.ids[row, column]


def test_depth_by_hand():
    """The ray of pixel (50, 50) is (0.01, 0.01, 1), that of pixel (0, 0) is (-0.99, -0.99, 1)."""
    centre = np.array([0.0, 0.0, 3.0])
    ball = Solid("ball", np.full(3, 1.0), centre, np.eye(3), PLAIN)
    box = Solid("box", np.full(3, 1.0), centre, about_y(np.pi / 4), PLAIN)
    assert depth_of(row=50, column=50) == (4.0, 0)  # the far wall
    assert depth_of(row=50, column=50, size=101) == (4.0, 0)  # the ray (0, 0, 1), along four walls
    assert depth_of(box, row=50, column=50, size=101) == (pytest.approx(1.5857864, abs=1e-6), 1)
    assert depth_of(ball, row=0, column=0) == (pytest.approx(2.020202, abs=1e-6), 0)  # the ceiling: 2 / 0.99
    # 1.0002 t^2 - 6 t + 8 = 0
    assert depth_of(ball, row=50, column=50) == (pytest.approx(2.0004002, abs=1e-6), 1)
    # Turned by 45 degrees, its near edge at 3 - sqrt(2): the face is x + (3 - z) = sqrt(2).
    assert depth_of(box, row=50, column=50) == (pytest.approx(1.6018045, abs=1e-6), 1)
    behind = dataclasses.replace(ball, centre=np.array([0.0, 0.0, -3.0]))
    assert depth_of(behind, row=50, column=50) == (4.0, 0)
    assert depth_of(ball, box, row=50, column=50)[1] == 2  # the nearer of two


def distance_to(points: np.ndarray, solid: Solid) -> np.ndarray:
    """Signed distance of points [..., 3] to a solid, negative inside; exact outside, as Quilez writes it."""
    local = (points - solid.centre) @ solid.rotation
    if solid.kind == "ball":
        return np.linalg.norm(local, axis=-1) - solid.half[0]
    beyond = np.abs(local) - solid.half
    return np.linalg.norm(np.maximum(beyond, 0), axis=-1) + np.minimum(beyond.max(-1), 0)


def points_of(clip, frame):
    """World points [H, W, 3] of a frame, and the camera centre."""
    size = clip.depth.shape[1]
    u, v = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    focal, centre = float(clip.intrinsics[0, 0]), float(clip.intrinsics[0, 2])
    seen = np.stack([(u - centre) / focal, (v - centre) / focal, np.ones_like(u)], -1) * clip.depth[frame][..., None]
    pose = clip.cam_to_world[frame].astype(float)
    return seen @ pose[:3, :3].T + pose[:3, 3], pose[:3, 3]


def test_every_pixel_lies_on_the_first_surface_of_its_ray(clips):
    for clip in clips:
        frame = 5
        points, eye = points_of(clip, frame)
        scene, solids = clip.scene, clip.scene.solids(clip.shares[frame])
        wall = np.minimum(points - scene.room.low, scene.room.high - points).min(-1)
        assert np.abs(wall[clip.ids[frame] == 0]).max() < 1e-5
        assert wall.min() > -1e-5
        along = eye + np.linspace(0, 0.998, 20)[:, None, None, None] * (points - eye)
        for number, solid in enumerate(solids, start=1):
            on_it = clip.ids[frame] == number
            assert np.abs(distance_to(points[on_it], solid)).max(initial=0) < 1e-4
            assert distance_to(along, solid).min() > -1e-2 * solid.half.max()  # nothing was passed through
            assert (distance_to(points[~on_it], solid) > -1e-4).all()


def test_points_of_one_frame_are_found_in_the_next():
    """All that does not move; the mover is left out where it moves."""
    source = WorldClips("train", 12, frames=16)
    for index in range(12):
        clip, frames = source.clip(index), source.read(index, range(16))
        still = [
            dataclasses.replace(frame, valid=frame.valid & (ids != clip.scene.mover + 1))
            for frame, ids in zip(frames, clip.ids, strict=True)
        ]
        assert_reprojects(still)
        assert np.linalg.norm(frames[0].cam_to_world[:3, 3] - frames[-1].cam_to_world[:3, 3]) > 0.2


def test_a_reading_of_some_frames_is_part_of_the_whole(clips):
    source = WorldClips("train", 12, frames=8)
    assert (len(source), source.frame_count(3), source.neighbours(3, 0)) == (12, 8, None)
    assert source.info(0).metric
    assert source.info(0).dynamic
    some = source.read(3, [6, 1])
    for frame, number in zip(some, (6, 1), strict=True):
        np.testing.assert_array_equal(frame.image, clips[3].images[number])
        np.testing.assert_array_equal(frame.depth, clips[3].depth[number])
        np.testing.assert_array_equal(frame.cam_to_world, clips[3].cam_to_world[number])
        assert frame.valid.all()
        assert not frame.sky.any()
    assert some[0].path == "world (train), seed 0, scene 3, frame 6"


def test_rays_and_depth_give_the_points(clips):
    clip = clips[0]
    rays = clip.rays()
    assert rays.shape == (8, 96, 96, 6)
    points, _ = points_of(clip, 5)
    first = np.linalg.inv(clip.cam_to_world[0].astype(float))
    expected = points @ first[:3, :3].T + first[:3, 3]
    np.testing.assert_allclose(rays[5, ..., :3] + clip.depth[5][..., None] * rays[5, ..., 3:], expected, atol=1e-5)
    np.testing.assert_allclose(rays[0, ..., :3], 0, atol=1e-12)


def test_the_same_numbers_give_the_same_pictures(clips):
    world_textures.cache_clear()
    again = pickle.loads(pickle.dumps(WorldClips("train", 12, frames=8))).clip(2)
    for field in ("images", "depth", "ids", "cam_to_world", "intrinsics"):
        np.testing.assert_array_equal(getattr(again, field), getattr(clips[2], field))
    assert not np.array_equal(WorldClips("train", 12, frames=8, seed=1).clip(2, [0]).images[0], clips[2].images[0])


def test_train_and_heldout_share_no_pixel_of_a_photograph():
    train, heldout = (world_textures(split).crops for split in SPLITS)
    assert len(set(train)) > 60
    assert len(set(heldout)) > 60
    for a, b in itertools.product(train, heldout):
        if a.photograph == b.photograph:
            apart = max(b.box[0] - a.box[2], a.box[0] - b.box[2], b.box[1] - a.box[3], a.box[1] - b.box[3])
            assert apart >= 0
    assert {"chelsea", "butterfly"} <= {crop.photograph for crop in heldout}
    assert not {"chelsea", "butterfly"} & {crop.photograph for crop in train}


def test_pictures_vary(clips):
    first = np.stack([clip.images[0] for clip in clips]).astype(float)
    apart = [np.abs(a - b).mean() for a, b in itertools.combinations(first, 2)]
    assert min(apart) > 15  # grey levels
    assert all(clip.images[0].std() > 25 for clip in clips)
    assert len({len(clip.scene.things) for clip in clips}) > 2
    assert len({thing.shape for clip in clips for thing in clip.scene.things}) == 4


def test_what_has_a_colour_looks_like_it(clips):
    checked = 0
    for clip in clips:
        for number, thing in enumerate(clip.scene.things, start=1):
            mask = clip.ids[0] == number
            if thing.colour is None or mask.sum() < 60:
                continue
            mean = clip.images[0][mask].mean(0)
            likeness = {name: mean @ rgb / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
            assert max(likeness, key=likeness.get) == thing.colour
            checked += 1
    assert checked > 20


def test_boxes_enclose_masks_and_centres(clips):
    for clip in clips:
        seen = clip.seen(4)
        assert clip.scene.mover in [one.thing for one in seen]
        for one in seen:
            rows, columns = np.nonzero(clip.ids[4] == one.thing + 1)
            assert len(rows) >= VISIBLE_SHARE * 96 * 96
            expected = [columns.min() / 96, rows.min() / 96, (columns.max() + 1) / 96, (rows.max() + 1) / 96]
            np.testing.assert_allclose(one.box, expected)
        pose = np.linalg.inv(clip.cam_to_world[4].astype(float))
        centre = pose[:3, :3] @ clip.scene.solids(clip.shares[4])[clip.scene.mover].centre + pose[:3, 3]
        x, y = (clip.intrinsics.astype(float) @ centre)[:2] / centre[2] / 96
        left, top, right, bottom = next(one.box for one in seen if one.thing == clip.scene.mover)
        assert left < x < right
        assert top < y < bottom


def test_every_class_begins_with_the_same_picture_and_goes_on_differently():
    for split, index in (("train", 5), ("heldout", 6)):
        clips = [render_clip(build_scene(3, split, index, motion), (0.0, 1.0), 64) for motion in range(len(MOTIONS))]
        for clip in clips[1:]:
            np.testing.assert_array_equal(clip.images[0], clips[0].images[0])
            np.testing.assert_array_equal(clip.cam_to_world, clips[0].cam_to_world)
        side = MOTIONS.index("moves to the right" if clips[0].scene.path.side > 0 else "moves to the left")
        same_end = {side, MOTIONS.index("speeds up"), MOTIONS.index("slows down")}  # only the way there differs
        for a, b in itertools.combinations(range(len(MOTIONS)), 2):
            assert np.array_equal(clips[a].images[1], clips[b].images[1]) == ({a, b} <= same_end), (a, b)
        halfway = [render_clip(build_scene(3, split, index, motion), [0.5], 64).images for motion in same_end]
        assert all(not np.array_equal(a, b) for a, b in itertools.combinations(halfway, 2))


def test_classes_are_balanced():
    labels = [WorldVideos("train", 44).label(index) for index in range(44)]
    for start in range(0, 44, 11):
        assert sorted(labels[start : start + 11]) == list(range(11))
    assert labels[:11] != labels[11:22]
    assert WorldClips("train", 44).scene(7).motion == labels[7]


def test_clockwise_is_as_seen_from_above():
    """The side of a thing that faces the camera goes to the left then, as on a turntable."""
    for name, sign in (("turns clockwise", -1), ("turns anticlockwise", 1)):
        scene = build_scene(0, "train", 1, MOTIONS.index(name))
        pose = scene.camera.cam_to_world(0.0)
        start, later = (scene.solids(share)[scene.mover] for share in (0.0, 0.1))
        np.testing.assert_allclose(start.centre, later.centre)
        facing = start.rotation.T @ -pose[:3, 2]  # in its own axes
        moved = (later.rotation - start.rotation) @ facing
        assert sign * (moved @ pose[:3, 0]) > 0.05


def mover_track(clip) -> np.ndarray:
    """[T, 3], the median point of the mover's pixels in the axes of the first camera."""
    first = clip.cam_to_world[0].astype(float)
    track = [np.median(points_of(clip, t)[0][clip.ids[t] == clip.scene.mover + 1], 0) for t in range(len(clip.ids))]
    return (np.array(track) - first[:3, 3]) @ first[:3, :3]


def test_displacement_tells_the_translations():
    right, down, forward = range(3)
    where = {1: (right, -1), 2: (right, 1), 3: (forward, -1), 4: (forward, 1), 5: (down, -1), 6: (down, 1)}
    source = WorldVideos("train", 44, frames=3, size=64)
    for index in range(44):
        track = mover_track(source.clip(index))
        moved, label = track[2] - track[0], source.label(index)
        path = source.scene(index).path
        if label in where:
            axis, sign = where[label]
            assert np.abs(moved).argmax() == axis, (index, label, moved)
            assert sign * moved[axis] > 0.4 * path.reach
        elif MOTIONS[label] in ("speeds up", "slows down"):
            early, late = track[1] - track[0], track[2] - track[1]
            assert (np.abs(late[right]) > np.abs(early[right])) == (MOTIONS[label] == "speeds up")
            assert moved[right] * path.side > 0.7 * path.reach
        else:
            assert np.linalg.norm(moved) < 0.5 * path.reach


def ridge_accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Of a linear classifier, trained on the first three quarters and tried on the rest."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    features = np.concatenate([features, np.ones((len(features), 1))], 1)
    count = len(features) * 3 // 4
    train, test = features[:count], features[count:]
    strength = 0.1 * features.shape[1]
    dual = np.linalg.solve(train @ train.T + strength * np.eye(count), np.eye(len(MOTIONS))[labels[:count]])
    return float(np.mean((test @ (train.T @ dual)).argmax(1) == labels[count:]))


def test_one_frame_does_not_tell_the_class():
    """Chance is 0.09, and 0.16 is 3.2 standard deviations above it on 176 clips; displacement finds 9 of 11 classes."""
    source = WorldVideos("train", 704, frames=3, size=24)
    labels = np.array([source.label(index) for index in range(704)])
    rendered = [source.clip(index) for index in range(704)]
    for frame in range(3):
        pixels = np.stack([clip.images[frame].reshape(-1) for clip in rendered]).astype(float)
        assert ridge_accuracy(pixels, labels) < 0.16
    tracks = np.stack([mover_track(clip) for clip in rendered])
    steps = np.concatenate([tracks[:, 1] - tracks[:, 0], tracks[:, 2] - tracks[:, 1]], 1)
    steps = steps / tracks[:, :1, 2]
    quadratic = np.stack([a * b for a, b in itertools.combinations_with_replacement(steps.T, 2)], 1)
    cubic = steps**3
    assert ridge_accuracy(np.concatenate([steps, quadratic, cubic], 1), labels) > 0.5


def test_a_caption_names_what_is_there():
    source = WorldCaptions("heldout", 48)
    relations = nearest = 0
    for index in range(0, 48, 4):
        record, scene = source.read(index), source.scene(index)
        assert source.task(index) == "describe"
        names = {noun(thing) for thing in scene.things}
        first, *others = re.split(r"(?<=\.) ", record.answer)
        counted, listed = first.rstrip(".").split(" thing", 1)
        mentioned = [re.sub(r"^a ", "", part) for part in re.split(r", | and ", listed.split(": ", 1)[1])]
        assert NUMBERS.index(counted.lower()) == len(mentioned) == len(record.boxes)
        assert tuple(mentioned) == record.phrases
        middles = [x1 + x2 for x1, _, x2, _ in record.boxes]
        assert middles == sorted(middles)  # from left to right
        assert set(mentioned) <= names
        boxes = dict(zip(record.phrases, record.boxes, strict=True))
        for sentence in others:
            if " the nearest" in sentence:
                nearest += 1
                continue
            a, word, b = re.fullmatch(
                r"The (.+) is (to the left of|to the right of|above|below) the (.+)\.", sentence
            ).groups()
            shift = (boxes[b][:2] + boxes[b][2:]) / 2 - (boxes[a][:2] + boxes[a][2:]) / 2
            expected = {"to the left of": shift[0], "to the right of": -shift[0], "above": shift[1], "below": -shift[1]}
            assert expected[word] > 0.1
            relations += 1
    assert relations > 6
    assert nearest > 2


def test_phrases_stand_in_the_text_and_boxes_in_the_picture():
    source = WorldCaptions("train", 60)
    texts = set()
    for index in range(60):
        record = source.read(index)
        assert record.image.shape == (96, 96, 3)
        assert len(record.boxes) == len(record.phrases)
        assert record.boxes.shape[1:] == (4,)
        assert (record.boxes[:, :2] < record.boxes[:, 2:]).all()
        assert (record.boxes >= 0).all()
        assert (record.boxes <= 1).all()
        assert all(phrase in f"{record.instruction} {record.answer}" for phrase in record.phrases)
        written = [tuple(map(int, found)) for found in BOX.findall(record.answer)]
        if source.task(index) in ("ground", "locate"):
            assert np.abs(np.array(written) / 1000 - record.boxes).max() < 0.0015
            names = set(record.phrases)
            assert names <= {noun(thing) for thing in source.scene(index).things}
        else:
            assert not written
        texts.add((record.instruction, record.answer))
        assert len({record.instruction, *(instruction for instruction, _ in record.others)}) == 4
        assert all(answer for _, answer in record.others)
    assert len(texts) > 50
    again = WorldCaptions("train", 60).read(17)
    np.testing.assert_array_equal(again.image, source.read(17).image)
    assert again.answer == source.read(17).answer


@pytest.mark.parametrize("split", SPLITS)
def test_the_texts_of_a_picture_tell_of_the_same_things(split):
    source, located, counted = WorldCaptions(split, 24, size=64), 0, set()
    for index in range(24):
        record = source.read(index)
        tasks = [source.task(index), *(task for task in source.TASKS if task != source.task(index))]
        texts = dict(zip(tasks, [(record.instruction, record.answer), *record.others], strict=True))
        assert list(texts) == tasks
        told = parse_boxes(texts["ground"][1])
        boxes = {box.phrase: box.corners for box in told}
        assert set(boxes) <= {noun(thing) for thing in source.scene(index).things}
        assert texts["describe"][1].startswith(f"{NUMBERS[len(told)].capitalize()} thing")
        assert without_boxes(texts["ground"][1]).startswith(texts["describe"][1].split(".")[0])
        if source.task(index) in ("describe", "ground"):  # their boxes do not come from a text
            np.testing.assert_allclose([box.corners for box in told], record.boxes, atol=0.0006)
        asked, answer = texts["locate"]
        phrase = without_boxes(asked.removeprefix("Give the box of ")).rstrip(".")
        assert [box.corners for box in parse_boxes(answer)] == [boxes[phrase]]
        located += len(boxes) > 1
        if texts["ask"][0].startswith("How many"):
            assert texts["ask"][1] == NUMBERS[len(told)]
        counted.add(len(told))
    assert located > 12, "of one thing alone any box is the right one"
    assert len(counted) > 1


def test_answers_are_true(clips):
    """Each kind of question, answered anew from masks and depth."""
    kinds = {}
    for clip in clips:
        scene, ids, depth = clip.scene, clip.ids[3], clip.depth[3]
        things = {noun(thing): number for number, thing in enumerate(scene.things, start=1)}
        assert len(things) == len(scene.things)  # no two have the same name
        middle = {n: np.argwhere(ids == n) for n in things.values()}
        middle = {n: (at.min(0) + at.max(0) + 1) / 2 for n, at in middle.items() if len(at)}
        for question in frame_questions(clip, 3, np.random.default_rng(0)):
            kinds.setdefault(question.kind, []).append(question.answer)
            words = question.question
            if question.kind == "count":
                assert question.answer == NUMBERS[sum((ids == n).mean() >= VISIBLE_SHARE for n in things.values())]
            elif question.kind == "presence":
                name = words.removeprefix("Is there a ").rstrip("?")
                assert question.answer == ("yes" if name in things else "no")
            elif question.kind == "nearer":
                names = re.fullmatch(r"Which is nearer, the (.+) or the (.+)\?", words).groups()
                nearer = min(names, key=lambda name: np.median(depth[ids == things[name]]))
                assert question.answer == f"the {nearer}"
            elif question.kind == "place":
                pattern = r"Is the (.+) (?:to the left or to the right of|above or below) the (.+)\?"
                a, b = (middle[things[name]] for name in re.fullmatch(pattern, words).groups())
                truth = {"left": a[1] < b[1], "right": a[1] > b[1], "above": a[0] < b[0], "below": a[0] > b[0]}
                assert truth[question.answer]
            else:
                thing = scene.things[question.things[0]]
                assert question.answer in (thing.colour, thing.material, thing.shape)
    assert set(kinds) == {"count", "colour", "material", "shape", "presence", "nearer", "place"}
    assert all(len(set(answers)) > 1 for answers in kinds.values())


def test_motion_is_told_for_clips(clips):
    for clip in clips:
        mover = noun(clip.scene.things[clip.scene.mover])
        name = MOTIONS[clip.scene.motion]
        which, what = clip_questions(clip)
        if name == "stays still":
            assert clip_caption(clip).endswith("Nothing moves.")
            assert which.answer == "nothing"
        else:
            assert clip_caption(clip).endswith(f"The {mover} {name}.")
            assert which.answer == f"the {mover}"
        assert (what.question, what.answer) == (f"What does the {mover} do?", f"It {name}.")


def test_videos_feed_self_supervision():
    source = WorldVideos("train", 6, frames=12, size=48)
    sample = source.sample(4, np.random.default_rng(0), 4, (2, 3))
    assert sample.frames.shape == (4, 48, 48, 3)
    whole = source.clip(4).images
    places = [next(i for i, frame in enumerate(whole) if np.array_equal(frame, wanted)) for wanted in sample.frames]
    assert set(np.diff(places)) <= {2, 3}
    with pytest.raises(DataError, match="has 12 frames"):
        source.sample(4, np.random.default_rng(0), 13, (1, 1))
    data = SelfSupervisedData((source,), 2, frames=4, global_size=32, local_size=16, mask_scheme="tubes")
    batch, again = (data.dataset(0, 0, 1)[3] for _ in range(2))
    assert batch["global_crops"].shape == (2, 2, 4, 32, 32, 3)
    np.testing.assert_array_equal(batch["global_crops"], again["global_crops"])
    assert data.describe(batch["record"])[0].startswith("world (train), seed 0, scene ")


def test_videos_are_sampled_at_a_side_and_a_frame_rate():
    source = WorldVideos("train", 2, frames=12, size=48, short_side=32, frame_rate=4.0)  # of 8 frames a second
    frames = source.sample(1, np.random.default_rng(0), 4, (1, 1)).frames
    small = WorldVideos("train", 2, frames=12, size=32).clip(1).images
    places = [next(i for i, frame in enumerate(small) if np.array_equal(frame, wanted)) for wanted in frames]
    assert set(np.diff(places)) == {2}
    larger = dataclasses.replace(source, short_side=64, frame_rate=30.0)  # than there is
    frames = larger.sample(1, np.random.default_rng(0), 12, (1, 1)).frames
    np.testing.assert_array_equal(frames, WorldVideos("train", 2, frames=12, size=48).clip(1).images)
    with pytest.raises(DataError, match="short_side is 8, expected 16 or more"):
        dataclasses.replace(source, short_side=8)
    with pytest.raises(DataError, match=r"frame_rate is -1\.0, expected a positive number"):
        dataclasses.replace(source, frame_rate=-1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split is 'test', expected one of train, heldout"),
        ({"length": 0}, "length is 0, expected 1 or more"),
        ({"frames": 0}, "frames is 0, expected 1 or more"),
        ({"size": 8}, "size is 8, expected 16 to 1024"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        WorldClips(**{"split": "train", "length": 3, **arguments})


def test_scenes_beyond_the_length_are_refused():
    with pytest.raises(DataError, match="scene 3, expected 0 to 2"):
        WorldClips("train", 3).read(3, [0])
    with pytest.raises(DataError, match="scene 2: frame 16, expected 0 to 15"):
        WorldClips("train", 3).read(2, [16])
