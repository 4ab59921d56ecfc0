"""The compiled loops of the CPU back end: over chunks of tensors, and over what may have changed since the last step.

Loaded through `schuss.engine.cache`, so that its machine code lies in the same folder as that of the kernels.
"""
# mypy: ignore-errors
# (Numba infers the types of what it compiles; mypy does not know its intrinsics.)

from numba import float32, float64, int64, njit, prange

from schuss.engine.native import c_call_status, c_call_word, call_kernel, load, prefetch, store
from schuss.engine.numba_kernel import CHUNK

# Functions that only compiled code calls have no wrapper for Python: they compile in half the time.
inner = njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)

AHEAD = 4  # tensors that memory is asked for before they are looked at
OVERHEAD = 512  # what starting a tensor costs, in elements, so that threads get equal work from small tensors too


@njit(cache=True, nogil=True)
def locate(weight, size, target):
    """The first (tensor, chunk) at or after the position `target` of the weight prefix sums."""
    low, high = 0, len(size)
    while low < high:
        middle = (low + high) // 2
        if weight[middle + 1] <= target:
            low = middle + 1
        else:
            high = middle
    if low == len(size):
        return low, 0
    chunk = (target - weight[low] + CHUNK - 1) // CHUNK
    if chunk * CHUNK >= size[low] and target > weight[low]:
        return low + 1, 0
    return low, chunk


