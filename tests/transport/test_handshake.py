from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efl.errors import ConfigError, DataError, ProtocolError
from efl.transport import Endpoint, Hello, Limits, TensorSpec, disagreements, handshake
from tests.transport.peers import mirrored, receives, sends

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SPECS = st.builds(
    TensorSpec,
    name=st.text(min_size=1, max_size=8).filter(lambda s: s.isprintable()),
    dtype=st.sampled_from(["float32", "int64", "string"]),
    shape=st.none() | st.lists(st.none() | st.integers(0, 9), max_size=3).map(tuple),
    direction=st.sampled_from(["send", "recv"]),
    require_grad=st.booleans(),
    mode=st.sampled_from(["", "train"]),
    task=st.sampled_from(["", "ctr"]),
)
# Tensors, their gradients, gradients of gradients and tokens, real and in name only.
INTERNAL = st.builds(
    TensorSpec,
    name=st.sampled_from(["t/a", "t/a/grad", "t/a/grad/grad", "t/pace", "t/pace/grad"]),
    dtype=st.sampled_from(["int8", "float32"]),
    shape=st.sampled_from([(), (2,)]),
    direction=st.sampled_from(["send", "recv"]),
    require_grad=st.booleans(),
)
TENSORS = st.lists(SPECS, max_size=4, unique_by=lambda t: (t.name, t.direction)).map(tuple)
HELLOS = st.builds(
    Hello,
    role=st.just("leader"),
    tensors=TENSORS,
    terms=st.dictionaries(st.text(max_size=5), JSON, max_size=3),
    facts=st.dictionaries(st.text(max_size=5), JSON, max_size=3),
)


@given(HELLOS)
def test_a_hello_survives_the_wire_and_agrees_with_its_mirror(hello):
    parsed, limits = handshake.parse(handshake.to_bytes(hello, Limits()), Limits())
    assert parsed == hello
    assert limits["window_steps"] == Limits().window_steps
    assert disagreements(parsed, replace(hello, role="follower", tensors=mirrored(hello.tensors))) == []


@given(HELLOS, TENSORS, st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_both_parties_find_the_same_disagreements(one, tensors, terms):
    two = Hello("follower", tensors, terms)
    assert disagreements(one, two) == disagreements(two, one)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DataError("'x' is no folder"), "the leader could not begin: DataError: 'x' is no folder"),
        (KeyError("secret"), "the leader could not begin: KeyError: its own log says why"),
    ],
)
def test_a_party_that_failed_says_only_that(error, expected):
    hello = Hello("leader", facts=handshake.failure_facts(error))
    other = Hello("follower", (BASE,), {"procedure": "train"})
    told, _ = handshake.parse(handshake.to_bytes(hello, Limits()), Limits())
    assert disagreements(told, other) == disagreements(other, told) == [expected]
    begun = Hello("leader", facts=handshake.failure_facts(error, begun=True))
    assert disagreements(begun, other) == [expected.replace("could not begin", "could not go on")]
    both = Hello("follower", facts=handshake.failure_facts(ValueError("y")))
    assert disagreements(both, told) == [expected, "the follower could not begin: ValueError: its own log says why"]


@pytest.mark.parametrize("told", [None, [], "x", {}, {"type": 3, "text": []}, {"type": "", "text": ""}])
def test_a_failure_in_a_form_of_its_own_is_still_one(told):
    reasons = disagreements(Hello("leader", facts={"failed": told}), Hello("follower"))
    assert reasons[0].startswith("the leader could not begin: ")
    long = Hello("leader", facts={"failed": {"type": "E" * 9999, "text": "x" * 99999}})
    assert len(disagreements(long, Hello("follower"))[0]) < 5000


BASE = sends("train/fc1", shape=(256, 128), mode="train")


