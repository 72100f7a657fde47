"""The reader of pickles by itself: what it makes, and all that it refuses."""

import collections
import io
import pickle
import struct

import pytest

from involution.models.checkpoint_readers import CheckpointError, restricted_unpickler

pytestmark = pytest.mark.any_backend

ARRAYS = "A checkpoint must be made of arrays alone"


def read(content, functions=None, persistent=None):
    return restricted_unpickler.read(io.BytesIO(content), functions or {}, persistent)


def refused(content, functions=None, persistent=None):
    with pytest.raises(CheckpointError) as caught:
        read(content, functions, persistent)
    return str(caught.value)


def named(module, name):
    """Instructions that ask for a name, as protocol 4 has them."""
    texts = (b"X" + struct.pack("<I", len(t.encode())) + t.encode() for t in (module, name))
    return b"".join(texts) + b"\x93"


SHARED = ["shared"]
VALUES = {
    "texts": ["", "é", "x" * 300],
    "numbers": [0, 1, 255, 256, 65536, -1, 2**40, -(2**70), 1.5, float("inf")],
    "constants": [None, True, False],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((5,), [6]))],
    "empty": [[], {}],
    "one": [[7], {8: 9}],
    "shared": [SHARED, SHARED],
    # More than 255 of them, whose numbers take four bytes.
    "many": [many := [[n] for n in range(300)], many[299], many[2]],
    3: {True: {"deep": {"deeper": [{}]}}},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_data_comes_as_pickle_gives_it(protocol):
    content = pickle.dumps(VALUES, protocol)
    value = read(content)
    assert repr(value) == repr(VALUES)
    assert value["shared"][0] is value["shared"][1]
    assert value["many"][0][299] is value["many"][1]


def test_bytes_and_texts_of_every_length():
    for value, protocol in (
        (b"", 3),
        (b"x" * 300, 3),
        (bytearray(b"abc"), 5),
    ):
        got = read(pickle.dumps(value, protocol))
        assert (type(got), got) == (type(value), value)
    # With 8 bytes for the length, which pickle writes above 4 GB alone.
    assert read(b"\x8d" + struct.pack("<Q", 3) + b"abc.") == "abc"
    assert read(b"\x8e" + struct.pack("<Q", 3) + b"abc.") == b"abc"
    # As Python 2 wrote them.
    assert read(b"(U\x01aT\x02\0\0\0bct.") == ("a", "bc")


def test_what_is_remembered_has_the_number_that_the_pickle_gives_it():
    assert read(b"(K\x01q\x05K\x02r\x07\0\0\0K\x03\x94h\x05j\x07\0\0\0h\x02t.") == (
        1,
        2,
        3,
        1,
        2,
        3,
    )


def test_one_pickle_is_read_and_the_file_stands_behind_it():
    file = io.BytesIO(b"\x80\x02K\x01.\x80\x02K\x02.")
    assert [restricted_unpickler.read(file, {}) for _ in range(2)] == [1, 2]


def test_names_are_texts_and_functions_are_the_callers():
    functions = {"a.b.c": None, "m.pair": lambda *values: list(values)}
    assert read(b"ca.b\nc\n.", functions) == restricted_unpickler.Name("a.b.c")
    assert read(named("a.b", "c") + b".", functions) == restricted_unpickler.Name("a.b.c")
    assert read(b"cm\npair\nK\x01K\x02\x86R.", functions) == [1, 2]
    assert read(named("m", "pair") + b"(K\x01K\x02tR.", functions) == [1, 2]
    assert read(b"K\x07Q.", persistent=lambda number: ["object", number]) == ["object", 7]
    assert restricted_unpickler.empty_dictionary() == {}
    ordered = pickle.dumps(collections.OrderedDict(a=1), 2)
    assert read(ordered, {"collections.OrderedDict": restricted_unpickler.empty_dictionary}) == {
        "a": 1
    }


def test_a_state_is_for_what_takes_one():
    class Taking:
        def build(self, state):
            self.state = state

    assert read(b"cm\nt\n)R}K\x01K\x02sb.", {"m.t": Taking}).state == {1: 2}
    # Attributes of a dictionary mean nothing.
    assert read(b"}K\x01K\x02s}K\x03K\x04sb.") == {1: 2}


def test_names_that_are_not_known():
    rule = f"{ARRAYS}; no code of a file is run. Received: a pickle that asks for "
    assert refused(b"cos\nsystem\n.") == f"{rule}os.system"
    assert refused(named("os", "system") + b")R.", {"os.path": None}) == f"{rule}os.system"
    assert refused(named("o", "é\n") + b".") == rf"{rule}o.\xe9\n"
    assert refused(named("o", "x" * 300) + b".") == f"{rule}o.{'x' * 198}"


def test_names_that_are_not_to_be_called():
    message = refused(b"cm\nkind\n)R.", {"m.kind": None})
    assert message == f"{ARRAYS}. Received: a call of m.kind"


@pytest.mark.parametrize(
    ("content", "instruction"),
    [
        (b"I1\n.", "INT"),
        (b"N0.", "POP"),
        (b"(1.", "POP_MARK"),
        (b"N2.", "DUP"),
        (b"P1\n.", "PERSID"),
        (b"K\x01Q.", "BINPERSID"),
        (b"(ios\nsystem\n.", "INST"),
        (b"(o.", "OBJ"),
        (b"N)\x81.", "NEWOBJ"),
        (b"N)}\x92.", "NEWOBJ_EX"),
        (b"\x82\x01.", "EXT1"),
        (b"\x8f.", "EMPTY_SET"),
        (b"\x97.", "NEXT_BUFFER"),
    ],
)
def test_other_instructions(content, instruction):
    assert refused(content) == f"{ARRAYS}. Received: the pickle instruction {instruction}"


def test_instructions_are_counted(monkeypatch):
    monkeypatch.setattr(restricted_unpickler, "STEPS", 1000)
    assert read(b"\x80\x02" * 998 + b"N.") is None
    rule = "A pickle must need at most 1,000 instructions. Received: a longer one"
    assert refused(b"\x80\x02" * 999 + b"N.") == rule


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"K\x01K\x02a.", TypeError, "int in the place of list"),
        (b"K\x01(K\x02e.", TypeError, "int in the place of list"),
        (b"]K\x01K\x02s.", TypeError, "list in the place of dict"),
        (b"](K\x01K\x02u.", TypeError, "list in the place of dict"),
        (b"cm\nf\n]R.", TypeError, "list in the place of tuple"),
        (b"K\x01)R.", TypeError, "int in the place of Name"),
        (b"K\x01X\1\0\0\0a\x93.", TypeError, "int in the place of str"),
        (b"X\1\0\0\0aK\x01\x93.", TypeError, "int in the place of str"),
        (b"}NK\x01s.", TypeError, "NoneType as a key"),
        (b"}(K\x01K\x02)K\x01u.", TypeError, "tuple as a key"),
        (b"}(K\x01u.", ValueError, "shorter"),
        (b"NN.", ValueError, "too many values"),
        (b".", ValueError, "not enough values"),
        (b"(.", ValueError, "not enough values"),
        (b"N", ValueError, "exhausted before seeing STOP"),
        (b"", ValueError, "exhausted before seeing STOP"),
        (b"t.", IndexError, "pop from empty list"),
        (b"\x85.", IndexError, "pop from empty list"),
        (b"h\x01.", KeyError, "1"),
        (b"]Nb.", AttributeError, "build"),
    ],
)
def test_what_is_not_well_formed(content, error, message):
    with pytest.raises(error, match=message) as caught:
        read(content, {"m.f": lambda: None})
    assert caught.type is error