@njit(cache=True, nogil=True)
def walk(kernel, context, size, weight, part, parts):
    """Call the kernel on every chunk of one of `parts` equal shares."""
    total = weight[-1]
    tensor, chunk = locate(weight, size, total // parts * part + total % parts * part // parts)
    last = part + 1
    end, end_chunk = locate(weight, size, total // parts * last + total % parts * last // parts)
    while tensor < end or (tensor == end and chunk < end_chunk):
        start = chunk * CHUNK
        if start < size[tensor]:
            call_kernel(kernel, context, tensor, start, min(CHUNK, size[tensor] - start))
            chunk += 1
        else:
            tensor, chunk = tensor + 1, 0


@njit(cache=True, nogil=True)
def advance(scalar_address, scalar_is_double, active, row_of, values):
    """Write the new per-tensor scalars, one row of `values` for all tensors of a row."""
    for tensor in range(len(active)):
        if active[tensor]:
            for k in range(len(scalar_is_double)):
                if scalar_is_double[k]:
                    store(scalar_address[tensor, k], values[row_of[tensor], k])
                else:
                    store(scalar_address[tensor, k], float32(values[row_of[tensor], k]))


@inner
def _number_at(address, is_double):
    return load(address, float64) if is_double else float64(load(address, float32))


@njit(cache=True, nogil=True)
def read(scalar_address, scalar_is_double, values):
    """Read the per-tensor scalars: [tensor, scalar] in float64."""
    for tensor in range(values.shape[0]):
        for k in range(values.shape[1]):
            values[tensor, k] = _number_at(scalar_address[tensor, k], scalar_is_double[k])


@njit(cache=True, nogil=True)
def gather(scalar_address, scalar_is_double, active, row_of, seen, values):
    """Read the per-tensor scalars by row; False if tensors of one row no longer agree."""
    seen[:] = False
    for tensor in range(len(active)):
        if not active[tensor]:
            continue
        row = row_of[tensor]
        for k in range(len(scalar_is_double)):
            value = _number_at(scalar_address[tensor, k], scalar_is_double[k])
            if not seen[row]:
                values[row, k] = value
            elif values[row, k] != value:
                return False
        seen[row] = True
    return True


@njit(cache=True, nogil=True)
def launch_serial(kernel, context, size, weight, scalar_address, scalar_is_double, active, row_of, values):
    """Update every tensor, then its scalars: one call, which no signal can interrupt halfway."""
    walk(kernel, context, size, weight, 0, 1)
    advance(scalar_address, scalar_is_double, active, row_of, values)


@njit(cache=True, nogil=True, parallel=True)
def launch_parallel(parts, kernel, context, size, weight, scalar_address, scalar_is_double, active, row_of, values):
    """`launch_serial` on several threads. The chunks are the same whatever their number, and so are the bits."""
    for part in prange(parts):
        walk(kernel, context, size, weight, int64(part), parts)
    advance(scalar_address, scalar_is_double, active, row_of, values)


@njit(cache=True, nogil=True, parallel=True)
def sweep_parallel(parts, kernel, context, size, weight):
    """Call a kernel that updates nothing on every chunk, on several threads."""
    for part in prange(parts):
        walk(kernel, context, size, weight, int64(part), parts)


@njit(cache=True)
def same_objects(list_get, sequence, expected):
    """Whether the Python list at `sequence` holds exactly the objects at the addresses `expected`, by identity."""
    for i in range(len(expected)):  # noqa: SIM110 (Numba compiles a loop, not a generator)
        if c_call_word(list_get, sequence, i) != expected[i]:
            return False
    return True


@inner
def _same_layout(api, handle, layout, begin, end, scratch, out):
    """Whether sizes and strides are those in layout[begin:end]; strides of dimensions of size 1 do not count."""
    dimensions = (end - begin) // 2
    c_call_status(api[4], handle, out)
    if scratch[0] != dimensions:
        return False
    c_call_status(api[5], handle, out)
    sizes = scratch[0]
    c_call_status(api[6], handle, out)
    strides = scratch[0]
    for d in range(dimensions):
        size = load(sizes + 8 * d, int64)
        if size != layout[begin + d]:
            return False
        if size > 1 and load(strides + 8 * d, int64) != layout[begin + dimensions + d]:
            return False
    return True


@inner
def _prefetch_tensor(address):
    """The C++ object that a handle points to: three cache lines."""
    prefetch(address)
    prefetch(address + 64)
    prefetch(address + 128)


@njit(cache=True)
def unchanged(
    api, scratch, out, none, tensor_type, handle_offset, grads, params, objects, dicts, keys, address, scalar_address,
    numel, layout, layout_begin, traits, active,
):  # fmt: skip
    """Compare everything a table of addresses rests on with what is there now, and put in the gradients' addresses.

    Returns -1 if something else than the gradients' addresses and presence has changed (the plan must be made anew);
    else 1 if other tensors than last time have a gradient, plus 2 if a gradient lies inside a larger storage.

    Args:
        api: addresses of C functions: PyList_GetItem, PyDict_GetItem, then torch's stable C interface: data_ptr,
            layout, dim, sizes, strides, dtype, device type, numel, is_contiguous,
            storage offset.
        scratch, out: room for one result of a C function, and its address.
        none, tensor_type: addresses of None and of torch.Tensor.
        handle_offset: where a Python tensor keeps its C++ handle.
        grads: address of the list of gradients.
        params: addresses of the parameters.
        objects: [tensor, key] addresses of the Python tensors in the states.
        dicts, keys: addresses of each tensor's state dict and of the names in it, in the order of `objects`.
        address, scalar_address: [tensor, role] and [tensor, scalar] data pointers, as of the last step.
        numel: elements of each parameter if it is contiguous, else -1.
        layout, layout_begin: sizes and strides of each parameter.
        traits: [layout, dtype, device type] every gradient must have.
        active: which tensors had a gradient.
    """
    states = address.shape[1] - 2
    pattern = 0
    count = address.shape[0]
    for t in range(count):
        # These objects lie all over memory: ask for those of tensors to come while this one is looked at.
        if t + 2 * AHEAD < count:
            soon = t + 2 * AHEAD
            prefetch(params[soon] + handle_offset)
            prefetch(c_call_word(api[0], grads, soon) + handle_offset)
            for k in range(len(keys)):
                prefetch(objects[soon, k] + handle_offset)
                prefetch(dicts[soon])
        if t + AHEAD < count:
            soon = t + AHEAD
            _prefetch_tensor(load(params[soon] + handle_offset, int64))
            grad = c_call_word(api[0], grads, soon)
            if grad != none:
                _prefetch_tensor(load(grad + handle_offset, int64))
            for k in range(len(keys)):
                _prefetch_tensor(load(objects[soon, k] + handle_offset, int64))
        handle = params[t] + handle_offset
        c_call_status(api[2], handle, out)
        if scratch[0] != address[t, 0]:
            return -1
        if not _same_layout(api, handle, layout, layout_begin[t], layout_begin[t + 1], scratch, out):
            return -1
        for k in range(len(keys)):
            item = objects[t, k]
            if c_call_word(api[1], dicts[t], keys[k]) != item:
                return -1
            c_call_status(api[2], item + handle_offset, out)
            if scratch[0] != (address[t, 2 + k] if k < states else scalar_address[t, k - states]):
                return -1
        grad = c_call_word(api[0], grads, t)
        if grad == none:
            if active[t]:
                active[t] = False
                pattern |= 1
            continue
        if load(grad + 8, int64) != tensor_type:
            return -1
        handle = grad + handle_offset
        for trait in range(3):
            scratch[0] = 0  # these three results are 32 bits wide
            c_call_status(api[3] if trait == 0 else api[6 + trait], handle, out)
            if scratch[0] != traits[trait]:
                return -1
        if numel[t] >= 0:  # torch keeps a gradient of its parameter's shape, which was just compared
            c_call_status(api[9], handle, out)
            if scratch[0] != numel[t]:
                return -1
            scratch[0] = 0  # this result is 8 bits wide
            c_call_status(api[10], handle, out)
            if scratch[0] == 0:
                return -1
        elif not _same_layout(api, handle, layout, layout_begin[t], layout_begin[t + 1], scratch, out):
            return -1
        c_call_status(api[11], handle, out)
        if scratch[0] != 0:
            pattern |= 2
        c_call_status(api[2], handle, out)
        address[t, 1] = scratch[0]
        if not active[t]:
            active[t] = True
            pattern |= 1
    return pattern
