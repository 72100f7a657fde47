"""The restricted unpickler: accepted and rejected pickles."""

import collections
import io
import pickle
import struct

import pytest

from involution.models.checkpoint_readers import CheckpointError, restricted_unpickler

pytestmark = pytest.mark.any_backend

ARRAYS = "A checkpoint must contain arrays only"


def read(content, functions=None, persistent=None):
    return restricted_unpickler.read(io.BytesIO(content), functions or {}, persistent)


def rejection(content, functions=None, persistent=None):
    with pytest.raises(CheckpointError) as caught:
        read(content, functions, persistent)
    return str(caught.value)


def global_instructions(module, name):
    """The instructions of protocol 4 that push a global."""
    strings = (b"X" + struct.pack("<I", len(t.encode())) + t.encode() for t in (module, name))
    return b"".join(strings) + b"\x93"


SHARED = ["shared"]
VALUES = {
    "strings": ["", "é", "x" * 300],
    "numbers": [0, 1, 255, 256, 65536, -1, 2**40, -(2**70), 1.5, float("inf")],
    "constants": [None, True, False],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((5,), [6]))],
    "empty": [[], {}],
    "one": [[7], {8: 9}],
    "shared": [SHARED, SHARED],
    # Memo indices above 255 take four bytes.
    "many": [many := [[n] for n in range(300)], many[299], many[2]],
    3: {True: {"deep": {"deeper": [{}]}}},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_data_matches_pickle(protocol):
    content = pickle.dumps(VALUES, protocol)
    value = read(content)
    assert repr(value) == repr(VALUES)
    assert value["shared"][0] is value["shared"][1]
    assert value["many"][0][299] is value["many"][1]


def test_bytes_and_strings_of_every_length():
    for value, protocol in (
        (b"", 3),
        (b"x" * 300, 3),
        (bytearray(b"abc"), 5),
    ):
        got = read(pickle.dumps(value, protocol))
        assert (type(got), got) == (type(value), value)
    # With a length of 8 bytes, which pickle writes only above 4 GB.
    assert read(b"\x8d" + struct.pack("<Q", 3) + b"abc.") == "abc"
    assert read(b"\x8e" + struct.pack("<Q", 3) + b"abc.") == b"abc"
    # Python 2.
    assert read(b"(U\x01aT\x02\0\0\0bct.") == ("a", "bc")


def test_memo_indices():
    assert read(b"(K\x01q\x05K\x02r\x07\0\0\0K\x03\x94h\x05j\x07\0\0\0h\x02t.") == (
        1,
        2,
        3,
        1,
        2,
        3,
    )


def test_one_pickle_is_read():
    file = io.BytesIO(b"\x80\x02K\x01.\x80\x02K\x02.")
    assert [restricted_unpickler.read(file, {}) for _ in range(2)] == [1, 2]


def test_globals_and_functions():
    functions = {"a.b.c": None, "m.pair": lambda *values: list(values)}
    assert read(b"ca.b\nc\n.", functions) == restricted_unpickler.GlobalRef("a.b.c")
    assert read(
        global_instructions("a.b", "c") + b".", functions
    ) == restricted_unpickler.GlobalRef("a.b.c")
    assert read(b"cm\npair\nK\x01K\x02\x86R.", functions) == [1, 2]
    assert read(global_instructions("m", "pair") + b"(K\x01K\x02tR.", functions) == [1, 2]
    assert read(b"K\x07Q.", persistent=lambda number: ["object", number]) == ["object", 7]
    assert restricted_unpickler.empty_dict() == {}
    ordered = pickle.dumps(collections.OrderedDict(a=1), 2)
    assert read(ordered, {"collections.OrderedDict": restricted_unpickler.empty_dict}) == {"a": 1}


def test_build():
    class Stateful:
        def build(self, state):
            self.state = state

    assert read(b"cm\nt\n)R}K\x01K\x02sb.", {"m.t": Stateful}).state == {1: 2}
    # Attributes of a dictionary are ignored.
    assert read(b"}K\x01K\x02s}K\x03K\x04sb.") == {1: 2}


def test_unknown_globals():
    rule = f"{ARRAYS}, no code. Received: a pickle with the global "
    assert rejection(b"cos\nsystem\n.") == f"{rule}os.system"
    assert (
        rejection(global_instructions("os", "system") + b")R.", {"os.path": None})
        == f"{rule}os.system"
    )
    assert rejection(global_instructions("o", "é\n") + b".") == rf"{rule}o.\xe9\n"
    assert rejection(global_instructions("o", "x" * 300) + b".") == f"{rule}o.{'x' * 198}"


def test_globals_that_are_not_callable():
    message = rejection(b"cm\nkind\n)R.", {"m.kind": None})
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
def test_unsupported_instructions(content, instruction):
    assert rejection(content) == f"{ARRAYS}. Received: the pickle instruction {instruction}"


def test_maximum_number_of_instructions(monkeypatch):
    monkeypatch.setattr(restricted_unpickler, "MAX_INSTRUCTIONS", 1000)
    assert read(b"\x80\x02" * 998 + b"N.") is None
    rule = "A pickle must have at most 1,000 instructions. Received: more"
    assert rejection(b"\x80\x02" * 999 + b"N.") == rule


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"K\x01K\x02a.", TypeError, "int instead of list"),
        (b"K\x01(K\x02e.", TypeError, "int instead of list"),
        (b"]K\x01K\x02s.", TypeError, "list instead of dict"),
        (b"](K\x01K\x02u.", TypeError, "list instead of dict"),
        (b"cm\nf\n]R.", TypeError, "list instead of tuple"),
        (b"K\x01)R.", TypeError, "int instead of GlobalRef"),
        (b"K\x01X\1\0\0\0a\x93.", TypeError, "int instead of str"),
        (b"X\1\0\0\0aK\x01\x93.", TypeError, "int instead of str"),
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
def test_malformed_pickles(content, error, message):
    with pytest.raises(error, match=message) as caught:
        read(content, {"m.f": lambda: None})
    assert caught.type is error
