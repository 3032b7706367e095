"""Together with what users switch on beside it: compiled blocks, model offload."""

import copy

import pipelines
import pytest
import torch
import transformer_pipelines
from rows import rows_of
from torch._dynamo.utils import counters

import regrow
from regrow.core.compiling import compile_blocks
from regrow.models import UnsupportedModelError

PLAN = regrow.Schedule(depth=("full", 1, 1, 0), ratio=(0.5, 0.3, 0.6, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        regrow.DaTo(schedule=PLAN),
        regrow.SiTo.preset("d"),
        regrow.Combined(caching=regrow.DeepCache(interval=2), tokens=regrow.ToMeSD(ratio=0.5)),
    ],
    ids=["dato", "sito", "deepcache+tome"],
)
def test_compiled_blocks_give_the_same_without_graph_breaks(config):
    pipe = pipelines.sd(pipelines.unet(mid_block_type="UNetMidBlock2D"))
    with regrow.apply(pipe, config):
        expected = pipelines.generate(pipe)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(pipe.unet, backend="eager")
    with regrow.apply(pipe, config):
        compiled = pipelines.generate(pipe)
        assert not counters["graph_break"]
        graphs = counters["stats"]["unique_graphs"]
        again = pipelines.generate(pipe)
    assert graphs
    assert torch.allclose(expected, compiled, atol=1e-4)
    assert torch.equal(compiled, again)
    assert counters["stats"]["unique_graphs"] == graphs, "a second generation compiles nothing"
    with regrow.apply(pipe, config):
        again = pipelines.generate(pipe)
    assert torch.equal(compiled, again)
    assert counters["stats"]["unique_graphs"] == graphs, "nor does applying it again"


@pytest.mark.slow
def test_layers_are_compiled_once_for_all_steps_and_once_for_all_runs() -> None:
    """The first full call, the others, and cached calls: three graphs a block, however many steps."""
    pipe, config = transformer_pipelines.dit(num_layers=2), regrow.FORA(interval=2)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(pipe.transformer, backend="eager")
    blocks, found = len(pipe.transformer.transformer_blocks), []
    for steps in (6, 11):
        with regrow.apply(pipe, config):
            transformer_pipelines.generate(pipe, num_inference_steps=steps)
        found.append(counters["stats"]["unique_graphs"])
    # What the first block is given may lie in memory otherwise.
    assert 3 * blocks <= found[0] <= 3 * (blocks + 1)
    assert found[1] == found[0]
    assert not counters["graph_break"]
    assert "forward" not in copy.deepcopy(pipe.transformer).transformer_blocks[0].ff.__dict__


@pytest.mark.slow
def test_blocks_that_diffusers_names_none_of_are_compiled_too() -> None:
    """Each makes a graph of its own, also where they are more than torch's own limit."""
    layers = 2
    pipe = transformer_pipelines.sd3(layers=layers)
    config = regrow.CATPruning(alpha=0.25, t0=2)
    with regrow.apply(pipe, config):
        expected = transformer_pipelines.generate(pipe)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=layers - 1):
        compile_blocks(pipe.transformer, backend="eager")
        with regrow.apply(pipe, config):
            compiled = transformer_pipelines.generate(pipe)
    assert torch.allclose(expected, compiled, atol=1e-4)
    assert counters["stats"]["unique_graphs"] >= layers
    assert not counters["graph_break"]


def test_what_has_no_blocks_is_not_compiled() -> None:
    with pytest.raises(UnsupportedModelError, match="AutoencoderKL is no denoiser"):
        compile_blocks(transformer_pipelines.vae())


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_offload_takes_nothing_away(pipe, offload_first):
    plain = pipelines.generate(pipe)
    with regrow.apply(pipe, regrow.DaTo(schedule=PLAN)):
        expected = pipelines.generate(pipe)
    if offload_first:
        pipe.enable_model_cpu_offload(device="cpu")
        run = regrow.apply(pipe, regrow.DaTo(schedule=PLAN))
    else:
        run = regrow.apply(pipe, regrow.DaTo(schedule=PLAN))
        pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipelines.generate(pipe), expected)
    assert torch.equal(pipelines.generate(pipe), expected), "also after the offload hooks were renewed"
    run.remove()
    assert torch.equal(pipelines.generate(pipe), plain)


def test_ip_adapter_masks_keep_only_the_cross_attention_from_pruning(pipe):
    """Every attention is handed the masks; without an IP-Adapter nobody reads them."""
    inputs = pipelines.unet_inputs(pipe.unet)
    masked = inputs | {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 16)]}}

    def outputs(config):
        out = []
        for arguments in (inputs, masked):
            with regrow.apply(pipe.unet, config) as run, run.generation(1), torch.no_grad():
                out.append(pipe.unet(**arguments).sample)
        return out

    with torch.no_grad():
        full = pipe.unet(**inputs).sample
    plain, with_masks = outputs(regrow.SiTo(ratio=0.5))
    assert torch.equal(plain, with_masks)
    assert not torch.equal(plain, full)
    plain, with_masks = outputs(regrow.SiTo(ratio=0.5, self_attention=False, cross_attention=True))
    assert not torch.equal(plain, full)
    assert torch.equal(with_masks, full)


@pytest.mark.slow
def test_blocks_may_be_compiled_between_generations_of_a_run() -> None:
    pipe, config = transformer_pipelines.sd3(layers=1), regrow.FORA(interval=2)
    # A full call and a cached one.
    steps = {"num_inference_steps": 2}
    plain = transformer_pipelines.generate(pipe, **steps)
    torch._dynamo.reset()
    counters.clear()
    with regrow.apply(pipe, config):
        expected = transformer_pipelines.generate(pipe, **steps)
        compile_blocks(pipe.transformer, backend="eager")
        assert torch.allclose(transformer_pipelines.generate(pipe, **steps), expected, atol=1e-4)
    assert counters["stats"]["unique_graphs"]
    assert torch.allclose(transformer_pipelines.generate(pipe, **steps), plain, atol=1e-4)


@pytest.mark.slow
def test_blocks_that_are_compiled_after_a_method_was_applied_are_compiled_once() -> None:
    """They keep what lies around them from run to run; a run removed twice leaves the next one alone."""
    pipe, config = transformer_pipelines.dit(num_layers=1), regrow.FORA(interval=2)
    plain = transformer_pipelines.generate(pipe)
    torch._dynamo.reset()
    counters.clear()
    first = regrow.apply(pipe, config)
    compile_blocks(pipe.transformer, backend="eager")
    expected = transformer_pipelines.generate(pipe)
    graphs = counters["stats"]["unique_graphs"]
    first.remove()
    with regrow.apply(pipe, config) as run:
        assert torch.equal(transformer_pipelines.generate(pipe), expected)
        first.remove()
        assert torch.equal(transformer_pipelines.generate(pipe), expected)
        assert "layers" in {call.depth for call in rows_of(run)}
    assert counters["stats"]["unique_graphs"] == graphs > 0
    assert torch.allclose(transformer_pipelines.generate(pipe), plain, atol=1e-4)
