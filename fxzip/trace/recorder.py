"""The dispatch mode that writes every ATen call it sees into an fx.Graph."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from ..errors import TraceError
from .guards import recorded
from .linear import WHOLE
from .lines import user_line, where

aten = torch.ops.aten

# Their tensor operand only lends its shape: the value is a constant whatever the operand holds.
SHAPE_ONLY = frozenset(
    {
        aten.zeros_like,
        aten.ones_like,
        aten.full_like,
        aten.empty_like,
        aten.new_zeros,
        aten.new_ones,
        aten.new_full,
        aten.new_empty,
        aten.new_empty_strided,
    }
)

# No values alias in a functional graph, so these change nothing; that ATen calls them may depend on strides.
IDENTITIES = frozenset({aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh, aten.lift_fresh_copy})
# One name for one thing; a reshape copies where it must, so the graph does not depend on strides.
SYNONYMS = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    **WHOLE,
}


class Recorder(TorchDispatchMode):
    """Writes the ATen calls made beneath it into `graph`; knows tensors by identity, as long as they live."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not through `torch._dynamo.disable`, whose import takes two seconds: nothing is compiled beneath us."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.onednn = torch._C._get_mkldnn_enabled()
        self.origin: fx.Node | None = None
        self.origins: dict[fx.Node, fx.Node | None] = {}
        self.closed = False  # after the forward, functionalize writes changed arguments back: not ours
        self._nodes = WeakIdKeyDictionary()  # Tensor -> its node; what the model has dropped is not kept alive
        self._by_storage: defaultdict[int, list[TensorWeakRef]] = defaultdict(list)
        self._stale = WeakIdKeyDictionary()  # views of what was written in place since: their node is out of date
        self._last_placeholder: fx.Node | None = None

    # ------------------------------------------------------------------ placeholders

    def parameter(self, name: str, tensor: Tensor, kind: str, constant: bool = False) -> fx.Node:
        """Placeholder of a parameter or buffer. Index tables and other non-floating buffers are constants."""
        node = self._placeholder("p_" + re.sub(r"\W", "_", name), tensor)
        node.meta.update(parameter=name, kind=kind, value=tensor.detach())
        if constant or not (tensor.is_floating_point() or tensor.is_complex()):
            node.meta["const"] = tensor.detach()
        return node

    def input(self, tensor: Tensor) -> fx.Node:
        """Placeholder of one input tensor."""
        return self.bind(tensor, self._placeholder("input", tensor))

    def constant(self, tensor: Tensor) -> fx.Node:
        """Placeholder of a tensor that is part of the model's code: a literal or a plain attribute."""
        node = self._placeholder("constant", tensor)
        node.meta.update(const=tensor.detach().clone(), fixed=True)
        return self.bind(tensor, node)

    def _placeholder(self, name: str, tensor: Tensor) -> fx.Node:
        with self.graph.inserting_after(self._last_placeholder):
            node = self.graph.placeholder(name)
        self._last_placeholder = node
        self._describe(node, tensor, None)
        return node

    def _describe(self, node: fx.Node, tensor: Tensor, origin: fx.Node | None) -> None:
        self.origins[node] = origin
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype)
        node.meta.update(origin=origin.name if origin else None, line=user_line(origin))

    def bind(self, tensor: Tensor, node: fx.Node) -> fx.Node:
        """From here on `tensor` is `node`'s value."""
        self._nodes[tensor] = node
        self._stale.pop(tensor, None)
        self._by_storage[_storage(tensor)].append(TensorWeakRef(tensor))
        return node

    def node_behind(self, value: Any) -> Any:
        """Node of a tensor as the model sees it (a functional wrapper); anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if torch._is_functional_tensor(value):  # pyright: ignore[reportPrivateImportUsage]
            torch._sync(value)  # pyright: ignore[reportPrivateImportUsage]
            value = torch._from_functional_tensor(value)  # pyright: ignore[reportPrivateImportUsage]
        return self._node_of(value)

    def _node_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value in self._stale:
            raise TraceError(
                f"{where(self.origin)} reads a view of %{self._nodes[value]} after an in-place write to"
                f" what it views. Write it without the in-place change"
            )
        return self._nodes.get(value) or self.constant(value)

    # ------------------------------------------------------------------ operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        writes = func._schema.is_mutable
        if self.closed:
            return args[0] if writes else func(*args, **kwargs)
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        leaves = [self._node_of(x) for x in leaves]
        node_args, node_kwargs = tree_unflatten(leaves, spec)
        operands = [x for x in leaves if isinstance(x, fx.Node)]
        constant = func.overloadpacket in SHAPE_ONLY or all("const" in x.meta for x in operands)
        if writes:
            return self._write(func, args, kwargs, node_args, node_kwargs, constant)
        result = recorded(func, args, kwargs, self.onednn)
        if not any(isinstance(x, Tensor) for x in tree_flatten(result)[0]):
            self._refuse_reading(func, operands)
            return result
        if func.overloadpacket in IDENTITIES:
            self.bind(result, node_args[0])
            return result
        random = _is_random(func, args, kwargs)
        node = self.graph.call_function(SYNONYMS.get(func) or func, node_args, node_kwargs)
        node.meta.update(random=True) if random else None
        self._attach(node, result, constant and not random)
        return result

    def _attach(self, node: fx.Node, result: Any, constant: bool) -> None:
        """Bind a result to its node; several results to a getitem node each."""
        if isinstance(result, Tensor):
            self._describe(node, result, self.origin)
            self.bind(result, node)
            if constant:
                fixed = all(x.meta.get("fixed") for x in node.all_input_nodes)
                node.meta.update(const=result.detach().clone(), fixed=fixed)
            return
        self.origins[node] = self.origin
        node.meta["results"] = tuple((tuple(r.shape), r.dtype) if isinstance(r, Tensor) else None for r in result)
        if constant:
            node.meta["fixed"] = False  # its getitem nodes hold the constants
        node.meta.update(shape=None, dtype=None, line=user_line(self.origin))
        node.meta["origin"] = self.origin.name if self.origin else None
        for k, part in enumerate(result):
            if any(isinstance(x, Tensor) for x in tree_flatten(part)[0]):
                self._attach(self.graph.call_function(operator.getitem, (node, k)), part, constant)

    def _write(self, func, args, kwargs, node_args, node_kwargs, constant: bool) -> Any:
        """A write below functionalize: ATen's composite operators change their own temporaries in place."""
        if func is aten.as_strided_.default and _same_view(*args):
            return func(*args, **kwargs)
        target = args[0] if args and isinstance(args[0], Tensor) else None
        pure = _pure(func)
        if torch.Tag.inplace_view in func.tags and pure is not None and not constant:
            # transpose_ and the like: the tensor gets a new shape, memory and other views of it keep their values
            node = self.graph.call_function(pure, node_args, node_kwargs)
            self._attach(node, func(*args, **kwargs), constant=False)
            return target
        if _is_random(func, args, kwargs):
            raise random_forward(func, self.origin)
        if target is None or (pure is None and not constant):
            raise TraceError(
                f"{func} at {where(self.origin)} writes in place to %{node_args[0]}, and no pure operator"
                f" does the same. Write it without the in-place change"
            )
        living = (ref() for ref in self._by_storage[_storage(target)])
        sharing = [x for x in living if x is not None and x is not target and _same_memory(x, target)]
        result = func(*args, **kwargs)
        if constant:
            for x in (target, *sharing):
                self.constant(x)  # its value from here on
            return result
        assert pure is not None
        node = self.graph.call_function(pure, node_args, node_kwargs)
        self._stale.update((x, True) for x in sharing)
        self._attach(node, target, constant=False)
        self.bind(result, node)
        return result

    def _refuse_reading(self, func, operands: list[fx.Node]) -> None:
        """A number read off a parameter steers Python code: the graph would hold for these weights only."""
        if func is aten._local_scalar_dense.default and any(depends_on_parameters(x) for x in operands):
            raise TraceError(
                f"{where(self.origin)} reads a parameter-dependent value into Python (item(), bool() or"
                f" float()), so the graph would depend on the weights. Compute with tensors instead"
            )


