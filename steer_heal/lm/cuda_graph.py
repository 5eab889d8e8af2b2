"""Record work of fixed shapes once as a CUDA graph and replay it, which avoids launching every kernel separately.

A replay runs no Python: anything that changes from one run to the next must be in a tensor that stays at the same
address. `tests/lm/test_cuda_graph.py` records and compares the steps of all families on a CPU by other means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from loguru import logger
from torch import Tensor

WARM_UP = 2  # runs before recording, in which libraries choose kernels and allocate workspace
SYNCHRONISES = "called a synchronizing CUDA operation"  # torch's error message in its sync debug mode


def recorded(work: Callable[[], Tensor], changes: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Return a function that does the same as `work` from a graph; each result is valid until the next call.

    `changes` are the tensors that carry state from one run of `work` to the next; their values are restored before this
    returns. Work that synchronises with the device cannot be recorded: it is returned unchanged, with a warning. Raises
    RuntimeError if the graph gives a different result from the work it was recorded from.
    """
    before = [tensor.clone() for tensor in changes]

    def restore() -> None:
        for tensor, value in zip(changes, before, strict=True):
            tensor.copy_(value)

    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        waits = _waits(work)
        restore()
        for _ in range(0 if waits else WARM_UP):
            expected = work()
            restore()
    here.wait_stream(side)
    if waits:
        logger.warning("generate: this model waits for the device within a step, so no CUDA graph is recorded for it")
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    graph.replay()
    restore()
    if not torch.allclose(result, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()), equal_nan=True):
        raise RuntimeError("a step replayed from a CUDA graph gives different logits from the step itself; "
                           "use runtime.cuda_graphs=false")  # fmt: skip

    def replayed() -> Tensor:
        graph.replay()
        return result

    return replayed


def _waits(work: Callable[[], Tensor]) -> bool:
    """Return True if `work` makes the host wait for the device, as when Python reads a value; it then stops midway."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if SYNCHRONISES not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False
