"""What all optimizers share that let others step, one or several: hooks, and how they are pickled."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import StateDict

if TYPE_CHECKING:
    from schuss.engine.plan import Plan
    from schuss.wrappers.combined import Plans


class Outer(torch.optim.Optimizer):
    """Base of optimizers that hold others, whose groups, defaults and state are theirs.

    A subclass has properties for these three that pass over what torch's constructor assigns, and writes `_inners`,
    `_step`, `_save` and `_restore`. Hooks run round all of it.
    """

    _pickled: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__([{"params": []}], {})  # hooks, and whatever torch will want beside

    @property
    def _inners(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers that it lets step."""
        raise NotImplementedError

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        """The step itself, without hooks."""
        raise NotImplementedError

    def _check_ready(self) -> None:
        """Raise if this optimizer itself would refuse a step without a closure now."""

    def _save(self) -> StateDict:
        """The state dict, without hooks."""
        raise NotImplementedError

    def _restore(self, state_dict: StateDict, *, strict: bool) -> None:
        """Load, without hooks; `state_dict` may be written into, but not what is in it."""
        raise NotImplementedError

    def plan(self) -> "Plan | Plans":
        """What a step of the inner optimizers does."""
        raise NotImplementedError

    def averaged(self) -> AbstractContextManager[None]:
        """The averages of the inner optimizers in the place of the parameters."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """A step of what is inside.

        Hooks of this optimizer run once, round all of it; those of an inner one, and those of all optimizers
        (`register_optimizer_step_pre_hook`), round its step.

        Args:
            closure: computes the loss and its gradients. Round one optimizer it is handed to that, which calls it
                once, or as often as it does (LBFGS); round several it is called once.

        Returns:
            The closure's loss, or None.
        """
        if not (self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks):
            return self._step(closure)
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for pre_hook in self._optimizer_step_pre_hooks.values():
            if (replaced := pre_hook(self, args, kwargs)) is not None:
                args, kwargs = replaced
        loss = self._step(*args[1:], **kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return loss

    def state_dict(self) -> StateDict:
        """The state of all as one dict of torch's layout: plain tensors under the parameters' numbers."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._save()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            if (replaced := post_hook(self, state_dict)) is not None:
                state_dict = replaced
        return state_dict

    def load_state_dict(self, state_dict: StateDict, *, strict: bool = True) -> None:
        """Load what `state_dict` returned.

        Args:
            state_dict: the saved state.
            strict: handed to the inner optimizers: see `schuss.Optimizer.load_state_dict`. torch's take True only.

        Raises:
            ValueError: other groups or shapes than this optimizer has.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            if (replaced := pre_hook(self, state_dict)) is not None:
                state_dict = replaced
        self._restore(state_dict, strict=strict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self._pickled}


# torch wraps each class's `step`, once, to run hooks and to name it in profiles, for 3 us. This one runs its hooks, and
# the inner ones' names stand in profiles.
Outer.step.hooked = True  # type: ignore[attr-defined]


def _chain(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """An optimizer and all that step in it, from the outside."""
    yield optimizer
    if isinstance(optimizer, Outer):
        for inner in optimizer._inners:
            yield from _chain(inner)


def _needs_closure(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """Of an optimizer and all that step in it, the one that evaluates the loss itself, as LBFGS does; None if none."""
    for part in _chain(optimizer):
        closure = signature(part.step).parameters.get("closure")
        must_be_given = closure is not None and closure.default is Parameter.empty
        if must_be_given or any(cls.__name__ == "LBFGS" for cls in type(part).__mro__):
            return part
    return None


def _takes_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a closure can be handed to the steps of an optimizer and of those in it, whatever they are wrapped in."""
    return all(map(_has_argument, (part.step for part in _chain(optimizer))))


def _has_argument(step: Callable[..., Any]) -> bool:
    try:
        arguments = [*signature(step).parameters.values()]
    except ValueError:  # written in C
        return True
    if arguments and arguments[0].name == "self":  # torch's schedulers wrap what is not bound
        del arguments[0]
    return any(a.kind not in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD) for a in arguments)


def _params(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, None]:
    """All parameters in the order of their numbers in a state dict."""
    return dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
