"""One backward pass for everything, then norms and weighted sums of per-example gradients ("book-keeping").

Sources: Goodfellow (arXiv:1510.01799), Li et al. (arXiv:2110.05679), Bu et al. (arXiv:2210.00038).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import tensorflow.compat.v1 as tf

from efl.errors import ModelError
from efl.privacy.per_example import parts, portions, rules
from efl.privacy.per_example.groups import Groups
from efl.privacy.per_example.layouts.layout import Mixed, Ragged, Rows, Shared
from efl.privacy.per_example.layouts.walk import Expectation, Walk
from efl.privacy.per_example.uses import Meeting, examples_of, meetings, source

_log = logging.getLogger("efl")


@dataclass(frozen=True)
class Objective:
    """What is differentiated: ``loss[i] + sum over s of <tensor_s[i], gradient_s[i]>`` for each example i.

    Attributes:
      loss: ``[B]`` or ``[B, 1]``, or None where only the peer's gradients drive.
      sent: (name, tensor, gradient) of tensors ``[B, …]`` whose gradient the peer returns.
      received: (name, tensor) of tensors ``[B, …]`` whose gradient goes back.
      where: What the loss is of, for messages.
      weights: ``[B]``, by what each loss is multiplied; None: by one.
      sampled: Whether the rows are a Poisson sample, so that how many there are is no public number.
    """

    loss: tf.Tensor | None
    sent: Sequence[tuple[str, tf.Tensor, tf.Tensor]] = ()
    received: Sequence[tuple[str, tf.Tensor]] = ()
    where: str = "the loss"
    weights: tf.Tensor | None = None
    sampled: bool = False


@dataclass(frozen=True)
class _Detour:
    """No rule covers the variable: its op's own gradient, once for each example."""

    why: str


@dataclass(frozen=True)
class _Plan:
    uses: list[rules.Use]
    parts: list[parts.Part] | _Detour
    product: tf.Tensor | None = None  # [M, …] that was made for the norm and serves the sum too
    direct: bool = True


@dataclass(frozen=True)
class _Portions:
    """Made of some examples at a time, or of all of them once somebody asks."""

    uses: list[rules.Use]
    part: parts.Rowwise


