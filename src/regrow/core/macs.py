"""Count the multiply-accumulates (MACs) of calls, by running the real denoiser on the meta device.

Attention is counted; choosing tokens is reported separately, so that figures are comparable with the
papers'. One MAC is two FLOPs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from regrow.core.branches import Branches
from regrow.core.clock import Position
from regrow.core.decision import Adapter, Decider, Decision, Entered, Sited, View
from regrow.core.engine import Engine
from regrow.core.install import Installed
from regrow.core.meta import KnownShapes, meta_copy
from regrow.core.others import grounding_of
from regrow.core.recipe import Attention, CallInfo, Recipe
from regrow.models import layout_of
from regrow.models.layers import LayerKind
from regrow.models.table import Layout, Site
from regrow.recover.space import Recovery
from regrow.schedule import FULL, SITES, Schedule, Step
from regrow.tokens.select import Selection


def free_selection(x: Tensor, count: int) -> Selection:
    """Make a selection of the right shapes without cost: the last ``count`` tokens copy the first."""
    batch, tokens = x.shape[:2]
    kept = torch.arange(tokens - count, device=x.device).expand(batch, -1)
    source = torch.arange(tokens, device=x.device).expand(batch, -1) % (tokens - count)
    return Selection.of(kept, source)


@dataclass(frozen=True)
class Macs:
    """MACs of one call of the denoiser, for the whole batch.

    Args:
        denoiser: MACs of the denoiser, with attention.
        selection: MACs of choosing tokens, in addition.
        attention: the part of ``denoiser`` for products of queries, keys and values.
    """

    denoiser: int
    selection: int
    attention: int


class Flops(TorchDispatchMode):
    """Counts FLOPs of operations by name, as PyTorch's `FlopCounterMode` does, but faster.

    It does not keep track of modules, which takes most of that mode's time.

    Args:
        also: formulas of operations that PyTorch's own registry lacks.
        shapes: looks up results without data.
    """

    def __init__(
        self, also: Mapping[Any, Any] = MappingProxyType({}), shapes: KnownShapes | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: Counter[str] = Counter()
        self._shapes = shapes
        self._formulas = {**flop_registry, **also}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and torch.is_inference_mode_enabled():
            # Composite operations come here undivided.
            with self:
                made = func.decompose(*args, **kwargs or {})
            if made is not NotImplemented:
                return made
        kwargs = kwargs or {}
        look_up = self._shapes
        given = func(*args, **kwargs) if look_up is None else look_up.result(func, args, kwargs)
        if formula is not None:
            flops = formula if look_up is None else partial(look_up.counted, formula)
            self.of[str(func._overloadpacket)] += flops(*args, **kwargs, out_val=given)
        return given

    def __enter__(self) -> Flops:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @property
    def total(self) -> int:
        """FLOPs of all operations."""
        return self.of.total()

    @property
    def attention(self) -> int:
        """FLOPs of products of activations with activations: on the meta device attention is two such
        batched products."""
        kinds = ("aten.bmm", "aten.baddbmm")
        return sum(n for name, n in self.of.items() if "scaled_dot_product" in name or name in kinds)


class PlainCounter:
    """Counts the MACs of calls of any diffusers denoiser without a method, with attention.

    Args:
        denoiser: the model, on any device; only its configuration is used.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._model = meta_copy(denoiser)
        self._known: dict[Any, int] = {}
        self._shapes = KnownShapes()

    def count(self, calls: Sequence[tuple[Any, Any]]) -> int:
        """Count the MACs of calls, whose positional and keyword arguments are on the meta device."""
        known = self._known
        for call in calls:
            if _signature(call) not in known:
                with torch.no_grad(), Flops(shapes=self._shapes) as counter:
                    self._model(*call[0], **call[1])
                known[_signature(call)] = counter.total // 2
        return sum(known[_signature(call)] for call in calls)


