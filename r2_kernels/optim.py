"""AdamW and SGD whose step carries the range penalty along: no pass over the weights of its own.

A step reads each weight and its gradient and writes the weight. The penalty's gradient is added on the way in, from
statistics that were gathered on the way out of the step before: those of the new weights, while they are in the cache.
Nothing changes the weights in between, so the statistics are exact, and where something did, as at the first step, they
are computed anew. Of sharded weights (``DTensor``) each rank steps its own shard; the statistics of all layers are
merged across ranks at the start of a step.

Both take the arguments of ``torch.optim``'s of the same name, with the same defaults, and have the same parameter
groups, state and hooks; ``state_dict`` goes from either to the other. One fused implementation serves all settings of
``foreach``, ``fused`` and ``capturable``, which are kept for ``torch.optim`` alone. ``docs/optimizers.md`` says what
differs between the coupled and the decoupled penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2_kernels import ops, optimizer_ops  # noqa: F401  (the latter defines the operators)
from r2_kernels.carried_statistics import CarriedStatistics, merge
from r2_kernels.distributed import check_mesh, check_shard, has_copies, is_distributed, local, local_gradient, whole
from r2_kernels.layout import is_dense
from r2_kernels.regularizer import RangeRegularizer
from r2_kernels.validation import FLOATING_DTYPES, value_dtype

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class _Bucket(NamedTuple):
    """What one call of an operator steps: the parameters of one group on one device, the watched ones first.

    ``weights`` and ``gradients`` are this rank's shards where the parameters are ``DTensor``s.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    weights: list[Tensor]
    gradients: list[Tensor]
    carried: CarriedStatistics | None

    @property
    def watched(self) -> list[Tensor]:
        return [] if self.carried is None else self.parameters[: len(self.carried.layers)]


class _Scaling(NamedTuple):
    """What multiplies the gradients on their way in, as tensors of one number, or None."""

    grad_scale: Tensor | None
    found_inf: Tensor | None
    clip_coefficient: Tensor | None

    def on(self, device: torch.device) -> list[Tensor | None]:
        return [None if number is None else number.to(device, torch.float32) for number in self]


