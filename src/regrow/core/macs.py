"""Counting multiply-accumulates of calls, by running the real denoiser on the meta device.

Attention is counted; choosing tokens is not (it is reported on its own), so that figures are those the
papers give. One MAC is two FLOPs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from regrow.core.recipe import Attention, CallInfo, Recipe, Recovery
from regrow.models import layout_of
from regrow.models.layers import LayerKind
from regrow.models.table import Layout, Site
from regrow.schedule import FULL, SITES, Schedule
from regrow.tokens.select import Selection


def free_selection(x: Tensor, count: int) -> Selection:
    """A selection of the right shapes that costs nothing: the last ``count`` tokens copy the first."""
    batch, tokens = x.shape[:2]
    kept = torch.arange(tokens - count, device=x.device).expand(batch, -1)
    source = torch.arange(tokens, device=x.device).expand(batch, -1) % (tokens - count)
    return Selection.of(kept, source)


@dataclass(frozen=True)
class Macs:
    """MACs of one call of the denoiser, for the whole batch.

    Args:
        denoiser: what the denoiser computes, attention counted.
        selection: what choosing tokens adds.
        attention: the part of ``denoiser`` that is products of queries, keys and values.
    """

    denoiser: int
    selection: int
    attention: int


class Flops(TorchDispatchMode):
    """FLOPs of operations by their names, as PyTorch's `FlopCounterMode` counts them.

    That one also keeps track of modules, which takes longer than all else.

    Args:
        also: formulas of operations that PyTorch's own registry lacks.
    """

    def __init__(self, also: Mapping[Any, Any] = MappingProxyType({})) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: Counter[str] = Counter()
        self._formulas = {**flop_registry, **also}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What the operation gives."""
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and torch.is_inference_mode_enabled():
            # Operations made of others come here whole.
            with self:
                made = func.decompose(*args, **kwargs or {})
            if made is not NotImplemented:
                return made
        given = func(*args, **kwargs or {})
        if formula is not None:
            self.of[str(func._overloadpacket)] += formula(*args, **kwargs or {}, out_val=given)
        return given

    def __enter__(self) -> Flops:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @property
    def total(self) -> int:
        """Of all operations."""
        return self.of.total()

    @property
    def attention(self) -> int:
        """Of products of activations with activations: on the meta device attention is two such batched
        products."""
        kinds = ("aten.bmm", "aten.baddbmm")
        return sum(n for name, n in self.of.items() if "scaled_dot_product" in name or name in kinds)


def plain_macs(denoiser: nn.Module, calls: Sequence[tuple[Any, Any]]) -> int:
    """MACs of calls of any diffusers denoiser as it is, attention counted.

    Args:
        denoiser: on any device; only its configuration is used.
        calls: positional and keyword arguments of each call, on the meta device.
    """
    model = meta_copy(denoiser)
    known: dict[Any, int] = {}
    shapes = KnownShapes()
    for call in calls:
        if _signature(call) not in known:
            with torch.no_grad(), shapes, Flops() as counter:
                model(*call[0], **call[1])
            known[_signature(call)] = counter.total // 2
    return sum(known[_signature(call)] for call in calls)


