"""Together with what users switch on beside it: compiled blocks, model offload."""

import copy

import pipelines
import pytest
import torch
import transformer_pipelines
from torch._dynamo.utils import counters

import regrow
from regrow import zoo
from regrow.core.compiling import compile_blocks
from regrow.models import UnsupportedModelError

PLAN = regrow.Schedule(depth=("full", 1, 1, 0), ratio=(0.5, 0.3, 0.6, 0.0))


def generate(pipeline):
    return pipeline(
        ["red apple"],
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


@pytest.fixture
def pipeline():
    return zoo.load("emoji")


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
def test_compiled_blocks_give_the_same_without_graph_breaks(pipeline, config):
    with regrow.apply(pipeline, config):
        expected = generate(pipeline)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(pipeline.unet, backend="eager")
    with regrow.apply(pipeline, config):
        compiled = generate(pipeline)
        assert not counters["graph_break"]
        graphs = counters["stats"]["unique_graphs"]
        again = generate(pipeline)
    assert torch.allclose(expected, compiled, atol=1e-4)
    assert torch.equal(compiled, again)
    assert counters["stats"]["unique_graphs"] == graphs, "a second generation compiles nothing"
    with regrow.apply(pipeline, config):
        again = generate(pipeline)
    assert torch.equal(compiled, again)
    assert counters["stats"]["unique_graphs"] == graphs, "nor does applying it again"


@pytest.mark.slow
def test_layers_are_compiled_once_for_all_steps_and_once_for_all_runs() -> None:
    """The first full call, the others, and cached calls: three graphs a block, however many steps."""
    pipe, config = transformer_pipelines.dit(), regrow.FORA(interval=2)
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
    pipe = transformer_pipelines.sd3()
    config = regrow.CATPruning(alpha=0.25, t0=2)
    with regrow.apply(pipe, config):
        expected = transformer_pipelines.generate(pipe)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(pipe.transformer, backend="eager")
    with regrow.apply(pipe, config):
        compiled = transformer_pipelines.generate(pipe)
    assert torch.allclose(expected, compiled, atol=1e-4)
    assert counters["stats"]["unique_graphs"] >= transformer_pipelines.LAYERS
    assert not counters["graph_break"]


def test_what_has_no_blocks_is_not_compiled() -> None:
    with pytest.raises(UnsupportedModelError, match="AutoencoderKL is no denoiser"):
        compile_blocks(transformer_pipelines.vae())


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_offload_takes_nothing_away(pipeline, offload_first):
    plain = generate(pipeline)
    with regrow.apply(pipeline, regrow.DaTo(schedule=PLAN)):
        expected = generate(pipeline)
    if offload_first:
        pipeline.enable_model_cpu_offload(device="cpu")
        run = regrow.apply(pipeline, regrow.DaTo(schedule=PLAN))
    else:
        run = regrow.apply(pipeline, regrow.DaTo(schedule=PLAN))
        pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(generate(pipeline), expected)
    assert torch.equal(generate(pipeline), expected), "also after the offload hooks were renewed"
    run.remove()
    assert torch.equal(generate(pipeline), plain)


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
@pytest.mark.parametrize("compile_first", [True, False])
def test_blocks_may_be_compiled_before_and_after_a_method_is_applied(compile_first):
    pipe = transformer_pipelines.sd3(layers=3)
    plain = transformer_pipelines.generate(pipe)
    config = regrow.FORA(interval=2)
    with regrow.apply(pipe, config):
        expected = transformer_pipelines.generate(pipe)
    torch._dynamo.reset()
    if compile_first:
        compile_blocks(pipe.transformer, backend="eager")
    run = regrow.apply(pipe, config)
    transformer_pipelines.generate(pipe)
    if not compile_first:
        compile_blocks(pipe.transformer, backend="eager")
    assert torch.allclose(transformer_pipelines.generate(pipe), expected, atol=1e-4)
    run.remove()
    assert torch.allclose(transformer_pipelines.generate(pipe), plain, atol=1e-4)
