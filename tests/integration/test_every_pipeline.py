"""What goes through, pipeline by pipeline: the table of docs/models.md is made of these tests' results.

python bench/pipelines.py    # runs them, and writes the table
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from conftest import quick_recipe
from ptqd import (
    InputError,
    PrecisionPlan,
    PtqdError,
    Recipe,
    Sampling,
    apply_plan,
    correct,
    export,
    load,
    measure,
    quantize,
)
from ptqd.diffusion import run_batch, with_components
from ptqd.diffusion.deep_part import deep_modules
from ptqd.diffusion.pipeline_parts import denoiser_name, denoisers_of
from ptqd.quantization import run_cost
from ptqd.quantization.modules.attention import attention_modules
from ptqd.quantization.modules.linear_conv import QuantLinear
from ptqd.quantization.sites import quantized_sites
from tiny import CASES
from tiny_more import MORE_CASES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the many libraries' own code
]
ALL = {**CASES, **MORE_CASES}
NO_PEFT = "its class takes no LoRA"


REFUSED: dict[str, tuple[str, ...]] = {  # what cannot be, and is said in a line; of graphs see below
    "amused": ("quantized",),  # discrete samples
    "ltx-2": ("quantized",),  # steps copies of its scheduler
    "cosmos": ("measured",),  # steps samples of several shapes
    "kandinsky-prior": ("measured",),  # steps vectors
}


def learning_recipe(shorthand: str = "w4a8-smooth-gptq-brecq") -> Recipe:
    """One that smooths, rounds by GPTQ and learns, in a few steps each."""
    values = Recipe.parse(shorthand).to_dict()
    values |= {"calibration_samples": 4, "calibration_rows": 0}
    for part in ("weights", "activations"):
        values[part] = {**values[part], "range": "minmax"}
    for method in values["methods"]:
        method |= {k: v for k, v in {"inputs": 16, "iterations": 2, "batch": 4}.items() if k in method}
    return Recipe.from_dict(values)


def samples(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.as_tensor(run_batch(pipe, run, range(min(2, run.batch)), "latent"))


def products_of(pipe: Any) -> tuple[int, int]:
    """Attentions whose products are quantized, and all."""
    models = denoisers_of(pipe).values()
    own = sum(site.weight is None for model in models for site in quantized_sites(model))
    return own, sum(1 for model in models for _ in attention_modules(model))


def has_lora(pipe: Any, run: Sampling, folder: Path | None) -> str:
    """A LoRA on three linear layers adds what it says, and is saved."""
    peft = pytest.importorskip("peft")
    name = denoiser_name(pipe)
    plain = getattr(pipe, name)
    if not hasattr(plain, "add_adapter"):
        return NO_PEFT
    layers = [path for path, module in plain.named_modules() if isinstance(module, QuantLinear)][:3]
    denoiser = copy.deepcopy(plain)
    torch.manual_seed(1)
    denoiser.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False), "own")
    by_hand = copy.deepcopy(plain)

    def add(module: Any, args: Any, output: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = output + args[0] @ down.T @ up.T * 4  # alpha 8, rank 2
        return changed

    for path in layers:
        tuned: Any = denoiser.get_submodule(path)
        pair = {"down": tuned.lora_A["own"].weight, "up": tuned.lora_B["own"].weight}
        by_hand.get_submodule(path).register_forward_hook(functools.partial(add, **pair))
    made, want = (with_components(pipe, **{name: model}) for model in (denoiser, by_hand))
    got = samples(made, run)
    torch.testing.assert_close(got, samples(want, run), rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, samples(pipe, run))
    if folder is not None:
        made.save_pretrained(folder)
        assert torch.equal(samples(load(folder), run), got)
    return "yes"


def _compiled(pipe: Any) -> Any:
    """The pipeline, its denoisers compiled as whole graphs."""
    torch._dynamo.reset()
    whole: dict[str, Any] = {
        name: torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        for name, model in denoisers_of(pipe).items()
    }
    return with_components(pipe, **whole)


def _offloaded(pipe: Any) -> Any:
    """The pipeline, the weights of its denoisers elsewhere until they are needed."""
    parts: dict[str, Any] = {name: copy.deepcopy(model) for name, model in denoisers_of(pipe).items()}
    for model in parts.values():
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    return with_components(pipe, **parts)


@pytest.mark.parametrize("name", [name for name in ALL if "quantized" not in REFUSED.get(name, ())])
def test_the_best_recipe_goes_through(name: str) -> None:
    case = ALL[name]
    torch.manual_seed(0)
    batch = 1 if name == "wan-vace" else 2  # it takes one generator
    run = Sampling(steps=case.steps, eta=case.eta, samples=4, batch=batch, call={**case.call, **(case.guidance or {})})
    made = quantize(case.build(), learning_recipe("w4a8-best"), run)
    assert bool(torch.isfinite(samples(made, run)).all())


@pytest.mark.parametrize("name", [name for name in ALL if not REFUSED.get(name)])
def test_a_step_that_holds_calls_nothing(name: str) -> None:
    """As many calls less as the step before has made, whatever a pipeline's guidance; and the sample is another. With
    three steps or more it goes on from two outputs.
    """
    case = ALL[name]
    torch.manual_seed(0)
    batch = 1 if name == "wan-vace" else 2
    run = Sampling(steps=case.steps, eta=case.eta, samples=2, batch=batch, call={**case.call, **(case.guidance or {})})
    recipe = quick_recipe("w8a8")
    pipe = case.build()
    qpipe = quantize(pipe, recipe, run)
    timesteps = measure(pipe, qpipe, run).measured_on.model_timesteps
    later = [t for t in timesteps if t != timesteps[0]]
    if not later or len(set(timesteps)) < len(timesteps):
        pytest.skip("one step, or a schedule that takes some timestep twice")
    one = later[0] if len(denoisers_of(pipe)) > 1 else later[-1]  # of two denoisers the second has its own first step
    plan = PrecisionPlan.uniform(timesteps, 8).holding([i for i, t in enumerate(timesteps) if t == one])
    if one == later[-1] and len(timesteps) > 2:
        plan = plan.replace(extrapolation={i: (1.5, -0.5) for i, holds in enumerate(plan.held) if holds})
    held = apply_plan(qpipe, plan)
    calls = {"computed": 0, "held": 0}
    for key, each in (("computed", qpipe), ("held", held)):
        for model in denoisers_of(each).values():
            model.register_forward_hook(lambda *_, key=key: calls.update({key: calls[key] + 1}))
    outcome = [samples(each, run) for each in (qpipe, held)]
    assert calls["held"] < calls["computed"]
    assert bool(torch.isfinite(outcome[1]).all())
    assert not torch.equal(*outcome)


@pytest.mark.parametrize("name", ALL)
def test_a_pipeline_goes_the_whole_way(
    name: str, record_property: Callable[[str, object], None], tmp_path: Path
) -> None:
    case, broken = ALL[name], []
    torch.manual_seed(0)
    pipe = case.build()
    batch = 1 if name == "wan-vace" else 2  # it takes one generator
    call = {**case.call, **(case.guidance or {})}
    run = Sampling(steps=case.steps, eta=case.eta, samples=4, batch=batch, call=call)
    more = run.replace(samples=16, batch=1 if batch == 1 else 8)
    state: dict[str, Any] = {}

    def quantized() -> str:
        state["q"] = quantize(pipe, learning_recipe(), run)
        own, every = products_of(state["q"])
        record_property("products", f"{own} of {every}")
        return "yes"

    def measured() -> str:
        state["stats"] = measure(pipe, state["q"], more)
        assert bool(torch.isfinite(state["stats"].fit().variance.value).all())
        return "yes"

    def searched() -> str:
        state["c"] = correct(
            state["q"], state["stats"], "auto", sampling=run.replace(samples=16, batch=1 if batch == 1 else 8)
        )
        assert bool(torch.isfinite(samples(state["c"], run)).all())
        return "yes"

    def loads() -> bool:
        """Whether diffusers itself loads what it saves of the pipeline in full precision, equal."""
        if "loads" not in state:
            try:
                pipe.save_pretrained(tmp_path / "full")
                state["loads"] = torch.equal(samples(load(tmp_path / "full"), run), samples(pipe, run))
            except Exception:  # whatever it is, it is not of quantization
                state["loads"] = False
        return bool(state["loads"])

    def saved() -> str:
        if not loads():
            return "nor without ptqd"
        corrected = state.get("c", state["q"])
        corrected.save_pretrained(tmp_path / "saved")
        assert torch.equal(samples(load(tmp_path / "saved"), run), samples(corrected, run))
        return "yes"

    def exported() -> str:
        made = export(state["q"], run, "onnxruntime", tmp_path / "exported", others="none")
        got, want, full = (samples(p, run) for p in (made.pipeline, state["q"], pipe))
        assert (got - want).abs().mean() <= 0.5 * (full - want).abs().mean() + 1e-4
        return "yes"

    def compiled() -> str:
        return alike(_compiled)

    def offloaded() -> str:
        return alike(_offloaded)

    def alike(change: Callable[[Any], Any]) -> str:
        """The quantized pipeline samples alike when it is changed, if the original one can be changed so."""
        try:
            samples(change(pipe), run)
        except Exception:  # whatever it is, it is not of quantization
            return "nor without ptqd"
        torch.testing.assert_close(samples(change(state["q"]), run), samples(state["q"], run), rtol=1e-3, atol=1e-3)
        return "yes"

    def tuned() -> str:
        return has_lora(state["q"], run, tmp_path / "lora" if loads() else None)

    for column in (quantized, measured, searched, saved, exported, compiled, offloaded, tuned):
        title = column.__name__
        if (title != "quantized" and "q" not in state) or (title == "searched" and "stats" not in state):
            record_property(title, "-")
            continue
        try:
            record_property(title, column())
        except PtqdError as error:
            line = " ".join(str(error).replace(str(tmp_path), "FOLDER").split())
            record_property(title, f"refused: {line}")
            if title not in (*REFUSED.get(name, ()), "exported"):  # of many arguments and operators no graph is made
                broken.append(f"{title}: {line}")
        except Exception as error:  # all columns are looked at
            line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            record_property(title, f"no: {line}")
            broken.append(f"{title}: {line}")
    record_property("class", type(pipe).__name__)
    assert not broken


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in CASES or name == "cascade-prior" else pytest.mark.slow)
        for name in ALL
        if not REFUSED.get(name)
    ],
)
def test_a_shallow_step_computes_the_outer_blocks_or_is_refused(name: str) -> None:
    """Of what the first step takes it costs less, and the sample is another; where the deep part is not known, it says
    so before anything runs.
    """
    case = ALL[name]
    torch.manual_seed(0)
    batch = 1 if name == "wan-vace" else 2
    run = Sampling(steps=case.steps, eta=case.eta, samples=2, batch=batch, call={**case.call, **(case.guidance or {})})
    recipe = quick_recipe("w8a8")
    pipe = case.build()
    qpipe = quantize(pipe, recipe, run)
    timesteps = measure(pipe, qpipe, run).measured_on.model_timesteps
    if len(timesteps) < 2 or len(set(timesteps)) < len(timesteps) or len(denoisers_of(pipe)) > 1:
        pytest.skip("one step, several denoisers, or a schedule that takes some timestep twice")
    plan = PrecisionPlan.uniform(timesteps, 8).replace(shallow=(len(timesteps) - 1,))
    try:
        deep_modules(next(iter(denoisers_of(pipe).values())))
    except InputError:
        with pytest.raises(InputError, match="let steps hold their output"):
            apply_plan(qpipe, plan)
        return
    shallow = apply_plan(qpipe, plan)
    outcome = [samples(each, run) for each in (qpipe, shallow)]
    assert bool(torch.isfinite(outcome[1]).all())
    assert not torch.equal(*outcome)
    assert run_cost(shallow, run).total < run_cost(qpipe, run).total
