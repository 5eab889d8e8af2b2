"""How much is done at once, where memory decides it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from loguru import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
SHARE = 0.5  # of what is free may be planned with: estimates are rough, and others need some of it too
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Of versions 2 and 1 of control groups: the folder below that, the files of limit and use, and the name of the cache.
GROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# Of CUDA itself and MPS, of torch on the CPU, of C++, and of oneDNN, which multiplies in bfloat16 there.
SAYINGS = ("out of memory", "DefaultCPUAllocator", "bad_alloc", "could not create a primitive")

_fitted: dict[Hashable, int] = {}  # what is done, and to what -> as many as fitted after memory had run out


def in_parts(what: str, n: int, most: int, run: Callable[[slice], Sequence[T]], alike: Hashable = None) -> Iterator[T]:
    """Results of n things, at most so many at once; where memory runs out half as many.

    So it stays in this process for things that take as much each, which are those of the same `alike`.
    Raises what `run` raised when there is no memory for one alone.
    """
    begin = 0
    while begin < n:
        size = min(most, _fitted.get((what, alike), most), n - begin)
        done = _attempt(run, slice(begin, begin + size), size > 1)
        if done is None:
            _fitted[what, alike] = size // 2
            logger.warning("{}: no memory for {} at once; from here on {}", what, size, size // 2)
            _release()
            continue
        yield from done
        begin += size


def _attempt(run: Callable[[slice], Sequence[T]], part: slice, may_fail: bool) -> Sequence[T] | None:
    """None where memory ran out. What it was out of is free again once this has returned."""
    try:
        return run(part)
    except (RuntimeError, MemoryError) as error:
        if not may_fail or not out_of_memory(error):
            raise
        return None


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed: CUDA has a class for it, all else a RuntimeError that says so."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in SAYINGS)


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows_that_fit(model: PreTrainedModel, prompt: int, new: int) -> int:
    """Rows that can be generated side by side within half of the free memory, each of so many tokens; at least 1.

    By a rough estimate: keys and values of all tokens, states within a block while the prompt is read, and logits.
    """
    free = available(model.device)
    if free is None:
        return sys.maxsize
    config = model.config.get_text_config()
    layers = list(getattr(config, "per_layer_config", ())) or [config] * config.num_hidden_layers  # Gemma 4's differ
    kept = 2 * sum(map(_keys, layers)) * (prompt + new) * model.dtype.itemsize
    passing = prompt * (4 * config.hidden_size + 3 * max(map(_inner, layers))) * model.dtype.itemsize
    logits = 4 * 4 * config.vocab_size
    return max(1, int(SHARE * free / (kept + passing + logits)))


def _keys(layer: Any) -> int:
    """Numbers that a block with such a configuration keeps of a token as its keys; of values as many."""
    all_heads = getattr(layer, "num_attention_heads", 1)  # Mamba has none
    heads = getattr(layer, "num_key_value_heads", None) or all_heads
    width = getattr(layer, "head_dim", None) or layer.hidden_size // all_heads
    return int(heads * width)


def _inner(layer: Any) -> int:
    """The width within a block's feed-forward part; the largest where it stands for every block, as in Gemma 3n."""
    inner = getattr(layer, "intermediate_size", None) or 4 * layer.hidden_size
    return int(max(inner) if isinstance(inner, Sequence) else inner)


def available(device: torch.device) -> int | None:
    """Bytes that could be taken on a device; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or sys.platform != "linux":
        return None
    told = [line for line in _lines(PROC / "meminfo") if line.startswith("MemAvailable")]  # WSL 1 does not tell
    return min([1024 * int(told[0].split()[1]), *_left_to_groups()]) if told else None


def _left_to_groups() -> list[int]:
    """What each limit above this process's control group leaves, as jobs of a cluster and containers have them."""
    entries = (line.split(":", 2) for line in _lines(PROC / "self/cgroup"))
    places, found = {controllers: place.lstrip("/") for _, controllers, place in entries}, list[int]()
    for name, limit, used, cache in GROUP_FILES:
        root = CGROUPS / name
        here = root / places.get(name, "")
        for folder in (here, *here.parents):
            most = _lines(folder / limit) if folder.is_relative_to(root) else []
            if most and most[0] != "max":
                taken = sum(int(line) for line in _lines(folder / used))
                stat = dict(line.split() for line in _lines(folder / "memory.stat"))
                found.append(max(0, int(most[0]) - taken + int(stat.get(cache, 0))))  # cache gives way
    return found


def _lines(path: Path) -> list[str]:
    """Of one of the kernel's files; none where there is no such file, or where it may not be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
