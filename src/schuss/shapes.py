"""The parameters of a model by name, without their memory: sizes of GPT-2, and `module:factory` for anybody's."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from schuss.bounds import nearest
from schuss.lookup import first_line, named

GPT2 = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}
"""Name -> layers and width (n_layer, n_embd) of the published sizes (Radford et al. 2019)."""


def gpt2(n_layer: int, n_embd: int, *, vocabulary: int = 50257, context: int = 1024) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of GPT-2, as the published checkpoints have them.

    The head is the table of tokens again, and the number of attention heads changes no shape.

    Args:
        n_layer: blocks.
        n_embd: width of the residual stream.
        vocabulary: tokens.
        context: positions.
    """
    d = n_embd
    block = {
        "ln_1.weight": (d,), "ln_1.bias": (d,),
        "attn.c_attn.weight": (d, 3 * d), "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d), "attn.c_proj.bias": (d,),
        "ln_2.weight": (d,), "ln_2.bias": (d,),
        "mlp.c_fc.weight": (d, 4 * d), "mlp.c_fc.bias": (4 * d,),
        "mlp.c_proj.weight": (4 * d, d), "mlp.c_proj.bias": (d,),
    }  # fmt: skip
    return {
        "wte.weight": (vocabulary, d),
        "wpe.weight": (context, d),
        **{f"h.{i}.{name}": shape for i in range(n_layer) for name, shape in block.items()},
        "ln_f.weight": (d,),
        "ln_f.bias": (d,),
    }


def find(name: str) -> list[torch.Tensor]:
    """The parameters of the model called `name`.

    Args:
        name: a size of GPT-2, or `module:factory`: a callable that returns a Module or an iterable of tensors, or such
            an object itself. The callable runs on the meta device, where tensors have no memory, or, if it cannot,
            for real.

    Raises:
        ValueError: there is none, it raises, or it has no parameters.
    """
    if ":" not in name:
        if name not in GPT2:
            raise ValueError(f"unknown model {name!r}: {nearest(name, [*GPT2, 'module:factory'])}")
        return [nn.Parameter(torch.empty(shape, device="meta")) for shape in gpt2(*GPT2[name]).values()]
    made = named(name)
    if callable(made) and not isinstance(made, nn.Module):
        try:
            made = _build(made)
        except Exception as error:  # it is anybody's
            raise ValueError(f"{name} raised {type(error).__name__}: {first_line(error)}") from error
    if isinstance(made, nn.Module):
        made = made.parameters()
    if isinstance(made, torch.Tensor) or not isinstance(made, Iterable):
        raise ValueError(f"{name} must be or return a Module or an iterable of tensors, got {type(made).__name__}")
    params = list(made)
    if not params:
        raise ValueError(f"{name} has no parameters")
    for p in params:
        if not isinstance(p, torch.Tensor):
            raise ValueError(
                f"{name} must be or return a Module or an iterable of tensors, got one of {type(p).__name__}"
            )
        if nn.parameter.is_lazy(p):
            raise ValueError(f"{name} has parameters without a shape yet; run its lazy layers once in the factory")
    return params


def _build(factory: Callable[[], Any]) -> Any:
    """What a factory returns, on the meta device if it can."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # loading pretrained values does nothing there, and says so
            return _made(factory)
    except Exception:
        return _made(factory)


def _made(factory: Callable[[], Any]) -> Any:
    made = factory()
    return list(made) if isinstance(made, Iterator) else made
