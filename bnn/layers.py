"""Where a model's graph uses its sampled weights: linear maps, convolutions, embeddings, added and multiplied vectors.

At the level of aten operations every spelling of a layer (``F.linear``, ``@``, ``einsum``, ``functional_call``,
attention) is one of a few. Each element of a sampled tensor carries its flat index through views, transposes, slices
and copies, so that at its use it is known which entries of the site a weight matrix holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

# One-hot inputs of an embedding, and batched products with different weights, are expanded up to these sizes.
LARGEST_ONE_HOT, MOST_SLICES = 1 << 24, 64

Env = Mapping[Node, Any]


@dataclass(eq=False)
class Tag:
    """Which entries of a site a tensor holds: ``tensor = factor · value.reshape(-1)[index]``."""

    site: str
    index: Tensor
    factor: float = 1.0


@dataclass(eq=False)
class Use:
    """One use of weights: ``rows(output) = inputs @ weightᵀ + bias``.

    :ivar node: whose output gradient is needed.
    :ivar weight: the entries of the site that form the matrix (outputs, inputs); None for a bias alone.
    :ivar bias: the entries (outputs,) of a site that are added.
    :ivar inputs: the rows (rows, inputs), given the values of the graph's nodes.
    :ivar rows: brings a tensor in the shape of the node's output, such as its gradient, into (rows, outputs).
    :ivar sources: nodes whose values ``inputs`` and ``rows`` read.
    :ivar unrows: the inverse of ``rows``; None where the use does not make up the whole output.
    """

    node: Node
    weight: Tag | None
    bias: Tag | None
    inputs: Callable[[Env], Tensor]
    rows: Callable[[Tensor, Env], Tensor]
    sources: tuple[Node, ...] = ()
    unrows: Callable[[Tensor], Tensor] | None = None


@dataclass
class Uses:
    """All uses of the latent sites on the way to the likelihood.

    :ivar found: the recognised ones.
    :ivar opaque: site -> the operation that was not recognised.
    """

    found: list[Use] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)


def uses_of(graph: GraphModule, shapes: Mapping[str, torch.Size], reachable: set[Node]) -> Uses:
    """The uses of the latent sites.

    :param graph: a graph whose first inputs are the values of the sites.
    :param shapes: site -> shape of its value, in the order of the inputs.
    :param reachable: the nodes that the likelihood is computed from.
    """
    finder = _Finder(graph, reachable)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for (site, shape), node in zip(shapes.items(), placeholders, strict=False):
        finder.tags[node] = Tag(site, torch.arange(shape.numel()).reshape(shape))
    for node in graph.graph.nodes:
        if node.op == "call_function" and node in reachable:
            finder.visit(node)
    return finder.uses


# Operations that only move numbers; the same operation moves the indices.
_MOVES = {
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.expand.default, aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.unbind.int, aten.clone.default, aten.alias.default, aten.contiguous.default, aten.narrow.default,
    aten.chunk.default, aten._to_copy.default, aten._reshape_alias.default, aten.diagonal.default,
}  # fmt: skip
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default}
_KEEPS_VALUES_APART = {aten.detach.default}


class _Finder:
    def __init__(self, graph: GraphModule, reachable: set[Node]) -> None:
        self.graph, self.reachable = graph, reachable
        self.tags: dict[Node, Tag | list[Tag]] = {}
        # Outputs of uses, still to be recognised when a bias is added: flat position in the use's rows.
        self.outputs: dict[Node, tuple[Use, Tensor]] = {}
        self.uses = Uses()

    def tag(self, node: Any) -> Tag | None:
        found = self.tags.get(node) if isinstance(node, Node) else None
        return found if isinstance(found, Tag) else None

    def visit(self, node: Node) -> None:
        tagged = [tag for tag in map(self.tags.get, node.all_input_nodes) if tag is not None]
        if node.target in _MOVES or getattr(node.target, "__name__", "") == "getitem":
            self._move(node)
            if tagged and node not in self.tags:
                self._give_up(node, tagged)
            return
        if not tagged or node.target in _KEEPS_VALUES_APART:
            return
        if not (self._scaled(node) or self._recognised(node)):
            self._give_up(node, tagged)

    def _give_up(self, node: Node, tagged: list[Tag | list[Tag]]) -> None:
        for tag in tagged:
            for one in tag if isinstance(tag, list) else [tag]:
                self.uses.opaque.setdefault(one.site, str(node.target).removeprefix("aten."))

    # ---- views

    def _move(self, node: Node) -> None:
        source = node.args[0]
        if not isinstance(source, Node):
            return
        tag = self.tags.get(source)
        if isinstance(tag, list):
            if isinstance(node.args[1], int):
                self.tags[node] = tag[node.args[1]]
        elif tag is not None:
            moved = _moved(node, tag.index)
            if isinstance(moved, Tensor):
                self.tags[node] = Tag(tag.site, moved, tag.factor)
            elif moved is not None:
                self.tags[node] = [Tag(tag.site, part, tag.factor) for part in moved]
        if source in self.outputs:
            use, position = self.outputs[source]
            result = _moved(node, position)
            if isinstance(result, Tensor):
                self.outputs[node] = use, result

    def _scaled(self, node: Node) -> bool:
        """A weight times a number, as nets in the neural-tangent parametrisation write it."""
        if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.neg.default):
            return False
        if node.target is aten.neg.default:
            tag, number = self.tag(node.args[0]), -1.0
        else:
            first, second = node.args[:2]
            divides = node.target in (aten.div.Tensor, aten.div.Scalar)
            tag, other = (self.tag(first), second) if self.tag(first) else (self.tag(second), first)
            value = self._number(other)
            if tag is None or value is None or (divides and self.tag(first) is None):
                return False
            number = 1 / value if divides else value
        if tag is None:
            return False
        self.tags[node] = Tag(tag.site, tag.index.reshape(node.meta["val"].shape), tag.factor * number)
        return True

    def _number(self, value: Any) -> float | None:
        if isinstance(value, Node) and value.op == "get_attr":
            value = getattr(self.graph, str(value.target))
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else None
        return float(value) if isinstance(value, (int, float)) else None

    # ---- layers

    def _recognised(self, node: Node) -> bool:
        target, args = node.target, cast(tuple[Any, ...], node.args)
        if target in (aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default):
            return self._product(node, args[0], args[1], None)
        if target in (aten.addmm.default, aten.baddbmm.default, aten.addmv.default):
            plain = all(value == 1 for value in node.kwargs.values())
            if not plain:
                return False
            if self.tag(args[1]) is None and self.tag(args[2]) is None:
                return self._added(node, args[0])
            return self._product(node, args[1], args[2], args[0])
        if target is aten.convolution.default:
            return self._convolution(node)
        if target is aten.embedding.default:
            return self._rows_of(node, *args[:3])
        if target is aten.index_select.default:
            return bool(args[1] == 0) and self._rows_of(node, args[0], args[2])
        if target is aten.index.Tensor:
            return len(args[1]) == 1 and self._rows_of(node, args[0], args[1][0])
        if target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs and len(args) == 2:
            first, second = args
            if self.tag(second) is not None and self.tag(first) is None:
                return self._added(node, second, -1.0 if target is aten.sub.Tensor else 1.0, to=first)
            if self.tag(first) is not None and self.tag(second) is None:
                return self._added(node, first, to=second if target is aten.add.Tensor else None)
            return False
        if target is aten.mul.Tensor:
            first, second = args
            weight, other = (first, second) if self.tag(first) is not None else (second, first)
            tag = self.tag(weight)
            if tag is None or not isinstance(other, Node) or self.tag(other) is not None:
                return False
            self._elementwise(node, tag, other)
            return True
        return False

    def _product(self, node: Node, left: Any, right: Any, bias: Any) -> bool:
        """A product of weights and data, or of two weights: each is the other's data."""
        tags = (self.tag(left), right, True), (self.tag(right), left, False)
        known = [self._factor(node, tag, data, on_left) for tag, data, on_left in tags if tag is not None]
        if not known or not all(known):
            return False
        return self.tag(bias) is None or self._added(node, bias, to=node)

    def _factor(self, node: Node, tag: Tag, data: Node, on_left: bool) -> bool:
        """One factor of a product, brought to the form ``rows(output) = inputs @ weightᵀ``."""
        index, shape = tag.index, node.meta["val"].shape
        if index.dim() == 1:
            index = index[None] if on_left else index[:, None]
        outputs = index.shape[-2] if on_left else index.shape[-1]
        if len(shape) < 2:  # a vector is one row on the left, one column on the right
            shape = torch.Size((outputs, shape.numel() // outputs) if on_left else (shape.numel() // outputs, outputs))

        def as_matrix(x: Tensor) -> Tensor:
            return x if x.dim() > 1 else x[:, None] if on_left else x[None]

        def turned(x: Tensor) -> Tensor:
            x = x.mT if on_left else x
            return x.reshape(-1, x.shape[-1])

        def unturned(r: Tensor) -> Tensor:
            r = r.reshape(*shape[:-2], shape[-1], shape[-2]).mT if on_left else r
            return r.reshape(node.meta["val"].shape)

        if index.dim() == 2 or (index == index[:1]).all():  # one matrix, repeated
            index = index if index.dim() == 2 else index[0]
            matrix = Tag(tag.site, index if on_left else index.T, tag.factor)
            self._add(node, matrix, data, lambda x: turned(as_matrix(x)), lambda g: turned(g.reshape(shape)), unturned)
            return True
        for k in range(len(index) if len(index) <= MOST_SLICES else 0):  # one for each entry, as attention heads have
            matrix = Tag(tag.site, index[k] if on_left else index[k].T, tag.factor)
            self._add(node, matrix, data, lambda x, k=k: turned(x[k]), lambda g, k=k: turned(g[k]))
        return len(index) <= MOST_SLICES

    def _add(
        self,
        node: Node,
        weight: Tag,
        data: Node,
        inputs: Callable[..., Tensor],
        rows: Callable[..., Tensor],
        unrows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        use = Use(node, weight, None, lambda env: inputs(env[data]), lambda g, env: rows(g), (data,), unrows)
        self.uses.found.append(use)
        if unrows is not None:
            numel, outputs = node.meta["val"].numel(), len(weight.index)
            self.outputs[node] = use, unrows(torch.arange(numel).reshape(-1, outputs))

    def _added(self, node: Node, bias: Any, sign: float = 1.0, to: Any = None) -> bool:
        """A vector added to the output of a use joins it; any other sum is a use of its own."""
        tag = self.tag(bias)
        if tag is None:
            return False
        shape = node.meta["val"].shape
        tag = Tag(tag.site, tag.index, tag.factor * sign)
        use, position = self.outputs.get(to, (None, None)) if isinstance(to, Node) else (None, None)
        alone = to is node or (isinstance(to, Node) and _only_views_between(to, use.node if use else None))
        if use is not None and position is not None and use.bias is None and alone and position.shape == shape:
            assert use.weight is not None
            outputs = len(use.weight.index)
            entries = tag.index.expand(shape).reshape(-1)
            channel = position.reshape(-1) % outputs
            joined = torch.full((outputs,), -1).scatter(0, channel, entries)
            if (joined >= 0).all() and (joined[channel] == entries).all():
                use.bias = Tag(tag.site, joined, tag.factor)
                self.outputs[node] = use, position
                return True
        self._elementwise(node, tag, None)
        return True

    def _elementwise(self, node: Node, tag: Tag, times: Node | None) -> None:
        """A tensor of weights added to, or multiplied with, the data: its gradient is a sum over what it repeats on."""
        shape = node.meta["val"].shape
        index = tag.index.reshape((1,) * (len(shape) - tag.index.dim()) + tag.index.shape)
        repeated = [d for d in range(len(shape)) if (index == index.narrow(d, 0, 1)).all()]
        kept = [d for d in range(len(shape)) if d not in repeated]
        entries = index[tuple(slice(1) if d in repeated else slice(None) for d in range(len(shape)))].reshape(-1)

        def rows(g: Tensor, env: Env) -> Tensor:
            g = g if times is None else g * env[times]
            return g.expand(shape).permute(*repeated, *kept).reshape(-1, len(entries))

        bias, sources = Tag(tag.site, entries, tag.factor), () if times is None else (times,)
        self.uses.found.append(Use(node, None, bias, lambda env: torch.ones(()), rows, sources))

    def _convolution(self, node: Node) -> bool:
        data, weight, bias, stride, padding, dilation, transposed, _, groups = cast(tuple[Any, ...], node.args)
        tag = self.tag(weight)
        shape, val = node.meta["val"].shape, data.meta["val"]
        if self.tag(data) is not None or transposed or len(shape) != val.dim():
            return False
        if tag is None:
            return self._channels(node, bias)
        outputs, kernel = tag.index.shape[0], tag.index.shape[2:]
        per_group, channels = outputs // groups, val.shape[1] // groups
        for k in range(groups):
            group = slice(k * per_group, (k + 1) * per_group)

            def inputs(env: Env, k: int = k) -> Tensor:
                x = env[data][:, k * channels : (k + 1) * channels]
                return patches(x, kernel, stride, padding, dilation)

            def rows(g: Tensor, env: Env, group: slice = group) -> Tensor:
                return g[:, group].flatten(2).mT.reshape(-1, per_group)

            matrix = Tag(tag.site, tag.index[group].reshape(per_group, -1), tag.factor)
            self.uses.found.append(Use(node, matrix, None, inputs, rows, (data,)))
        if groups != 1:
            return self._channels(node, bias) or self.tag(bias) is None
        use = self.uses.found[-1]
        use.bias, use.unrows = self.tag(bias), lambda r: r.reshape(shape[0], -1, outputs).mT.reshape(shape)
        self.outputs[node] = use, use.unrows(torch.arange(shape.numel()).reshape(-1, outputs))
        return True

    def _channels(self, node: Node, bias: Any) -> bool:
        """A bias alone of a convolution."""
        tag = self.tag(bias)
        if tag is None:
            return False
        dims = node.meta["val"].dim() - 2
        self._elementwise(node, Tag(tag.site, tag.index.reshape(-1, *(1,) * dims), tag.factor), None)
        return True

    def _rows_of(self, node: Node, table: Any, tokens: Any, padding: int = -1) -> bool:
        """Rows of a table picked by numbers: a product with one-hot inputs."""
        tag = self.tag(table)
        if tag is None or not isinstance(tokens, Node) or tokens.meta["val"].dtype not in (torch.long, torch.int):
            return False
        count, numel = len(tag.index), tokens.meta["val"].numel()
        if numel * count > LARGEST_ONE_HOT:
            return False

        def one_hot(env: Env) -> Tensor:
            numbers = torch.arange(count, device=env[tokens].device)
            found = env[tokens].reshape(-1, 1).remainder(count) == numbers
            return (found & (numbers != padding)).to(node.meta["val"].dtype)

        def rows(g: Tensor, env: Env) -> Tensor:
            return g.reshape(numel, -1)

        matrix = Tag(tag.site, tag.index.reshape(count, -1).T, tag.factor)
        self.uses.found.append(Use(node, matrix, None, one_hot, rows, (tokens,)))
        return True


def patches(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """The receptive fields ``(examples · locations, channels · kernel)`` of a convolution over 1, 2 or 3 dimensions."""
    dims = len(kernel)
    x = F.pad(x, [p for size in reversed(padding) for p in (size, size)])
    for d in range(dims):
        width = dilation[d] * (kernel[d] - 1) + 1
        x = x.unfold(2 + d, width, stride[d])
    for d in range(dims):
        if dilation[d] > 1:
            x = x.unfold(x.dim() - dims + d, 1, dilation[d]).squeeze(-1)
    x = x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.reshape(x.shape[: 1 + dims].numel(), -1)


def _moved(node: Node, index: Tensor) -> Any:
    if getattr(node.target, "__name__", "") == "getitem":
        return None
    if node.target is aten._to_copy.default:
        return index if node.meta["val"].is_floating_point() else None
    try:
        if len(node.all_input_nodes) > 1:
            return None
        if node.target in _VIEWS:  # the copy before it may be laid out otherwise in memory
            return index.reshape(node.meta["val"].shape)
        result: Any = node.target(index, *node.args[1:])  # type: ignore[operator]
        return list(result) if isinstance(result, (list, tuple)) else result
    except (RuntimeError, TypeError):
        return None


def _only_views_between(node: Node, use: Node | None) -> bool:
    """Whether ``node`` is the use's output, or views of it that nothing else reads: then their gradients are equal."""
    while node is not use:
        if len(node.users) != 1 or node.target not in _MOVES or not isinstance(node.args[0], Node):
            return False
        node = node.args[0]
    return len(node.users) == 1