@pytest.mark.parametrize(
    ("leader", "follower", "expected"),
    [
        ((BASE,), (), "tensor 'train/fc1': the leader sends it, the follower has no recv of that name"),
        ((), (BASE,), "tensor 'train/fc1': the follower sends it, the leader has no recv of that name"),
        (
            (),
            (receives("train/fc1"),),
            "tensor 'train/fc1': the follower receives it, the leader has no send of that name",
        ),
        (
            (BASE,),
            (receives("train/fc1", "int32", (256, 128), mode="train"),),
            "tensor 'train/fc1': the leader sends it with dtype='float32', the follower receives it with dtype='int32'",
        ),
        (
            (BASE,),
            (receives("train/fc1", shape=(None, 64), mode="train"),),
            "tensor 'train/fc1': the leader sends shape (256, 128), the follower receives shape (None, 64)",
        ),
        (
            (BASE,),
            (receives("train/fc1", shape=(256,), mode="train"),),
            "tensor 'train/fc1': the leader sends shape (256, 128), the follower receives shape (256,)",
        ),
        (
            (BASE,),
            (receives("train/fc1", mode="train", require_grad=True),),
            "tensor 'train/fc1': the leader sends it with require_grad=False, "
            "the follower receives it with require_grad=True",
        ),
        (
            (BASE,),
            (receives("train/fc1", mode="eval"),),
            "tensor 'train/fc1': the leader sends it with mode='train', the follower receives it with mode='eval'",
        ),
        (
            (BASE,),
            (receives("train/fc1", mode="train", task="ctr"),),
            "tensor 'train/fc1': the leader sends it with task='', the follower receives it with task='ctr'",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(leader, follower, expected):
    assert disagreements(Hello("leader", leader), Hello("follower", follower)) == [expected]


TOKEN = replace(sends("train/pace", "int8", ()), mode="train")
GRADIENT = receives("train/fc1/grad", shape=(256, 128), mode="train")
EVAL_TOKENS = (sends("eval/pace", "int8", (), mode="eval"), receives("eval/pace", "int8", (), mode="eval"))


@pytest.mark.parametrize(
    ("leader", "follower", "expected"),
    [
        # The follower has no recv of fc1, so it receives nothing here, expects a token, and returns no gradient.
        (
            (replace(BASE, require_grad=True), GRADIENT),
            (replace(TOKEN, direction="recv"), TOKEN),
            ["tensor 'train/fc1': the leader sends it, the follower has no recv of that name"],
        ),
        # Without require_grad on one side, the gradient is on the other side's list only.
        (
            (replace(BASE, require_grad=True), GRADIENT),
            (replace(BASE, direction="recv"), TOKEN),
            [
                "tensor 'train/fc1': the leader sends it with require_grad=True, "
                "the follower receives it with require_grad=False"
            ],
        ),
        # Another dtype is the gradient's, too.
        (
            (replace(BASE, require_grad=True), GRADIENT),
            mirrored((replace(BASE, require_grad=True, dtype="float64"), replace(GRADIENT, dtype="float64"))),
            [
                "tensor 'train/fc1': the leader sends it with dtype='float32', "
                "the follower receives it with dtype='float64'"
            ],
        ),
        # The tensor is agreed on, its gradient is not.
        (
            (replace(BASE, require_grad=True), GRADIENT),
            mirrored((replace(BASE, require_grad=True),)),
            ["tensor 'train/fc1/grad': the leader receives it, the follower has no send of that name"],
        ),
        # A tensor of the program's own that is only named like a gradient: nothing requires one.
        (
            (BASE, GRADIENT),
            (),
            [
                "tensor 'train/fc1': the leader sends it, the follower has no recv of that name",
                "tensor 'train/fc1/grad': the leader receives it, the follower has no send of that name",
            ],
        ),
        # Nor is this one fc1's gradient: it goes the way that fc1 goes.
        (
            (replace(BASE, require_grad=True), GRADIENT, replace(GRADIENT, direction="send")),
            (),
            [
                "tensor 'train/fc1': the leader sends it, the follower has no recv of that name",
                "tensor 'train/fc1/grad': the leader sends it, the follower has no recv of that name",
            ],
        ),
        # A tensor of the program's own that is only named like a token.
        (
            (BASE, receives("train/pace", mode="train")),
            (),
            [
                "tensor 'train/fc1': the leader sends it, the follower has no recv of that name",
                "tensor 'train/pace': the leader receives it, the follower has no send of that name",
            ],
        ),
    ],
)
def test_what_follows_from_another_entry_is_left_out(leader, follower, expected):
    one, two = Hello("leader", leader), Hello("follower", follower)
    assert disagreements(one, two) == disagreements(two, one) == expected


def test_tokens_are_left_out_where_a_term_tells_why():
    one = Hello("leader", EVAL_TOKENS, {"tasks": ["eval", "train"]})
    assert disagreements(one, Hello("follower", (), {"tasks": ["train"]})) == [
        "tasks: the leader has ['eval', 'train'], the follower has ['train']"
    ]


def test_tokens_are_named_where_nothing_else_is():
    assert disagreements(Hello("leader", EVAL_TOKENS), Hello("follower")) == [
        "tensor 'eval/pace': the leader sends it, the follower has no recv of that name",
        "tensor 'eval/pace': the leader receives it, the follower has no send of that name",
    ]


@given(*[st.lists(INTERNAL, max_size=5, unique_by=lambda t: (t.name, t.direction)).map(tuple)] * 2, st.booleans())
def test_whatever_is_left_out_something_is_named(here, there, term):
    one, two = Hello("leader", here, {"x": 1} if term else {}), Hello("follower", there)
    found = disagreements(one, two)
    assert found == disagreements(two, one)
    unlike = {(t.name, t.direction) for t in here} != {(t.name, t.direction) for t in mirrored(there)}
    assert bool(found) or not (unlike or term)


def test_unknown_dimensions_fit_anything():
    for shape in (None, (None, 128), (None, None)):
        other = receives("train/fc1", shape=shape, mode="train")
        assert disagreements(Hello("leader", (BASE,)), Hello("follower", (other,))) == []


def test_one_name_may_go_both_ways():
    tensors = (sends("x"), receives("x", "int32"))
    assert disagreements(Hello("leader", tensors), Hello("follower", mirrored(tensors))) == []


def test_every_term_that_differs_is_named():
    one = Hello("leader", terms={"batch size": 256, "procedure": ["train", 10], "seed": 1, "same": (1, 2)})
    two = Hello("follower", terms={"batch size": 128, "procedure": ["train", 10], "shuffle": True, "same": [1, 2]})
    assert disagreements(one, two) == [
        "batch size: the leader has 256, the follower has 128",
        "seed: the leader has 1, the follower does not state it",
        "shuffle: the follower has True, the leader does not state it",
    ]


def test_equal_looking_values_of_other_types_differ():
    one, two = Hello("leader", terms={"x": 1}), Hello("follower", terms={"x": True})
    assert disagreements(one, two) == ["x: the leader has 1, the follower has True"]


def test_facts_may_differ():
    assert disagreements(Hello("leader", facts={"a": 1}), Hello("follower", facts={"a": 2, "b": 3})) == []


def test_roles_and_version():
    assert disagreements(Hello("leader"), Hello("leader")) == [
        "both parties have the role 'leader'; one must be the leader, the other the follower"
    ]
    assert disagreements(Hello("leader"), Hello("wizard")) == [
        "role 'wizard' is unknown; expected 'leader' or 'follower'"
    ]
    assert disagreements(Hello("leader"), Hello("follower", version=7)) == [
        "protocol version: the leader has 1, the follower has 7"
    ]


def test_another_version_is_understood_enough_to_say_so():
    body = json.dumps({"role": "follower", "instance": "abc", "version": 2, "something": "new"}).encode()
    hello, _ = handshake.parse(body, Limits())
    assert hello.version == 2


VALID = json.loads(handshake.to_bytes(Hello("follower", (sends("x", shape=(None, 2)),), {"a": 1}), Limits()))


@pytest.mark.parametrize(
    "change",
    [
        {"role": 5},
        {"role": ""},
        {"instance": None},
        {"version": "1"},
        {"version": True},
        {"version": -1},
        {"terms": []},
        {"facts": None},
        {"tensors": {}},
        {"tensors": [["x"]]},
        {"tensors": [["", "float32", None, "send", False, "", ""]]},
        {"tensors": [["x" * 300, "float32", None, "send", False, "", ""]]},
        {"tensors": [["x", 3, None, "send", False, "", ""]]},
        {"tensors": [["x", "float32", [-1], "send", False, "", ""]]},
        {"tensors": [["x", "float32", [1.5], "send", False, "", ""]]},
        {"tensors": [["x", "float32", [1] * 40, "send", False, "", ""]]},
        {"tensors": [["x", "float32", [10**30], "send", False, "", ""]]},
        {"tensors": [["x", "float32", None, "both", False, "", ""]]},
        {"tensors": [["x", "float32", None, "send", 1, "", ""]]},
        {"tensors": [["x", "float32", None, "send", False, None, ""]]},
        {"tensors": [["x", "float32", None, "send", False, "", ""]] * 2},
        {"limits": None},
        {"limits": {}},
        {"limits": {**VALID["limits"], "window_steps": 0}},
        {"limits": {**VALID["limits"], "window_steps": 1.5}},
    ],
    ids=str,
)
def test_malformed_hellos_are_refused(change):
    handshake.parse(json.dumps(VALID).encode(), Limits())
    with pytest.raises(ProtocolError, match="malformed hello"):
        handshake.parse(json.dumps({**VALID, **change}).encode(), Limits())


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff", b"[]", b"[" * 100_000, b'{"a": NaN}', b"1" * 5000, b'"x"'],
    ids=["empty", "not utf-8", "list", "deep", "nan", "long number", "string"],
)
def test_what_is_not_a_hello_is_refused(text):
    with pytest.raises(ProtocolError):
        handshake.parse(text, Limits())


def test_too_many_tensors_are_refused():
    hello = Hello("leader", tuple(sends(f"t{i}") for i in range(5)))
    text = handshake.to_bytes(hello, Limits())
    with pytest.raises(ProtocolError, match="5 tensors; at most 4 are accepted"):
        handshake.parse(text, Limits(max_tensors=4))


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        (Hello("wizard"), "role 'wizard' is unknown"),
        (Hello("leader", (sends("x", "float99"),)), "tensor 'x': dtype 'float99' cannot travel; expected one of"),
        (Hello("leader", (sends("x"), sends("x", "int32"))), "listed twice"),
        (Hello("leader", terms={"x": object()}), "must be JSON values"),
        (Hello("leader", terms={"x": float("nan")}), "must be JSON values"),
        (Hello("leader", (sends("x", shape=(-1,)),)), "shape"),
    ],
)
def test_our_own_mistakes_are_found_before_they_travel(hello, message):
    with pytest.raises(ConfigError, match=message):
        handshake.to_bytes(hello, Limits())


@pytest.mark.parametrize(
    "address", ["", "localhost", "localhost:", ":50051", "localhost:0", "localhost:65536", "a b:1", "host:port", None]
)
def test_bad_addresses_are_refused(address):
    with pytest.raises(ConfigError, match="expected 'host:port'"):
        Endpoint("leader", address, listen=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_steps": 0}, "window_steps=0: expected a number above 0"),
        ({"chunk_bytes": 1.5}, "expected a whole number"),
        ({"chunk_bytes": 1 << 30}, "at most 16777216"),
        ({"dead_seconds": 1.0, "heartbeat_seconds": 1.0}, "at least twice"),
    ],
)
def test_bad_limits_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**change)


def test_a_layer_without_its_twin_is_told_in_one_sentence():
    names = ("zc", "dw", "scale")
    terms = {f"encrypted/hetero/{term}": 1 for term in ("key", "kind", "outputs")}
    tensors = tuple(TensorSpec(f"train/hetero/{name}", "uint8", (None,), "send") for name in names)
    told = disagreements(Hello("leader", tensors, {**terms, "a": 1}), Hello("follower", (), {"a": 1}))
    assert told == ["encrypted/hetero: the leader has it, the follower has none of that name"]
    # Made at both, and called at one only.
    told = disagreements(Hello("leader", tensors, terms), Hello("follower", (), terms))
    assert told == [
        "tensors 'train/hetero/' (dw, scale, zc): the leader sends it, the follower has no recv of that name "
        "(encrypted/hetero is made there; is it called in this task and mode?)"
    ]