class _FirstOfSites(Sited, Decider):
    """A method with a given plan that always chooses the first tokens, and counts what it looks at.

    Args:
        sited: the method; its decider is made once, since it may read trained weights from a file.

    Attributes:
        decided: the plan; None for the method's own.
        looking: MACs of looking at tokens in the last call.
        observing: MACs of observing attentions in it.
        selected: the selections that pruning layers asked for.
        asked: the last choice of whole calls' tokens: its site, the number of tokens, and what was known.
    """

    def __init__(self, sited: Sited) -> None:
        self._sited = sited
        self.asked: tuple[Site, int, CallInfo] | None = None
        self._decider: Decider | None = None
        self.decided: Mapping[str, Decision] | None = {}
        self.selected: list[_Selected] = []
        self.looking, self.observing = Flops(), Flops()

    @property
    def full_calls(self) -> int:
        """Number of full calls before tokens can be chosen by the last two outputs."""
        return min(self._sited.full_calls, 2)

    def on(self, denoiser: nn.Module, layout: Layout) -> _FirstOfSites:
        """Itself."""
        if self._decider is None:
            self._decider = self._sited.on(denoiser, layout)
        return self

    @property
    def _own(self) -> Decider:
        assert self._decider is not None
        return self._decider

    @property
    def sites(self) -> Sequence[Site]:  # type: ignore[override]
        return self._own.sites

    @property
    def observes(self) -> frozenset[LayerKind]:
        return self._own.observes

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self._own.adapters

    @property
    def by_ratio(self) -> bool:
        return self._sited.by_ratio

    @property
    def space(self) -> Recovery | None:
        return self._own.space

    @property
    def entries(self) -> Mapping[str, nn.Module]:
        return self._own.entries

    @property
    def attentions(self) -> Mapping[str, tuple[str, nn.Module]]:
        return self._own.attentions

    def plan(self, view: View) -> Mapping[str, Decision]:
        """Return the given plan."""
        return self._own.plan(view) if self.decided is None else self.decided

    def begin(self, memory: Any = None) -> Any:
        """Make the method's memory, of the last full call alone, so that one call is counted."""
        return self._own.begin(None)

    def observe(self, memory: Any, site: Site, attention: Attention) -> None:
        """Observe as the method does, and count it."""
        with self.observing:
            self._own.observe(memory, site, attention)

    def look(self, memory: Any, entered: Entered, info: CallInfo) -> Any:
        """Look as the method does, and count it; once in a call."""
        with self.looking:
            return self._own.look(memory, entered, info)

    def choose(
        self, memory: Any, seen: Any, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor | Selection:
        """Choose the first ``count`` tokens."""
        assert count is not None
        if self.space is not None:
            assert info.view is not None
            self.selected.append(_Selected(site, x.shape, count, info.view, _shapes(info.attention)))
            return free_selection(x, x.shape[1] - count)
        if site.stream:
            self.asked = site, count, info
        return torch.arange(count, device="meta").repeat(len(x), 1)

    def selecting(self) -> int:
        """Count the MACs of the selections that layers asked for."""
        return sum(n * self._selection(kind) for kind, n in Counter(self.selected).items())

    def _selection(self, kind: _Selected) -> int:
        """Count the MACs of one layer's selection, on zeros for one sample."""
        attention, generator = _one_sample(kind.attention), torch.Generator().manual_seed(0)
        call = CallInfo(1, False, (), generator, attention=attention, view=kind.view)
        x = torch.zeros(1, *kind.shape[1:], device="cpu" if attention is None else "meta")
        seen = self._own.look(None, Entered(torch.zeros(1, 1, 1), (), {}), call)
        with Flops() as counter:
            self._own.choose(None, seen, kind.site, x, kind.count, call)
        return kind.shape[0] * (counter.total // 2)

    def choosing(self) -> int:
        """Count the MACs of choosing a whole call's tokens, on zeros for one sample, after a full call.

        Cached calls before the first such call make their own choice, which is not counted.
        """
        if self.asked is None:
            return 0
        site, count, asked = self.asked
        outputs = tuple(torch.zeros(1, *output.shape[1:]) for output in asked.outputs)
        attention, x = _one_sample(_shapes(asked.attention)), torch.zeros(1, 1, 1)
        generator = torch.Generator().manual_seed(0)
        call = CallInfo(1, False, outputs, generator, attention=attention, grid=asked.grid)
        memory = self._own.begin(None)
        self._own.choose(memory, None, site, x, count, call)
        with Flops() as counter:
            self._own.choose(memory, None, site, x, count, replace(call, cached=asked.cached))
        return asked.batch * (counter.total // 2)


class _Here:
    """A clock that stays where it is set."""

    index = 0
    batch = None
    timesteps = ()

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def read(self, timestep: Any) -> Position:
        """Return the position that was set."""
        return Position(self.index, self.steps, self.index == 0)

    def called(self) -> None:
        """Do nothing: no sampler steps."""

    def detach(self) -> None:
        """Do nothing: there is nothing to remove."""


class _Calls:
    """Counts calls of a denoiser without weights. The full calls that others need are made once, first.

    Args:
        denoiser: without weights.
        sites: the method's decisions for sites, or None.
        depths: depths of the calls.
        inputs: arguments of the calls.
        knows_text: each call has the text of the one before, or each has another.
        shapes: shapes that are known from other calls.

    Attributes:
        first: MACs of the first call, which is full.
    """

    def __init__(
        self,
        denoiser: Any,
        sites: _FirstOfSites | None,
        depths: Sequence[int],
        inputs: tuple[Any, Any],
        knows_text: bool,
        shapes: KnownShapes,
    ) -> None:
        self._denoiser, self._sites, self._shapes = denoiser, sites, shapes
        self._inputs, self._knows_text = inputs, knows_text
        by_ratio = sites is not None and sites.by_ratio
        kinds = (*depths, SITES) if sites is not None and not by_ratio else (*depths,)
        full = max(1, 0 if sites is None else sites.full_calls)
        # With any ratio above 0 the method decides.
        ratio = 0.5 if by_ratio else 0.0
        plan = Schedule(depth=(FULL,) * full + kinds, ratio=(0.0,) * full + (ratio,) * len(kinds))
        self._clock = _Here(len(plan))
        self._engine = Engine(denoiser, Recipe(plan, sites=sites), self._clock, quiet=True)
        if sites is not None:
            sites.decided = {}
        self.first = self._macs()
        for self._clock.index in range(1, full):
            self._call()
        self._clock.index = full

    def count(self, step: Step, decided: Mapping[str, Decision] | None) -> Macs:
        """Count the MACs of a call.

        Args:
            step: what it computes.
            decided: the method's plan for it; None for its own.
        """
        generation, index = self._engine.generation, self._clock.index
        assert generation is not None
        # The same step again, not its second branch.
        generation.branches = Branches()
        generation.steps[index] = step
        generation.records.clear()
        if self._sites is not None:
            self._sites.decided = decided
        if not self._knows_text:
            self._inputs = _with_another_text(self._inputs)
        return self._macs()

    def _macs(self) -> Macs:
        """Count the MACs of the next call."""
        sites = self._sites
        if sites is None:
            counter = self._call()
            return Macs(counter.total // 2, 0, counter.attention // 2)
        sites.looking, sites.observing, sites.asked, sites.selected = Flops(), Flops(), None, []
        counter = self._call()
        # Looking and observing multiply too.
        total, attention, chosen = counter.total, counter.attention, sites.choosing() + sites.selecting()
        for beside in (sites.looking, sites.observing):
            total, attention = total - beside.total, attention - beside.attention
            chosen += beside.total // 2
        return Macs(total // 2, chosen, attention // 2)

    def _call(self) -> Flops:
        hooks = Installed(self._engine)
        try:
            with torch.no_grad(), Flops(shapes=self._shapes) as counter:
                self._denoiser(*self._inputs[0], **self._inputs[1])
        finally:
            hooks.remove()
        return counter


class CallCounter:
    """Counts the MACs of calls of one denoiser with one method, each kind of call once.

    Args:
        denoiser: the denoiser, on any device; only its configuration is used.
        sites: the method's decisions for sites, or None.
        depths: depths of calls that will be counted. The full calls that come first are made once for all
            of these, and once more for each other depth.
    """

    def __init__(self, denoiser: nn.Module, sites: Sited | None = None, depths: Iterable[int] = ()) -> None:
        self._model = meta_copy(denoiser)
        self._layout = layout_of(self._model)
        self._sites = None if sites is None else _FirstOfSites(sites).on(self._model, self._layout)
        self._depths = tuple(sorted({FULL, *depths}))
        self._known: dict[Any, Macs] = {}
        self._shapes = KnownShapes()
        self._calls: dict[Any, _Calls] = {}
        self._grounding = grounding_of(self._model)

    def attend_to_boxes(self, grounded: bool) -> None:
        """Include or exclude the layers that attend to boxes (GLIGEN) from now on."""
        for module in self._grounding:
            module.enabled = grounded

    def count(
        self,
        depth: int,
        ratio: float,
        inputs: tuple[Any, Any],
        *,
        knows_text: bool = False,
        plan: Mapping[str, Decision] = {},
    ) -> Macs:
        """Count the MACs of a call.

        Args:
            depth: up-path layers computed, `FULL` for all.
            ratio: pruning ratio; 1 if no layer recomputes the tokens that it should.
            inputs: positional and keyword arguments on the meta device.
            knows_text: whether what depends on the text alone was computed before.
            plan: decisions by the names of sites; empty if there are none.
        """
        grounded = any(module.enabled for module in self._grounding)
        decided = tuple(sorted(plan.items(), key=lambda item: item[0]))
        key = (depth, ratio if depth else 0.0, knows_text, grounded, decided, _signature(inputs))
        if key not in self._known:
            self._known[key] = self._count(depth, ratio, inputs, knows_text, plan)
        return self._known[key]

    def _count(
        self,
        depth: int,
        ratio: float,
        inputs: tuple[Any, Any],
        knows_text: bool,
        decided: Mapping[str, Decision],
    ) -> Macs:
        in_layers = self._sites is not None and self._sites.space is not None
        chooses = bool(decided) or (in_layers and 0 < ratio < 1)
        if depth == FULL and not chooses and not knows_text:
            return self._behind_full(depth, inputs, knows_text=True).first
        # Where nothing depends on the text alone, no call knows it, and it is all the same.
        calls = self._behind_full(depth, inputs, knows_text=knows_text or not self._layout.text)
        return calls.count(Step(depth, ratio if chooses else 0.0), None if in_layers else decided)

    def _behind_full(self, depth: int, inputs: tuple[Any, Any], *, knows_text: bool) -> _Calls:
        """Find the calls of a depth with such arguments; the first time, make the full ones before."""
        depths = self._depths if depth in self._depths else (depth,)
        grounded = any(module.enabled for module in self._grounding)
        key = depths, knows_text, grounded, _signature(inputs)
        if key not in self._calls:
            self._calls[key] = _Calls(self._model, self._sites, depths, inputs, knows_text, self._shapes)
        return self._calls[key]


@dataclass(frozen=True)
class _Shapes:
    """Shapes of an attention's queries and keys, and its number of image tokens."""

    query: torch.Size
    key: torch.Size
    tokens: int


@dataclass(frozen=True)
class _Selected:
    """A kind of selection: its layer, the features' shape, the number of tokens, the attention read."""

    site: Site = field(compare=False)
    shape: torch.Size
    count: int
    view: View
    attention: _Shapes | None


def _shapes(attention: Attention | None) -> _Shapes | None:
    if attention is None:
        return None
    return _Shapes(attention.query.shape, attention.key.shape, attention.tokens)


def _one_sample(shapes: _Shapes | None) -> Attention | None:
    """Make an attention of one sample without data: whole maps would take long to compute."""
    if shapes is None:
        return None
    query, key = (torch.empty(1, *shape[1:], device="meta") for shape in (shapes.query, shapes.key))
    return Attention(query, key, shapes.tokens, None)


def _with_another_text(inputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """Copy the arguments with a new text of the same shape."""
    args, kwargs = inputs
    text = kwargs.get("encoder_hidden_states")
    return args, kwargs | {"encoder_hidden_states": text.clone()} if isinstance(text, Tensor) else kwargs


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((k, _signature(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_signature(v) for v in value)
    return str(value)
