"""Work of fixed shapes recorded once as a CUDA graph and replayed, which spares the launch of every kernel.

Recording runs none of Python's conditions again: whatever changes from one run to the next must be in a tensor that
stays where it is. `tests/test_graph.py` records the steps of all families on a CPU by other means, and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from loguru import logger
from torch import Tensor

WARM_UP = 2  # runs before recording, in which libraries choose their kernels and take their workspace
SYNCHRONISES = "called a synchronizing CUDA operation"  # what torch says where its debug mode makes an error of one


def recorded(work: Callable[[], Tensor], changes: Sequence[Tensor]) -> Callable[[], Tensor]:
    """What does the same as `work`, from a graph; the result stands until the next call.

    `changes` are the tensors whose value one run of `work` hands to the next; they are as they were when this returns.
    Work that waits for the device cannot be recorded: it is told in a warning, and given back as it is. Raises
    RuntimeError where the graph says something else than the work it was recorded from.
    """
    before = [tensor.clone() for tensor in changes]

    def back() -> None:
        for tensor, value in zip(changes, before, strict=True):
            tensor.copy_(value)

    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        waits = _waits(work)
        back()
        for _ in range(0 if waits else WARM_UP):
            expected = work()
            back()
    here.wait_stream(aside)
    if waits:
        logger.warning("generate: this model waits for the device within a step, so no CUDA graph is made of it")
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    graph.replay()
    back()
    if not torch.allclose(result, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()), equal_nan=True):
        raise RuntimeError("a step replayed from a CUDA graph gives other logits than the step itself; "
                           "runtime.cuda_graphs=false generates without")  # fmt: skip

    def replayed() -> Tensor:
        graph.replay()
        return result

    return replayed


def _waits(work: Callable[[], Tensor]) -> bool:
    """Whether the host waits for the device in it, as where Python looks at a value; it may have stopped half-way."""
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
