"""Values as a file holds them: what `torch.load` takes without running code, and tags for what it refuses."""

from collections import Counter, OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch
from torch import nn

_TAG = "schuss: "
"""Of the keys that stand for what `torch.load` refuses."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def encode(value: Any, where: str) -> Any:
    """A value as a file holds it; NumPy's under a tag.

    Raises:
        TypeError: it has no place in a file; the message names `where`.
    """
    kind = type(value)
    if _is_refused(value):
        return {_TAG + kind.__name__: hex(value) if value else ""}
    if kind in _PLAIN:
        return value
    if kind in (torch.Tensor, nn.Parameter):
        if value.is_meta:
            raise TypeError(f"{where} is a tensor on the meta device, which has no elements to save")
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, np.ma.MaskedArray):
        try:
            tensor = torch.from_numpy(np.array(value))
        except (TypeError, ValueError):
            raise TypeError(f"{where} is of NumPy's dtype {value.dtype}, which torch does not have") from None
        return {_TAG + ("array" if isinstance(value, np.ndarray) else "number"): tensor}
    if kind is set:
        return {encode_key(item, where) for item in value}
    if kind in (list, tuple):
        return kind(encode(item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind in (dict, OrderedDict, Counter, defaultdict):
        new: Any = OrderedDict() if kind is OrderedDict else Counter() if kind is Counter else {}
        for key, item in value.items():
            new[encode_key(key, where)] = encode(item, f"{where}[{key!r}]")
        for name, item in getattr(value, "__dict__", {}).items():  # a module's versions
            setattr(new, name, encode(item, f"{where}.{name}"))
        return new
    if isinstance(value, torch.Tensor):
        raise TypeError(
            f"{where} is a {kind.__name__}, which this file does not hold; sharded models belong to "
            "torch.distributed.checkpoint"
        )
    raise TypeError(
        f"{where} is of type {kind.__name__}, which cannot be loaded without running code; save tensors, numbers, "
        "strings, and lists, tuples, dicts and sets of them, or an object with state_dict and load_state_dict"
    )


def encode_key(key: Any, where: str) -> Any:
    """The key of a dict as a file holds it; TypeError if it has no place there."""
    if type(key) is tuple:
        return tuple(encode_key(item, where) for item in key)
    if type(key) not in _PLAIN or _is_refused(key) or (isinstance(key, str) and key.startswith(_TAG)):
        raise TypeError(f"{where} has {key!r} ({type(key).__name__}) for a key; use other strings and numbers")
    return key


def _is_refused(value: Any) -> bool:
    """Whether it is plain, and `torch.load` refuses it nevertheless."""
    return (type(value) is bytes and not value) or (type(value) is int and value.bit_length() > 2000)


def decode(value: Any) -> Any:
    """What was encoded. Containers are new."""
    if isinstance(value, (list, tuple, set)) and type(value) is not torch.Size:
        return type(value)(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and isinstance(key := next(iter(value)), str) and key.startswith(_TAG):
        if key in (_TAG + "int", _TAG + "bytes"):
            return int(value[key], 16) if key == _TAG + "int" else b""
        array = value[key].cpu().numpy()
        return array if key == _TAG + "array" else array[()]
    new: Any = type(value)()
    for key, item in value.items():
        new[key] = decode(item)
    if hasattr(value, "__dict__"):
        vars(new).update(decode(vars(value)))
    return new
