"""Integers for real: what an engine computes beside the simulation, and what it refuses."""

import dataclasses
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from conftest import quick_recipe, tiny_pipeline
from ptqd import (
    ArtifactError,
    InputError,
    LatentClassPipeline,
    MismatchError,
    PrecisionPlan,
    QuantSpec,
    Recipe,
    Rule,
    Sampling,
    apply_plan,
    correct,
    load,
    measure,
    measure_widths,
    quantize,
    search_plan,
)
from ptqd.diffusion import denoiser_name, pipeline_fingerprint, run_batch
from ptqd.engines import (
    EngineModule,
    Exported,
    OnnxRuntimeSession,
    OpenVinoSession,
    Processor,
    captured,
    for_engine,
    onnx_graph,
    overflows,
    read_graph,
    sessions,
)
from ptqd.engines.cpu import this_processor
from ptqd.engines.expansion import expanded
from ptqd.engines.export import export
from ptqd.engines.fidelity import fidelity
from ptqd.engines.fixed_ranges import with_fixed_ranges
from ptqd.engines.lowering import lowered
from ptqd.engines.sessions import ENGINES, RANGES
from ptqd.mixed_precision import StepSeconds
from ptqd.mixed_precision.problem import check_can_hold
from ptqd.quantization import plan_of
from ptqd.quantization.modules import ActivationQuantizer, QuantLinear
from ptqd.quantization.modules.linear_conv import full_weight
from ptqd.quantization.sites import quantized_layers
from ptqd_cli.main import main
from tiny import CASES

MODERN = Processor(vnni=True, avx2=True)
OLDER = Processor(vnni=False, avx2=True)
needs_vnni = pytest.mark.skipif(not this_processor().vnni, reason="a graph of signed codes, for processors with VNNI")
RUN = Sampling(steps=3, eta=1.0, samples=4, batch=2)


def small_pipe() -> DDIMPipeline:
    """A UNet with all that has to be lowered: strides, nearest upsampling, attention, concatenations."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return DDIMPipeline(unet.eval(), DDIMScheduler(clip_sample=False))


@pytest.fixture(scope="module")
def full() -> DDIMPipeline:
    return small_pipe()


Exports = Callable[..., tuple[Any, Exported]]


@pytest.fixture(scope="module")
def exports(full: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Quantized pipelines and what they were exported to, each made once."""
    made: dict[str, tuple[Any, Exported]] = {}

    def get(text: str) -> tuple[Any, Exported]:
        if text not in made:
            qpipe = quantize(full, quick_recipe(text), RUN)
            made[text] = qpipe, export(qpipe, RUN, "onnxruntime", tmp_path_factory.mktemp("engines") / "made")
        return made[text]

    return get


def images(pipe: Any, run: Sampling = RUN) -> Any:
    return run_batch(pipe, run, range(run.batch))


def assert_near(found: Any, simulated: Any, full: Any) -> None:
    """Far nearer to the simulation than that is to full precision: random weights make much of one other code."""
    assert np.square(found - simulated).mean() < 0.4 * np.square(simulated - full).mean()


def outputs(*models: Any) -> list[Any]:
    with torch.no_grad():
        return [model(*call_of()).sample.numpy() for model in models]


