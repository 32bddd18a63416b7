"""REPAIR and RESCALE: give merged features the spread that they have in the models.

Averaging features that correlate imperfectly shrinks their variance, layer by layer. Batch-norm statistics that
are recomputed on data undo that; networks without batch norm need this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .distill import Distill
from .errors import InputError
from .infer import Spaces
from .match import Matcher, Matching, Permute, resolve
from .measure import Programs
from .rewrite import Partition, merge_parameters
from .solve.affine import packet
from .solve.slots import arguments
from .trace import state_by_all_names

# operator: (argument of the weight, of the bias, output axis of the weight, feature axis of the value)
AFFINE = {
    "linear": ("weight", "bias", 0, -1),
    "convolution": ("weight", "bias", 0, 1),
    "addmm": ("mat2", "self", 1, -1),
    "native_layer_norm": ("weight", "bias", 0, -1),
    "native_group_norm": ("weight", "bias", 0, 1),
    "native_batch_norm": ("weight", "bias", 0, 1),
}
Aim = Mapping[str, tuple[Tensor, Tensor]]  # value -> two figures per feature
MODIFIERS = {"repair": True, "rescale": False}  # name in "zip+repair" -> shift


@dataclass(frozen=True)
class Repair:
    """method="permute+repair": merge by `matcher`, then rescale every feature to the mean of the models'.

    Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", ICLR 2023, section 4:
    a merged feature gets the mean and the standard deviation that its features have on average in the models.
    shift=False (method="permute+rescale") leaves the mean, as RESCALE there. The correction is written into weight
    and bias of every shared affine layer or norm that has both; nothing stays in the graph. Of a batch norm the
    scale and shift become the features' deviation and mean, its statistics are recomputed.

    >>> Repair(shift=False).name
    'permute+rescale'
    """

    matcher: Matcher = field(default_factory=Permute)
    shift: bool = True

    @property
    def name(self) -> str:
        return f"{self.matcher.name}+{'repair' if self.shift else 'rescale'}"


def split(method: Any, budget: Any = None) -> tuple[Repair | None, Any]:
    """(Repair or None, the method without it), of "zip+repair", a Repair, or any other method; of "solve+distill", the
    `Distill` it stands for.

    Raises InputError for an unknown modifier, one of "solve", or one with a budget.

    >>> split("zip+rescale")[0].shift, split("zip")
    (False, (None, 'zip'))
    """
    if method == Distill.name:
        return None, Distill()
    if isinstance(method, str) and "+" in method:
        name, _, modifier = method.partition("+")
        if modifier not in MODIFIERS:
            raise InputError(f"unknown modifier {modifier!r} in method {method!r}; modifiers: {', '.join(MODIFIERS)};"
                             " of solve, distill")
        if name == "solve":
            raise InputError(f"method {method!r}: solve fits means and deviations itself; use method='solve'")
        method = Repair(resolve(name), MODIFIERS[modifier])
    if not isinstance(method, Repair):
        return None, method
    if budget is not None:
        raise InputError(f"{method.name} keeps the models' widths: leave out budget=, or use method='solve'")
    return replace(method, matcher=resolve(method.matcher)), method.matcher


@dataclass(frozen=True)
class Site:
    """A value [.., c, ..] that is affine in a weight and a bias of its own. axis: of its features;
    out: the weight's axis that makes them; norm: whether it is a batch norm."""

    value: str
    weight: str
    bias: str
    axis: int
    out: int
    norm: bool


@dataclass
class Statistics:
    """Mean and deviation of every feature of a value, streamed, and those of every batch. float64 [c]"""

    batches: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    count: int = 0
    total: Tensor | float = 0.0
    power: Tensor | float = 0.0

    def add(self, value: Tensor, axis: int) -> None:
        rest = [d for d in range(value.dim()) if d != axis % value.dim()]
        n = value.numel() // max(value.shape[axis], 1)
        variance, mean = (s.double() for s in torch.var_mean(value, rest, correction=0))
        self.batches.append((mean, variance.sqrt()))
        self.count, self.total = self.count + n, self.total + n * mean
        self.power = self.power + n * (variance + mean.square())

    def result(self) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self.total) / self.count
        return mean, (torch.as_tensor(self.power) / self.count - mean.square()).clamp(min=0).sqrt()