class _FirstOfSites(Sited, Decider):
    """A method of sites with a given plan that computes the first tokens; what it looks at is counted.

    Args:
        sited: the method; it is put to work once, since it may read what it has learned.

    Attributes:
        decided: the plan; None for the method's own.
        looking: what looking at tokens takes.
        observing: what observing attentions took in the last full call.
        selected: what layers were asked for that prune.
        asked: the way through the blocks of which tokens were last chosen, how many, and what was known.
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
        """As many as tokens need that are chosen by the last two outputs."""
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
        """The given one."""
        return self._own.plan(view) if self.decided is None else self.decided

    def begin(self, memory: Any = None) -> Any:
        """The method's memory; of the last full call alone, so that one call is counted."""
        self.observing = Flops()
        return self._own.begin(None)

    def observe(self, memory: Any, site: Site, attention: Attention) -> None:
        """The method's, counted."""
        with self.observing:
            self._own.observe(memory, site, attention)

    def look(self, memory: Any, entered: Entered, info: CallInfo) -> Any:
        """The method's, counted; once a call."""
        self.looking = Flops()
        with self.looking:
            return self._own.look(memory, entered, info)

    def choose(
        self, memory: Any, seen: Any, site: Site, x: Tensor, count: int | None, info: CallInfo
    ) -> Tensor | Selection:
        """The first ``count`` tokens."""
        assert count is not None
        if self.space is not None:
            assert info.view is not None
            self.selected.append(_Selected(site, x.shape, count, info.view, _shapes(info.attention)))
            return free_selection(x, x.shape[1] - count)
        if site.stream:
            self.asked = site, count, info
        return torch.arange(count, device="meta").repeat(len(x), 1)

    def selecting(self) -> int:
        """MACs of the selections that layers asked for."""
        return sum(n * self._selection(kind) for kind, n in Counter(self.selected).items())

    def _selection(self, kind: _Selected) -> int:
        """MACs of one layer's selection, counted on zeros for one sample."""
        attention, generator = _one_sample(kind.attention), torch.Generator().manual_seed(0)
        call = CallInfo(1, False, (), generator, attention=attention, view=kind.view)
        x = torch.zeros(1, *kind.shape[1:], device="cpu" if attention is None else "meta")
        seen = self._own.look(None, Entered(torch.zeros(1, 1, 1), (), {}), call)
        with Flops() as counter:
            self._own.choose(None, seen, kind.site, x, kind.count, call)
        return kind.shape[0] * (counter.total // 2)

    def choosing(self) -> int:
        """MACs of choosing the tokens of a whole call, on zeros for one sample, after a call of all blocks.

        Cached calls before the first such call choose for themselves, which is not counted.
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
    """A clock that stands where it is set."""

    index = 0
    batch = None
    timesteps = ()

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def read(self, timestep: Any) -> Position:
        """One of so many calls."""
        return Position(self.index, self.steps, self.index == 0)

    def called(self) -> None:
        """Nobody steps."""

    def detach(self) -> None:
        """There is nothing to leave."""


class _BehindFull:
    """A denoiser without weights after its full call; later calls do at sites what they are told.

    The full call is made once: plans may decide otherwise in every call.

    Args:
        denoiser: without weights.
        sites: the method's.
        depth: of the later calls.
        inputs: of the calls.
        knows_text: whether the text is that of the full call.
        shapes: that are known from other calls.
    """

    def __init__(
        self,
        denoiser: Any,
        sites: _FirstOfSites,
        depth: int,
        inputs: tuple[Any, Any],
        knows_text: bool,
        shapes: KnownShapes,
    ) -> None:
        self._denoiser, self._sites, self._shapes = denoiser, sites, shapes
        self._inputs, self._knows_text = inputs, knows_text
        full = max(sites.full_calls, 1)
        # Any ratio above 0 has the method asked.
        ratio = 0.5 if sites.full_calls else 0.0
        plan = Schedule(depth=(FULL,) * full + (depth,), ratio=(0.0,) * full + (ratio,))
        clock = _Here(len(plan))
        self._engine = Engine(denoiser, Recipe(plan, sites=sites), clock, quiet=True)
        for _ in range(full):
            self._call(inputs)
            clock.index += 1

    def count(self, decided: Mapping[str, Decision]) -> Macs:
        """MACs of a call."""
        sites = self._sites
        sites.decided, sites.looking, sites.asked = decided, Flops(), None
        assert self._engine.generation is not None
        # The second step again, not another branch of it.
        self._engine.generation.branches = Branches()
        counter = self._call(self._inputs if self._knows_text else _with_another_text(self._inputs))
        total, attention = counter.total - sites.looking.total, counter.attention - sites.looking.attention
        return Macs(total // 2, sites.looking.total // 2 + sites.choosing(), attention // 2)

    def _call(self, inputs: tuple[Any, Any]) -> Flops:
        hooks = Installed(self._engine)
        try:
            with torch.no_grad(), self._shapes, Flops() as counter:
                self._denoiser(*inputs[0], **inputs[1])
        finally:
            hooks.remove()
        return counter


class CallCounter:
    """Counts calls of one denoiser with one method, each kind of call once.

    Args:
        denoiser: the denoiser, on any device; only its configuration is used.
        sites: the method's decisions for sites, or None.
    """

    def __init__(self, denoiser: nn.Module, sites: Sited | None = None) -> None:
        self._model = meta_copy(denoiser)
        self._sites = None if sites is None else _FirstOfSites(sites)
        self._known: dict[Any, Macs] = {}
        self._shapes = KnownShapes()
        self._behind: dict[Any, _BehindFull] = {}
        self._grounding = grounding_of(self._model)

    def attend_to_boxes(self, grounded: bool) -> None:
        """Count calls from now on with or without the layers that attend to boxes (GLIGEN)."""
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
        """MACs of a call.

        Args:
            depth: up-path layers computed, `FULL` for all.
            ratio: pruning ratio; 1 if no layer computes a token that should have.
            inputs: positional and keyword arguments on the meta device.
            knows_text: whether what depends on the text alone was computed before.
            plan: by the name of a site, what was decided for it; empty where nothing was.
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
        in_layers = self._sites is not None and self._sites.on(self._model, layout_of(self._model)).space
        if self._sites is not None and decided and not in_layers:
            key = depth, knows_text, any(m.enabled for m in self._grounding), _signature(inputs)
            if key not in self._behind:
                self._behind[key] = _BehindFull(
                    self._model, self._sites, depth, inputs, knows_text, self._shapes
                )
            return self._behind[key].count(decided)
        # Full calls come first: others need what they leave.
        before = 1 if depth < FULL or knows_text else 0
        # A full call observes if another follows that reads what it saw.
        observes = self._sites is not None and not self._sites.by_ratio and depth == FULL
        sites = self._sites if observes or in_layers else None
        after = (SITES,) if observes else ()
        if sites is not None:
            sites.decided, sites.selected = None if in_layers else {}, []
        plan = Schedule(
            depth=(FULL,) * before + (depth, *after),
            ratio=(0.0,) * before + (ratio if ratio < 1 else 0.0,) + (0.0,) * len(after),
        )
        engine = Engine(self._model, Recipe(plan, sites), quiet=True)
        hooks = Installed(engine)
        try:
            with torch.no_grad(), self._shapes, engine.manual(len(plan)) as clock:
                for _ in range(before):
                    self._model(*inputs[0], **inputs[1])
                    clock.step()
                if sites is not None:
                    sites.selected.clear()
                if not knows_text:
                    inputs = _with_another_text(inputs)
                with Flops() as counter:
                    self._model(*inputs[0], **inputs[1])
        finally:
            hooks.remove()
        chosen = 0 if sites is None else sites.selecting()
        total, attention = counter.total, counter.attention
        if sites is not None and observes:
            # What is observed are products of queries and keys as well.
            total, attention = total - sites.observing.total, attention - sites.observing.attention
            chosen += sites.observing.total // 2
        return Macs(total // 2, chosen, attention // 2)


@dataclass(frozen=True)
class _Shapes:
    """Of an attention's queries and keys, and its number of the image's tokens."""

    query: torch.Size
    key: torch.Size
    tokens: int


@dataclass(frozen=True)
class _Selected:
    """A kind of selection: of a layer, from features of a shape, how many tokens, by which attention."""

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
    """An attention of one sample, without data: whole maps would take long to compute."""
    if shapes is None:
        return None
    query, key = (torch.empty(1, *shape[1:], device="meta") for shape in (shapes.query, shapes.key))
    return Attention(query, key, shapes.tokens, None)


def _with_another_text(inputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """The same arguments with a text of the same shape that is not known yet."""
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