class _FusedOptimizer(torch.optim.Optimizer):
    """What AdamW and SGD share: who is watched, the order of a step, the statistics, the checkpoint."""

    regularizer: RangeRegularizer | None

    def _start(
        self,
        regularizer: RangeRegularizer | None,
        decoupled: bool,
        state_dtype: torch.dtype | None,
        stochastic_rounding: bool,
    ) -> None:
        """The part of the constructors that ``torch.optim`` does not have."""
        if regularizer is not None and not isinstance(regularizer, RangeRegularizer):
            raise TypeError(f"regularizer: expected a RangeRegularizer or None, got {type(regularizer).__name__}")
        if regularizer is not None and regularizer.granularity != "tensor":
            raise ValueError(
                f"regularizer: expected granularity 'tensor', got {regularizer.granularity!r}, which these optimizers "
                f"do not carry: call add_gradients_() before a step of an optimizer without a regularizer"
            )
        if decoupled and regularizer is None:
            raise ValueError("decoupled: expected False, since there is no regularizer")
        if state_dtype is not None and state_dtype not in FLOATING_DTYPES:
            raise TypeError(f"state_dtype: expected a floating-point dtype or None, got {state_dtype!r}")
        if any(group["differentiable"] for group in self.param_groups):
            raise ValueError("differentiable: expected False, since a fused step leaves no graph")
        for index, group in enumerate(self.param_groups):
            _check_shards(group, index, stochastic_rounding)
        self._step_supports_amp_scaling = True
        self.regularizer = regularizer
        self.decoupled = decoupled
        self.state_dtype = state_dtype
        self.stochastic_rounding = stochastic_rounding
        self._carried: dict[tuple[int, torch.device], CarriedStatistics] = {}
        if regularizer is not None:
            self._add_own_parameter()
            self._layer_of_weight()

    def _add_own_parameter(self) -> None:
        """M or the temperature in a group of its own, without weight decay, unless the caller has placed it."""
        own = self._own_parameter()
        if own is None or any(parameter is own for group in self.param_groups for parameter in group["params"]):
            return
        assert self.regularizer is not None
        is_named = "param_names" in self.param_groups[0]
        name = next(name for name, parameter in self.regularizer.named_parameters() if parameter is own)
        self.add_param_group({"params": [(f"regularizer.{name}", own)] if is_named else [own], "weight_decay": 0.0})

    def _own_parameter(self) -> Tensor | None:
        return None if self.regularizer is None else self.regularizer.own_parameter()

    def _layer_of_weight(self) -> dict[int, int]:
        """The watched weights' positions among the regularizer's layers, by identity."""
        if self.regularizer is None:
            return {}
        layers = {id(weight): layer for layer, weight in enumerate(self.regularizer.weights())}
        missing = layers.keys() - {id(parameter) for group in self.param_groups for parameter in group["params"]}
        if missing:
            names = [repr(self.regularizer.names[layers[weight]]) for weight in missing]
            raise ValueError(f"params: expected all weights of the regularizer among them, {', '.join(names)} not")
        return layers

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, clip_coefficient: float | Tensor | None = None) -> Any:
        """One step, with the penalty's gradient at the weights as they are now.

        Args:
            closure: evaluates the model again and returns the loss, as in ``torch.optim``.
            clip_coefficient: what the gradients of the task are multiplied with, a number or a tensor of one, such as
                ``(max_norm / (total_norm + 1e-6)).clamp(max=1)``. It is not read on the host.

        Returns:
            What the closure returns, or None.

        Raises:
            TypeError: a weight or gradient that is not dense or of a dtype that no kernel reads. Nothing has changed.
            ValueError: a weight of the regularizer that is not among the parameters or requires no gradient; a gradient
                on another device mesh than its weight. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scaling = _Scaling(
            _number_or_none(getattr(self, "grad_scale", None)),
            _number_or_none(getattr(self, "found_inf", None)),
            _number_or_none(clip_coefficient),
        )
        buckets = self._buckets()
        own = self._own_parameter()
        self._gather_where_stale(buckets, own)
        if self.regularizer is not None:
            merge(_parts_of(buckets))
        coefficients = self._coefficients(buckets)
        if own is not None:
            # Before the weights: what is gathered from the new weights is for the new M or temperature.
            self._step_own_parameter(own, buckets, coefficients, scaling)
        for bucket in buckets:
            self._step_bucket(bucket, own, coefficients, scaling)
        if self.regularizer is not None:
            self.regularizer.advance()
            self.regularizer.carried_statistics = _parts_of(buckets)
        return loss

    @torch.no_grad()
    def refresh_statistics(self) -> None:
        """Gather the weights' statistics now, as after a change that leaves no trace: a write through ``.data``."""
        for carried in self._carried.values():
            carried.statistics = None
        self._gather_where_stale(self._buckets(), self._own_parameter())

    def _gather_where_stale(self, buckets: Sequence[_Bucket], own: Tensor | None) -> None:
        for bucket in buckets:
            if bucket.carried is not None and not bucket.carried.hold_for(bucket.watched, own):
                bucket.carried.gather(bucket.watched, own)

    def _coefficients(self, buckets: Sequence[_Bucket]) -> Tensor | None:
        """The strength of each layer."""
        if self.regularizer is None:
            return None
        watched = [weight for bucket in buckets for weight in bucket.watched]
        return self.regularizer.strengths(value_dtype(watched), watched[0].device)

    def _buckets(self) -> list[_Bucket]:
        own = self._own_parameter()
        layer_of_weight = self._layer_of_weight()
        before, self._carried = self._carried, {}  # What no group has any more is forgotten.
        buckets = []
        for index, group in enumerate(self.param_groups):
            _check_parameters(group, index, self.stochastic_rounding)
            by_device: dict[torch.device, tuple[dict[int, Tensor], list[Tensor]]] = {}
            for parameter in group["params"]:
                layer = layer_of_weight.get(id(parameter))
                if parameter is own or (parameter.grad is None and layer is None):
                    continue
                watched, others = by_device.setdefault(parameter.device, ({}, []))
                if layer is None:
                    others.append(parameter)
                    continue
                if not parameter.requires_grad:
                    name = self.regularizer.names[layer]  # type: ignore[union-attr]
                    raise ValueError(f"params: expected the regularizer's weight {name!r} to require a gradient")
                watched[layer] = parameter
            for device, (watched, others) in by_device.items():
                parameters = [*watched.values(), *others]
                weights = [local(parameter) for parameter in parameters]
                gradients = [_gradient(*pair) for pair in zip(parameters, weights, strict=True)]
                carried = None
                if watched:
                    carried = self._carried_by(before.get((index, device)), list(watched), device)
                    self._carried[index, device] = carried
                buckets.append(_Bucket(group, parameters, weights, gradients, carried))
        return buckets

    def _carried_by(
        self, before: CarriedStatistics | None, layers: list[int], device: torch.device
    ) -> CarriedStatistics:
        if before is not None and before.layers == layers:
            return before
        assert self.regularizer is not None
        return CarriedStatistics(self.regularizer.penalty, layers, len(self.regularizer.names), device)

    def _step_own_parameter(
        self, own: Tensor, buckets: Sequence[_Bucket], coefficients: Tensor | None, scaling: _Scaling
    ) -> None:
        """The optimizer's own rule for M or the temperature. Its gradient is the penalty's, which is not scaled."""
        if not own.requires_grad:
            return
        assert coefficients is not None
        gradient = torch.zeros_like(own)
        if own.grad is not None:
            gradient.copy_(own.grad)
            if scaling.grad_scale is not None:
                gradient.div_(scaling.grad_scale)
            if scaling.clip_coefficient is not None:
                gradient.mul_(scaling.clip_coefficient)
        for bucket in buckets:
            if bucket.carried is not None:
                _, slopes = bucket.carried.finalize()
                bucket.carried.add_to(gradient, (slopes * bucket.carried.select(coefficients)).to(own.dtype))
        group = next(group for group in self.param_groups if any(own is parameter for parameter in group["params"]))
        unscaled = _Scaling(None, scaling.found_inf, None)
        self._step_bucket(_Bucket(group, [own], [own], [gradient], None), None, None, unscaled)

    def _step_bucket(self, bucket: _Bucket, own: Tensor | None, coefficients: Tensor | None, scaling: _Scaling) -> None:
        carried = bucket.carried
        device = bucket.weights[0].device
        seed = int(torch.randint(1 << 62, ())) if self.stochastic_rounding else None
        shared: list[Any] = [*scaling.on(device), seed]
        next_parameter = None
        if carried is None:
            empty = torch.empty(0, dtype=torch.float64, device=device)
            shared += [None, None, None, empty.view(0, 0), empty, empty, False]
        else:
            assert coefficients is not None
            next_parameter = carried.of_layers(own)
            shared += [carried.penalty, carried.parameter, next_parameter, carried.merged, carried.partials]
            shared += [carried.select(coefficients), self.decoupled]
        self._run(bucket, shared)
        torch.autograd.graph.increment_version(bucket.parameters)
        if carried is not None:
            carried.take_step(bucket.watched, own, next_parameter, shared[1])

    def _run(self, bucket: _Bucket, shared: list[Any]) -> None:
        """Call the operator; ``shared`` are its arguments from ``grad_scale`` on."""
        raise NotImplementedError

    def _moment(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight, dtype=self.state_dtype or weight.dtype, requires_grad=False)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim``'s, and under ``"range_statistics"`` those that the last step has left.

        They tell how each layer stood; ``load_state_dict`` computes them anew, from the weights that are then there.
        Those of sharded weights are left out: one rank alone does not know them.
        """
        state = super().state_dict()
        parts = list(self._carried.values())
        is_sharded = any(is_distributed(weight) for part in parts for weight in part.weights)
        if self.regularizer is not None and not is_sharded and all(part.statistics is not None for part in parts):
            names = self.regularizer.names
            rows = {
                names[layer]: row
                for carried in parts
                for layer, row in zip(carried.layers, carried.statistics, strict=True)  # type: ignore[arg-type]
            }
            state["range_statistics"] = {"penalty": self.regularizer.penalty, "rows": rows}
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim``'s; the moments take ``state_dtype`` and the memory order of their weights."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key != "step" and isinstance(value, Tensor):
                    self.state[parameter][key] = self._moment(parameter).copy_(value)
        self._carried.clear()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("regularizer", "decoupled", "state_dtype", "stochastic_rounding", "_step_supports_amp_scaling")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._carried = {}


class AdamW(_FusedOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` (arXiv 1711.05101), with the penalty of a ``RangeRegularizer`` inside the step::

        reg = RangeRegularizer(model, "soft_min_max", strength=0.01)
        optimizer = r2_kernels.optim.AdamW(model.parameters(), lr=1e-3, regularizer=reg)
        ...
        loss.backward()
        optimizer.step()

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, fused: as ``torch.optim.AdamW``
            has them. ``differentiable`` must be False.
        regularizer: whose penalty joins the step; its weights must be among ``params``. Its M or temperature is stepped
            by the same rule: in the group that the caller has placed it in, else in a group of its own with the
            default learning rate and no weight decay. Neither add its loss to the task's nor call its
            ``add_gradients_`` then.
        decoupled: apply the penalty's gradient to the weights directly, ``w -= lr · strength · slope``, before the
            update, as weight decay is, instead of adding it to the gradient, which goes through the moments.
        state_dtype: dtype of the moments; default that of each weight, as in ``torch.optim``.
        stochastic_rounding: round bfloat16 weights and moments up or down with a chance of the distance, by torch's
            default random generator, so that small updates are not lost.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a weight of the regularizer that is not among ``params``; a ``DTensor`` with a ``Partial``
            placement, of a mesh without this rank or, with ``stochastic_rounding``, with copies on other ranks; and
            what ``torch.optim`` raises it for.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        regularizer: RangeRegularizer | None = None,
        decoupled: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._start(regularizer, decoupled, state_dtype, stochastic_rounding)

    def _run(self, bucket: _Bucket, shared: list[Any]) -> None:
        group = bucket.group
        states = [self._state_of(parameter, group["amsgrad"]) for parameter in bucket.parameters]
        beta1, beta2 = map(float, group["betas"])
        device = bucket.weights[0].device
        ops.kernel("adamw_step_", device)(
            bucket.weights,
            bucket.gradients,
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [local(state["max_exp_avg_sq"]) for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            _number(group["lr"], device),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["maximize"],
            *shared,
        )

    def _state_of(self, weight: Tensor, is_amsgrad: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = self._moment(weight)
            state["exp_avg_sq"] = self._moment(weight)
        if is_amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = self._moment(weight)
        if state["step"].device != weight.device:  # torch.optim leaves the counts on the CPU unless it is fused
            state["step"] = state["step"].to(weight.device)
        return state


class SGD(_FusedOptimizer, torch.optim.SGD):
    """``torch.optim.SGD``, with momentum, with the penalty of a ``RangeRegularizer`` inside the step.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, fused: as ``torch.optim.SGD`` has
            them. ``differentiable`` must be False.
        regularizer, decoupled, state_dtype, stochastic_rounding: as ``AdamW`` has them.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a weight of the regularizer that is not among ``params``; a ``DTensor`` with a ``Partial``
            placement, of a mesh without this rank or, with ``stochastic_rounding``, with copies on other ranks; and
            what ``torch.optim`` raises it for.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        regularizer: RangeRegularizer | None = None,
        decoupled: bool = False,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._start(regularizer, decoupled, state_dtype, stochastic_rounding)

    def _run(self, bucket: _Bucket, shared: list[Any]) -> None:
        group = bucket.group
        device = bucket.weights[0].device
        buffers: list[Tensor] = []
        started: list[int] = []
        if group["momentum"] != 0:
            found_inf = shared[1]
            # On the CPU alone is it free to look whether the step is skipped. Elsewhere a buffer that such a step has
            # left at zero starts with 1 - dampening times the gradient.
            is_skipped = found_inf is not None and device.type == "cpu" and float(found_inf) != 0
            for parameter in bucket.parameters:
                buffer = self.state[parameter].get("momentum_buffer")
                started.append(buffer is not None)
                buffer = self._moment(parameter) if buffer is None else buffer
                buffers.append(local(buffer))
                if not is_skipped:
                    self.state[parameter]["momentum_buffer"] = buffer
        ops.kernel("sgd_step_", device)(
            bucket.weights,
            bucket.gradients,
            buffers,
            started,
            _number(group["lr"], device),
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            group["nesterov"],
            group["maximize"],
            *shared,
        )