def repair_parameters(
    graph_modules: Sequence[fx.GraphModule],
    spaces: Spaces,
    cut: Partition,
    matchings: Mapping[str, Matching],
    shared: Mapping[str, Tensor],
    batches: Sequence[tuple],
    shift: bool = True,
    shares: Sequence[float] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """The merged parameters `shared` with every feature's mean and deviation set right, and notices.

    batches: positional arguments, run through all models and twice through the merged weights: while one pass
    corrects every layer batch by batch, all later layers are measured on what they will read; the second corrects
    by what the first one found, and gives what is written. shares: what every model counts in the means.
    Batch-norm statistics have to be recomputed afterwards. Raises InputError where features have no counterpart.
    """
    mixed = [n for n, m in matchings.items() if bool((m.merge < 0).any())]
    if mixed:
        raise InputError(f"repair: {mixed[0]} is a mixture of features, not features; use 'permute' or 'zip'")
    programs = Programs(graph_modules, spaces)
    sites, rest = affine_sites(spaces, cut, shared)
    if not sites:
        return dict(shared), ["repair: no shared layer has a weight and a bias, so nothing was rescaled"]
    parents = [_statistics(programs, i, sites, batches) for i in range(len(graph_modules))]

    def merged(results: Sequence[Mapping[str, tuple[Tensor, Tensor]]]) -> Aim:
        """The models' means and deviations in the coordinates, and by the rule, of the merged biases."""
        both = []
        for k in range(2):
            states = [{s.bias: r[s.value][k] for s in sites} for r in results]
            both.append(merge_parameters(states, spaces, matchings, [s.bias for s in sites], shares))
        return {s.value: (both[0][s.bias], both[1][s.bias]) for s in sites}

    target = merged([{n: s.result() for n, s in p.items()} for p in parents])
    by_batch = [merged([{n: s.batches[k] for n, s in p.items()} for p in parents]) for k in range(len(batches))]
    corrected = replace(programs, states=[{**state_by_all_names(graph_modules[0]), **shared}, *programs.states[1:]])
    first = _pass(corrected, sites, batches, lambda k, name, own: _correction(own, by_batch[k][name], shift))
    change = {n: _correction(s.result(), target[n], shift) for n, s in first.items()}
    second = _pass(corrected, sites, batches, lambda k, name, own: change[name])
    change = {n: _correction(s.result(), target[n], shift) for n, s in second.items()}
    left = f"; {rest} without a bias of their own keep their scale" if rest else ""
    return _written(shared, sites, target, change, shift), [f"repair: {len(sites)} layers rescaled{left}"]


def _written(
    shared: Mapping[str, Tensor], sites: Sequence[Site], target: Aim, change: Aim, shift: bool
) -> dict[str, Tensor]:
    """`shared` with every value y of a site become a y + c, (a, c) = change[site.value]."""
    out = dict(shared)
    for site in sites:
        a, c = change[site.value]
        weight, bias = out[site.weight], out[site.bias]
        if site.norm:  # its statistics will be those of the data
            mean, deviation = target[site.value]
            new = torch.where(weight < 0, -deviation.to(weight), deviation.to(weight)), mean if shift else bias
        else:
            column = a.view([-1] + [1] * (weight.dim() - site.out % weight.dim() - 1))
            new = weight * column.to(weight), a.to(bias) * bias + c.to(bias)
        out[site.weight], out[site.bias] = new[0].to(weight), new[1].to(bias)
    return out


def affine_sites(spaces: Spaces, cut: Partition, shared: Mapping[str, Tensor]) -> tuple[list[Site], int]:
    """Shared affine layers with weight and bias of their own, and how many others there are (save those that
    a batch norm reads: it makes up for them)."""
    sites, rest = [], 0
    for node in spaces.lowered.graph.nodes:
        if node.op != "call_function" or node.meta.get("origin") not in cut.shared:
            continue
        name = packet(node)
        if name in AFFINE:
            site = _site(node, name, shared)
            sites += [site] if site else []
            rest += not site and not any("batch_norm" in str(u.target) for u in node.users)
    return sites, rest


def _site(node: fx.Node, name: str, shared: Mapping[str, Tensor]) -> Site | None:
    weight, bias, out, axis = AFFINE[name]
    given = arguments(node)
    held = [given.get(weight), given.get(bias)]
    if not all(isinstance(h, fx.Node) and "parameter" in h.meta and len(h.users) == 1 for h in held):
        return None
    first, second = (h.meta["parameter"] for h in held)  # type: ignore[union-attr]
    if first not in shared or second not in shared or shared[second].dim() != 1:
        return None
    if given.get("transposed"):
        if given.get("groups") != 1:
            return None
        out = 1
    value = node if not name.startswith("native") else next((u for u in node.users if u.args[1] == 0), None)
    return value and Site(value.name, first, second, axis, out, "batch_norm" in name)


def _statistics(programs: Programs, model: int, sites: Sequence[Site], batches) -> dict[str, Statistics]:
    found = {s.value: Statistics() for s in sites}
    axis = {s.value: s.axis for s in sites}
    for args in batches:
        programs.observe(model, args, list(axis), lambda name, value: found[name].add(value, axis[name]))
    return found


def _pass(
    programs: Programs, sites: Sequence[Site], batches: Sequence[tuple], correct: Callable[..., tuple[Tensor, Tensor]]
) -> dict[str, Statistics]:
    """Statistics of every site's values, before correction, in model 0 of `programs`, all earlier ones corrected.

    correct: (batch, value, (mean, deviation) on it) -> (a, c): its readers see a y + c.
    """
    seen = {s.value: Statistics() for s in sites}
    axis = {s.value: s.axis for s in sites}
    for k, args in enumerate(batches):

        def sink(name: str, value: Tensor, k: int = k) -> None:
            seen[name].add(value, axis[name])
            a, c = correct(k, name, seen[name].batches[k])
            shape = [1] * value.dim()
            shape[axis[name]] = -1
            value.mul_(a.to(value).view(shape)).add_(c.to(value).view(shape))

        programs.observe(0, args, list(axis), sink)
    return seen


def _correction(
    own: tuple[Tensor, Tensor], aim: tuple[Tensor, Tensor], shift: bool
) -> tuple[Tensor, Tensor]:
    """a, c with a y + c of mean and deviation `aim` (of its own mean unless shift). Constants keep their scale."""
    (mean, deviation), (to_mean, to_deviation) = own, (t.to(own[0]) for t in aim)
    alive = deviation > 1e-6 * (mean.abs() + to_deviation).clamp(min=1e-30)
    a = torch.where(alive, to_deviation / deviation.clamp(min=1e-30), torch.ones_like(mean))
    return a, (to_mean if shift else mean) - a * mean

