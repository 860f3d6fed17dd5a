"""Differentially private optimizers: DP-SGD for any optimizer of ``tf.train``.

    model.optimizer_fn(efl.optimizer_fn.optimizer_setter(
        efl.DPAdamGaussianOptimizer(l2_norm_clip=1.0, noise_multiplier=1.1, learning_rate=0.01)))

They take a *vector* of losses, one for each row of the batch, clip what each row (or micro-batch) contributes to the
gradient, add the contributions, and add Gaussian noise to the sum (Abadi et al., 2016, arXiv:1607.00133, algorithm 1).
Names and arguments are those of tensorflow-privacy; how the gradients are computed is not (see ``per_example``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import tensorflow.compat.v1 as tf

from efl._gradients import finished
from efl._program import ancestors
from efl.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from efl.privacy._private_step import NoiseSource

__all__ = [
    "DPAdagradGaussianOptimizer",
    "DPAdagradOptimizer",
    "DPAdamGaussianOptimizer",
    "DPAdamOptimizer",
    "DPGradientDescentGaussianOptimizer",
    "DPGradientDescentOptimizer",
    "GaussianOptimizer",
    "PrivateOptimizer",
    "QueryOptimizer",
    "make_gaussian_optimizer_class",
    "make_optimizer_class",
]


class PrivateOptimizer:
    """What all private optimizers have in common; mixed into a subclass of ``tf.train.Optimizer``.

    Attributes:
      reads_backend_mode: It reads ``BACKEND_MODE`` of ``opt_config``.
      dp_sum_query: The mechanism, where it is not the Gaussian one.
      l2_norm_clip: The largest norm that one example, or one micro-batch, contributes; None with another mechanism.
      noise_multiplier: Standard deviation of the noise on the sum, in units of ``l2_norm_clip``.
      num_microbatches: Into how many parts of equal size a batch is cut, each clipped as one; None: one for each row.
      made: The ops by which a model's step computes and applies gradients.
    """

    reads_backend_mode: ClassVar[bool] = True
    dp_sum_query: Any = None
    l2_norm_clip: float | None = None
    noise_multiplier: float | None = None
    num_microbatches: int | None = None
    made: frozenset[tf.Operation] = frozenset()
    _for_model = False

    def compute_gradients(
        self,
        loss: tf.Tensor,
        var_list: Sequence[tf.Variable] | None = None,
        gate_gradients: int = 1,
        aggregation_method: Any = None,
        colocate_gradients_with_ops: bool = False,
        grad_loss: tf.Tensor | None = None,
    ) -> list[tuple[tf.Tensor, tf.Variable]]:
        """The private gradient, for use without a model of efl; ``minimize`` calls it.

        Args:
          loss: Vector, one value for each row of the batch.
          var_list: Variables to train; default: all trainable ones.
          gate_gradients: Has no effect: all gradients are finished before any is applied.
          aggregation_method: Has no effect.
          colocate_gradients_with_ops: Has no effect.
          grad_loss: Must be None.

        Returns:
          (gradient, variable) pairs: clipped, summed, noised, divided by the number of micro-batches. The noise has a
          fresh secret seed in this process, and nothing is entered in a ledger: count the steps yourself
          (``efl.privacy.compute_dp_sgd_privacy``).

        Raises:
          ModelError: The loss is no vector, or an example's loss depends on other examples.
        """
        from efl.privacy import _private_step

        if grad_loss is not None:
            raise ModelError("grad_loss of a private optimizer: expected None; weigh the loss vector itself instead")
        variables = list(var_list) if var_list is not None else tf.trainable_variables()
        return _private_step.gradients_alone(self, loss, variables)

    def apply_gradients(
        self, grads_and_vars: Iterable[tuple[Any, tf.Variable]], global_step: Any = None, name: str | None = None
    ) -> tf.Operation:
        """Applies gradients as the base class does, and updates of rows as they are; see ``efl.privacy._deferred``.

        Raises:
          ModelError: The learning rate, or another number of the optimizer, is computed from rows of the batch.
        """
        pairs = list(grads_and_vars)
        rows = [gradient for gradient, _ in pairs if hasattr(gradient, "add_to_table")]
        if not rows:
            return self._applied(pairs, global_step, name)
        rest = [pair for pair in pairs if not hasattr(pair[0], "add_to_table")]
        with self.making():
            done = [gradient.add_to_table() for gradient in rows]
        if rest:
            done.append(self._applied(rest))
        if global_step is None:
            return tf.group(*done, name=name)
        with tf.control_dependencies(done):
            return tf.assign_add(global_step, 1, name=name)

    def _applied(
        self, pairs: Sequence[tuple[Any, tf.Variable]], global_step: Any = None, name: str | None = None
    ) -> tf.Operation:
        from efl.privacy import _moved

        with self.making() as made:
            applied = super().apply_gradients(pairs, global_step, name)  # type: ignore[misc]  # of the class mixed with
        updates = made & set(ancestors(applied if isinstance(applied, tf.Operation) else applied.op))
        numbers = [tensor for op in updates for tensor in op.inputs if tensor.op not in made]
        _moved.refuse_rows(self, numbers, [tensor for gradient, _ in pairs for tensor in finished(gradient)])
        return applied

    @contextmanager
    def making(self) -> Iterator[set[tf.Operation]]:
        """Notes in ``made`` the ops that are made inside; gives the set of these, empty until the end."""
        graph, new = tf.get_default_graph(), set[tf.Operation]()
        before = len(graph.get_operations())
        yield new
        new.update(graph.get_operations()[before:])
        if self._for_model:
            self.made |= new

    @contextmanager
    def trusted(self) -> Iterator[None]:
        """What is made inside is made by a model for its step, and so on gradients that are private and counted.

        What a user lets the optimizer apply beside it need not be.
        """
        self._for_model = True
        try:
            yield
        finally:
            self._for_model = False

    def noise_source(self) -> NoiseSource:
        """Where noise comes from when the optimizer is used without a model: a seed of its own, and fresh each time."""
        from efl.privacy import _private_step

        if not hasattr(self, "_own_noise"):
            self._own_noise = _private_step.FreshNoise()
        return self._own_noise


class GaussianOptimizer(PrivateOptimizer):
    """Mixed into a subclass of ``tf.train.Optimizer``: DP-SGD with Gaussian noise.

    Args:
      l2_norm_clip: The largest Euclidean norm that one row, or one micro-batch, contributes to the sum of gradients.
      noise_multiplier: Standard deviation of the noise on that sum, in units of ``l2_norm_clip``; 0 clips only, and
        protects nobody.
      num_microbatches: Into how many parts of equal size a batch is cut; each is reduced (``REDUCE`` of ``opt_config``)
        and clipped as one. None: each row is. Fewer than rows makes the noise larger beside the signal.
      unroll_microbatches: Accepted for tensorflow-privacy's sake; changes nothing.
      *args: For the optimizer's own class.
      **kwargs: For the optimizer's own class.

    Raises:
      ConfigError: An argument that cannot be.
    """

    def __init__(
        self,
        l2_norm_clip: float,
        noise_multiplier: float,
        num_microbatches: int | None = None,
        unroll_microbatches: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.l2_norm_clip = checked_number("l2_norm_clip", l2_norm_clip, 0.0, may_be_least=False)
        self.noise_multiplier = checked_number("noise_multiplier", noise_multiplier, 0.0, may_be_least=True)
        self.num_microbatches = _microbatches(num_microbatches)
        _check_rate(super().__init__, args, kwargs)
        super().__init__(*args, **kwargs)


class QueryOptimizer(PrivateOptimizer):
    """Mixed into a subclass of ``tf.train.Optimizer``: a mechanism of one's own.

    Args:
      dp_sum_query: A ``DPQuery`` of tensorflow-privacy that sums records, or what has its interface. Its noise is its
        own: efl neither keys nor counts it, unless it is a ``GaussianSumQuery``, which is as good and as fast as the
        Gaussian classes. Any other is handed the gradients of one micro-batch after the other.
      num_microbatches: Into how many parts of equal size a batch is cut, each a record; None: each row is.
      unroll_microbatches: Accepted for tensorflow-privacy's sake; changes nothing.
      *args: For the optimizer's own class.
      **kwargs: For the optimizer's own class.

    Raises:
      ConfigError: An argument that cannot be.
    """

    def __init__(
        self,
        dp_sum_query: Any,
        num_microbatches: int | None = None,
        unroll_microbatches: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        missing = [name for name in _QUERY_METHODS if not callable(getattr(dp_sum_query, name, None))]
        if missing:
            raise ConfigError(
                f"dp_sum_query={dp_sum_query!r:.100} has no {', '.join(missing)}: expected a DPQuery that sums, such "
                "as tensorflow_privacy.GaussianSumQuery(l2_norm_clip, stddev)"
            )
        self.dp_sum_query, self.num_microbatches = dp_sum_query, _microbatches(num_microbatches)
        gaussian = _as_gaussian(dp_sum_query)
        if gaussian is not None:
            self.l2_norm_clip, self.noise_multiplier = gaussian
        _check_rate(super().__init__, args, kwargs)
        super().__init__(*args, **kwargs)


_QUERY_METHODS = (
    "initial_global_state",
    "derive_sample_params",
    "initial_sample_state",
    "accumulate_record",
    "get_noised_result",
)


def _as_gaussian(query: Any) -> tuple[float, float] | None:
    """(clip, multiplier) of tensorflow-privacy's Gaussian query; None of any other, a subclass of it too."""
    if (type(query).__name__, type(query).__module__.split(".")[0]) != ("GaussianSumQuery", "tensorflow_privacy"):
        return None
    clip, deviation = (float(getattr(query, name)) for name in ("_l2_norm_clip", "_stddev"))
    return (clip, deviation / clip) if clip > 0 else None


