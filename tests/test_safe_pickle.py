"""Plain pickles are read as pickle itself reads them; whatever could call anything is refused, and called by nobody."""

import collections
import datetime
import functools
import os
import pickle

import numpy as np
import pytest

from omnistream_jax.data.errors import DataError
from omnistream_jax.data.readers.safe_pickle import read_plain_pickle

PLAIN = [
    {
        "ref_id": 12,
        "split": "testA",
        "sentences": [{"raw": "lédy\nin \"red\" 'x' \\n", "tokens": []}],
        "box": (1.5, -2.0),
    },
    {"big": 1 << 70, "small": -3, "short": 300, "long": 70_000, "none": None, "yes": True, "no": False, "": ()},
    [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], {}],
    "x" * 300,
]

PYTHON2 = rb"""(lp1
(dp2
S'sent_ids'
p3
(lp4
I0
aI1
aI2
asS'file_name'
p5
S'COCO_train2014_000000581857_16.jpg'
p6
sS'ann_id'
p7
I1719310
sS'sentences'
p8
(lp9
(dp10
S'tokens'
p11
(lp12
S'the'
p13
aS'lady'
p14
asS'raw'
p15
VTHE L\u00c4DY
p16
sS'sent_id'
p17
I0
sS'sent'
p18
S'the lady'
p19
sasS'ref_id'
p20
L0L
sS'split'
p21
g13
sa."""
"""As Python 2 wrote the published files: protocol 0, typed from its documentation."""


def _write(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", PLAIN)
def test_plain_values_are_read_as_pickle_reads_them(tmp_path, value, protocol):
    read = read_plain_pickle(_write(tmp_path / "x.p", pickle.dumps(value, protocol)))
    assert read == value
    assert repr(read) == repr(value)  # True and 1 are equal, () and [] print otherwise


def test_many_references_are_read(tmp_path):
    rng = np.random.default_rng(0)
    references = [
        {"ref_id": index, "sentences": [{"sent": f"word {number}"} for number in rng.integers(0, 9, 3).tolist()]}
        for index in range(3000)
    ]
    for protocol in (0, 2, 4):
        assert read_plain_pickle(_write(tmp_path / "x.p", pickle.dumps(references, protocol))) == references


def test_a_pickle_of_python_2_is_read(tmp_path):
    (reference,) = read_plain_pickle(_write(tmp_path / "refs(unc).p", PYTHON2))
    assert reference["ann_id"] == 1719310
    assert reference["sentences"][0]["raw"] == "THE LÄDY"
    assert (reference["split"], reference["ref_id"], reference["sent_ids"]) == ("the", 0, [0, 1, 2])
    assert pickle.loads(PYTHON2) == [reference]


class _Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_calls_a_function_is_refused_and_not_called(tmp_path, protocol):
    data = pickle.dumps([1, _Evil(tmp_path / "called")], protocol)
    with pytest.raises(DataError, match=r"x.p: holds the instruction (GLOBAL|STACK_GLOBAL), .* refused"):
        read_plain_pickle(_write(tmp_path / "x.p", data))
    assert not (tmp_path / "called").exists()
    pickle.loads(data)
    assert (tmp_path / "called").exists()  # so it would have been


@pytest.mark.parametrize(
    "value",
    [
        np.arange(3),
        np.float64(1.5),
        {1, 2},
        frozenset([1]),
        b"bytes",
        bytearray(b"bytes"),
        collections.OrderedDict(a=1),
        datetime.date(2020, 1, 1),
        functools.partial(print),
        complex(1, 2),
        DataError,
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_what_is_not_plain_is_refused(tmp_path, value, protocol):
    with pytest.raises(DataError, match=r"x.p: holds the instruction \w+, which plain values do not need; refused"):
        read_plain_pickle(_write(tmp_path / "x.p", pickle.dumps({"value": value}, protocol)))


@pytest.mark.parametrize(
    ("data", "instruction"),
    [
        (b"(S'true'\nios\nsystem\n.", "INST"),
        (b"cos\nsystem\n(S'true'\ntR.", "GLOBAL"),
        (b"(cos\nsystem\nS'true'\no.", "GLOBAL"),
        (b"Pposition\n.", "PERSID"),
        (b"\x80\x02K\x01Q.", "BINPERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"(dS'a'\nb.", "BUILD"),
        (b"I1\n2.", "DUP"),
    ],
)
def test_every_other_instruction_is_refused_by_its_name(tmp_path, data, instruction):
    with pytest.raises(DataError, match=rf"holds the instruction {instruction},"):
        read_plain_pickle(_write(tmp_path / "x.p", data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        b"(lp1\nI1\na",  # no end
        pickle.dumps(PLAIN)[:60],
        b".",  # nothing on the stack
        b"I1\nI2\n.",  # two values
        b"(I1\n.",  # a mark is left
        b"a.",
        b"I1\nI2\na.",  # append to a number
        b"I1\nt.",  # no mark
        b"g7\n.",  # was never put
        b"(I1\nd.",  # a key without a value
        b"((lI1\nd.",  # a list as a key
        b"(u.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # text of 9 exabytes
        b"S'\xe9'\n.",  # bytes that are no text
    ],
)
def test_damaged_pickles_are_refused(tmp_path, data):
    with pytest.raises(DataError, match=r"x.p: expected a pickle of lists, dicts, text and numbers"):
        read_plain_pickle(_write(tmp_path / "x.p", data))


def test_a_missing_pickle_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.p: there is no such file"):
        read_plain_pickle(tmp_path / "gone.p")


def test_values_that_would_grow_without_limit_are_refused(tmp_path):
    itself = []
    itself.append(itself)
    laughs = ["ha"]
    for _ in range(40):  # a trillion parts
        laughs = [laughs, laughs]
    for value in (itself, laughs):
        with pytest.raises(DataError, match=r"its parts contain each other or are used over and over"):
            read_plain_pickle(_write(tmp_path / "x.p", pickle.dumps(value)))
    shared = ["the", "lady"]
    value = [shared, shared, "x", "y"]
    assert read_plain_pickle(_write(tmp_path / "x.p", pickle.dumps(value))) == value
