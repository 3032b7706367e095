"""Put the hooks of a run on a denoiser while one of its calls runs, and remove them after it.

Between calls only the denoiser itself has something of regrow on it. So others (diffusers' caches, offload,
adapters, other accelerators) may wrap or replace modules while no call runs, in any order: a call wraps the
modules as it finds them, and restores them afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from regrow.core.engine import Engine
from regrow.core.hooks import (
    AdapterHook,
    ChooseHook,
    EntryHook,
    Forward,
    FusedAttentionHook,
    Hook,
    KeysHook,
    NormHook,
    TableHook,
    TextHook,
    TurnHook,
)
from regrow.core.site_hook import SiteHook
from regrow.core.sites import Sites
from regrow.core.watch import KEYS, QUERIES, CatchHook, ObserveHook, Watched
from regrow.models.table import Keeps


class _Around:
    """A module's forward method with hooks around it.

    Args:
        module: the module.
        hooks: the hooks, the innermost first.
        below: the forward method that somebody set on this module; None if it has its class's.
    """

    def __init__(self, module: nn.Module, hooks: Sequence[Hook], below: Forward | None) -> None:
        self.module, self.kind, self.below = module, type(module), below
        self.inner: Forward = functools.partial(self.kind.forward, module) if below is None else below
        self.serve(hooks)

    def serve(self, hooks: Sequence[Hook]) -> None:
        """Use these hooks from now on."""
        self.hooked, self.retired = self.inner, False
        for hook in hooks:
            self.hooked = functools.partial(hook, self.module, self.hooked)

    def retire(self) -> None:
        """Use no hooks from now on."""
        self.hooked, self.retired = self.inner, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) if self.retired else self.hooked(*args, **kwargs)


class _Place:
    """A module that has hooks while a call of the denoiser runs.

    Args:
        module: the module.
        name: its path.
        denoiser: that it is in.
    """

    def __init__(self, module: nn.Module, name: str, denoiser: nn.Module) -> None:
        self.module, self.name, self._denoiser = module, name, denoiser
        self.hooks: list[Hook] = []
        self._around: _Around | None = None

    def attach(self) -> None:
        """Wrap the forward method that the module has now."""
        below: Forward | None = self.module.__dict__.get("forward")
        while isinstance(below, _Around):
            # An interrupted call left it here, and somebody who had saved it put it back.
            below = below.below
        last = self._around
        # The same object while nothing changes: compiled blocks would be compiled again for another.
        if last is None or last.below is not below or last.kind is not type(self.module):
            self.retire()
            self._around = self._lying_around(below)
        self.module.__dict__["forward"] = self._around

    def _lying_around(self, below: Forward | None) -> _Around:
        """Wrap a forward method; with compiled blocks, reuse the wrapper of an earlier run."""
        # Blocks may be compiled after a method was applied.
        known = self._denoiser.__dict__.get(COMPILED, {})
        around: _Around | None = known.get(self.name)
        fits = around is not None and around.retired and around.module is self.module
        if around is None or not fits or around.below is not below or around.kind is not type(self.module):
            around = known[self.name] = _Around(self.module, self.hooks, below)
        else:
            around.serve(self.hooks)
        return around

    def detach(self) -> None:
        """Restore the module, unless somebody replaced its forward method during the call."""
        around = self._around
        if around is None:
            return
        state, below = self.module.__dict__, around.below
        if state.get("forward") is not around:
            return
        if below is None:
            del state["forward"]
        else:
            state["forward"] = below

    def retire(self) -> None:
        """Make wrappers that others may have saved do nothing from now on."""
        if self._around is not None:
            self._around.retire()
            # A later run may use it: it is no longer this one's.
            self._around = None


class Installed:
    """The hooks of one engine: on the denoiser until `remove`, on its modules while it runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._attached: list[_Place] = []
        self._build()
        self._root = _Root(self, engine)
        self._denoiser = engine.denoiser
        self._denoiser.__dict__[_ENTRY] = self._root

    @property
    def active(self) -> bool:
        """Whether the hooks are installed."""
        return self._denoiser.__dict__.get(_ENTRY) is self._root

    def remove(self) -> None:
        """Restore every module."""
        self.detach()
        for place in self._places.values():
            place.retire()
        if self.active:
            del self._denoiser.__dict__[_ENTRY]

    def attach(self) -> None:
        """Put the hooks that the present call needs on the modules."""
        call = self._engine.call
        assert call is not None
        # Modules inside skipped ones do not run, so they need no hooks.
        final = call.skip_plan is not None and call.skip_plan.final
        wanted = self._skipping if final else self._places
        for name, place in wanted.items():
            if not final or (call.skip_plan is not None and name in call.skip_plan.skip):
                place.attach()
                self._attached.append(place)

    def detach(self) -> None:
        """Remove the hooks from the modules."""
        while self._attached:
            self._attached.pop().detach()

    def is_current(self) -> bool:
        """Whether the denoiser still has the same modules."""
        return all(children.get(name) is module for children, name, module in self._edges)

    def renew(self) -> None:
        """Make the hooks for the modules that the denoiser has now."""
        for place in self._places.values():
            place.retire()
        self._build()

    def _build(self) -> None:
        engine = self._engine
        self._names = {module: name for name, module in engine.denoiser.named_modules()}
        self._places: dict[str, _Place] = {}
        if engine.sites is not None:
            self._hook_pruned(engine, engine.sites)
        for name, module in engine.layout.text.items():
            self._hook(module, TextHook(engine, name))
        # Inside the hooks that keep and catch keys, so that these keys are turned.
        for name, rotary in engine.turning.items():
            self._hook(rotary.attention, TableHook(engine, name, rotary))
            for module, rows in rotary.turned:
                self._hook(module, TurnHook(engine, rotary.attention, rows))
        if engine.sites is not None:
            self._hook_inside(engine, engine.sites)
        for watched in engine.watched:
            self._hook_watched(engine, watched)
        # Outside all others, so that skipped sites are neither selected from nor pruned.
        skipped = sorted(frozenset().union(*(skip_plan.skip for skip_plan in engine.skip_plans.values())))
        own = () if engine.sites is None else engine.sites.decider.sites
        sites = {site.name: site for site in own if site.keeps is not Keeps.NOTHING}
        for name in skipped:
            site = sites.get(name) or engine.layout.skippable[name]
            self._hook(site.module, SiteHook(engine, site, decided=name in sites))
        for norm in engine.layout.norms:
            if norm.readers and all(name in skipped for name in norm.readers):
                self._hook(norm.module, NormHook(engine, norm))
        self._skipping = {name: self._places[name] for name in skipped}
        self._edges = list(_edges(engine.denoiser, self._places))

    def _hook_pruned(self, engine: Engine, sites: Sites) -> None:
        """Hook the layers that leave tokens out, and the modules that tokens are chosen from."""
        for site in sites.able:
            if site.keeps is Keeps.NOTHING:
                self._hook(site.module, SiteHook(engine, site, decided=True))
        # Outside the layer's own hook, so that this one runs first.
        for group, module in sites.decider.entries.items():
            self._hook(module, ChooseHook(engine, group))

    def _hook_inside(self, engine: Engine, sites: Sites) -> None:
        """Hook the modules inside sites."""
        for name, module, site in sites.memory:
            self._hook(module, KeysHook(engine, name, site))
        for site in sites.able:
            if site.entry is not None:
                self._hook(site.entry, EntryHook(engine, site))
            if site.stream:
                self._hook(site.module, SiteHook(engine, site, decided=True))
            if site.fused_attention is not None:
                fused = site.fused_attention
                self._hook(fused.module, FusedAttentionHook(engine, site, fused))
        for name, adapter in sites.decider.adapters.items():
            self._hook(engine.denoiser.get_submodule(name), AdapterHook(engine, adapter))

    def _hook_watched(self, engine: Engine, watched: Watched) -> None:
        # The outputs of norms are turned by position.
        turned = watched.name in engine.turning
        for projection, norm in (*QUERIES, *KEYS):
            part = getattr(watched.module, norm if turned else projection, None)
            if part is not None:
                self._hook(part, CatchHook(engine, watched, projection, turned=turned))
        self._hook(watched.module, ObserveHook(engine, watched))

    def _hook(self, module: nn.Module, hook: Hook) -> None:
        name = self._names[module]
        self._places.setdefault(name, _Place(module, name, self._engine.denoiser)).hooks.append(hook)


