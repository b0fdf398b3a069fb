"""Makes tokenizer.json: a byte-level BPE tokenizer of the embedded world's own texts.

    python -m omnistream_jax.data.embedded.make_tokenizer [FILE]

It splits text as Qwen3's tokenizer does, each digit a token, and has those of Qwen3's control tokens that text here can
hold. The rest of its vocabulary is learned from the captions, questions and boxes of the training split, so that each
of their words is a token. Other text falls apart into bytes: any is encoded, and comes back as it was. Qwen3's
tokenizer composes accents first (NFC), which would not; this one does not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from omnistream_jax.data.boxes import BOX_END, BOX_START, REF_END, REF_START, format_phrase
from omnistream_jax.data.chat import CONTROL, PROMPT, TEXT_END, THINK_END, THINK_START, TURN_END, TURN_START
from omnistream_jax.data.embedded import TOKENIZER
from omnistream_jax.data.readers import captions
from omnistream_jax.data.world import WorldClips
from omnistream_jax.data.world.language import (
    NUMBERS,
    clip_caption,
    clip_questions,
    frame_caption,
    frame_questions,
    noun,
)
from omnistream_jax.utils.files import written_aside

LIMIT = 1024
"""Of the vocabulary, which is as large as whole words need: about half of that."""
SCENES = 400
# The pattern of Qwen3's tokenizer.json (Hub Qwen/Qwen3-0.6B).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of Qwen3's; there, too, those of thinking do not count as special.
SPECIAL = (TEXT_END, TURN_START, TURN_END, REF_START, REF_END, BOX_START, BOX_END)
THINKING = (THINK_START, THINK_END)
INSTRUCTIONS = (
    captions.DESCRIBE,
    captions.DESCRIBE_WITH_BOXES,
    captions.LOCATE.format(phrase=""),
    captions.TRANSCRIBE,
    captions.TRANSCRIBE_WITH_BOXES,
)


def training_texts(scenes: int = SCENES) -> Iterator[str]:
    """All that is said about the first scenes of the training split, and how numbers, turns and tasks are worded."""
    yield from (word for number in NUMBERS for word in (number, number.capitalize()))  # some are rare
    world = WorldClips("train", scenes, size=16)  # what is said about a picture does not depend on its size
    for index in range(scenes):
        clip, rng = world.clip(index, [0]), np.random.default_rng(index)
        yield from (PROMPT.format(instruction) for instruction in INSTRUCTIONS)
        yield from (frame_caption(clip, 0, rng), clip_caption(clip))
        yield from (format_phrase(noun(clip.scene.things[one.thing]), [one.box]) for one in clip.seen(0))
        for question in (*frame_questions(clip, 0, rng), *clip_questions(clip)):
            yield from (question.question, question.answer)


def make_tokenizer() -> Tokenizer:
    """Trains the tokenizer; always the same."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LIMIT - len(SPECIAL) - len(THINKING),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Control tokens are cut out of text before it is split: what lies between them is what is learned from.
    pieces = (piece for text in training_texts() for piece in CONTROL.split(text) if piece)
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKING])
    return tokenizer


def main(arguments: list[str]) -> None:
    """Writes the file, by default the one of the package."""
    with written_aside(arguments[0] if arguments else TOKENIZER) as aside:
        aside.write_text(make_tokenizer().to_str() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
