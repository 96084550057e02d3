"""What a computation would take, told by running it on tensors that have sizes and no numbers.

Every operation passes through a `Ledger`, which adds up the bytes that live at once, the arithmetic and the traffic.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from varpi.runtime.sizes import on_cpu
from varpi.runtime.stages import Stages


@dataclass
class Stage:
    """What one stage took, over all its turns."""

    top: int = 0
    """Most bytes that lived at once while it ran."""
    added: int = 0
    """Most bytes on top of what lived when it began."""
    kept: int = 0
    """Most bytes that it left behind."""
    flops: Counter[torch.dtype] = field(default_factory=Counter)
    """Of matrix products, convolutions and attention by their type, two per multiply-add."""
    bytes: int = 0
    """Read and written by all other operations."""


class Ledger(TorchDispatchMode):
    """Within it, tensors have no numbers: `with Ledger() as ledger: ...`.

    Whatever asks for a number gets 1 (true), and a mask selects nothing, as where all is in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes of all tensors that are there."""
        self.peak = 0
        self.stages: dict[str, Stage] = defaultdict(Stage)
        self._open = [self.stages["between"]]
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._within = ExitStack()

    def __enter__(self) -> Self:
        self._within.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._within.close()

    def forget(self) -> None:
        """Begin counting anew, with what lives now."""
        self.peak = self.live
        self.stages.clear()
        self._open = [self.stages["between"]]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens within counts as this stage's."""
        begun, turn = self.live, Stage(top=self.live)
        self._open.append(turn)
        try:
            yield
        finally:
            self._open.pop()
            stage = self.stages[name]
            stage.top = max(stage.top, turn.top)
            stage.added = max(stage.added, turn.top - begun)
            stage.kept = max(stage.kept, self.live - begun)
            stage.flops += turn.flops
            stage.bytes += turn.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            return args[0].new_empty((0, *args[0].shape[args[1][0].ndim :]))
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in results:
            self._enter(tensor)
        if func is torch.ops.aten.convolution.default and on_cpu(out) and not _channels_last(args[0]):
            self._reach(self.live + args[0].nbytes + out.nbytes)  # oneDNN's copies of both, in a layout of its own
        self._count(func, args, kwargs, out, results)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, results: list[Tensor]) -> None:
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self._open[-1].flops[results[0].dtype] += count(*args, **kwargs, out_val=out)
        elif not func.is_view:
            moved = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] + results
            self._open[-1].bytes += sum(tensor.nbytes for tensor in moved)

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._leave(key, size))
            self.live += size
            self._reach(self.live)

    def _reach(self, size: int) -> None:
        self.peak = max(self.peak, size)
        self._open[-1].top = max(self._open[-1].top, size)

    def _leave(self, key: int, size: int) -> None:
        self.live -= size
        del self._storages[key]


def _channels_last(images: Tensor) -> bool:
    return images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)


class LedgerStages(Stages):
    """Stages that tell a ledger where they begin and end."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with self._ledger.stage(name), super().__call__(name):
            yield


def enter(modules: Iterable[nn.Module]) -> None:
    """Within a ledger, give modules of the meta device weights there, in place; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    for part in dict.fromkeys(part for module in modules for part in module.modules()):
        for tensors in cast("list[dict[str, Any]]", [part._parameters, part._buffers]):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[id(old)]
