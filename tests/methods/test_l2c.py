"""Learning-to-Cache against a slow reference: every layer computed, then what was kept put in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_pipelines
from torch import Tensor
from transformer_pipelines import FORMS, STEPS, generate

import regrow
from regrow.files import FileError
from regrow.lab.measure.architectures import architecture
from regrow.lab.measure.macs import profile
from regrow.methods.fora import FORA
from regrow.methods.l2c import L2C
from regrow.methods.names import named
from regrow.models import layout_of
from regrow.origin import denoiser_key
from regrow.predictors import UNTRAINED, Learned, read_learned, write_learned


def router_file(folder: Path, transformer: Any, beta: Tensor, **changes: Any) -> Path:
    about = Learned(
        kind="router",
        model="a test",
        denoiser=denoiser_key(transformer),
        sites=beta.shape[1],
        steps=len(beta),
    ).model_copy(update=changes)
    file = folder / "router.safetensors"
    write_learned(file, about, {"beta": beta, "table": beta > 0.5})
    return file


def beta_of(transformer: Any) -> Tensor:
    torch.manual_seed(3)
    beta = torch.rand(STEPS, len(layout_of(transformer).layer_sites))
    beta[::2] = 1.0
    return beta


def slow(pipe: Any, table: Tensor, **options: Any) -> Tensor:
    """A generation whose layers are all computed, and return what the table says."""
    kept: dict[str, Any] = {}
    call = [-1]
    hooks = [pipe.transformer.register_forward_pre_hook(lambda m, a: call.__setitem__(0, call[0] + 1))]

    def put(name: str, computed: Tensor, out: Any) -> Any:
        if computed[call[0]]:
            kept[name] = out
        return kept[name]

    for i, site in enumerate(layout_of(pipe.transformer).layer_sites):
        column = table[:, i]
        hooks.append(
            site.module.register_forward_hook(lambda m, a, out, n=site.name, c=column: put(n, c, out))
        )
    out = generate(pipe, **options)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("kind", ["dit", "pixart"])
@pytest.mark.parametrize("form", ["guided", "batch"])
def test_layers_are_computed_or_reused_as_the_table_says(tmp_path: Path, kind: str, form: str) -> None:
    pipe = transformer_pipelines.KINDS[kind](num_layers=3)  # type: ignore[operator]
    beta = beta_of(pipe.transformer)
    file = str(router_file(tmp_path, pipe.transformer, beta))
    for threshold, table in ((None, beta > 0.5), (0.8, beta > 0.8)):
        with regrow.apply(pipe, L2C(router=file, threshold=threshold)) as run:
            ours = generate(pipe, **FORMS[form])
        torch.testing.assert_close(ours, slow(pipe, table, **FORMS[form]), rtol=1e-4, atol=1e-5)
        macs = [call.macs for call in run.report().calls]
        assert macs[1] < macs[2] <= macs[0]


def test_a_table_that_computes_all_is_the_plain_pipeline_bit_for_bit(tmp_path: Path) -> None:
    pipe = transformer_pipelines.dit(num_layers=3)
    plain = generate(pipe)
    file = router_file(tmp_path, pipe.transformer, torch.ones(STEPS, 6))
    with pytest.warns(UserWarning, match="saved nothing"), regrow.apply(pipe, L2C(router=str(file))):
        assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(pipe), plain)


def test_untrained_it_reuses_every_layer_in_every_other_step() -> None:
    pipe = transformer_pipelines.dit(num_layers=3)
    with regrow.apply(pipe, L2C(router=UNTRAINED)):
        ours = generate(pipe)
    with regrow.apply(pipe, FORA(interval=2)):
        assert torch.equal(ours, generate(pipe))
    counted = [profile(architecture("dit-xl-256"), config, 20).macs for config in (L2C(), FORA(interval=2))]
    assert counted[0] == counted[1]


def test_a_model_needs_a_router_of_its_own(tmp_path: Path) -> None:
    pipe = transformer_pipelines.dit(num_layers=3)
    with pytest.raises(ValueError, match="router: none is given for this DiT"):
        regrow.apply(pipe, L2C())
    file = router_file(tmp_path, pipe.transformer, beta_of(pipe.transformer))
    with pytest.raises(ValueError, match=r"router.safetensors is for a test .* regrow train router"):
        regrow.apply(transformer_pipelines.pixart(), L2C(router=str(file)))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(FileError, match="cut off, changed"):
        regrow.apply(pipe, L2C(router=str(file)))


def test_a_unet_is_refused() -> None:
    import pipelines

    with pytest.raises(regrow.UnsupportedModelError, match=r"regrow does not know the layers of UNet2D"):
        regrow.apply(pipelines.sd(), L2C(router=UNTRAINED))


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_table_of_another_form_is_refused_in_one_line(tmp_path: Path, threshold: float | None) -> None:
    pipe = transformer_pipelines.dit()
    file = router_file(tmp_path, pipe.transformer, beta_of(pipe.transformer))
    learned = read_learned(file, "router")
    write_learned(file, learned.about, {name: t[:, :3] for name, t in learned.tensors.items()})
    with pytest.raises(FileError, match=r"router\.safetensors: (table|beta): this tensor") as error:
        regrow.apply(pipe, L2C(router=str(file), threshold=threshold))
    assert "\n" not in str(error.value)


def test_a_file_with_another_ending_is_refused_by_the_fields_name() -> None:
    with pytest.raises(ValueError, match=r"router: 'table\.bin' is not allowed"):
        regrow.apply(transformer_pipelines.dit(), L2C(router="table.bin"))


def test_its_name_takes_a_file() -> None:
    assert named("l2c:untrained", 50).config == L2C(router="untrained")
    assert L2C.from_text("some/router.safetensors", 50) == L2C(router="some/router.safetensors")
