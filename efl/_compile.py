"""From a user's functions to one program per task and mode."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import tensorflow.compat.v1 as tf

from efl import _constants
from efl import _gradients as gradients
from efl._frames import last_user_line
from efl._graph import as_graph_tensor, batch_collection, eager_error
from efl._program import Metric, Program, as_metrics, feature_tensors
from efl._task_scope import MODE, TaskScope, task_scope
from efl._tensorflow import enable_int_sizes, has_int_sizes, reference_variables
from efl.errors import EflError, ModelError
from efl.sample import Sample

if TYPE_CHECKING:
    from efl.model import Model

_log = logging.getLogger("efl")
_DIMENSIONS = tuple(f"'{kind}' object has no attribute 'value'" for kind in ("int", "NoneType"))
# TensorFlow has no type of error for an eager tensor that meets a graph.
_EAGER = ("Eager-defined Tensor", "EagerTensor", "undefined when eager execution is enabled")


def compile_model(model: Model) -> None:
    """Builds the training and evaluation programs of every task of a model.

    Raises:
      ModelError: Something is missing or wrong in the definition.
    """
    tasks = list(dict.fromkeys([*model._input_fns, *model._loss_fns, *model._eval_fns, *model._opt_fns]))
    if not tasks:
        raise ModelError("the model has no functions yet: set input_fn, loss_fn and optimizer_fn before compile()")
    names = {task: "the model" if task is None else f"task {task!r}" for task in tasks}
    for task, name in names.items():
        if task not in model._loss_fns and task not in model._eval_fns:
            raise ModelError(f"{name} has neither a loss_fn nor an eval_fn")
        if task not in model._input_fns:
            raise ModelError(f"{name} has no input_fn")
    enable_int_sizes()
    # All losses before the first optimizer: whoever enters a variable scope again (a trunk that tasks share) makes
    # TensorFlow forget which names of slots are taken below it, and those of two optimizers would clash.
    updates: dict[str | None, list[Any]] = {}
    for task in (task for task in tasks if task in model._loss_fns):
        with task_scope(MODE.TRAIN, task) as scope:
            updates[task] = _compile_loss(model, scope, names[task])
    for task, moving in updates.items():
        with task_scope(MODE.TRAIN, task) as scope:
            _compile_training(model, scope, names[task], moving)
    for task in (task for task in tasks if task in model._eval_fns):
        with task_scope(MODE.EVAL, task) as scope:
            _compile_evaluation(model, scope, names[task])
    model._check_exchanges()
    if tf.get_collection("efl_privacy_labels"):
        from efl.privacy import _label_use  # only who randomises labels needs it

        _label_use.bind(model)
    model._opt_config.warn_if_unread(opt for program in model._programs.values() for opt in program.optimizers)
    _refuse_tensorflow_1()
    _constants.warn_of_large(tf.get_default_graph())


def _compile_loss(model: Model, scope: TaskScope, name: str) -> list[Any]:
    """Reads a batch and builds the loss of a task.

    Returns:
      The update ops that were made meanwhile.
    """
    program = model._program(scope)
    updates_before = set(tf.get_collection(tf.GraphKeys.UPDATE_OPS))
    with _metric_variables(program):
        program.sample = _read(model, scope)
        _note_batch(scope, program.sample)
        model._batch_is_read(scope, program.sample)
        returned = _call(model._loss_fns[scope.task], f"loss_fn of {name}", model, program.sample)
    loss = None
    if isinstance(returned, (list, tuple)):
        raise ModelError(
            f"loss_fn of {name} returned a {type(returned).__name__} of {len(returned)}: expected one tensor (add "
            "losses up, with tf.add_n for instance), or None where the peer's gradients alone train what was sent"
        )
    if returned is not None and not model._is_driven_by_peer(scope, returned):
        loss = as_graph_tensor(returned, f"loss_fn of {name} returned something that is no loss")
        if not loss.dtype.is_floating:
            raise ModelError(f"loss_fn of {name} returned a {loss.dtype.name} tensor: expected floating point")
        program.loss_given = loss
        rank = loss.shape.rank or 0
        if rank > 1 and loss.shape[-1] != 1 and model._sent(scope):
            _log.warning(
                "loss_fn of %s returned a tensor of shape %s, whose mean or sum (REDUCE) is minimised beside what the "
                "peer's gradients ask for. If they alone are to train what was sent, return the very tensor that was "
                "handed to send(), or None",
                name,
                loss.shape,
            )
        loss = model._opt_config.to_scalar(loss, f"loss_fn of {name}")
    program.loss, program.has_loss = loss, True
    if scope.task not in model._opt_fns and tf.trainable_variables():
        raise ModelError(f"{name} has a loss_fn and trainable variables but no optimizer_fn")
    return _made_since(updates_before)


def _compile_training(model: Model, scope: TaskScope, name: str, moving: list[Any]) -> None:
    """Builds the update of a task, gated on everything that reads a variable in the same step.

    Args:
      model: Whose task it is.
      scope: Of the task.
      name: Of the task, for messages.
      moving: The update ops that its loss made.
    """
    program = model._program(scope)
    loss, made_before = program.loss, set(tf.get_collection(tf.GraphKeys.UPDATE_OPS))
    sent, received = model._sent(scope), model._received(scope)
    assignments = _assignments(model, scope, name)
    variables = list(dict.fromkeys(v for held, _ in assignments.values() for v in held))
    if assignments and loss is None and not sent:
        raise ModelError(
            f"loss_fn of {name} returned no loss of its own, and no send requires a gradient: nothing would train. "
            "Return a loss, or send with require_grad=True"
        )
    private = [optimizer for optimizer in assignments if gradients.is_private(optimizer)]
    _refuse_tensorflow_1()
    if private and model._layers(scope):
        raise ModelError(
            f"{name}: {type(private[0]).__name__} beside the encrypted layer {model._layers(scope)[0]!r}: the layer's "
            "weights are trained without clipping and noise, so nothing would be promised. Use one or the other"
        )
    if private:
        from efl.privacy import _training as private_training  # only who asks for privacy pays for it

        derived = private_training.differentiate(model, program, assignments, private, sent, received, name)
    else:
        derived = gradients.differentiate(loss, sent, variables, [tensor for _, tensor in received])
        for number in derived.unconnected:
            _log.warning(
                "%s: nothing that is differentiated depends on the received tensor %r, so the peer gets zeros for its "
                "gradient in every step: is it used, and on no way through tf.stop_gradient, tf.argmax or a rounding? "
                "Otherwise leave out require_grad on both sides",
                name,
                received[number][0],
            )
    model._return_gradients(scope, derived.received, undivided=bool(private))
    by_variable = dict(zip(variables, derived.variables))
    exchange = model._exchange_ops(scope, program.sample)
    gate = [op for g in derived.variables for op in gradients.finished(g)] + derived.received + exchange
    gate += [] if loss is None else [loss]
    updates = []
    for optimizer, (held, where) in assignments.items():
        if gradients.differentiates_itself(optimizer):
            pairs = optimizer.compute_gradients(gradients.surrogate(loss, sent), var_list=held)
            gate += [op for g, _ in pairs for op in gradients.finished(g)]
        else:
            pairs = [(by_variable[v], v) for v in held]
        pairs = [(g, v) for g, v in pairs if g is not None]
        if not pairs:
            raise ModelError(
                f"{type(optimizer).__name__} of {name}{f' for scope {where}' if where else ''} has nothing to train: "
                "the objective depends on none of "
                f"{', '.join(v.op.name for v in held) or 'its variables (there are none)'}"
            )
        program.optimizers[optimizer] = ([v for _, v in pairs], where)
        updates.append((optimizer, pairs))
    gate += [*program.step_ops(), *moving, *_made_since(made_before)]
    # Everything that reads a variable in this step is in the gate, metrics too, so no update can run ahead of a reader
    # of the old value.
    with tf.control_dependencies(gate):
        applied = []
        for optimizer, pairs in updates:
            with optimizer.trusted() if gradients.is_private(optimizer) else contextlib.nullcontext():
                applied.append(optimizer.apply_gradients(pairs))
        applied += [*model._layer_updates(scope), tf.no_op()]
    with tf.control_dependencies(applied):
        counted = tf.assign_add(model.global_step, 1)
    program.moving = moving = [*moving, *_made_since(made_before)]  # an optimizer may have made some
    program.set_op(tf.group(counted, *exchange, *program.step_ops(), *moving, name=_op_name("train", scope)))


def _refuse_tensorflow_1() -> None:
    refs = reference_variables(tf.get_default_graph())
    if refs:
        raise ModelError(
            f"{', '.join(refs[:5])}: reference variables (tf.disable_v2_behavior() turns resource variables off); "
            "write tf.enable_resource_variables() after it, before the first variable is made"
        )
    if not has_int_sizes():
        raise ModelError(
            "the sizes in a tensor's shape are tf.Dimension objects, as tf.disable_v2_behavior() makes them: an "
            "unknown one cannot be told from a known one. Write tf.enable_v2_tensorshape() after it"
        )


def _made_since(before: set[Any]) -> list[Any]:
    return [op for op in tf.get_collection(tf.GraphKeys.UPDATE_OPS) if op not in before]


def _compile_evaluation(model: Model, scope: TaskScope, name: str) -> None:
    program = model._program(scope)
    before = set(tf.trainable_variables())
    with _metric_variables(program):
        program.sample = _read(model, scope)
        _note_batch(scope, program.sample)
        model._batch_is_read(scope, program.sample)
        returned = _call(model._eval_fns[scope.task], f"eval_fn of {name}", model, program.sample)
    made = [v.op.name for v in tf.trainable_variables() if v not in before]
    if made and model._loss_fns:
        raise ModelError(
            f"eval_fn of {name} made trainable variables that no loss trains: {', '.join(made)}. Evaluation would run "
            "on fresh weights: build the model under tf.variable_scope(…, reuse=tf.AUTO_REUSE), with the same name in "
            "loss_fn"
        )
    metrics = as_metrics(returned, f"eval_fn of {name}")
    known = [part for m in program.metrics.values() for part in (m.value, m.update)]
    for index, metric in enumerate(metrics):
        parts = metric if isinstance(metric, (tuple, list)) else [metric]
        if any(part is held for part in parts for held in known):
            continue  # the user added it under a name of its own
        if isinstance(metric, tf.Operation):
            program.extra_ops.append(metric)
        elif parts[0].shape.rank:
            # A layer's output, say, that the function also sent: to log a whole batch would help nobody.
            program.extra_ops.extend(parts)
            if not model._is_driven_by_peer(scope, metric):
                _log.warning(
                    "eval_fn of %s returned a tensor of shape %s: only scalars are logged; add_metric names others",
                    name,
                    parts[0].shape,
                )
        else:
            label = "eval" if len(metrics) == 1 else f"eval_{index}"
            program.metrics.setdefault(label, Metric.parse(label, metric))
    exchange = model._exchange_ops(scope, program.sample)
    program.set_op(tf.group(*exchange, *program.step_ops(), name=_op_name("eval", scope)))


class _metric_variables:
    """Collects the metric variables that are made inside the block."""

    def __init__(self, program: Program) -> None:
        self._program = program

    def __enter__(self) -> None:
        self._before = set(tf.get_collection(tf.GraphKeys.METRIC_VARIABLES))

    def __exit__(self, *exc: object) -> None:
        made = [v for v in tf.get_collection(tf.GraphKeys.METRIC_VARIABLES) if v not in self._before]
        self._program.metric_variables = made
        self._program.metrics_initializer = tf.variables_initializer(made)


def _read(model: Model, scope: TaskScope) -> Sample:
    assert scope.mode is not None
    what = f"input_fn of {'the model' if scope.task is None else f'task {scope.task!r}'} for {scope.mode.name}"
    sample = _call(model._input_fns[scope.task], what, model, scope.mode)
    if not isinstance(sample, Sample):
        raise ModelError(
            f"{what} returned a {type(sample).__name__}: expected an efl.Sample or efl.FederalSample"
            + (" (the task has an eval_fn, so there must be input for it)" if scope.mode is MODE.EVAL else "")
        )
    return sample


def _call(function: Callable[..., Any], what: str, *arguments: Any) -> Any:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        expected = {"input_fn": "(model, mode)", "loss_fn": "(model, sample)", "eval_fn": "(model, sample)"}
        raise ModelError(
            f"{what} is called with {expected.get(what.split()[0], '(model, task)')}, which it does not take: {error}"
        ) from None
    except ValueError:
        pass  # a callable without a signature
    try:
        return function(*arguments)
    except (ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, AttributeError) and str(error) in _DIMENSIONS:
            raise ModelError(
                f"{what} ({last_user_line(error)}): {error}. Sizes in a shape are numbers or None, also after "
                "tf.disable_v2_behavior(): write tensor.shape[1] for tensor.shape[1].value"
            ) from error
        if isinstance(error, EflError) or not any(words in str(error) for words in _EAGER):
            raise
        raise eager_error(f"{what} ({last_user_line(error)})") from error


def _assignments(model: Model, scope: TaskScope, name: str) -> dict[Any, tuple[list[tf.Variable], str | None]]:
    function = model._opt_fns.get(scope.task)
    if function is None:
        return {}
    returned = _call(function, f"optimizer_fn of {name}", model, scope.task)
    if not isinstance(returned, Mapping):
        raise ModelError(
            f"optimizer_fn of {name} returned a {type(returned).__name__}: expected {{optimizer: (variables, scope)}}, "
            "as efl.optimizer_fn.optimizer_setter makes it"
        )
    result = {}
    for optimizer, assigned in returned.items():
        if not (isinstance(assigned, (tuple, list)) and len(assigned) == 2):
            raise ModelError(f"optimizer_fn of {name}: {assigned!r:.100} is not a (variables, scope) pair")
        if isinstance(optimizer, tf.train.SyncReplicasOptimizer):
            raise ModelError(f"optimizer_fn of {name}: SyncReplicasOptimizer needs several workers, which efl has not")
        result[optimizer] = (list(assigned[0]), assigned[1])
    counts = Counter(v.ref() for held, _ in result.values() for v in held)
    twice = [ref.deref().op.name for ref, count in counts.items() if count > 1]
    if twice:
        raise ModelError(
            f"optimizer_fn of {name} gives {', '.join(twice[:5])} to more than one optimizer, or twice: each would be "
            "applied in every step, in no order. Give each variable to one (scope_optimizer does, by scopes)"
        )
    if not any(held for held, _ in result.values()):
        if (
            any(map(gradients.is_private, result))
            and model._received(scope)
            and model._opt_config.backend_mode == "noise"
        ):
            raise ModelError(
                f"{name} has a private optimizer and no variables to train, so it makes no private step, and the "
                "gradients that it returns would have no noise. Give this party a layer of its own (a scale or a bias "
                "will do), or set opt_config={'BACKEND_MODE': 'unnoise'}, and know that they are exact"
            )
        return {}
    return result


def _note_batch(scope: TaskScope, sample: Sample) -> None:
    """Keeps all that a batch consists of, for who has to know whether a step is about the same rows."""
    places = [feature.indices for feature in sample.features.values() if isinstance(feature, tf.SparseTensor)]
    for tensor in [*feature_tensors(sample), *places]:
        tf.add_to_collection(batch_collection(scope.wire), tensor)


def _op_name(what: str, scope: TaskScope) -> str:
    return f"efl_{what}_op" if scope.task is None else f"efl_{what}_op/{scope.task}"
