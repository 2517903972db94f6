"""Our axes as published ones, which are products of neighbours: heads [N, H] are rows [N * H].

slices of (N, H, D), (N * H, D) --regroup--> slices of (N * H, D)
"""

import math


def regroup(
    shape: tuple[int, ...], index: tuple[slice, ...], target: tuple[int, ...]
) -> tuple[slice, ...]:
    """An index into `shape` as one into `target`, whose axes are products of neighbouring axes.

    Only the first axis of a group may be cut: heads [N, H] are rows [N*H].
    """
    result, axis = [], 0
    for size in target:
        group, product = [], 1
        while axis < len(shape) and (product < size or (not group and shape[axis] == size)):
            group.append(axis)
            product *= shape[axis]
            axis += 1
        if product != size:
            raise ValueError(f"{shape} does not group into {target}")
        first, rest = (group[0], group[1:]) if group else (None, [])
        if any(index[a].indices(shape[a])[:2] != (0, shape[a]) for a in rest):
            raise ValueError(f"{index} cuts inside a group of {target}")
        start, stop, _ = index[first].indices(shape[first]) if first is not None else (0, 1, 1)
        inner = math.prod(shape[a] for a in rest)
        result.append(slice(start * inner, stop * inner))
    if axis != len(shape):
        raise ValueError(f"{shape} does not group into {target}")
    return tuple(result)
