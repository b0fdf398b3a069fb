"""What can be said and asked about the world, drawn from the scene graph and from what a frame shows of it."""

from __future__ import annotations

import dataclasses

import numpy as np

from omnistream_jax.data.world.clips import Seen, WorldClip
from omnistream_jax.data.world.motion import MOTIONS
from omnistream_jax.data.world.scenes import COLOURS, SHAPES, Scene, Thing
from omnistream_jax.data.world.textures import MATERIALS

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
CLEARLY_NEARER = 1.15
"""Depths differ by this factor or more where nearness is spoken of."""
CLEARLY_ASIDE = 0.12
"""Boxes' centres differ by this share of the picture or more where left, right, above or below is spoken of."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its answer, and the things of the scene that it speaks of (places in `Scene.things`)."""

    kind: str
    question: str
    answer: str
    things: tuple[int, ...] = ()


def noun(thing: Thing) -> str:
    """ "red ball" or "cube covered in stars": no two things of a scene have the same."""
    return _noun(thing.colour, thing.material, thing.shape)


def left_to_right(seen: list[Seen]) -> list[Seen]:
    """What is seen in the order of the boxes' middles: one that a picture tells, so that it can be learned."""
    return sorted(seen, key=lambda one: one.box[0] + one.box[2])


def frame_caption(clip: WorldClip, frame: int, rng: np.random.Generator) -> str:
    """How many things a frame shows and which, from left to right, how two of them lie, and which is the nearest."""
    seen, things = clip.seen(frame), clip.scene.things
    sentences = [_enumeration(clip.scene, seen)]
    if relations := _relations(clip.scene, seen):
        _, first, word, second = relations[rng.integers(len(relations))]
        sentences.append(f"The {noun(things[first])} is {word} the {noun(things[second])}.")
    by_depth = sorted(seen, key=lambda one: one.depth)
    if len(seen) > 1 and by_depth[1].depth > CLEARLY_NEARER * by_depth[0].depth:
        sentences.append(f"The {noun(things[by_depth[0].thing])} is the nearest.")
    return " ".join(sentences)


def clip_caption(clip: WorldClip) -> str:
    """Which things the first frame of a clip shows, and what the one that moves does."""
    scene = clip.scene
    name = MOTIONS[scene.motion]
    moves = "Nothing moves." if name == MOTIONS[0] else f"The {noun(scene.things[scene.mover])} {name}."
    return f"{_enumeration(scene, clip.seen(0))} {moves}"


def frame_questions(clip: WorldClip, frame: int, rng: np.random.Generator) -> list[Question]:
    """All that can be asked about a frame; `rng` draws the order of alternatives and what is asked for in vain."""
    scene, seen = clip.scene, clip.seen(frame)
    questions = [Question("count", "How many things can be seen?", NUMBERS[len(seen)])]
    for kind in (_look_questions, _shape_questions, _presence_questions, _depth_questions, _place_questions):
        questions += kind(scene, seen, rng)
    return questions


def clip_questions(clip: WorldClip) -> list[Question]:
    """What only time tells: which thing moves, and what it does."""
    scene = clip.scene
    mover, name = noun(scene.things[scene.mover]), MOTIONS[scene.motion]
    which = "nothing" if name == MOTIONS[0] else f"the {mover}"
    return [
        Question("which moves", "Which thing moves?", which, (scene.mover,)),
        Question("motion", f"What does the {mover} do?", f"It {name}.", (scene.mover,)),
    ]


def _noun(colour: str | None, material: str | None, shape: str) -> str:
    return f"{colour} {shape}" if material is None else f"{shape} covered in {material}"


def _enumeration(scene: Scene, seen: list[Seen]) -> str:
    names = [f"a {noun(scene.things[one.thing])}" for one in left_to_right(seen)]
    count = f"{NUMBERS[len(names)].capitalize()} thing{'' if len(names) == 1 else 's'}"
    listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
    return f"{count}: {listed}." if names else f"{count}."


