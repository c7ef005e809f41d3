"""RangeRegularizer: which weights of a model, their M or temperature, the strength; a loss or in-place gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from r2_kernels import ops
from r2_kernels.carried_statistics import CarriedStatistics, merge
from r2_kernels.distributed import check_gradient, check_shards, whole
from r2_kernels.granularity import (
    PER_TENSOR,
    Granularity,
    counts_of,
    group_size_of,
    in_segments,
    over_segments,
    summed_by_weight,
)
from r2_kernels.layout import overlaps_itself
from r2_kernels.penalties import by_name
from r2_kernels.report import Report, layer_report
from r2_kernels.schedule import Schedule
from r2_kernels.validation import check_parameter, check_weights, value_dtype

Selection = Callable[[str, Tensor], bool] | str | Sequence[str]
Strength = float | Tensor | Sequence[float] | Callable[[int], float]


class _Layer(NamedTuple):
    """Where a weight is found at each step: parameters and modules may be replaced, so none is kept but the root."""

    name: str
    root: nn.Module | None
    path: tuple[str, ...]
    attribute: str
    parameter: Tensor | None

    def weight(self) -> Tensor:
        if self.parameter is not None:
            return self.parameter
        module: Any = self.root
        try:
            for name in self.path:  # Not by getattr, which takes several times as long on a module.
                module = module._modules[name]
            found = module._parameters[self.attribute]
        except (KeyError, AttributeError):
            found = None
        if found is None:
            raise ValueError(f"model: expected a parameter {self.name!r} as when it was given, but it is gone")
        return found


class RangeRegularizer(nn.Module):
    """The sum over a model's weights of one range penalty each, times a strength (arXiv 2303.08253, equation 2).

    Or with a ``granularity``, over the segments of these weights: the strength weighs one segment, and a layer of many
    segments counts as often. For the gradients of L∞ and soft-min-max to be as large in sum as those per tensor, divide
    the strength of a layer by the number of its segments.

    Either add ``reg()`` to the task's loss, or call ``reg.add_gradients_()`` between ``loss.backward()`` and the
    optimizer's step, which gives the same gradients in one fused pass, without a graph and without temporaries::

        reg = RangeRegularizer(model, "linf", strength=0.01)
        optimizer = torch.optim.AdamW([*model.parameters(), *reg.parameters()])
        ...
        loss.backward()
        reg.add_gradients_()
        optimizer.step()

    The regularizer owns M (``reg.margin``) or the temperature (``reg.temperature``) as one parameter of shape
    (segments,), in the order of ``reg.names``, per tensor one for each: give it to the optimizer, without weight decay.
    It does not own the model's weights: it looks them up at each call, so ``model.to(dtype)`` and
    ``load_state_dict(assign=True)`` are followed. After ``model.to(device)`` move the regularizer too. Its own
    parameter stays float32 or wider.

    Args:
        model: a module, or an iterable of (name, parameter).
        penalty: ``"linf"``, ``"margin"`` or ``"soft_min_max"``, or their peer ``"kurtosis"``.
        strength: what the penalty is multiplied with: a number, a sequence or tensor of one per layer, or a function
            of the step that returns a number. A step is one ``add_gradients_()`` or, in training mode, one ``reg()``.
            None of these, whatever it changes to, makes ``torch.compile`` compile a step anew.
        temperature: the start of soft-min-max's temperature, in units of one over the weights', a number, one per
            layer or one per segment. It must start high, or learn fast, enough for the length of the training.
        margin: the start of M in multiples of each segment's standard deviation, in the same form.
        granularity: what a segment is: ``"tensor"``, a layer; ``"channel"``, an output channel (dimension 0); or the
            size of a group of consecutive weights of a channel. ``r2_kernels.functional`` says more.
        shared: whether the segments of a layer share one M or temperature: ``reg.margin`` or ``reg.temperature`` then
            has shape (layers,), and M starts in multiples of the layer's standard deviation.
        include: which parameters to watch: a predicate of (name, parameter), or one or more patterns as in
            ``fnmatch`` for the name. Default: those of two or more dimensions that require a gradient.
        exclude: which of these to leave out, in the same form.

    Raises:
        TypeError: an argument of the wrong type, a weight that is not a dense floating-point tensor.
        ValueError: an unknown penalty or granularity, no weight chosen, an empty weight, ``temperature``, ``margin`` or
            ``shared`` for a penalty without it, or a sequence of the wrong length.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, Tensor]],
        penalty: str = "soft_min_max",
        *,
        strength: Strength = 0.01,
        temperature: float | Sequence[float] | None = None,
        margin: float | Sequence[float] | None = None,
        granularity: Granularity = "tensor",
        shared: bool = False,
        include: Selection | None = None,
        exclude: Selection | None = None,
    ) -> None:
        super().__init__()
        self.penalty = penalty
        self._rule = by_name(penalty)
        self.granularity = granularity
        self._group_size = group_size_of(granularity)
        if shared and self._rule.parameter is None:
            raise ValueError(f"shared: expected False, since the penalty {penalty!r} has nothing to share")
        for name, start in (("temperature", temperature), ("margin", margin)):
            if start is not None and self._rule.parameter != name:
                raise ValueError(f"{name}: expected none, since the penalty {penalty!r} has no {name}")
        self._layers = tuple(_watched_layers(model, include, exclude))
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise ValueError(f"model: expected one parameter per name, got several of the name {repeated[0]!r}")
        if not self._layers:
            raise ValueError("model: expected at least one weight to regularize, but none is chosen")
        weights = self.weights()
        check_weights(weights, self.names)
        check_shards(weights, self._group_size, self.names)
        counts = counts_of(weights, self._group_size)
        self._segment_count = sum(counts)
        self._counts: Tensor
        self.register_buffer("_counts", torch.tensor(counts, device=weights[0].device), persistent=False)
        # A tensor, and on the CPU whatever the model is on: the schedule's function runs there.
        self._step = torch.zeros((), dtype=torch.int64, device="cpu")
        # What an optimizer has left of its last step, which `losses` and `report` take while it holds.
        self.carried_statistics: list[CarriedStatistics] = []
        self.register_buffer("_strengths", None, persistent=False)
        self.strength = strength
        starts = {"temperature": temperature, "margin": margin}
        if self._rule.parameter is not None:
            own_size = PER_TENSOR if shared else self._group_size
            initial = _initial_parameter(self._rule.parameter, starts[self._rule.parameter], weights, own_size)
            self.register_parameter(self._rule.parameter, nn.Parameter(initial))

    @property
    def names(self) -> list[str]:
        """The watched weights' names, in the order of all results."""
        return [layer.name for layer in self._layers]

    @property
    def step(self) -> int:
        """How many steps a strength that is a function of the step has seen; it may be set."""
        return int(self._step)

    @step.setter
    def step(self, step: int) -> None:
        self._step.fill_(step)

    @property
    def strength(self) -> Strength:
        """What the penalty is multiplied with; it may be set at any time, a tensor also be filled in place."""
        if self._strength is not None:
            return self._strength
        assert self._strengths is not None
        return self._strengths

    @strength.setter
    def strength(self, strength: Strength) -> None:
        is_number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
        is_list = isinstance(strength, Tensor) or (isinstance(strength, Sequence) and not isinstance(strength, str))
        if not (is_number or is_list or callable(strength)):
            raise TypeError(
                f"strength: expected a number, one per layer or a function of the step, got {type(strength).__name__}"
            )
        numbers = None
        if is_list:
            numbers = _as_numbers("strength", strength, self.weights()[0].device)
            if numbers.ndim and numbers.shape != (len(self._layers),):
                raise ValueError(
                    f"strength: expected one number per layer, shape ({len(self._layers)},), got {tuple(numbers.shape)}"
                )
        elif is_number:
            # For compiled graphs alone, to which each value of a Python number is another constant.
            numbers = torch.tensor(strength, dtype=torch.float64, device=self.weights()[0].device)
        self._strengths: Tensor | None = numbers
        self._strength: Strength | None = None if is_list else strength
        self._schedule = Schedule(strength) if callable(strength) and not is_list else None

    def weights(self) -> list[Tensor]:
        """The watched weights as they are now."""
        return [layer.weight() for layer in self._layers]

    def own_parameter(self) -> Tensor | None:
        """M or the temperature, shape (segments,) or (layers,), or None where the penalty has neither.

        A parameter, or under ``torch.func.functional_call`` the tensor that takes its place.
        """
        return None if self._rule.parameter is None else getattr(self, self._rule.parameter)

    def forward(self, *, check_finite: bool = False) -> Tensor:
        """The loss to add to the task's: sum of strength · penalty over the segments, a differentiable scalar.

        Raises:
            FloatingPointError: with ``check_finite``, if a layer's value is NaN or infinite; it names the layers.
        """
        values = self._values()
        if check_finite:
            self._check_finite(values)
        loss = (values * self._in_segments(self.strengths(values.dtype, values.device))).sum()
        if self.training and torch.is_grad_enabled():
            self.advance()
        return loss

    @torch.no_grad()
    def add_gradients_(self, *, scale: float | Tensor = 1.0, check_finite: bool = False) -> Tensor:
        """Add the gradient of the loss to each ``weight.grad``, and to that of M or the temperature, in place.

        One fused pass without a graph; a ``.grad`` that is None is created. Call it once a step, after the task's
        ``backward()``; under gradient accumulation after the last one.

        Args:
            scale: what the gradients are multiplied with besides the strength: ``GradScaler.get_scale()`` under AMP.
            check_finite: raise, before any gradient changes, where a layer's value is NaN or infinite.

        Returns:
            The loss, as ``reg()`` would return it, detached.

        Raises:
            TypeError: a gradient that is not dense or not of its weight's dtype.
            ValueError: a weight that requires no gradient, or a gradient of another shape, device or, of a ``DTensor``,
                of other placements than its weight.
            FloatingPointError: as ``reg()`` does.
        """
        weights = self._checked_weights()
        self._check_gradients(weights)
        parameter, scalars = self._parameter(weights)
        if check_finite:
            self._check_finite(self._values())
        strengths = self.strengths(value_dtype(weights), weights[0].device)
        coefficients = strengths * _scale(scale)
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        values, parameter_gradients = ops.reduce_apply_(
            self.penalty, weights, scalars, coefficients, gradients, self._group_size
        )
        torch.autograd.graph.increment_version(gradients)  # A graph that saved one must notice, as of any operator.
        for weight, gradient in zip(weights, gradients, strict=True):
            if weight.grad is None:
                weight.grad = gradient
        if parameter is not None and parameter.requires_grad:
            slope = parameter_gradients * self._in_segments(coefficients)
            slope = (self._by_layer(slope) if parameter.shape == coefficients.shape else slope).to(parameter.dtype)
            parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)
        self.advance()
        return (self._by_layer(values) * strengths).sum()

    @torch.no_grad()
    def losses(self) -> dict[str, Tensor]:
        """The penalty of each layer by name, without the strength: detached scalars on the weights' device.

        That of a layer of several segments is the sum of theirs.

        After a step of an optimizer of ``r2_kernels.optim`` that has this regularizer, no pass over the weights.
        """
        values = self._carried_values()
        values = self._by_layer(self._values() if values is None else values)
        return dict(zip(self.names, values.unbind(), strict=True))

    @torch.no_grad()
    def report(self) -> Report:
        """What each layer looks like to a quantizer: print it, or take its ``rows``."""
        weights = self.weights()
        values = list(self.losses().values())
        own = self.own_parameter()
        parameter = None if own is None else self._mean_by_layer(own).tolist()
        rows = [
            layer_report(name, whole(weight), self.penalty, float(value), self._group_size)
            | ({} if parameter is None else {str(self._rule.parameter): parameter[index]})
            for index, (name, weight, value) in enumerate(zip(self.names, weights, values, strict=True))
        ]
        return Report(rows)

    def __getstate__(self) -> dict[str, Any]:
        # Weights that a copy or a pickle makes anew are not those that the carried statistics know.
        return self.__dict__ | {"carried_statistics": []}

    def get_extra_state(self) -> dict[str, Any]:
        return {"penalty": self.penalty, "granularity": self.granularity, "names": self.names, "step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Before anything is loaded: shapes that fit do not make it the state of the same layers.
        state = state_dict.get(f"{prefix}_extra_state", self.get_extra_state())
        if state["penalty"] != self.penalty:
            raise ValueError(f"state_dict: expected the state of penalty {self.penalty!r}, got {state['penalty']!r}")
        granularity = state.get("granularity", "tensor")
        if granularity != self.granularity:
            raise ValueError(f"state_dict: expected the state of granularity {self.granularity!r}, got {granularity!r}")
        if list(state["names"]) != self.names:
            different = sorted(set(state["names"]) ^ set(self.names)) or "the same weights in another order"
            raise ValueError(f"state_dict: expected the state of the watched weights, differs in {different}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        granularity = "" if self.granularity == "tensor" else f", granularity={self.granularity!r}"
        return f"penalty={self.penalty!r}{granularity}, layers={len(self._layers)}, strength={self.strength}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RangeRegularizer:
        # M and the temperature learn in steps that 8 bits of mantissa would round away: a cast moves, never narrows.
        def move_without_narrowing(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_narrower = moved.is_floating_point() and moved.element_size() < tensor.element_size()
            return tensor.to(moved.device) if is_narrower else moved

        return super()._apply(move_without_narrowing, recurse)

    def _checked_weights(self) -> list[Tensor]:
        weights = self.weights()
        check_weights(weights, self.names)
        check_shards(weights, self._group_size, self.names)
        return weights

    def _values(self) -> Tensor:
        weights = self._checked_weights()
        parameter, _ = self._parameter(weights)
        return ops.PenaltyFunction.apply(self.penalty, self._group_size, parameter, *weights)

    def _in_segments(self, per_layer: Tensor) -> Tensor:
        """A tensor with one entry per layer, spread to one per segment."""
        is_same = self._group_size == PER_TENSOR
        return per_layer if is_same else in_segments(per_layer, self._counts, self._segment_count)

    def _by_layer(self, per_segment: Tensor) -> Tensor:
        """The sum over the segments of each layer."""
        return per_segment if self._group_size == PER_TENSOR else summed_by_weight(per_segment, self._counts)

    def _mean_by_layer(self, own: Tensor) -> Tensor:
        """M or the temperature, or its mean over the segments of each layer where each has its own."""
        return own if len(own) == len(self._layers) else self._by_layer(own) / self._counts

    def _carried_values(self) -> Tensor | None:
        """The layers' values from what an optimizer has left, or None where a weight or M has changed since."""
        weights, own = self.weights(), self.own_parameter()
        carried = self.carried_statistics
        is_whole = sum(len(part.layers) for part in carried) == len(weights)
        if not is_whole or not all(part.hold_for([weights[i] for i in part.layers], own) for part in carried):
            return None
        merge(carried)
        values = torch.zeros(len(weights), dtype=value_dtype(weights), device=weights[0].device)
        for part in carried:
            part.add_to(values, part.finalize()[0])
        return values

    def _parameter(self, weights: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """M or the temperature, and the same as the operators take it."""
        parameter = self.own_parameter()
        if parameter is None:
            return None, None
        check_parameter(parameter, str(self._rule.parameter), weights, self.granularity)
        return parameter, ops.widened(parameter)

    def strengths(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The strength of each layer at this step, shape (layers,)."""
        strength: Any = self._strengths
        if self._schedule is not None:
            strength = self._schedule.at(self._step)
        elif not torch.compiler.is_compiling() and self._strength is not None:
            strength = self._strength
        if isinstance(strength, Tensor):
            return strength.detach().to(device, dtype).expand(len(self._layers))
        return torch.full((len(self._layers),), strength, dtype=dtype, device=device)

    def advance(self) -> None:
        """Count a step; ``add_gradients_``, a training ``reg()`` and the optimizers of ``r2_kernels.optim`` do it."""
        if self._schedule is not None:  # Nothing else depends on the step.
            self._step.add_(1)

    def _check_gradients(self, weights: Sequence[Tensor]) -> None:
        for index, (weight, layer) in enumerate(zip(weights, self._layers, strict=True)):
            if not weight.requires_grad:
                raise ValueError(f"weights[{index}] ({layer.name!r}): expected a weight that requires a gradient")
            if not weight.is_leaf:
                raise ValueError(f"weights[{index}] ({layer.name!r}): expected a leaf, got the result of a computation")
            gradient = weight.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided or gradient.dtype is not weight.dtype:
                raise TypeError(
                    f"gradient of weights[{index}] ({layer.name!r}): expected a dense tensor of {weight.dtype}, "
                    f"got {gradient.dtype}, {gradient.layout}"
                )
            if gradient.shape != weight.shape or gradient.device != weight.device:
                raise ValueError(
                    f"gradient of weights[{index}] ({layer.name!r}): expected shape {tuple(weight.shape)} on "
                    f"{weight.device}, got {tuple(gradient.shape)} on {gradient.device}"
                )
            check_gradient(gradient, weight, f"weights[{index}] ({layer.name!r})")
            if not gradient.is_contiguous() and overlaps_itself(gradient):
                raise ValueError(
                    f"gradient of weights[{index}] ({layer.name!r}): expected one memory location per entry, "
                    f"got overlapping ones, strides {gradient.stride()}"
                )

    def _check_finite(self, values: Tensor) -> None:
        is_finite = torch.isfinite(self._by_layer(values.detach())).tolist()
        if not all(is_finite):
            layers = [repr(name) for name, finite in zip(self.names, is_finite, strict=True) if not finite]
            raise FloatingPointError(f"the {self.penalty} penalty is not finite for {', '.join(layers)}")


def _scale(scale: float | Tensor) -> float | Tensor:
    if isinstance(scale, Tensor) and scale.numel() == 1 and not scale.is_complex():
        return scale.detach().reshape(())
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or a tensor of one, got {scale!r}")
    return scale


def _watched_layers(
    model: nn.Module | Iterable[tuple[str, Tensor]], include: Selection | None, exclude: Selection | None
) -> Iterator[_Layer]:
    is_included = _has_a_range if include is None else _predicate("include", include)
    is_excluded = _predicate("exclude", () if exclude is None else exclude)
    seen: set[int] = set()
    for layer in _candidates(model):
        parameter = layer.weight()
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if is_included(layer.name, parameter) and not is_excluded(layer.name, parameter):
            yield layer


def _candidates(model: nn.Module | Iterable[tuple[str, Tensor]]) -> Iterator[_Layer]:
    if isinstance(model, nn.Module):
        for name, _ in model.named_parameters():
            *path, attribute = name.split(".")
            yield _Layer(name, model, tuple(path), attribute, None)
        return
    if isinstance(model, Tensor) or not isinstance(model, Iterable):
        raise TypeError(f"model: expected a module or an iterable of (name, parameter), got {type(model).__name__}")
    for index, item in enumerate(model):
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError(f"model: expected (name, parameter) at position {index}, got {type(item).__name__}")
        name, parameter = item
        if not isinstance(parameter, Tensor):
            raise TypeError(f"model: expected a tensor for {name!r}, got {type(parameter).__name__}")
        yield _Layer(name, None, (), "", parameter)


def _has_a_range(name: str, parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.ndim >= 2


def _predicate(argument: str, selection: Selection) -> Callable[[str, Tensor], bool]:
    if callable(selection):
        return selection
    patterns = (selection,) if isinstance(selection, str) else selection
    patterns = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument}: expected a predicate of (name, parameter) or name patterns, got {selection!r}")
    return lambda name, parameter: any(fnmatchcase(name, pattern) for pattern in patterns)


def _as_numbers(argument: str, given: Any, device: torch.device) -> Tensor:
    """A number or a sequence of numbers as a tensor, float32."""
    try:
        return torch.as_tensor(given, dtype=torch.float32, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument}: expected a number or one per layer, got {given!r}") from error


def _initial_parameter(
    name: str, start: float | Sequence[float] | None, weights: Sequence[Tensor], group_size: int
) -> Tensor:
    """M or the temperature at the start, float32: 0.1 and twice the standard deviation unless the caller says."""
    start = {"temperature": 0.1, "margin": 2.0}[name] if start is None else start
    given = _as_numbers(name, start, weights[0].device)
    counts = counts_of(weights, group_size)
    segment_count = sum(counts)
    if given.ndim and given.shape not in ((len(weights),), (segment_count,)):
        per_segment = "" if segment_count == len(weights) else f", or one per segment, shape ({segment_count},)"
        raise ValueError(
            f"{name}: expected a number or one per layer, shape ({len(weights)},){per_segment}, "
            f"got {tuple(given.shape)}"
        )
    if given.shape == (len(weights),):
        given = in_segments(given, torch.tensor(counts, device=given.device), segment_count)
    given = given.expand(segment_count).clone()
    if name == "margin":
        given *= torch.cat([over_segments(whole(weight).float(), group_size, _deviation) for weight in weights])
    return given


def _deviation(segments: Tensor) -> Tensor:
    return segments.std(-1, correction=0)
