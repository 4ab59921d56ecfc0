"""The keyword arguments that every optimizer takes beside its rule's own."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypedDict

import torch

from schuss.bounds import check, nearest
from schuss.engine.storage import ROUNDINGS, Rounding
from schuss.rule import State

__all__ = ["BACKENDS", "Backend", "Options", "Settings", "StateDtype"]

Backend = Literal["auto", "numba", "triton", "foreach", "reference"]
BACKENDS = ("auto", "numba", "triton", "foreach", "reference")
StateDtype = Literal["float32", "bfloat16", "int8"] | torch.dtype
Nonfinite = Literal["propagate", "skip", "raise"]
NONFINITE = ("propagate", "skip", "raise")
NUMBERS = {"max_norm": "(0, inf]", "clip_value": "(0, inf)", "ema_decay": "[0, 1)"}
"""Options that are numbers, or None, with their bounds."""
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Options(TypedDict, total=False):
    """Keyword arguments that every schuss optimizer takes beside its own."""

    backend: Backend
    """What runs the formula. "auto" (default): numba for dense CPU tensors, triton for CUDA tensors, foreach on devices
    without a compiler of ours, reference (eager torch) for the rest; `optimizer.plan()` tells. A named one is used for
    every tensor with a dense gradient, but in groups with differentiable=True."""

    state_dtype: StateDtype | Mapping[str, StateDtype] | None
    """What states are stored as, whatever the rule computes in: "float32", "bfloat16" or "int8", for all states or by
    name. "int8" is blocks of 256 codes with one float32 absmax each; tensors under 4096 elements, and complex ones,
    keep their values. None (default): like the parameter, as in torch; loaded state as it was saved."""

    rounding: Rounding
    """How bfloat16 and float16 parameters are rounded: "nearest" (default), "stochastic" (to one of the two neighbours,
    the nearer the likelier, so that small steps count on average), or "kahan" (what is cut off is kept in one more
    state of the parameter's dtype, and added to the next step)."""

    max_norm: float | None
    """Gradients are scaled so that the norm of all of them together is at most this, in (0, inf], as
    `torch.nn.utils.clip_grad_norm_` does, but inside the step and without changing p.grad; after the unscaling of a
    GradScaler. `optimizer.last_grad_norm` tells the norm before; with inf it is measured only. None (default): no."""

    clip_value: float | None
    """Each element of the gradient is limited to [-clip_value, clip_value], in (0, inf). None (default): no."""

    nonfinite: Nonfinite
    """What a step does if max_norm finds a norm that is infinite or NaN: "propagate" (default; as torch, parameters
    become NaN), "skip" (nothing changes, and `optimizer.skipped_steps` counts it), or "raise" (nothing changes). On a
    device the last two wait for it, unless capturable=True lets it skip by itself."""

    ema_decay: float | None
    """Keep an average of every parameter, in float32 at least, as the state "ema": ema = ema_decay * ema +
    (1 - ema_decay) * p after each step of p, in the same pass; in [0, 1). `with optimizer.averaged():` puts it in the
    parameters' place. None (default): no."""

    ema_warmup: bool
    """Whether the decay of the average starts lower, min(ema_decay, (1 + step) / (10 + step)). Default False."""

    cautious: bool
    """Whether elements whose step would not go against their gradient stay where they are (Liang et al. 2024,
    arXiv:2411.16085); the steps of the others are divided by their share in the tensor, 0.001 at least. Default False.
    """

    cautious_decay: bool
    """Whether decoupled weight decay leaves out elements whose step leads away from zero (Chen et al. 2025,
    arXiv:2510.12402). Default False."""

    seed: int
    """Of the random bits of rounding="stochastic", which depend on it, the parameter's place in the optimizer, the step
    and the element alone. Default 0."""


@dataclass(frozen=True)
class Settings:
    """`Options`, checked.

    Args:
        backend, rounding, seed: as there.
        state_dtype: state's name -> dtype; states that are not in it are stored like the parameter.
    """

    backend: Backend = "auto"
    state_dtype: Mapping[str, torch.dtype] = field(default_factory=dict)
    rounding: Rounding = "nearest"
    seed: int = 0
    max_norm: float | None = None
    clip_value: float | None = None
    nonfinite: Nonfinite = "propagate"
    ema_decay: float | None = None
    ema_warmup: bool = False
    cautious: bool = False
    cautious_decay: bool = False

    @property
    def needs_step(self) -> bool:
        """Whether every parameter must keep the number of its step, for rules that do without, too."""
        return self.rounding == "stochastic" or self.ema_decay is not None

    @classmethod
    def parse(cls, owner: str, options: Mapping[str, Any], states: Collection[str], own: Iterable[str]) -> Self:
        """Check what was given.

        Args:
            owner: the class that messages name.
            options: keyword arguments.
            states: the names of the rule's states.
            own: the class's own arguments, to help with an unknown one.

        Raises:
            TypeError: an unknown keyword.
            ValueError: an unknown value.
        """
        for name in options:
            if name not in Options.__annotations__:
                known = (*own, *Options.__annotations__)
                raise TypeError(f"{owner}: unknown argument {name!r}; {nearest(name, known)}")
        given = {name: value for name, value in options.items() if name != "state_dtype"}
        for name, allowed in (("backend", BACKENDS), ("rounding", ROUNDINGS), ("nonfinite", NONFINITE)):
            if name in given and given[name] not in allowed:
                raise ValueError(f"{owner}: {name} must be one of {', '.join(allowed)}, got {given[name]!r}")
        for name, bound in NUMBERS.items():
            if name in given:
                check(owner, name, given[name], f"None or {bound}")
        flags = ("ema_warmup", "cautious", "cautious_decay")
        for name, kind, what in (("seed", int, "an integer"), *((flag, bool, "True or False") for flag in flags)):
            value = given.get(name, kind())
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise TypeError(f"{owner}: {name} must be {what}, got {value!r} ({type(value).__name__})")
        for name, needed in (("nonfinite", "max_norm"), ("ema_warmup", "ema_decay")):
            if given.get(name, cls.__dict__[name]) != cls.__dict__[name] and given.get(needed) is None:
                raise ValueError(f"{owner}: {name}={given[name]!r} has no meaning without {needed}; give it, too")
        return cls(state_dtype=_state_dtypes(owner, options.get("state_dtype"), states), **given)

    def check_exact(self, owner: str, states: Iterable[State], group: Mapping[str, Any]) -> None:
        """Raise if a state that a group of parameters needs exactly is to be stored in 8 bits."""
        for state in states:
            if self.state_dtype.get(state.name) == torch.int8 and state.may_exist(group) and state.must_be_exact(group):
                raise ValueError(
                    f"{owner}: state_dtype of {state.name!r} must be float32 or bfloat16, since small differences of "
                    "it decide what a step does; got int8"
                )

    def check_parameters(self, owner: str, params: Iterable[torch.Tensor]) -> None:
        """Raise if no parameter can be rounded as wished."""
        if self.rounding != "nearest" and not any(p.dtype in (torch.bfloat16, torch.float16) for p in params):
            raise ValueError(
                f"{owner}: rounding={self.rounding!r} is for bfloat16 and float16 parameters, and there are none; "
                "use rounding='nearest'"
            )


def _state_dtypes(owner: str, given: Any, states: Collection[str]) -> dict[str, torch.dtype]:
    if given is None:
        return {}
    if isinstance(given, Mapping):
        for name in given:
            if name not in states:
                hint = nearest(name, states) if states else "the rule has none"
                raise ValueError(f"{owner}: state_dtype names {name!r}, which is no state that can be stored; {hint}")
        return {name: _dtype(owner, f"state_dtype[{name!r}]", value) for name, value in given.items()}
    return dict.fromkeys(states, _dtype(owner, "state_dtype", given))


def _dtype(owner: str, argument: str, value: Any) -> torch.dtype:
    name = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
    if not isinstance(name, str) or name not in STATE_DTYPES:
        raise ValueError(f"{owner}: {argument} must be one of {', '.join(STATE_DTYPES)}, got {value!r}")
    return STATE_DTYPES[name]