def _relations(scene: Scene, seen: list[Seen]) -> list[tuple[str, int, str, int]]:
    """(axis, thing, word, other thing) of all pairs that lie clearly aside of each other in the picture."""
    words = {"x": ("to the left of", "to the right of"), "y": ("above", "below")}
    relations = []
    for first in seen:
        for second in seen:
            for axis, start in (("x", 0), ("y", 1)):
                apart = sum(second.box[start::2]) / 2 - sum(first.box[start::2]) / 2
                if first is not second and abs(apart) >= CLEARLY_ASIDE:
                    relations.append((axis, first.thing, words[axis][int(apart < 0)], second.thing))
    return relations


def _look_questions(scene: Scene, seen: list[Seen], rng: np.random.Generator) -> list[Question]:
    questions = []
    shapes = [scene.things[one.thing].shape for one in seen]
    for one in seen:
        thing = scene.things[one.thing]
        if shapes.count(thing.shape) > 1:
            continue
        if thing.colour is not None:
            questions.append(Question("colour", f"What colour is the {thing.shape}?", thing.colour, (one.thing,)))
        else:
            questions.append(
                Question("material", f"What is the {thing.shape} covered in?", str(thing.material), (one.thing,))
            )
    return questions


def _shape_questions(scene: Scene, seen: list[Seen], rng: np.random.Generator) -> list[Question]:
    looks = [(scene.things[one.thing].colour, scene.things[one.thing].material) for one in seen]
    return [
        Question("shape", f"What shape is the {_noun(*look, 'thing')}?", scene.things[one.thing].shape, (one.thing,))
        for one, look in zip(seen, looks, strict=True)
        if looks.count(look) == 1
    ]


def _presence_questions(scene: Scene, seen: list[Seen], rng: np.random.Generator) -> list[Question]:
    """One thing that is seen and one that is not in the scene, made of a look and a shape that are, where it can be."""
    if not seen:
        return []
    here = seen[rng.integers(len(seen))].thing
    present = {(thing.colour, thing.material, thing.shape) for thing in scene.things}
    everything = [(c, None) for c in COLOURS] + [(None, m) for m in MATERIALS]
    absent = [(*look, shape) for look in everything for shape in SHAPES if (*look, shape) not in present]
    looks = {(thing.colour, thing.material) for thing in scene.things}
    shapes = {thing.shape for thing in scene.things}
    near = [candidate for candidate in absent if candidate[:2] in looks and candidate[2] in shapes] or absent
    return [
        Question("presence", f"Is there a {noun(scene.things[here])}?", "yes", (here,)),
        Question("presence", f"Is there a {_noun(*near[rng.integers(len(near))])}?", "no"),
    ]


def _depth_questions(scene: Scene, seen: list[Seen], rng: np.random.Generator) -> list[Question]:
    questions = []
    by_depth = sorted(seen, key=lambda one: one.depth)
    for place, near in enumerate(by_depth):
        for far in by_depth[place + 1 :]:
            if far.depth < CLEARLY_NEARER * near.depth:
                continue
            pair = [near.thing, far.thing] if rng.random() < 0.5 else [far.thing, near.thing]
            names = [noun(scene.things[thing]) for thing in pair]
            question = f"Which is nearer, the {names[0]} or the {names[1]}?"
            questions.append(Question("nearer", question, f"the {noun(scene.things[near.thing])}", tuple(pair)))
    return questions


def _place_questions(scene: Scene, seen: list[Seen], rng: np.random.Generator) -> list[Question]:
    questions = []
    for axis, first, word, second in _relations(scene, seen):
        names = noun(scene.things[first]), noun(scene.things[second])
        choice = "to the left or to the right of" if axis == "x" else "above or below"
        answer = word.removeprefix("to the ").removesuffix(" of")
        questions.append(Question("place", f"Is the {names[0]} {choice} the {names[1]}?", answer, (first, second)))
    return questions
