"""Modes and tasks, and which of them is current."""

import contextlib
import threading

import pytest

import efl
from efl.errors import ModelError


def test_outside_any_scope_there_is_neither_mode_nor_task():
    assert efl.current_task_scope() == efl.TaskScope(None, None)


def test_the_two_modes():
    assert list(efl.MODE) == [efl.MODE.TRAIN, efl.MODE.EVAL]


def test_scopes_nest_and_are_left_again_also_by_an_error():
    with efl.task_scope(mode=efl.MODE.TRAIN, task="ctr") as outer:
        assert outer == efl.current_task_scope() == efl.TaskScope(efl.MODE.TRAIN, "ctr")
        with contextlib.suppress(KeyError), efl.task_scope(efl.MODE.EVAL):
            assert efl.current_task_scope() == efl.TaskScope(efl.MODE.EVAL, None)
            raise KeyError
        assert efl.current_task_scope() is outer
    assert efl.current_task_scope() == efl.TaskScope()


def test_each_thread_has_a_scope_of_its_own():
    seen, entered, left = {}, threading.Event(), threading.Event()

    def other():
        seen["at first"] = efl.current_task_scope()
        with efl.task_scope(efl.MODE.EVAL, "b"):
            entered.set()
            left.wait(10)
            seen["inside"] = efl.current_task_scope()

    with efl.task_scope(efl.MODE.TRAIN, "a"):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        assert efl.current_task_scope() == efl.TaskScope(efl.MODE.TRAIN, "a")
    left.set()
    thread.join(10)
    assert seen == {"at first": efl.TaskScope(), "inside": efl.TaskScope(efl.MODE.EVAL, "b")}


def test_scopes_are_values():
    scope = efl.TaskScope(efl.MODE.TRAIN, "ctr")
    assert scope == efl.TaskScope(efl.MODE.TRAIN, "ctr")
    assert len({scope, efl.TaskScope(efl.MODE.TRAIN, "ctr"), efl.TaskScope(efl.MODE.EVAL, "ctr")}) == 2
    assert str(scope) == "train:ctr"
    assert str(efl.TaskScope(efl.MODE.EVAL)) == "eval"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "train"}, "mode='train': expected efl.MODE.TRAIN or efl.MODE.EVAL"),
        ({"task": "a/b"}, "task='a/b': expected None or a name of 1 to 64 letters"),
        ({"task": ""}, "task='': expected None or a name"),
        ({"task": "x" * 65}, "expected None or a name of 1 to 64"),
        ({"task": 3}, "task=3: expected None or a name"),
    ],
)
def test_what_is_no_scope(arguments, message):
    with pytest.raises(ModelError, match=message):
        efl.TaskScope(**arguments)
    with pytest.raises(ModelError, match=message), efl.task_scope(**arguments):
        pass
    assert efl.current_task_scope() == efl.TaskScope()


def test_functions_of_a_task_run_in_its_scope(toy):
    seen = []
    model = toy.model(evaluate=toy.batch())
    opt_fn = model.opt_fns[None]
    inner = {"input_fn": model.input_fns[None], "loss_fn": toy.loss, "eval_fn": model._eval_fns[None]}

    def record(name):
        return lambda m, argument: (seen.append((name, str(efl.current_task_scope()))), inner[name](m, argument))[1]

    model = efl.Model()
    model.input_fn(record("input_fn"), task="t").loss_fn(record("loss_fn"), task="t")
    model.eval_fn(record("eval_fn"), task="t")
    model.optimizer_fn(opt_fn, task="t").compile()
    assert seen == [
        ("input_fn", "train:t"),
        ("loss_fn", "train:t"),
        ("input_fn", "eval:t"),
        ("eval_fn", "eval:t"),
    ]