def _parts_of(buckets: Sequence[_Bucket]) -> list[CarriedStatistics]:
    return [bucket.carried for bucket in buckets if bucket.carried is not None]


def _check_parameters(group: dict[str, Any], group_index: int, stochastic_rounding: bool) -> None:
    """Raise unless the operators read all parameters that have a gradient: before any of them is touched."""
    _check_shards(group, group_index, stochastic_rounding)
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is None:
            continue
        check_mesh(parameter.grad, parameter, _called(group, group_index, index))
        weight, gradient = local(parameter), local(parameter.grad)
        problem = None
        if weight.layout is not torch.strided or weight.dtype not in FLOATING_DTYPES or not is_dense(weight):
            problem = f"got {weight.dtype}, {weight.layout}, strides {_strides(weight)}"
        elif gradient.layout is not torch.strided or gradient.dtype not in FLOATING_DTYPES:
            problem = f"got a gradient of {gradient.dtype}, {gradient.layout}"
        if problem is not None:
            raise TypeError(
                f"{_called(group, group_index, index)}: expected a floating-point tensor that is dense in memory and "
                f"a dense floating-point gradient, {problem}"
            )


def _check_shards(group: dict[str, Any], group_index: int, stochastic_rounding: bool) -> None:
    """Raise where a parameter is a ``DTensor`` of which this rank does not know its entries, or rounds copies apart."""
    for index, parameter in enumerate(group["params"]):
        if not is_distributed(parameter):
            continue
        called = _called(group, group_index, index)
        check_shard(parameter, called)
        if stochastic_rounding and has_copies(parameter):
            raise ValueError(
                f"{called}: expected no copies on other ranks with stochastic_rounding, since each rank rounds by "
                f"random numbers of its own, got placements {parameter.placements}"
            )


