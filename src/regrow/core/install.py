"""Puts the hooks of a run on a denoiser for as long as one of its calls lasts, and takes them off again.

Between calls nothing of regrow is on any module but what the denoiser calls first. So others (diffusers'
caches, offload, adapters, other accelerators) may wrap or replace modules whenever no call is running, in
any order: a call finds the modules as they are, lies around them, and leaves them as they were.
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
        hooks: the innermost first.
        below: the forward method that somebody gave this very module; None if it has its class's.
    """

    def __init__(self, module: nn.Module, hooks: Sequence[Hook], below: Forward | None) -> None:
        self.module, self.kind, self.below = module, type(module), below
        self.inner: Forward = functools.partial(self.kind.forward, module) if below is None else below
        self.serve(hooks)

    def serve(self, hooks: Sequence[Hook]) -> None:
        """Have these hooks around the module from now on."""
        self.hooked, self.retired = self.inner, False
        for hook in hooks:
            self.hooked = functools.partial(hook, self.module, self.hooked)

    def retire(self) -> None:
        """Pass everything through from now on."""
        self.hooked, self.retired = self.inner, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) if self.retired else self.hooked(*args, **kwargs)


class _Place:
    """A module that hooks lie around while a call of the denoiser lasts.

    Args:
        module: the module.
        name: its path.
        known: by path, what lay around modules of compiled blocks before.
    """

    def __init__(self, module: nn.Module, name: str, known: dict[str, _Around] | None) -> None:
        self.module, self.name, self._known = module, name, known
        self.hooks: list[Hook] = []
        self._around: _Around | None = None

    def attach(self) -> None:
        """Lie around the forward method that the module has now."""
        below: Forward | None = self.module.__dict__.get("forward")
        while isinstance(below, _Around):
            # An interrupted call left it behind, and somebody who kept it put it back.
            below = below.below
        last = self._around
        # One object as long as nothing changes: compiled blocks would be compiled anew for another.
        if last is None or last.below is not below or last.kind is not type(self.module):
            self.retire()
            self._around = self._lying_around(below)
        self.module.__dict__["forward"] = self._around

    def _lying_around(self, below: Forward | None) -> _Around:
        """Hooks around a forward method; with compiled blocks, in what lay around it in a run before."""
        known = {} if self._known is None else self._known
        around = known.get(self.name)
        fits = around is not None and around.retired and around.module is self.module
        if around is None or not fits or around.below is not below or around.kind is not type(self.module):
            around = known[self.name] = _Around(self.module, self.hooks, below)
        else:
            around.serve(self.hooks)
        return around

    def detach(self) -> None:
        """Leave the module as it was, unless somebody replaced its forward method within the call."""
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
        """Let what others may have kept of this place pass everything through from now on."""
        if self._around is not None:
            self._around.retire()


class Installed:
    """The hooks of one engine, on the denoiser until `remove`, on its modules while it runs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._attached: list[_Place] = []
        self._build()
        self._root = _Root(self, engine)
        self._denoiser = engine.denoiser
        self._denoiser.__dict__[_ENTRY] = self._root

    @property
    def active(self) -> bool:
        """Whether the hooks are in place."""
        return self._denoiser.__dict__.get(_ENTRY) is self._root

    def remove(self) -> None:
        """Leave every module as it was before."""
        self.detach()
        for place in self._places.values():
            place.retire()
        if self.active:
            del self._denoiser.__dict__[_ENTRY]

    def attach(self) -> None:
        """Put the hooks that the present call needs on the modules."""
        call = self._engine.call
        assert call is not None
        # A call that reuses the last output runs none of the modules within those it leaves out.
        final = call.cut is not None and call.cut.final
        wanted = self._skipping if final else self._places
        for name, place in wanted.items():
            if not final or (call.cut is not None and name in call.cut.skip):
                place.attach()
                self._attached.append(place)

    def detach(self) -> None:
        """Take them off again."""
        while self._attached:
            self._attached.pop().detach()

    def is_current(self) -> bool:
        """Whether the denoiser still has the modules that the hooks are for."""
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
        # Inside what keeps and catches keys, so that those are turned.
        for name, rotary in engine.turning.items():
            self._hook(rotary.attention, TableHook(engine, name, rotary))
            for module, rows in rotary.turned:
                self._hook(module, TurnHook(engine, rotary.attention, rows))
        if engine.sites is not None:
            self._hook_inside(engine, engine.sites)
        for watched in engine.watched:
            self._hook_watched(engine, watched)
        # Outside all others, so that what is skipped is neither selected from nor pruned.
        skipped = sorted(frozenset().union(*(cut.skip for cut in engine.cuts.values())))
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
        """Hook layers that leave tokens out, and what those are chosen from."""
        for site in sites.able:
            if site.keeps is Keeps.NOTHING:
                self._hook(site.module, SiteHook(engine, site, decided=True))
        # Outside the layer's own hook, so that it runs before it.
        for group, module in sites.decider.entries.items():
            self._hook(module, ChooseHook(engine, group))

    def _hook_inside(self, engine: Engine, sites: Sites) -> None:
        """Hook what lies in sites."""
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
        # Norms give what is turned by position.
        turned = watched.name in engine.turning
        for projection, norm in (*QUERIES, *KEYS):
            part = getattr(watched.module, norm if turned else projection, None)
            if part is not None:
                self._hook(part, CatchHook(engine, watched, projection, turned=turned))
        self._hook(watched.module, ObserveHook(engine, watched))

    def _hook(self, module: nn.Module, hook: Hook) -> None:
        name = self._names[module]
        known = self._engine.denoiser.__dict__.get(COMPILED)
        self._places.setdefault(name, _Place(module, name, known)).hooks.append(hook)


def _edges(
    denoiser: nn.Module, names: Iterable[str]
) -> Iterator[tuple[Mapping[str, nn.Module | None], str, nn.Module]]:
    """The ways from the denoiser to modules: a module's children, the name of one of them, and that one."""
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


# Where a denoiser with compiled blocks keeps what lies around its modules, from run to run: code is
# compiled for these very objects.
COMPILED = "_regrow_compiled"

# What torch calls when a module is called: its hooks, then the forward method that it has now. A hook of
# torch's own comes too late to stand in for the latter.
_ENTRY = "_call_impl"


class _Root:
    """Decides before a call of the denoiser begins, and looks at its output."""

    def __init__(self, installed: Installed, engine: Engine) -> None:
        self._installed, self._engine = installed, engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        engine, installed = self._engine, self._installed
        engine.enter()
        # Those of a call that was interrupted.
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

    What a method decides before a call, and does after it, lies between them, unlike between torch's hooks.
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
    """Whether an engine's hooks are on a denoiser already."""
    return isinstance(denoiser.__dict__.get(_ENTRY), _Root)
