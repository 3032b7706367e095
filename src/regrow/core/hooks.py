"""Hooks of the modules in and around sites, for a call that was decided at its root.

Each hook is called instead of a module's forward method, with the module and the forward method that it
wraps. `regrow.core.install` puts hooks on modules while a call of the denoiser runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor, nn

from regrow.core.decision import Adapter
from regrow.core.engine import Engine
from regrow.core.inputs import arguments_of, some_rows
from regrow.models.norms import Norm
from regrow.models.rotary import Rotary, Rows, rows_of_table
from regrow.models.table import Site
from regrow.tokens.select import put_rows, rows_of, take_rows

Forward = Callable[..., Any]


class Hook(Protocol):
    """Takes the place of a module's forward method."""

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        """Compute what the module returns.

        Args:
            module: the module.
            forward: its forward method, or the next inner hook.
            args: the module's positional arguments.
            kwargs: the module's named arguments.
        """


class ChooseHook:
    """The module whose input the tokens of a group are chosen from."""

    def __init__(self, engine: Engine, group: str) -> None:
        self.engine, self.group = engine, group

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        self.engine.sited.choose_from(self.group, self.engine.call, x)
        return forward(*args, **kwargs)


class EntryHook:
    """The module where tokens enter a site of several modules.

    It gets only the chosen tokens; in a stream it gets all, and only the chosen ones continue after it.
    """

    def __init__(self, engine: Engine, site: Site) -> None:
        self.engine, self.site = engine, site

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call, site = self.engine.call, self.site
        if call is None:
            return forward(*args, **kwargs)
        if not site.stream:
            tokens = self.engine.sited.enter(call, site, args, kwargs)
            if tokens is not None:
                call.partial[site.name] = tokens
                args, kwargs = some_rows(tokens, args, kwargs)
            return forward(*args, **kwargs)
        output = forward(*args, **kwargs)
        # Blocks of joint attention return the text before the image.
        image = output[-1] if isinstance(output, tuple) else output
        tokens = self.engine.sited.enter(call, site, (image,), {})
        if tokens is None:
            return output
        call.partial[site.name] = tokens
        short = rows_of(image, tokens.tokens)
        return (*output[:-1], short) if isinstance(output, tuple) else short


class FusedAttentionHook:
    """The attention fused with a site: it is computed for the site's tokens, or reuses its last output."""

    def __init__(self, engine: Engine, site: Site, attention: Site) -> None:
        self.engine, self.site, self.attention = engine, site, attention

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call, attention = self.engine.call, self.attention
        tokens = None if call is None else call.partial.get(self.site.name)
        if call is None or tokens is None:
            out = forward(*args, **kwargs)
            if call is not None and call.skip_plan is None and not attention.able:
                call.slot.store.add(attention.key, out)
            return out
        if attention.able:
            args, kwargs = some_rows(tokens, args, kwargs)
            return forward(*args, **kwargs)
        last = call.recovered(attention.key)
        return take_rows(last, tokens.rows(last.shape[1]))


class KeysHook:
    """Completes keys or values: those of the computed tokens are new, those of the others are reused."""

    def __init__(self, engine: Engine, key: str, site: Site) -> None:
        self.engine, self.key, self.site = engine, key, site

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        call = self.engine.call
        if call is None:
            return output
        store, tokens = call.slot.store, call.partial.get(self.site.name)
        if self.site.stream and call.keeps_sites and len(output) != call.info.batch:
            self.engine.sited.forget(call, self.site)
            return output
        if tokens is not None and (call.keeps_sites or not self.site.stream):
            if self.key not in store:
                raise RuntimeError(
                    f"{self.key} runs, but was skipped in the last full call; the layers to skip must stay "
                    "the same within a generation"
                )
            old = store.last(self.key)
            put_rows(old, tokens.rows(old.shape[1]), output)
            return old
        if call.keeps_sites:
            # Keys of a part of the batch (perturbed-attention guidance) can't be reused.
            store.drop(self.key)
            if len(output) == call.given.get(self.site.name):
                store.keep(self.key, output)
        return output


class AdapterHook:
    """Adds a low-rank update to a linear layer in calls that leave something out; no weight is changed."""

    def __init__(self, engine: Engine, adapter: Adapter) -> None:
        self.engine, self.adapter = engine, adapter

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        call = self.engine.call
        if call is None or not call.plan:
            return output
        return output + self.adapter(args[0] if args else kwargs["input"])


class NormHook:
    """Skips a norm if nobody reads its output, and returns the first token only.

    What runs between it and the layers that read it works token by token, so it costs almost nothing too.
    """

    def __init__(self, engine: Engine, norm: Norm) -> None:
        self.engine, self.norm = engine, norm

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call, norm = self.engine.call, self.norm
        if call is None or not args or not all(map(call.reuses, norm.readers)):
            return forward(*args, **kwargs)
        # Chunked feed-forwards count tokens, and hooks of others must see the true output.
        if getattr(norm.block, "_chunk_size", None) is not None or module._forward_hooks:
            return forward(*args, **kwargs)
        return args[0][:, :1]


class TableHook:
    """Calls an attention without its table of positions, as its queries and keys are turned already.

    Args:
        engine: engine of the denoiser.
        name: path of the attention.
        rotary: the attention.
    """

    def __init__(self, engine: Engine, name: str, rotary: Rotary) -> None:
        self.engine, self.name, self.rotary = engine, name, rotary
        self.names = arguments_of(rotary.attention)

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call, rotary = self.engine.call, self.rotary
        given = dict(zip(self.names, args, strict=False)) | kwargs
        table = given.get(rotary.table)
        if call is None or table is None or not rotary.is_plain:
            return forward(*args, **kwargs)
        sides = tuple(side.reshape(-1, side.shape[-1]) for side in table)
        site = self.engine.sited.attending.get(self.name, "")
        call.positions = sides, site, call.partial.get(site)
        try:
            return forward(**given | {rotary.table: None})
        finally:
            call.positions = None


class TurnHook:
    """Turns queries or keys ``(B, n, heads, D)``, or ``(B, n, heads D)``, by their tokens' positions."""

    def __init__(self, engine: Engine, attention: Any, rows: Rows) -> None:
        # Imports of diffusers take as long as those of torch: only here.
        from diffusers.models.embeddings import apply_rotary_emb

        self.engine, self.attention, self.rows = engine, attention, rows
        self._turned: Any = apply_rotary_emb

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = forward(*args, **kwargs)
        call = self.engine.call
        if call is None or call.positions is None:
            return output
        sides, site, tokens = call.positions
        key = f"{site} {self.rows.value}"
        table = None if tokens is None else call.turned.get(key)
        if table is None:
            table = tuple(rows_of_table(side, self.rows, output.shape[1], tokens) for side in sides)
            if tokens is not None:
                # Attentions of one site have the same tokens: rows are gathered once a call.
                call.turned[key] = table
        # Samples that compute different tokens have different positions: then all form one sequence.
        sequences = output.reshape(-1, len(table[0]), self.attention.heads, table[0].shape[-1])
        turned = self._turned(sequences, table, sequence_dim=1)
        return cast(Tensor, turned.view(output.shape))


class TextHook:
    """Computes what depends on the text alone once for each text."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name

    def __call__(self, module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        call = self.engine.call
        if call is not None and call.knows_text and self.name in call.slot.store:
            return call.slot.store.last(self.name)
        out = forward(*args, **kwargs)
        if call is not None:
            call.slot.store.keep(self.name, out)
        return out
