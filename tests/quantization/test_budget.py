"""What quantizing takes, and that it keeps to what it is given."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import quick_recipe, tiny_pipeline
from ptqd import Budget, InputError, Recipe, Sampling, quantize
from ptqd.diffusion.fingerprints import fingerprint
from ptqd.quantization.budget import live_bytes, rows_that_fit
from ptqd.quantization.calibration import as_calibrated
from ptqd.quantization.estimate import Estimate, StageCost, fitted, measure_costs
from ptqd.quantization.methods import Distill, Gptq, Widen
from ptqd.quantization.rounding import adaround_brecq, gptq
from ptqd.quantization.rounding.lockstep import in_lockstep
from ptqd.quantization.rounding.training_memory import Kept, RowsAtOnce, computed_again, kept_bytes, rows_at_once

RUN = Sampling(steps=2, samples=4, batch=4, call={"class_labels": [0, 1, 2], "guidance_scale": 2.0})


def recipe(words: str, **changes: Any) -> Recipe:
    return dataclasses.replace(quick_recipe(words, 4), **changes)


def learned(monkeypatch: pytest.MonkeyPatch, plan: RowsAtOnce) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(adaround_brecq, "rows_at_once", lambda *args: plan)
    method = Distill(iterations=4, batch=8, inputs=16)
    quantized = quantize(tiny_pipeline(), recipe("w4a8-split", methods=(method,)), RUN)
    return {name: layer.weight for name, layer in quantized.unet.named_modules() if hasattr(layer, "codes")}


@pytest.mark.parametrize("plan", [RowsAtOnce(3, again=False, fits=True), RowsAtOnce(2, again=True, fits=True)])
def test_a_batch_in_parts_teaches_the_same(plan: RowsAtOnce, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learned(monkeypatch, RowsAtOnce(8, again=False, fits=True))
    parts = learned(monkeypatch, plan)
    assert whole.keys() == parts.keys()
    far = [float((whole[name] - parts[name]).norm() / whole[name].norm()) for name in whole]
    assert max(far) < 2e-3  # a code on the edge of rounding may fall to the other side


def test_what_is_kept_for_gradients_is_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False), nn.Tanh())
    x = torch.randn(5, 8, requires_grad=True)
    kept = kept_bytes(lambda: model(x), model, ["0", "2"])
    activations, weights = 5 * 8 * 4, 8 * 8 * 4
    assert kept.all == 3 * activations + 2 * weights  # the input, what each tanh gives, and the weights
    assert kept.by_unit["0"] >= weights
    with computed_again(model, ["0", "2"]):
        again = kept_bytes(lambda: model(x), model, ["0", "2"])
        assert again.all <= kept.all
        loss = model(x).square().sum()
    want = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], want)
    assert "forward" not in vars(model[0])


def test_rows_at_once_fit() -> None:
    one, two = Kept(110, {"": 20, "a": 50, "b": 40}), Kept(210, {"": 30, "a": 100, "b": 80})
    assert rows_at_once(one, two, 64, 10**6) == RowsAtOnce(64, again=False, fits=True)
    assert rows_at_once(one, two, 64, 516) == RowsAtOnce(3, again=False, fits=True)
    few = rows_at_once(one, two, 64, 170)
    assert few.again
    assert not rows_at_once(one, two, 64, 5).fits


def test_gptq_in_one_pass_is_gptq_unit_by_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    words = recipe("w4a8-split-time-gptq")
    threads = threading.active_count()
    once = quantize(tiny_pipeline(), words, RUN)
    assert threading.active_count() == threads
    monkeypatch.setattr(gptq, "live_bytes", lambda *args: 1 << 60)
    anew = quantize(tiny_pipeline(), words, RUN)
    assert fingerprint(once.unet) == fingerprint(anew.unet)


def test_rows_wait_in_half_of_the_memory() -> None:
    assert gptq.rows_that_wait(10, 10**6, 256) == 256
    assert gptq.rows_that_wait(10, 2000, 256) == 100
    assert gptq.rows_that_wait(10, 1000, 256) == 0
    assert gptq.rows_that_wait(10, 1000, 20) == 20


def test_calls_in_lockstep_end_together_when_one_fails() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    calls: list[Any] = [((torch.zeros(1, 2),), {}), ((torch.zeros(1, 3),), {})]
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        in_lockstep(model, calls, ["0", "1"], lambda unit, call: None)
    assert threading.active_count() == threads
    visited: list[str] = []

    def visit(unit: str, call: Callable[[], None]) -> None:
        visited.append(unit)
        call()

    in_lockstep(model, calls[:1] * 3, ["0", "1"], visit)
    assert visited == ["0", "1"]
    assert not model[0]._forward_pre_hooks


def test_another_denoiser_is_called_before_each_unit_on_its_own_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.unit, self.factor = nn.Identity(), factor

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            once: torch.Tensor = self.unit(self.factor * self.unit(x))  # it is visited once
            return once

    model, other = Twice(2.0), Twice(3.0)
    calls: list[Any] = [((torch.full((1,), value),), {}) for value in (1.0, 5.0)]
    seen: list[tuple[str, float]] = []

    def visit(unit: str, call: Callable[[], None]) -> None:
        hooks = [
            each.unit.register_forward_pre_hook(lambda module, args, name=name: seen.append((name, float(args[0]))))
            for name, each in (("model", model), ("other", other))
        ]
        call()
        for hook in hooks:
            hook.remove()

    in_lockstep(model, calls, ["unit"], visit, (other, other.get_submodule))
    assert seen == [("other", 1.0), ("model", 1.0), ("other", 5.0), ("model", 5.0)]
    assert not model.unit._forward_pre_hooks
    assert not other.unit._forward_pre_hooks


def test_another_denoiser_that_skips_a_unit_is_left_where_it_is() -> None:
    class Some(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.names, self.units = names, nn.ModuleDict({name: nn.Identity() for name in "abc"})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in self.names:
                x = self.units[name](x + 1)
            return x

    model, other = Some("a", "c"), Some("b", "c")
    calls: list[Any] = [((torch.zeros(1),), {})]
    units, seen = ["units.a", "units.b", "units.c"], dict[str, list[float]]()

    def visit(unit: str, call: Callable[[], None]) -> None:
        values = seen.setdefault(unit, [])
        hooks = [
            each.get_submodule(unit).register_forward_pre_hook(lambda module, args: values.append(float(args[0])))
            for each in (other, model)
        ]
        call()
        for hook in hooks:
            hook.remove()

    in_lockstep(model, calls, units, visit, (other, other.get_submodule))
    assert seen == {"units.a": [1.0], "units.c": [2.0, 2.0]}
    in_lockstep(model, calls, units, lambda unit, call: None, (other, other.get_submodule))  # nothing waits for ever


def test_live_bytes_are_of_what_is_kept() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    size = 3 * 16 * 4
    assert size <= live_bytes(model, ["0", "1", "2", "3", "4"], ((torch.zeros(3, 16),), {})) <= 2 * size
    assert rows_that_fit(model, ((torch.zeros(1, 16),), {}), 10**9, 64) == 64
    assert rows_that_fit(model, ((torch.zeros(1, 16),), {}), 1, 64) == 1


def test_an_estimate_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    pipe, words = tiny_pipeline(), recipe("w4a8-wide-smooth-gptq")
    costs = measure_costs(as_calibrated(pipe.unet), pipe, words, RUN)
    taken = costs.estimate(words, RUN, 2, Budget())
    assert [stage.name for stage in taken.stages] == ["calibrating", "finding ranges", "wide", "smooth", "gptq"]
    assert all(stage.seconds > 0 for stage in taken.stages)
    assert costs.rows_a_sample == 2
    more = costs.estimate(dataclasses.replace(words, calibration_samples=400), RUN, 2, Budget())
    assert more.stages[0].seconds > 20 * taken.stages[0].seconds
    quantize(pipe, words, RUN, progress=True)
    said = capsys.readouterr().err
    assert "quantizing the unet takes about" in said
    assert "GB (calibrating" in said


def costing(seconds_a_row: float) -> Callable[[Recipe], Estimate]:
    """An estimate of calibration and methods by their rows alone."""

    def estimate(words: Recipe) -> Estimate:
        stages = [StageCost("calibrating", seconds_a_row * words.calibration_samples, 10**9)]
        for method in words.methods:
            rows = getattr(method, "iterations", 1) * getattr(method, "batch", getattr(method, "inputs", 16))
            stages.append(
                StageCost(method.name, seconds_a_row * rows, 5 * 10**9 if method.name == "distill" else 10**9)
            )
        return Estimate(tuple(stages))

    return estimate


def test_a_recipe_is_cut_down_to_the_budget() -> None:
    words = Recipe.parse("w4a8-best")
    same, taken = fitted(words, Budget(minutes=1000), costing(0.1), lambda samples: samples)
    assert same == words
    assert taken.seconds == pytest.approx(0.1 * (64 + 16 + 16 + 256 + 300 * 64))
    less, taken = fitted(words, Budget(minutes=10), costing(0.1), lambda samples: samples)
    assert taken.seconds <= 600
    distill = next(method for method in less.methods if isinstance(method, Distill))
    assert 50 <= distill.iterations < 300
    least, taken = fitted(words, Budget(minutes=0.4), costing(0.1), lambda samples: samples)
    assert taken.seconds <= 24
    assert not any(isinstance(method, Distill) for method in least.methods)
    assert next(m for m in least.methods if isinstance(m, Gptq)).inputs < 256
    with pytest.raises(InputError, match=r"takes at least .* on this model and machine, and 0.01 minutes were given"):
        fitted(words, Budget(minutes=0.01), costing(0.1), lambda samples: samples)
    small, taken = fitted(words, Budget(memory=2 * 10**9), costing(0.1), lambda samples: samples)
    assert [method.name for method in small.methods] == ["wide", "smooth", "gptq"]
    with pytest.raises(InputError, match=r"takes at least 1.0 GB on this model, and 0.1 GB were given"):
        fitted(words, Budget(memory=10**8), costing(0.1), lambda samples: samples)


@pytest.mark.parametrize("values", [{"memory": 0}, {"minutes": 0.0}, {"minutes": float("nan")}])
def test_budgets_that_are_none(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be positive"):
        Budget(**values)


def test_rounding_to_nearest_keeps_to_its_memory() -> None:
    with pytest.raises(InputError, match=r"takes at least .* GB were given"):
        quantize(tiny_pipeline(), recipe("w8a8"), RUN, budget=Budget(memory=1000))


def test_what_was_decided_holds_after_a_kill(tmp_path: Path) -> None:
    words = recipe("w4a8", methods=(Widen(inputs=2),))
    decided = dataclasses.replace(words, calibration_samples=2)
    (tmp_path / "decided.json").write_text(json.dumps({"recipe": decided.to_dict(), "batch": 1}))
    quantized = quantize(tiny_pipeline(), words, RUN, scratch=tmp_path, budget=Budget(minutes=100))
    assert quantized.unet.hf_quantizer.quantization_config.recipe["calibration_samples"] == 2


def test_few_steps_get_more_seeds() -> None:
    words = recipe("w4a8", calibration_rows=24)
    quantized = quantize(tiny_pipeline(), words, RUN.replace(steps=1))  # two rows a sample
    assert quantized.unet.hf_quantizer.quantization_config.recipe["calibration_samples"] == 12
    quantized = quantize(tiny_pipeline(), words, RUN.replace(steps=4))
    assert quantized.unet.hf_quantizer.quantization_config.recipe["calibration_samples"] == 4


def test_an_estimate_that_fails_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("no unit")

    monkeypatch.setattr("ptqd.quantization.quantize.measure_costs", fail)
    assert quantize(tiny_pipeline(), recipe("w8a8-gptq"), RUN, progress=True) is not None
    assert "cannot be told beforehand: no unit" in caplog.text
    with pytest.raises(ZeroDivisionError):
        quantize(tiny_pipeline(), recipe("w8a8-gptq"), RUN, budget=Budget(minutes=10))