def _called(group: dict[str, Any], group_index: int, index: int) -> str:
    name = f" ({group['param_names'][index]!r})" if "param_names" in group else ""
    return f"params: group {group_index}, parameter {index}{name} of shape {tuple(group['params'][index].shape)}"


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout is torch.strided else None


def _gradient(parameter: Tensor, weight: Tensor) -> Tensor:
    """The gradient in the memory order of the weight, the parameter's shard; zeros where the task has none."""
    if parameter.grad is None:
        return torch.zeros_like(weight)
    gradient = local_gradient(parameter.grad, parameter)
    is_in_order = (weight.is_contiguous() and gradient.is_contiguous()) or weight.stride() == gradient.stride()
    return gradient if is_in_order else torch.empty_like(weight, dtype=gradient.dtype).copy_(gradient)


def _number(number: float | Tensor, device: torch.device) -> Tensor:
    """A tensor of one number on the device, from a number without waiting for the device."""
    if isinstance(number, Tensor):
        dtype = torch.float64 if number.dtype is torch.float64 else torch.float32
        return number.detach().to(device, dtype)
    return torch.full((), number, dtype=torch.float64, device=device)


def _number_or_none(number: Any) -> Tensor | None:
    if number is None:
        return None
    if isinstance(number, Tensor) and number.numel() != 1:
        raise ValueError(f"clip_coefficient: expected one number, got shape {tuple(number.shape)}")
    return whole(torch.as_tensor(number))