def call_of(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(400)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("text", ["w4a8", "w4a8-affine", pytest.param("w8a8-affine", marks=pytest.mark.slow)])
def test_an_engine_computes_what_the_simulation_does(text: str, engine: str, exports: Exports, tmp_path: Path) -> None:
    qpipe, made = exports(text)
    assert not made.products.floating
    assert any(".products" in name for name in made.products.integer)
    for_engine(made.pipeline.unet.folder.parent, engine, tmp_path / "engine")
    pipe = load(tmp_path / "engine")
    unet = pipe.unet
    assert isinstance(unet, EngineModule)
    assert unet.engine == engine
    for batch in (1, 3) if text == "w4a8" else (1,):  # one code at a tie is another one, and shows
        with torch.no_grad():
            expected = qpipe.unet(*call_of(batch)).sample
        torch.testing.assert_close(unet(*call_of(batch)).sample, expected, rtol=0, atol=2e-2 * expected.std().item())
    found = fidelity(qpipe.unet, unet, *call_of())
    assert found.codes > 1000
    assert found.first == 0
    assert found.differing < 0.02
    assert found.most <= 3
    assert_near(images(pipe), images(qpipe), images(small_pipe()))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_steps_that_hold_are_not_computed(engine: str, exports: Exports, full: DDIMPipeline, tmp_path: Path) -> None:
    qpipe = exports("w4a8")[0]
    qpipe.scheduler.set_timesteps(RUN.steps)
    plan = PrecisionPlan.uniform(tuple(float(t) for t in qpipe.scheduler.timesteps), 8).holding((1,))
    held = apply_plan(qpipe, plan)
    export(held, RUN, engine, tmp_path / "held")
    pipe = load(tmp_path / "held")
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    found = images(pipe)
    assert len(calls) == RUN.steps - 1
    again = apply_plan(pipe, plan.holding((1, 2)))  # an exported pipeline can be given another one
    again.save_pretrained(tmp_path / "again")
    loaded = load(tmp_path / "again")
    assert plan_of(loaded).held == (False, True, True)
    np.testing.assert_array_equal(images(loaded), images(again))
    with pytest.raises(InputError, match="operations of an exported pipeline are not counted"):
        search_plan(full, pipe, RUN, {8: measure(full, pipe, RUN)}, budget=20, hold=True)
    assert np.square(found - images(held)).mean() < 0.1 * np.square(found - images(qpipe)).mean()


def test_shallow_steps_compute_the_outer_blocks_alone(exports: Exports, tmp_path: Path) -> None:
    qpipe, whole = exports("w4a8")
    qpipe.scheduler.set_timesteps(RUN.steps)
    uniform = PrecisionPlan.uniform(tuple(float(t) for t in qpipe.scheduler.timesteps), 8)
    shallow = apply_plan(qpipe, uniform.replace(shallow=(1,)))
    export(shallow, RUN, "onnxruntime", tmp_path / "onnxruntime")
    for_engine(tmp_path / "onnxruntime", "openvino", tmp_path / "openvino")
    simulated, plain = images(shallow), images(qpipe)
    assert not whole.pipeline.unet.facts.deep
    for engine in ENGINES:
        pipe = load(tmp_path / engine)
        assert list(pipe.unet.facts.deep) == ["deep.3"]  # what up_blocks.0 gives
        whole_graph, outer = (read_graph(pipe.unet.folder / name).graph for name in ("model.onnx", "shallow.onnx"))
        assert len(outer.node) < 0.5 * len(whole_graph.node)
        found = images(pipe)
        assert np.square(found - simulated).mean() < 0.1 * np.square(simulated - plain).mean()
        assert_near(images(apply_plan(pipe, uniform)), plain, images(small_pipe()))
    again = apply_plan(pipe, uniform.replace(shallow=(1, 2)))
    again.save_pretrained(tmp_path / "again")
    loaded = load(tmp_path / "again")
    assert plan_of(loaded).shallow == (1, 2)
    np.testing.assert_array_equal(images(loaded), images(again))
    assert not np.array_equal(images(loaded), found)
    with pytest.raises(InputError, match="hold_deep"):
        apply_plan(whole.pipeline, uniform.replace(shallow=(1,)))
    whole.pipeline.save_pretrained(tmp_path / "again")  # over one with two graphs
    assert not load(tmp_path / "again").unet.facts.deep
    path = tmp_path / "openvino" / "unet" / "engine.json"
    path.write_text(path.read_text().replace('"deep.3"', '"deep.2"'))
    with pytest.raises(ArtifactError, match="another deep part"):
        load(tmp_path / "openvino")


@pytest.mark.slow
def test_plans_with_shallow_steps_are_made_on_a_pipeline_whose_ranges_are_inputs(
    full: DDIMPipeline, exports: Exports, tmp_path: Path
) -> None:
    qpipe = quantize(full, quick_recipe("w4a4+8"), RUN)
    pipe = export(qpipe, RUN, "onnxruntime", tmp_path / "made", hold_deep=True).pipeline
    stats = measure_widths(full, pipe, RUN)
    seconds = StepSeconds({4: 0.9, 8: 1.0}, 0.1, 0.4)
    plan = search_plan(full, pipe, RUN, stats, budget=1.3, hold_deep=True, seconds=seconds)
    assert plan.shallow
    assert np.isfinite(images(apply_plan(pipe, plan))).all()
    _, whole = exports("w4a8")
    with pytest.raises(InputError, match="hold_deep"):
        check_can_hold(whole.pipeline, deep=True)


def test_affine_weights_become_signed_ones(exports: Exports) -> None:
    """Kernels of integers are several times as slow with unsigned weights, or with zero points."""
    from onnx import TensorProto, numpy_helper

    folder = exports("w4a8-affine")[1].pipeline.unet.folder
    stored = {tensor.name: tensor for tensor in read_graph(folder / "model.onnx").graph.initializer}
    graph = expanded(read_graph(folder / "model.onnx")).graph
    made = {tensor.name: tensor for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in made:
            continue
        name = node.input[0]
        assert made[name].data_type == TensorProto.INT8
        codes, before = (numpy_helper.to_array(t).astype(np.int16) for t in (made[name], stored[name]))
        zero = numpy_helper.to_array(stored[name.removesuffix("codes") + "zero"]).astype(np.int16)
        kept = numpy_helper.to_array(made[node.input[2]]).astype(np.int16) if len(node.input) > 2 else 0 * zero
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        np.testing.assert_array_equal(codes - kept.reshape(shape), before - zero.reshape(shape))
        found.append((stored[name].data_type, len(node.input)))
    assert (TensorProto.UINT4, 2) in found
    assert (TensorProto.UINT8, 3) in found
    assert (TensorProto.UINT4, 3) not in found


def test_it_is_a_component_like_any_other(exports: Exports, tmp_path: Path) -> None:
    qpipe, made = exports("w4a8")
    unet = made.pipeline.unet
    assert unet.config.sample_size == 8
    assert (unet.dtype, unet.device) == (torch.float32, torch.device("cpu"))
    made.pipeline.save_pretrained(tmp_path / "copy")
    again = load(tmp_path / "copy").to("cpu")
    np.testing.assert_array_equal(images(again), images(made.pipeline))
    assert pipeline_fingerprint(again) == pipeline_fingerprint(made.pipeline) != pipeline_fingerprint(qpipe)
    assert isinstance(unet(*call_of(), return_dict=False), tuple)
    torch.testing.assert_close(unet(*call_of()).sample, unet(*call_of(), return_dict=False)[0], rtol=0, atol=0)


def test_corrections_and_statistics(exports: Exports, full: DDIMPipeline, tmp_path: Path) -> None:
    qpipe, made = exports("w4a8")
    simulated, on_engine = measure(full, qpipe, RUN), measure(full, made.pipeline, RUN)
    torch.testing.assert_close(on_engine.fit().k.value, simulated.fit().k.value, rtol=0, atol=1e-2)
    by_either = [correct(made.pipeline, stats, ("cnc", "bc", "vsc")) for stats in (simulated, on_engine)]
    for corrected in by_either:
        assert np.abs(images(corrected) - images(made.pipeline)).max() > 0
    by_either[0].save_pretrained(tmp_path / "corrected")
    np.testing.assert_array_equal(images(load(tmp_path / "corrected")), images(by_either[0]))
    with pytest.raises(MismatchError, match="on another unet"):
        correct(qpipe, on_engine, ("cnc",))


def test_a_plan_and_ranges_by_step_are_inputs_of_one_graph(
    full: DDIMPipeline, exports: Exports, tmp_path: Path
) -> None:
    qpipe = quantize(full, quick_recipe("w4a4+8-steps2-time"), RUN)
    scheduler = DDIMScheduler.from_config(full.scheduler.config)
    scheduler.set_timesteps(RUN.steps)
    timesteps = tuple(map(float, scheduler.timesteps.tolist()))
    plan = PrecisionPlan(
        timesteps=timesteps, bits=((8, 4), (4, 8), (8, 8)), groups=(("down", ("down*",)), ("rest", ("*",)))
    )
    planned = apply_plan(qpipe, plan, full)
    made = export(planned, RUN, "onnxruntime", tmp_path / "planned")
    again = load(tmp_path / "planned")
    expected = images(planned)
    for pipe in (made.pipeline, again):
        assert_near(images(pipe), expected, images(full))
    wide = apply_plan(qpipe, dataclasses.replace(plan, bits=((8, 8),) * 3), full)
    assert np.square(images(again) - expected).mean() < 0.5 * np.square(images(wide) - expected).mean()
    for_engine(tmp_path / "planned", "openvino", tmp_path / "openvino")
    with_constants = load(tmp_path / "openvino")
    assert_near(images(with_constants), expected, images(full))
    assert len(with_constants.unet._held.session._last_call) == RUN.steps  # each has kernels of its own
    as_inputs = load(tmp_path / "openvino")
    as_inputs.unet._held.session.most_ranges = 1  # the other steps have the ranges as inputs
    assert_near(images(as_inputs), images(with_constants), images(full))
    sizes = [
        sum(path.stat().st_size for path in folder.iterdir())
        for folder in (tmp_path / "planned" / "unet", exports("w4a8")[1].pipeline.unet.folder)
    ]
    assert sizes[0] < 1.3 * sizes[1]  # weights once
    with pytest.raises(InputError, match="the samples of a batch are at several steps"):
        again.unet(call_of()[0], torch.tensor([666, 0]))


def test_ranges_as_constants_are_those_of_a_graph_of_one_width(exports: Exports) -> None:
    """What a step's ranges make of the graph of all widths is the graph of its width, node by node."""
    made = exports("w4a8")[1]
    unet = exports("w4a4+8")[1].pipeline.unet
    call = dict(zip(("sample", "timestep"), call_of(), strict=True))
    inputs = unet._inputs("forward", (), call)[0]
    graph = with_fixed_ranges(read_graph(unet.folder / "model.onnx"), {name: inputs[name] for name in RANGES})
    alone = read_graph(made.pipeline.unet.folder / "model.onnx")
    assert Counter(n.op_type for n in graph.graph.node) == Counter(n.op_type for n in alone.graph.node)
    assert [value.name for value in graph.graph.input] == [value.name for value in alone.graph.input]
    torch.testing.assert_close(unet(**call).sample, made.pipeline.unet(**call).sample, rtol=0, atol=1e-6)


def test_kernels_for_ranges_make_place_where_they_are_not_used(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = EngineModule(exports("w4a4+8")[1].pipeline.unet.folder)
    session: Any = unet._held.session
    session.most_ranges = 1

    def rows(width: int) -> set[bytes]:
        for quantizer in unet.quantizers:
            quantizer.active.index = quantizer.widths.index(width)
        unet(*call_of())
        return set(session._sessions)

    first = rows(4)
    assert rows(8) == first | {b""}  # the second has its ranges as inputs
    there = dict(session._sessions)
    assert rows(4) == rows(8) == first | {b""}
    assert all(session._sessions[row] is opened for row, opened in there.items())  # nothing is opened anew
    monkeypatch.setattr(sessions, "UNUSED", 1)
    second = rows(8) - {b""}
    assert len(second) == 1
    assert first.isdisjoint(second)


@pytest.mark.parametrize(
    "types", [pytest.param(["linear", "attention"], marks=pytest.mark.slow), ["linear", "attention", "conv"]]
)
def test_ranges_as_they_come(types: Sequence[str], full: DDIMPipeline, tmp_path: Path) -> None:
    """Of tokens, and of samples, beyond whose edges the code is a zero point of their own."""
    rules = tuple(Rule("*", type=kind, dynamic=True) for kind in types)  # type: ignore[arg-type]
    qpipe = quantize(full, dataclasses.replace(quick_recipe("w8a8"), rules=rules), RUN)
    made = export(qpipe, RUN, "onnxruntime", tmp_path / "onnxruntime")
    for_engine(tmp_path / "onnxruntime", "openvino", tmp_path / "openvino")
    reasons = dict(made.products.floating)
    assert set(reasons.values()) == {"ranges of queries and keys as they come"}
    assert all(".products" in name for name in reasons)
    for engine in ENGINES:
        unet = load(tmp_path / engine).unet
        for batch in (1, 3) if engine == "onnxruntime" else (3,):
            x, t = call_of(batch)
            x = x * torch.tensor([1.0, 5.0, 0.1])[:batch].view(-1, 1, 1, 1)
            with torch.no_grad():
                expected = qpipe.unet(x, t).sample
            torch.testing.assert_close(unet(x, t).sample, expected, rtol=0, atol=2e-2 * expected.std().item())
    graph = lowered(read_graph(made.pipeline.unet.folder / "model.onnx"), MODERN)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("MatMulIntegerToFloat") == len(made.products.integer) + len(reasons)  # values by probabilities
    assert "Conv" not in kinds


def test_four_bits_are_four_bits_on_disk(exports: Exports) -> None:
    from onnx import TensorProto

    graph = read_graph(exports("w4a8")[1].pipeline.unet.folder / "model.onnx")
    kinds = [tensor.data_type for tensor in graph.graph.initializer if tensor.name.endswith(".codes")]
    assert kinds.count(TensorProto.INT4) == len(kinds) - 2  # the first and the last layer have 8


def test_sums_of_two_products() -> None:
    full_range = np.array([[127], [127]], np.int8)
    assert overflows(full_range)
    assert not overflows(np.array([[64], [64]], np.int8))
    assert overflows(np.array([[65], [64]], np.int8))  # 255 * 129 = 32895
    assert not overflows(np.array([[127], [1], [127]], np.int8))  # neighbours in pairs, the last alone
    assert overflows(np.array([[-128], [-1]], np.int8))
    assert not overflows(full_range, most=15)


def test_saturation_is_avoided_where_it_can_happen(exports: Exports) -> None:
    from onnx import TensorProto

    path = exports("w8a8")[1].pipeline.unet.folder / "model.onnx"
    kinds = {}
    for processor in (MODERN, OLDER):
        kinds[processor] = row_kinds(path, processor)
    assert set(kinds[MODERN]) == {TensorProto.INT8}
    assert TensorProto.UINT8 in kinds[OLDER]
    if this_processor().vnni:  # elsewhere MODERN's sums do saturate
        ours, older = (OnnxRuntimeSession(path, processor=p).run(feed(path)) for p in (MODERN, OLDER))
        np.testing.assert_allclose(ours[0], older[0], atol=2e-2)
    with pytest.raises(InputError, match=r"sums of two products would saturate; use onnxruntime"):
        OpenVinoSession(path, processor=OLDER)
    four_bits = exports("w4a8")[1].pipeline.unet.folder / "model.onnx"
    assert row_kinds(four_bits, OLDER).count(TensorProto.UINT8) <= 2  # proven from the codes: 4 bits cannot
    with pytest.raises(InputError, match="no AVX2"):
        OnnxRuntimeSession(path, processor=Processor(vnni=False, avx2=False))


def test_unsigned_codes_keep_their_zero_points(exports: Exports) -> None:
    """Weights with zero points of their own, which on a processor without VNNI become unsigned."""
    from onnx import TensorProto

    path = exports("w4a8-affine")[1].pipeline.unet.folder / "model.onnx"
    assert TensorProto.UINT8 in row_kinds(path, OLDER)
    if this_processor().vnni:
        ours, older = (OnnxRuntimeSession(path, processor=p).run(feed(path)) for p in (MODERN, OLDER))
        np.testing.assert_allclose(ours[0], older[0], atol=2e-2 * ours[0].std())


def row_kinds(path: Path, processor: Processor) -> list[int]:
    """Of the weights' codes, as products read them."""
    graph = lowered(read_graph(path), processor).graph
    return [tensor.data_type for tensor in graph.initializer if tensor.name.endswith("/rows")]


def feed(path: Path) -> Mapping[str, Any]:
    sample, t = call_of()
    return {"sample": sample.numpy(), "timestep": np.full(2, t.item(), np.float32)}


def test_what_is_not_there(
    exports: Exports, full: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qpipe, made = exports("w4a8")
    with pytest.raises(InputError, match="unknown engine 'tvm'; known are onnxruntime, openvino, torchao"):
        export(qpipe, RUN, "tvm", tmp_path / "out")
    with pytest.raises(InputError, match="cuda is a provider of onnxruntime"):
        export(qpipe, RUN, "openvino", tmp_path / "out", provider="cuda")
    path = made.pipeline.unet.folder / "model.onnx"
    with pytest.raises(InputError, match="has no CUDAExecutionProvider"):
        OnnxRuntimeSession(path, provider="cuda")
    monkeypatch.setattr(sessions, "version", lambda package: "1.2.0")
    with pytest.raises(InputError, match=r"onnxruntime 1.2.0 is older than 1.20: pip install 'ptqd\[engines\]'"):
        OnnxRuntimeSession(path)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"openvino is not installed: pip install 'ptqd\[engines\]', or sample in sim"):
        export(qpipe, RUN, "openvino", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    images(qpipe)  # the simulation still runs


def test_a_call_it_was_not_made_for(exports: Exports) -> None:
    unet = exports("w4a8")[1].pipeline.unet
    with pytest.raises(InputError, match="made for sample of N x 2 x 8 x 8, it is given 2 x 2 x 16 x 16; export the"):
        unet(torch.zeros(2, 2, 16, 16), 1)
    with pytest.raises(InputError, match="the graph was made without it: 'class_labels'"):
        unet(*call_of(), class_labels=torch.zeros(2))
    with pytest.raises(InputError, match="only 'forward' was exported"):
        unet.decode(torch.zeros(1))


def test_number_formats_that_no_engine_multiplies(full: DDIMPipeline, tmp_path: Path) -> None:
    floats = quantize(full, quick_recipe("we4m3ae4m3"), RUN)
    with pytest.raises(InputError, match="no engine multiplies e4m3 weights; quantize to integers, or simulate"):
        export(floats, RUN, "onnxruntime", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_is_found(exports: Exports, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exports("w4a8")[1].pipeline.unet.folder, folder)
    data = bytearray((folder / "model.onnx").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(InputError, match="not the one that was exported; export the pipeline again"):
        EngineModule(folder)
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(InputError, match="is no ONNX graph"):
        read_graph(folder / "model.onnx")
    facts = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps(facts | {"format": 0}))
    with pytest.raises(InputError, match="of another version of ptqd"):
        EngineModule(folder)


@needs_vnni
def test_an_operator_that_an_engine_lacks(exports: Exports, tmp_path: Path) -> None:
    import onnx

    graph = read_graph(exports("w4a8")[1].pipeline.unet.folder / "model.onnx")
    next(node for node in graph.graph.node if node.op_type == "Softmax").op_type = "Hardermax"
    onnx.save(graph, tmp_path / "model.onnx")
    for engine in (OnnxRuntimeSession, OpenVinoSession):
        with pytest.raises(InputError, match=r"does not load .*Hardermax"):
            engine(tmp_path / "model.onnx")


@needs_vnni
def test_tensorrt_wants_signed_codes(full: DDIMPipeline, exports: Exports, tmp_path: Path) -> None:
    from onnx import TensorProto, checker

    with pytest.raises(InputError, match="has a zero point, which TensorRT does not multiply"):
        export(exports("w8a8")[0], RUN, "onnxruntime", tmp_path / "refused", provider="tensorrt")
    text = quick_recipe("w4a8").to_dict()
    text |= {"attention": False, "activations": {**text["activations"], "symmetric": True}}
    qpipe = quantize(full, Recipe.from_dict(text), RUN)
    made = export(qpipe, RUN, "onnxruntime", tmp_path / "trt", provider="tensorrt")
    graph = read_graph(tmp_path / "trt" / "unet" / "model.onnx")
    checker.check_model(graph, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    points = [node.input[2] for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    assert {kinds[name] for name in points} == {TensorProto.INT8}
    assert TensorProto.INT4 not in kinds.values()
    assert_near(*outputs(made.pipeline.unet, qpipe.unet, full.unet))
    assert fidelity(qpipe.unet, made.pipeline.unet, *call_of()).first == 0
    assert made.pipeline.unet.facts.provider == "tensorrt"
    with pytest.raises(InputError, match="has no TensorrtExecutionProvider"):
        made.pipeline.unet.to("cuda")


@pytest.mark.parametrize(("text", "layout"), [("w8a8", "int8"), ("w4a8-affine", "int8"), ("w4a8", "int4")])
def test_torchao(text: str, layout: Any, exports: Exports, tmp_path: Path) -> None:
    qpipe, _ = exports(text)
    made = export(qpipe, RUN, "torchao", tmp_path / "ao", layout=layout)
    unet = made.pipeline.unet
    assert type(unet) is UNet2DModel
    linear = [name for name, module in qpipe.unet.named_modules() if isinstance(module, QuantLinear)]
    assert list(made.products.integer) == linear
    assert {reason for _, reason in made.products.floating} == {"a convolution", "attention products"}
    for name in made.products.integer:
        layer, weight = qpipe.unet.get_submodule(name), unet.get_submodule(name).weight
        if layout == "int8":
            zero = torch.zeros(()) if layer.zero_point is None else layer.zero_point.view(-1, 1)
            torch.testing.assert_close(weight.qdata.int(), layer.integer_weight().int() - zero.int())
            x = torch.randn(2, *[3] * (weight.act_quant_scale.ndim - 2), layer.in_features)
            torch.testing.assert_close(unet.get_submodule(name)(x), layer(x), rtol=1e-4, atol=1e-5)
        else:
            low, high = (weight.qdata << 4) >> 4, weight.qdata >> 4
            codes = torch.stack([low, high], -1).flatten(1)
            torch.testing.assert_close(codes.int(), layer.integer_weight().int())
    again = load(tmp_path / "ao", dtype=torch.bfloat16 if layout == "int4" else torch.float32)
    assert pipeline_fingerprint(again) == pipeline_fingerprint(made.pipeline)
    if layout == "int8":
        np.testing.assert_array_equal(images(again), images(made.pipeline))


@pytest.mark.slow
def test_decoder_and_text_encoder(pipe: LatentClassPipeline, qpipe: Any, run: Sampling, tmp_path: Path) -> None:
    small = run.replace(batch=2)
    made = export(qpipe, small, "onnxruntime", tmp_path / "out", others="int8")
    assert made.components == ("unet", "vae")
    loaded = load(tmp_path / "out")
    expected = images(qpipe, small)
    assert np.square(images(loaded, small) - expected).mean() < 1e-3
    other = small.replace(call={**small.call, "guidance_scale": 3.0})
    assert np.abs(images(loaded, other) - images(loaded, small)).max() > 0
    with pytest.raises(InputError, match="encoder is not exported"):
        loaded.vae.encode(torch.zeros(1, 1, 16, 16))


def test_from_the_shell(
    exports: Exports, full: DDIMPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full.save_pretrained(tmp_path / "full")
    arguments = ["--steps", "3", "--samples", "4", "--batch", "2", "--judge", "none", "--measured", "4"]
    toml = tmp_path / "small.toml"
    toml.write_text("calibration_samples = 2\n")
    ran = [str(tmp_path / "full"), "--recipe", str(toml), "--methods", "cnc,bc", "--out", str(tmp_path / "run")]
    assert main(["run", *ran, *arguments]) == 0
    assert main(["export", str(tmp_path / "run"), "--row", "small cnc+bc", "--out", str(tmp_path / "engine")]) == 0
    assert "products of integers: " in capsys.readouterr().out
    sampled = ["--steps", "3", "--samples", "4", "--batch", "2"]
    assert main(["sample", str(tmp_path / "engine"), "--out", str(tmp_path / "images"), *sampled]) == 0
    for arguments, message in (
        (["export", str(tmp_path / "run"), "--row", "w2a2 none"], "no rows of .* are called 'w2a2 none'; there are"),
        (["export", str(tmp_path / "full"), "--row", "x"], "is no run folder"),
        (["bench", str(tmp_path / "full")], "give --model, the pipeline in full precision"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "none")]) == 2
        assert re.search(f"^ptqd: .*{message}", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.slow
def test_engines_are_timed_in_turn(full: DDIMPipeline, tmp_path: Path) -> None:
    full.save_pretrained(tmp_path / "full")
    (tmp_path / "small.toml").write_text("calibration_samples = 2\n")
    ran = [str(tmp_path / "full"), "--recipe", str(tmp_path / "small.toml"), "--methods", "cnc,bc"]
    sampled = ["--steps", "3", "--samples", "4", "--batch", "2", "--judge", "none", "--measured", "4"]
    assert main(["run", *ran, *sampled, "--out", str(tmp_path / "run")]) == 0
    bench = ["bench", str(tmp_path / "run"), "--engine", "torch", "--engine", "onnxruntime", "--repeats", "1"]
    values = tmp_path / "values.json"
    assert main([*bench, "--batch", "2", "--threads", "1", "--json", str(values)]) == 0
    facts = json.loads(values.read_text())
    assert json.loads((tmp_path / "run" / "report.json").read_text())["speed"] == facts
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Real seconds" in (tmp_path / "run" / "report.html").read_text()
    rows = facts["rows"]
    assert [(row["engine"], row["precision"]) for row in rows] == [
        ("torch", "FP32"),
        ("torch, simulated", "small"),
        ("onnxruntime", "FP32"),
        ("onnxruntime", "small"),
    ]
    assert rows[0]["of_torch"] == 1
    assert rows[1]["psnr"] == pytest.approx(rows[3]["psnr"], abs=0.5)
    assert rows[2]["psnr"] > 80
    assert all(row["peak"] > 1e8 for row in rows)


REFUSED = {
    "sana": "cannot be traced to an ONNX graph",  # torch.export does not divide its sizes
    "ltx": "is given a tuple as 'rope_interpolation_scale', which no graph takes",
    "stable-audio": "is given a tuple as 'rotary_embedding', which no graph takes",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_every_pipeline_is_exported(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    full = case.build()
    run = Sampling(case.steps, case.eta, 3, 3, call={**case.call, **(case.guidance or {})})
    qpipe = quantize(full, quick_recipe("w8a8", 3), run)
    others: Any = "fp32" if name == "sd1" else "none"
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]):
            export(qpipe, run, "onnxruntime", tmp_path / "engine", others=others)
        return
    export(qpipe, run, "onnxruntime", tmp_path / "engine", others=others)
    exported = load(tmp_path / "engine")
    if others == "fp32":
        assert all(isinstance(getattr(exported, part), EngineModule) for part in ("unet", "vae", "text_encoder"))
    assert np.isfinite(np.asarray(run_batch(exported, run, range(3), "latent"))).all()
    simulated, engine = (getattr(pipe, denoiser_name(pipe)) for pipe in (qpipe, exported))
    call = captured(qpipe, run, simulated)
    found = fidelity(simulated, engine, **call.arguments(list(call.tensors.values())))
    assert found.first == 0
    assert found.output < 0.1  # random weights make much of one other code


@pytest.mark.slow
def test_probabilities_of_16_bits_are_multiplied_as_floats(full: DDIMPipeline, tmp_path: Path) -> None:
    qpipe = quantize(full, quick_recipe("w8a8", softmax_bits=16), RUN)
    made = export(qpipe, RUN, "onnxruntime", tmp_path / "made")
    assert set(dict(made.products.floating).values()) == {"16-bit probabilities"}
    assert_near(*outputs(made.pipeline.unet, qpipe.unet, full.unet))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["w4a8-svd2x8", "w4a4-rotate8"])
def test_branches_in_few_bits_and_rotations_are_computed_as_simulated(
    text: str, full: DDIMPipeline, tmp_path: Path
) -> None:
    qpipe = quantize(full, quick_recipe(text), RUN)
    for name, layer in quantized_layers(qpipe.unet):
        if layer.rotation is not None:  # whether it helps or not
            layer.set_rotation(layer.largest_rotation)
            layer.encode(full_weight(full.unet, name, layer))
    assert any(layer.rotated > 1 or layer.low_rank_inputs for _, layer in quantized_layers(qpipe.unet))
    export(qpipe, RUN, "onnxruntime", tmp_path / "onnxruntime", others="none")
    for_engine(tmp_path / "onnxruntime", "openvino", tmp_path / "openvino")
    for engine in ENGINES:
        assert_near(*outputs(load(tmp_path / engine).unet, qpipe.unet, full.unet))


@pytest.mark.slow
def test_layers_with_more_bits_are_computed_as_simulated(tmp_path: Path) -> None:
    """Bytes of codes are multiplied one by one; a range as it comes has no more than one."""
    pipe = tiny_pipeline()
    run = Sampling(steps=2, samples=2, batch=2, call={"class_labels": [0, 1], "guidance_scale": 2.0})
    rules = (Rule("conv_out", 8, 16), Rule("*conv_shortcut*", 8, 13), Rule("*to_q", activation_bits=12, dynamic=True))
    recipe = dataclasses.replace(Recipe.parse("w8a8-split"), rules=rules, calibration_samples=2)
    quantized = quantize(pipe, recipe, run)
    made = export(quantized, run, "onnxruntime", tmp_path / "onnxruntime", others="none")
    for_engine(tmp_path / "onnxruntime", "openvino", tmp_path / "openvino")
    assert set(dict(made.products.floating).values()) == {"activations of more than 8 bits"}
    assert all(name.endswith("to_q") for name, _ in made.products.floating)
    want = run_batch(quantized, run, range(2), "latent")
    for engine in ENGINES:
        got = run_batch(load(tmp_path / engine), run, range(2), "latent")
        assert (got - want).abs().mean() < 0.02 * want.abs().mean()
    graph = lowered(read_graph(made.pipeline.unet.folder / "model.onnx"), MODERN)
    assert "Conv" not in [node.op_type for node in graph.graph.node]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's exporter
def test_two_bytes_are_the_code() -> None:
    """Also at the ends of the range and beyond, and where a code's low byte is full or empty."""
    import onnxruntime

    quantizer = ActivationQuantizer(QuantSpec(16, symmetric=False))
    quantizer.scale.fill_(0.5)
    quantizer.zero_point.fill_(quantizer.grids[0].qmin + 30_001)
    quantizer.refresh()

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rounding: Any = onnx_graph._Rounding(quantizer, None, None, signed=False)  # type: ignore[arg-type]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(self.rounding.bytes_of(x))  # type: ignore[no-any-return]

    edges = torch.arange(0, 2**16, 256)[:, None] + torch.tensor([-1.0, 0.0, 1.0, 127.0, 128.0])
    x = (torch.cat([edges.flatten(), torch.tensor([-500.0, 66_000.0])]) - 30_001 + 0.2) * 0.5
    program: Any = torch.onnx.export(Sum().eval(), (x,), dynamo=True, opset_version=21, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_array_equal(got, quantizer(x).numpy())