@dataclass
class PerExample:
    """The gradients of an objective, by what is clipped as one (M groups of ``rows`` rows).

    Attributes:
      groups: How rows are grouped.
      received: Gradient of each received tensor, row i being that of example i's own objective.
      variables: Those that the objective depends on.
    """

    groups: Groups
    received: list[tf.Tensor]
    variables: list[tf.Variable]
    _plans: dict[object, _Plan | _Portions] = field(default_factory=dict)
    _outputs: list[tf.Tensor] = field(default_factory=list)
    _deltas: list[tf.Tensor] = field(default_factory=list)
    _ys: list[tf.Tensor] = field(default_factory=list)
    _grad_ys: list[tf.Tensor] = field(default_factory=list)

    def clipped(
        self, variables: Sequence[tf.Variable], weigh: Callable[[tf.Tensor], tf.Tensor], rows: int | None = None
    ) -> tuple[tf.Tensor, list[tf.Tensor | tf.IndexedSlices]]:
        """Sums over groups of weights times gradients, where the weights follow from the norms over all variables.

        What takes much memory for each example is made for some examples at a time.

        Args:
          variables: One clipping group.
          weigh: From squared norms ``[m]``, float32, the weights ``[m]``; each must depend on its own norm alone.
          rows: How many rows a batch usually has, where that is known.

        Returns:
          The squared norms ``[M]``, and the sums as ``weighted_sum`` gives them.
        """
        plans = {v.ref(): self._plans[v.ref()] for v in variables}
        large = {ref: plan.part for ref, plan in plans.items() if isinstance(plan, _Portions)}
        size = self.groups.walk.static_size or rows
        portion = portions.rows_at_once(list(large.values()))
        if not large or (size is not None and size <= portion):
            squares = _added(self.squared_norms(variables))
            weights = weigh(squares)
            return squares, [self.weighted_sum(v, weights) for v in variables]
        others = self.squared_norms([v for v in variables if v.ref() not in large])
        squares, weights, sums = portions.clipped(
            list(large.values()), _added(others) if others else None, weigh, portion, self.groups.count
        )
        found = dict(zip(large, sums))
        return squares, [
            tf.reshape(found[v.ref()], v.shape) if v.ref() in large else self.weighted_sum(v, weights)
            for v in variables
        ]

    def _whole(self, variable: tf.Variable) -> _Plan:
        plan = self._plans[variable.ref()]
        if isinstance(plan, _Portions):
            part = plan.part.whole()
            product = part.product if isinstance(part, parts.Outer) else None
            plan = self._plans[variable.ref()] = _Plan(plan.uses, [part], product)
        return plan

    def squared_norm(self, variable: tf.Variable) -> tf.Tensor:
        """``[M]``: the squared norm of each group's gradient with respect to a variable."""
        plan = self._whole(variable)
        if isinstance(plan.parts, _Detour):
            return self._norms_by_detour(variable, plan)
        if plan.product is not None:
            return parts.sum_of_squares(plan.product, [1, 2])
        return parts.squared_norms(plan.parts)

    def squared_norms(self, variables: Sequence[tf.Variable]) -> list[tf.Tensor]:
        """``[M]`` each: squared norms whose sum is that of each group's gradient with respect to all variables."""
        alike: dict[tuple[int, tf.DType], list[tuple[parts.Lookup, int]]] = {}
        norms = []
        for variable in variables:
            plan = self._whole(variable)
            part = plan.parts[0] if isinstance(plan.parts, list) and len(plan.parts) == 1 else None
            shape = variable.shape
            table = shape.rank == 2 and shape.is_fully_defined()
            # A table that is read in another form has other rows.
            if table and isinstance(part, parts.Lookup) and not part.one_each and part.d.shape[1] == shape[1]:
                alike.setdefault((int(shape[1]), part.d.dtype), []).append((part, int(shape[0])))
            else:
                norms.append(self.squared_norm(variable))
        return norms + [parts.square_of_tables(*zip(*held)) for held in alike.values()]

    def weighted_sum(self, variable: tf.Variable, weights: tf.Tensor) -> tf.Tensor | tf.IndexedSlices:
        """The sum over groups of ``weights[i]`` times the gradient; its type is that of the ordinary gradient."""
        plan = self._whole(variable)
        weights = tf.cast(weights, variable.dtype.base_dtype)
        if plan.product is not None:
            total = tf.tensordot(weights, plan.product, 1)  # [N, K]
            return tf.reshape(tf.transpose(total), variable.shape)
        if plan.parts and isinstance(plan.parts, list) and plan.direct and len(plan.parts) == 1:
            part = plan.parts[0]
            if isinstance(part, parts.Product):
                total = tf.tensordot(weights, part.g, 1)  # [K, N], its rows in an order of their own
                return tf.reshape(tf.gather(total, part.rows), variable.shape)
            if isinstance(part, parts.Whole):
                return tf.reshape(tf.linalg.matvec(part.g, weights, transpose_a=True), variable.shape)
        return self._pulled_back(variable, plan, weights)

    def _pulled_back(self, variable: tf.Variable, plan: _Plan, weights: tf.Tensor) -> tf.Tensor | tf.IndexedSlices:
        walk, total = self.groups.walk, []
        # An op that reads the variable twice has one gradient with respect to it.
        for use in {use.output.ref(): use for use in plan.uses}.values():
            spread = self.groups.spread(weights, use.output, walk.layout(use.output))
            scaled = use.delta * tf.cast(spread, use.delta.dtype)
            held = examples_of(use.op, walk)
            gradient = tf.gradients(use.output, source(variable), grad_ys=scaled, stop_gradients=held)[0]
            if gradient is not None:
                total.append(gradient)
        if not total:
            return tf.zeros(variable.shape, variable.dtype.base_dtype)
        if len(total) == 1:
            return total[0]
        if all(isinstance(g, tf.IndexedSlices) for g in total):
            values, indices = (tf.concat([getattr(g, name) for g in total], 0) for name in ("values", "indices"))
            return tf.IndexedSlices(values, indices, total[0].dense_shape)
        return tf.add_n([tf.convert_to_tensor(g) for g in total])

    def _norms_by_detour(self, variable: tf.Variable, plan: _Plan) -> tf.Tensor:
        count = tf.cast(self.groups.count, tf.int32)

        def one(i: tf.Tensor, norms: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            alone = tf.one_hot(i, count, dtype=plan.uses[0].delta.dtype)
            gradient = tf.convert_to_tensor(self._pulled_back(variable, plan, alone))
            return i + 1, norms.write(i, tf.reduce_sum(tf.square(gradient)))

        norms = tf.TensorArray(variable.dtype.base_dtype, count)
        _, norms = tf.while_loop(lambda i, _: i < count, one, [tf.constant(0), norms], parallel_iterations=1)
        return tf.ensure_shape(norms.stack(), [None])

    def experiment(self, wanted: tf.Tensor) -> tf.Tensor:
        """Repeats the backward pass with random weights for the examples, where ``wanted`` holds.

        Args:
          wanted: Scalar bool.

        Returns:
          Scalar float32: the largest deviation, relative to the largest gradient, from what independent examples give;
          0 where it was not wanted (and then costs nothing).
        """
        walk = self.groups.walk
        alone = Groups(walk, 1, walk.size)
        # What an untaken branch of a Switch feeds is never computed: neither weights nor the backward pass behind them.
        skipped, size = tf.raw_ops.Switch(data=tf.cast(walk.size, tf.int32), pred=wanted)
        taken = tf.ensure_shape(tf.random.uniform(size[tf.newaxis], -1.5, 1.5), [walk.static_size])
        grads = [g * tf.cast(alone.spread(taken, g, Rows(0)), g.dtype) for g in self._grad_ys]
        again = tf.gradients(self._ys, self._outputs, grad_ys=grads)
        worst = [tf.zeros([])]
        for output, delta, other in zip(self._outputs, self._deltas, again, strict=True):
            expected = delta * tf.cast(alone.spread(taken, delta, walk.layout(output)), delta.dtype)
            largest = tf.reduce_max(tf.abs(tf.cast(expected, tf.float32)))
            off = tf.reduce_max(tf.abs(tf.cast(other - expected, tf.float32)))
            worst.append(off / tf.maximum(largest, 1e-30))
        return tf.raw_ops.Merge(inputs=[tf.reduce_max(worst), 0.0 * tf.cast(skipped, tf.float32)])[0]


def _added(squares: Sequence[tf.Tensor]) -> tf.Tensor:
    return tf.add_n([tf.cast(each, tf.float32) for each in squares])


def check(objective: Objective) -> list[Expectation]:
    """Raises ``ModelError`` where an example's loss is not known to depend on that example alone.

    Returns:
      What has to hold at run time for that to be right.
    """
    walk, _, _ = _walk(objective)
    return walk.expectations


def _walk(objective: Objective) -> tuple[Walk, list[tf.Tensor], tf.Tensor | None]:
    """The layouts below an objective, its targets, and its loss as a vector."""
    loss = None if objective.loss is None else as_vector(objective.loss, objective.where)
    named = [] if loss is None else [(objective.where, loss)]
    named += [(f"the sent tensor {name!r}", tensor) for name, tensor, _ in objective.sent]
    targets = [tensor for _, tensor in named]
    walk = Walk(targets, [tensor for _, tensor in objective.received], objective.sampled)
    for what, tensor in named:
        _check_target(what, tensor, walk)
    return walk, targets, loss


def differentiate(objective: Objective, variables: Sequence[tf.Variable], rows: int = 1) -> PerExample:
    """Builds the backward pass of an objective.

    Args:
      objective: What to differentiate.
      variables: Trainable variables.
      rows: How many rows of the batch are clipped as one.

    Returns:
      Its gradients by group; of variables that it does not depend on there is none.

    Raises:
      ModelError: An example's loss depends on other examples, or may do so for all that is known; the message names the
        op. Or the loss has not one value for each example, an op has a gradient of the user's own, or a variable meets
        examples as complex numbers.
    """
    walk, targets, loss = _walk(objective)
    groups = Groups.of(walk, rows, objective.where)
    grad_ys = []
    if loss is not None:
        grad_ys.append(tf.ones_like(loss) if objective.weights is None else objective.weights)
    grad_ys += [gradient for _, _, gradient in objective.sent]
    found = {v.ref(): meetings(v, walk) for v in variables}
    outputs = _outputs([meeting for met in found.values() for meeting in met], walk)
    received = [tensor for _, tensor in objective.received]
    gradients = tf.gradients(targets, [*outputs, *received], grad_ys=grad_ys)
    deltas = {o.ref(): g for o, g in zip(outputs, gradients) if g is not None}
    back = [tf.zeros_like(t) if g is None else g for t, g in zip(received, gradients[len(outputs) :])]
    kept = [o for o in outputs if o.ref() in deltas]
    result = PerExample(
        groups, back, [], {}, kept, [tf.convert_to_tensor(deltas[o.ref()]) for o in kept], targets, grad_ys
    )
    for variable in variables:
        plan = _plan(variable, found[variable.ref()], deltas, groups)
        if plan is not None:
            result.variables.append(variable)
            result._plans[variable.ref()] = plan
    return result


def as_vector(loss: tf.Tensor, where: str) -> tf.Tensor:
    """A loss as ``[B]``.

    Raises:
      ModelError: It is neither ``[B]`` nor ``[B, 1]``.
    """
    if loss.shape.rank == 2 and loss.shape[1] == 1:
        return tf.squeeze(loss, [1])
    if loss.shape.rank != 1:
        raise ModelError(
            f"{where} has the shape {loss.shape}: a private optimizer clips what each row contributes, so it needs a "
            "vector with one value for each row of the batch. Do not reduce it over the batch (REDUCE of opt_config "
            "does that, inside a micro-batch); reduce other axes with tf.reduce_mean(loss, axis=[1, …]). A party "
            "without a loss of its own returns the very tensor that it handed to send(), or None"
        )
    return loss


def _check_target(what: str, tensor: tf.Tensor, walk: Walk) -> None:
    layout = walk.layout(tensor)
    if isinstance(layout, Mixed):
        raise ModelError(
            f"{what}: what it is for one row of the batch depends on other rows, so clipping would not bound what one "
            f"row can do to the weights. {layout.op.name!r} ({layout.op.type}): {layout.why}"
        )
    if isinstance(layout, Shared):
        raise ModelError(f"{what} depends on no row of the batch: expected one value for each row of the input")
    if isinstance(layout, Rows) and layout.axis == 0 and layout.before == 1 and layout.within is None:
        walk.expect_rows(tensor, what)
    elif not (isinstance(layout, Rows) and layout.axis == 0 and layout.plain):
        raise ModelError(f"{what} has not one value, or one row of values, for each row of the batch on its first axis")


def _outputs(found: Sequence[Meeting], walk: Walk) -> list[tf.Tensor]:
    """The outputs of the ops that read variables, each once."""
    unique: dict[object, tf.Tensor] = {}
    for meeting in found:
        for out in meeting.op.outputs:
            has_gradient = out.dtype.is_floating or out.dtype.is_complex
            if has_gradient and isinstance(walk.layout(out), (Rows, Ragged)):
                unique.setdefault(out.ref(), out)
    return list(unique.values())


def _plan(
    variable: tf.Variable, found: Sequence[Meeting], deltas: dict[object, tf.Tensor], groups: Groups
) -> _Plan | _Portions | None:
    uses: list[rules.Use] = []
    factors: list[parts.Part | None] = []
    direct = True
    for meeting in found:
        for out in meeting.op.outputs:
            delta = deltas.get(out.ref())
            if delta is None:
                continue
            _check_real(variable, meeting, out)
            use = rules.Use(
                meeting.op, meeting.index, out, tf.convert_to_tensor(delta), meeting.direct and len(found) == 1
            )
            uses.append(use)
            direct = direct and meeting.direct
            part = _part(variable, meeting, use, groups)
            if isinstance(part, parts.Rowwise):
                return _Portions(uses, part)
            factors.append(part)
    if not uses:
        return None
    whole = [part for part in factors if part is not None]
    together = parts.joined(whole) if len(whole) == len(factors) else None
    if together is None:
        without = [u.op for u, part in zip(uses, factors) if part is None] or [u.op for u in uses]
        why = ", ".join(f"{op.name!r} ({op.type})" for op in without[:3])
        _log.warning(
            "%s: there is no fast rule for how %s read%s it: its norms take the gradient of that op once for each row "
            "of the batch (exact, but as slow as the batch is long)",
            variable.op.name,
            why,
            "s" if len(without) == 1 else "",
        )
        return _Plan(uses, _Detour(why), direct=direct)
    product = None
    if len(together) == 1 and isinstance(together[0], parts.Outer) and direct:
        part = together[0]
        if part.a.shape[1] != 1 and part.is_product_cheaper:
            product = part.product
    return _Plan(uses, together, product, direct)


_HALF = (tf.float16, tf.bfloat16)


def _check_real(variable: tf.Variable, meeting: Meeting, output: tf.Tensor) -> None:
    if meeting.op.inputs[meeting.index].dtype in _HALF or output.dtype in _HALF:
        raise ModelError(
            f"{variable.op.name}: {meeting.op.name!r} ({meeting.op.type}) computes with it in half precision, where "
            "the sum over the rows of a batch is rounded, by more than a row may change, before noise is added: cast "
            "to float32 where a variable meets rows"
        )
    if variable.dtype.is_complex or meeting.op.inputs[meeting.index].dtype.is_complex or output.dtype.is_complex:
        raise ModelError(
            f"{variable.op.name}: {meeting.op.name!r} ({meeting.op.type}) makes complex numbers of it and of rows, and "
            "norms of gradients are taken of real ones only: keep real and imaginary parts apart (tf.math.real, "
            "tf.math.imag) where a variable meets rows"
        )


def _part(variable: tf.Variable, meeting: Meeting, use: rules.Use, groups: Groups) -> parts.Part | parts.Rowwise | None:
    if meeting.direct:
        return rules.part_of(use, groups)
    read = meeting.op.inputs[meeting.index]
    if read.shape.num_elements() != 1 and not meeting.diagonal:
        return None
    part = rules.part_of(use, groups)
    assert not isinstance(part, parts.Rowwise)  # only of a variable that one op reads, as it is
    if meeting.diagonal and not isinstance(part, parts.Direction):
        slope = tf.gradients(read, source(variable))[0]
        return None if part is None or slope is None else _times(part, tf.reshape(tf.convert_to_tensor(slope), [-1]))
    along = tf.gradients(read, source(variable))[0]
    if not isinstance(part, parts.Direction) or along is None:
        return None
    return parts.Direction(part.scale, tf.reshape(tf.convert_to_tensor(along), [-1]))


def _times(part: parts.Part, slope: tf.Tensor) -> parts.Part | None:
    """A part, number by number times ``[n]``: the variable goes through a function of each number before it is read."""
    if isinstance(part, parts.Whole):
        return parts.Whole(part.g * slope)
    if isinstance(part, parts.Lookup):
        width = part.d.shape[1] if part.d.shape[1] is not None else tf.shape(part.d)[1]
        d = part.d * tf.gather(tf.reshape(slope, [-1, width]), part.ids)
        return parts.Lookup(part.ids, part.owner, d, part.count, part.one_each)
    if isinstance(part, parts.Outer):
        k, n = tf.shape(part.a)[2], tf.shape(part.d)[2]
        if part.a.shape[1] == 1:
            return parts.Masked(part.a[:, 0], part.d[:, 0], tf.reshape(slope, [k, n]))
        if part.is_product_cheaper:
            return parts.Whole(tf.reshape(tf.transpose(part.product, [0, 2, 1]), [-1, k * n]) * slope)
    return None