def _check_rate(make: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses a learning rate that is none, of what the optimizer's own class is given.

    Raises:
      ConfigError: It is given, no number of at least 0, and neither a tensor nor a function.
    """
    try:
        given = inspect.signature(make).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # the class itself says what it expects
        return
    if "learning_rate" not in given:
        return
    rate = given["learning_rate"]
    if not (callable(rate) or tf.is_tensor(rate) or isinstance(rate, tf.Variable)):
        checked_number("learning_rate", rate, 0.0, may_be_least=True)


def _microbatches(count: Any) -> int | None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConfigError(f"num_microbatches={count!r}: expected a positive number of micro-batches, or None")
    return count


def checked_number(name: str, value: Any, least: float, may_be_least: bool) -> float:
    """A finite number above ``least``, or equal to it where that is allowed.

    Raises:
      ConfigError: It is none.
    """
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < least or (number == least and not may_be_least):
        raise ConfigError(f"{name}={value!r}: expected a number {'of at least' if may_be_least else 'above'} {least:g}")
    return number


def make_gaussian_optimizer_class(cls: type) -> type:
    """Makes a private subclass, with Gaussian noise, of an optimizer class.

    Args:
      cls: A subclass of ``tf.train.Optimizer`` that does not override ``compute_gradients``.

    Returns:
      A class that takes the arguments of ``GaussianOptimizer``, then those of ``cls``.

    Raises:
      ConfigError: ``cls`` is no such class.
    """
    _check_base(cls)
    return _made(f"DP{cls.__name__.removesuffix('Optimizer')}GaussianOptimizer", GaussianOptimizer, cls)


def make_optimizer_class(cls: type) -> type:
    """Makes a private subclass of an optimizer class that takes any mechanism.

    Args:
      cls: A subclass of ``tf.train.Optimizer`` that does not override ``compute_gradients``.

    Returns:
      A class that takes the arguments of ``QueryOptimizer``, then those of ``cls``.

    Raises:
      ConfigError: ``cls`` is no such class.
    """
    _check_base(cls)
    return _made(f"DP{cls.__name__}", QueryOptimizer, cls)


def _check_base(cls: Any) -> None:
    if not (isinstance(cls, type) and issubclass(cls, tf.train.Optimizer)):
        raise ConfigError(
            f"{cls!r:.100} is no optimizer class of tf.train: expected a class such as "
            "tf.compat.v1.train.GradientDescentOptimizer"
        )
    if issubclass(cls, PrivateOptimizer):
        raise ConfigError(f"{cls.__name__} is private already")
    base: Any = cls
    if base.compute_gradients is not tf.train.Optimizer.compute_gradients:
        raise ConfigError(
            f"{cls.__name__} computes gradients in a way of its own, which would see those of single rows: a private "
            "optimizer can only be made of one that takes gradients as they are"
        )


def _made(name: str, mixin: type, base: type) -> type:
    doc = f"``{base.__name__}`` made private; see ``efl.privacy.optimizers.{mixin.__name__}`` for its first arguments."
    return type(name, (mixin, base), {"__doc__": doc, "__module__": __name__})


class DPGradientDescentGaussianOptimizer(GaussianOptimizer, tf.train.GradientDescentOptimizer):
    """DP-SGD with Gaussian noise; further arguments: ``learning_rate``."""


class DPAdamGaussianOptimizer(GaussianOptimizer, tf.train.AdamOptimizer):
    """Adam on gradients made private with Gaussian noise; further arguments are ``tf.train.AdamOptimizer``'s."""


class DPAdagradGaussianOptimizer(GaussianOptimizer, tf.train.AdagradOptimizer):
    """Adagrad on gradients made private with Gaussian noise; further arguments are ``tf.train.AdagradOptimizer``'s."""


class DPGradientDescentOptimizer(QueryOptimizer, tf.train.GradientDescentOptimizer):
    """Gradient descent with a mechanism of one's own; further arguments: ``learning_rate``."""


class DPAdamOptimizer(QueryOptimizer, tf.train.AdamOptimizer):
    """Adam with a mechanism of one's own; further arguments are ``tf.train.AdamOptimizer``'s."""


class DPAdagradOptimizer(QueryOptimizer, tf.train.AdagradOptimizer):
    """Adagrad with a mechanism of one's own; further arguments are ``tf.train.AdagradOptimizer``'s."""