def _edges(
    denoiser: nn.Module, names: Iterable[str]
) -> Iterator[tuple[Mapping[str, nn.Module | None], str, nn.Module]]:
    """List the edges from the denoiser to modules: a module's children, a child's name, the child."""
    known: set[str] = set()
    for name in filter(None, names):
        module, path = denoiser, ""
        for child in name.split("."):
            path = f"{path}.{child}"
            below = module._modules[child]
            assert below is not None
            if path not in known:
                known.add(path)
                yield module._modules, child, below
            module = below


# Attribute of a denoiser with compiled blocks that keeps its modules' wrappers from run to run: code is
# compiled for these objects.
COMPILED = "_regrow_compiled"

# What torch calls when a module is called: its hooks, then its present forward method. A forward hook of
# torch can't replace the forward method.
_ENTRY = "_call_impl"


class _Root:
    """Decides before a call of the denoiser begins, and checks its output."""

    def __init__(self, installed: Installed, engine: Engine) -> None:
        self._installed, self._engine = installed, engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine, installed = self._engine, self._installed
        engine.enter()
        # The hooks of an interrupted call.
        installed.detach()
        if not installed.is_current() and engine.renew():
            installed.renew()
        denoiser: Any = engine.denoiser
        output = None
        try:
            engine.begin(args, kwargs)
            if engine.call is not None:
                installed.attach()
            output = type(denoiser)._call_impl(denoiser, *args, **kwargs)
        finally:
            installed.detach()
            usable = engine.end(output)
        if usable:
            return output
        with engine.aside():
            return self(*args, **kwargs)


@contextmanager
def around_calls(
    denoiser: nn.Module, before: Callable[[Any, Any, Any], None], after: Callable[[Any, Any, Any], None]
) -> Iterator[None]:
    """Call ``before(denoiser, args, kwargs)`` and ``after(denoiser, args, output)`` around each whole call.

    Unlike torch's hooks, they are outside of what a method decides before a call and does after it.
    """
    inner = denoiser.__dict__.get(_ENTRY)
    within = functools.partial(type(denoiser)._call_impl, denoiser) if inner is None else inner

    def call(*args: Any, **kwargs: Any) -> Any:
        before(denoiser, args, kwargs)
        output = within(*args, **kwargs)
        after(denoiser, args, output)
        return output

    denoiser.__dict__[_ENTRY] = call
    try:
        yield
    finally:
        if inner is None:
            del denoiser.__dict__[_ENTRY]
        else:
            denoiser.__dict__[_ENTRY] = inner


def is_hooked(denoiser: nn.Module) -> bool:
    """Whether a denoiser has an engine's hooks."""
    return isinstance(denoiser.__dict__.get(_ENTRY), _Root)
