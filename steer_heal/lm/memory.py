"""Fit batch sizes to the available memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from loguru import logger

from steer_heal.system import control_groups
from steer_heal.system.control_groups import lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
SHARE = 0.5  # of free memory that may be planned for: estimates are rough, and other processes need some too
# For cgroup versions 2 and 1: where it is mounted, files with limit and usage, and the cache's name in memory.stat.
GROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# From CUDA and MPS, from torch on the CPU, from C++, and from oneDNN, which multiplies bfloat16 on the CPU.
SAYINGS = ("out of memory", "DefaultCPUAllocator", "bad_alloc", "could not create a primitive")

_fitted: dict[Hashable, int] = {}  # (what, alike) -> the number that is tried at once since memory ran out


def in_parts(what: str, n: int, most: int, run: Callable[[slice], Sequence[T]], alike: Hashable = None) -> Iterator[T]:
    """Yield the results of n items, at most `most` at once; when memory runs out, halve that number.

    The smaller number holds for the rest of the process, for items of the same `what` and `alike`, which need the same
    memory each. Raises what `run` raised if there is not enough memory for a single item.
    """
    begin = 0
    while begin < n:
        size = min(most, _fitted.get((what, alike), most), n - begin)
        done = _attempt(run, slice(begin, begin + size), size > 1)
        if done is None:
            _fitted[what, alike] = size // 2
            logger.warning("{}: out of memory with {} at once; continuing with {}", what, size, size // 2)
            _release()
            continue
        yield from done
        begin += size


def _attempt(run: Callable[[slice], Sequence[T]], part: slice, may_fail: bool) -> Sequence[T] | None:
    """Run a part; return None if memory ran out. What the attempt allocated is free again once this returns."""
    try:
        return run(part)
    except (RuntimeError, MemoryError) as error:
        if not may_fail or not out_of_memory(error):
            raise
        return None


def out_of_memory(error: Exception) -> bool:
    """Return True if an allocation failed: CUDA has an error class for it, all others a RuntimeError with a message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in SAYINGS)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows_that_fit(model: PreTrainedModel, prompt: int, new: int) -> int:
    """Estimate how many rows of `prompt + new` tokens can be generated at once in half of the free memory; at least 1.

    The estimate is rough: keys and values of all tokens, states within a block during the prompt pass, and logits.
    """
    free = available(model.device)
    if free is None:
        return sys.maxsize
    config = model.config.get_text_config()
    layers = list(getattr(config, "per_layer_config", ())) or [config] * config.num_hidden_layers  # Gemma 4's differ
    cached = 2 * sum(map(_keys, layers)) * (prompt + new) * model.dtype.itemsize
    transient = prompt * (4 * config.hidden_size + 3 * max(map(_inner, layers))) * model.dtype.itemsize
    logits = 4 * 4 * config.vocab_size
    return max(1, int(SHARE * free / (cached + transient + logits)))


def _keys(layer: Any) -> int:
    """Return how many numbers a block with this configuration caches per token as keys; values take as many."""
    all_heads = getattr(layer, "num_attention_heads", 1)  # Mamba has none
    heads = getattr(layer, "num_key_value_heads", None) or all_heads
    width = getattr(layer, "head_dim", None) or layer.hidden_size // all_heads
    return int(heads * width)


def _inner(layer: Any) -> int:
    """Return the width of a block's feed-forward part; the largest if the field lists every block's, as in Gemma 3n."""
    inner = getattr(layer, "intermediate_size", None) or 4 * layer.hidden_size
    return int(max(inner) if isinstance(inner, Sequence) else inner)


def available(device: torch.device) -> int | None:
    """Return the bytes that could be allocated on a device; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or sys.platform != "linux":
        return None
    found = [
        line for line in lines(control_groups.PROC / "meminfo") if line.startswith("MemAvailable")
    ]  # absent in WSL 1
    return min([1024 * int(found[0].split()[1]), *_cgroup_headroom()]) if found else None


def _cgroup_headroom() -> list[int]:
    """Return the bytes left under each limit on this process's cgroup and its parents (cluster jobs, containers)."""
    found = list[int]()
    for name, limit, used, cache in GROUP_FILES:
        for folder in control_groups.folders(name, name):
            most = lines(folder / limit)
            if most and most[0] != "max":
                taken = sum(int(line) for line in lines(folder / used))
                stat = dict(line.split() for line in lines(folder / "memory.stat"))
                found.append(max(0, int(most[0]) - taken + int(stat.get(cache, 0))))  # cache is reclaimable
    return found