def depends_on_parameters(node: fx.Node) -> bool:
    """Whether a floating parameter or buffer is upstream of a node that is not constant."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        x = stack.pop()
        if x in seen or "const" in x.meta:
            continue
        if "parameter" in x.meta:
            return True
        seen.add(x)
        stack.extend(x.all_input_nodes)
    return False


def random_forward(operator: Any, origin: fx.Node | None) -> TraceError:
    """The error for a forward that draws random numbers in eval mode."""
    return TraceError(
        f"the forward is random in eval mode: {operator} at {where(origin)}. Two passes would differ; make it"
        f" depend on self.training, or take the noise as an input"
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """The address of a storage that is gone may be another's."""
    return _storage(a) == _storage(b) and _overlap(a, b)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on one storage share an element."""
    if a.dtype != b.dtype or a.numel() == 0 or b.numel() == 0:
        return a.numel() > 0 and b.numel() > 0
    spans: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])  # step -> how often at least, at most
    for sign, x in ((1, a), (-1, b)):
        for size, step in zip(x.shape, x.stride(), strict=True):
            spans[step][sign > 0] += sign * (size - 1)
    spans.pop(0, None)
    return _reaches(int(b.storage_offset() - a.storage_offset()), sorted(spans.items(), reverse=True))


def _reaches(gap: int, spans: list[tuple[int, list[int]]]) -> bool:
    """Whether steps of these lengths, each at least and at most so often, can add up to `gap`."""
    if not spans:
        return gap == 0
    (step, (least, most)), rest = spans[0], spans[1:]
    low, high = (sum(s * span[k] for s, span in rest) for k in (0, 1))
    counts = range(max(least, -((high - gap) // step)), min(most, (gap - low) // step) + 1)
    return any(_reaches(gap - count * step, rest) for count in counts)


@cache
def _pure(func) -> Any:
    """`aten.add.Tensor` for `aten.add_.Tensor`, `aten.transpose.int` for `aten.transpose_`; None without one."""
    name = func._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    if packet is None or hasattr(packet, func._overloadname):
        return getattr(packet, func._overloadname, None)
    overloads = (getattr(packet, o) for o in packet.overloads())
    return next((o for o in overloads if _arguments(o) == _arguments(func)), None)


def _arguments(func) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in func._schema.arguments]


def _same_view(tensor: Tensor, size, stride, storage_offset: int | None = None) -> bool:
    """as_strided_ that only renames the strides of axes of size one (ATen does, for channels last)."""
    moved = any(n > 1 and a != b for n, a, b in zip(size, tensor.stride(), stride, strict=False))
    offset = tensor.storage_offset()
    return tuple(size) == tuple(tensor.shape) and not moved and storage_offset in (None, offset)


def _is_random(func, args, kwargs) -> bool:
    """Draws from a generator; dropout and the like with their `train` flag off or probability 0 do not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    given.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    given.update(kwargs)
    if given.get("train") is False or given.get("training") is False:
        return False
    return given.get("dropout_p", given.get("p")) != 0.0
