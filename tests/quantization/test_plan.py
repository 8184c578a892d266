import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import quick_recipe, tiny_pipeline
from ptqd import (
    InputError,
    MismatchError,
    PrecisionPlan,
    Sampling,
    apply_plan,
    correct,
    fit_correction,
    load,
    measure,
    measure_widths,
    quantize,
)
from ptqd.diffusion import StepState, run_batch, with_components
from ptqd.quantization import PlanSteps, at_width, plan_of
from ptqd.quantization.modules import BitWidth


@pytest.fixture(scope="module")
def wide(pipe: Any, run: Sampling) -> Any:
    """Quantized, with ranges for 4, 6 and 8 bits."""
    return quantize(pipe, quick_recipe("w4a4+6+8", 4), run)


@pytest.fixture(scope="module")
def timesteps(pipe: Any, run: Sampling) -> tuple[float, ...]:
    pipe.scheduler.set_timesteps(run.steps)
    return tuple(float(t) for t in pipe.scheduler.timesteps)


@pytest.fixture
def mixed(timesteps: tuple[float, ...]) -> PrecisionPlan:
    groups = (
        ("z, for down", ("down_blocks.*", "time_embedding.*")),
        ("all others", ("*",)),
    )  # not in alphabetical order
    return PrecisionPlan(timesteps, ((4, 8), (4, 6), (6, 8), (8, 8)), groups)


def sampled(pipe: Any, run: Sampling) -> torch.Tensor:
    return torch.as_tensor(run_batch(pipe, run, range(3), "latent"))


def test_a_plan_is_the_same_after_writing_it(mixed: PrecisionPlan, tmp_path: Path) -> None:
    plan = mixed.replace(weights={"conv_in": 5, "a.b": 3}, made={"rule": "budget", "budget": 19.9, "widths": [4, 8]})
    plan.save(tmp_path / "plan.toml")
    assert PrecisionPlan.load(tmp_path / "plan.toml") == plan
    assert PrecisionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert '"1: t 501, bits 4 6",' in (tmp_path / "plan.toml").read_text()


def test_odd_timesteps_are_kept_to_the_last_digit() -> None:
    plan = PrecisionPlan.uniform((0.1 + 0.2, 1e-7, 5.0), 4)
    assert PrecisionPlan.from_dict(plan.to_dict()).timesteps == plan.timesteps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["bits"].pop(1), r"lacks step 1 \(after t 751\)"),
        (lambda p: p["bits"].pop(0), r"lacks step 0 \(the first\)"),
        (lambda p: p["bits"].pop(), "says 4 steps and has 3"),
        (lambda p: p.update(steps=3), "says 3 steps and has 4"),
        (lambda p: p.update(bitz=[]), "unknown key 'bitz'"),
        (lambda p: p["bits"].__setitem__(2, "2: t 251 bits 4"), "'2: t 251 bits 4' is no step"),
        (lambda p: p["bits"].__setitem__(2, "2: t x, bits 4 4"), "is no step"),
        (lambda p: p["bits"].__setitem__(2, "2: t 251, bits 4"), "step 2 of the plan has 1 bits for 2 groups"),
        (lambda p: p["bits"].__setitem__(2, "2: t 251, bits 4 17"), "bits must be 2 to 16; got 17"),
        (lambda p: p["bits"].__setitem__(2, "2: t 751, bits 8 8"), "other bits for step 0 and step 2, both at t 751"),
        (lambda p: p.update(groups={"a": "x"}), "must be a list of lines"),
        (lambda p: p.update(groups=["down_blocks.*", "rest: *"]), "'down_blocks.*' is no group"),
        (lambda p: p.update(groups=["a: down_blocks.*", "a: *"]), "two groups are called 'a'"),
        (lambda p: p["bits"].__setitem__(2, "2: t nan, bits 4 4"), "is no step"),
        (lambda p: p.update(made=3), "'made' must give a word or a number"),
        (lambda p: p.update(made={"x": {"y": 1}}), "'made' must give a word or a number"),
        (lambda p: p.update(weights={"conv_in": "4"}), "must give a number of bits"),
        (lambda p: p.pop("steps"), "needs 'steps', a number"),
    ],
)
def test_an_edited_plan_is_checked(mixed: PrecisionPlan, change: Any, message: str) -> None:
    values = mixed.to_dict()
    change(values)
    with pytest.raises(InputError, match=message):
        PrecisionPlan.from_dict(values)


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        PrecisionPlan.load(tmp_path / "none.toml")
    (tmp_path / "x.toml").write_text("steps = [")
    with pytest.raises(InputError, match="cannot be read"):
        PrecisionPlan.load(tmp_path / "x.toml")
    with pytest.raises(InputError, match="must be a table"):
        PrecisionPlan.from_dict([1])
    with pytest.raises(InputError, match="one row of bits for each step"):
        PrecisionPlan((1.0,), ())


def clock(timesteps: tuple[float, ...]) -> PlanSteps:
    plan = PrecisionPlan(timesteps, tuple((4 + timesteps.index(t) % 4,) for t in timesteps))
    return PlanSteps(plan, [BitWidth(0)], [[0]] * len(timesteps))


def test_the_clock_follows_the_timesteps() -> None:
    ticking = clock((9.0, 5.0, 5.0, 1.0))
    for t, step in ((9.0, 0), (9.0, 0), (5.0, 1), (5.0, 1), (1.0, 3), (9.0, 0), (5.0, 1)):  # and a run that starts anew
        assert ticking.step_at(t) == step
    with pytest.raises(MismatchError, match="no step at timestep 7"):
        ticking.step_at(7.0)
    assert ticking.step_at(9.0) == 0
    with pytest.raises(MismatchError, match="after timestep 9 came 1: it was made for 4 steps"):
        ticking.step_at(1.0)  # a schedule of fewer steps
    assert ticking.step_at(1.0) == 3  # the end of the schedule alone, as image-to-image takes it


def test_timesteps_in_other_precisions_and_on_other_devices() -> None:
    """Flux's pipeline tells t / 1000, divided in the latents' precision; a GPU may multiply by 0.001."""
    exact = [float(t) for t in torch.linspace(1000, 1, 50)]
    planned = tuple(float(torch.tensor(t) / 1000) for t in exact)
    for dtype in (torch.float16, torch.bfloat16):
        ticking = clock(planned)
        told = [float(torch.tensor(t, dtype=dtype) / 1000) for t in exact]
        assert [ticking.step_at(t, dtype) for t in told] == list(range(50))
    ticking = clock(planned)
    assert [ticking.step_at(float(torch.tensor(t) * torch.tensor(1e-3))) for t in exact] == list(range(50))
    with pytest.raises(MismatchError):
        clock(planned).step_at(planned[3] * 1.001)


def test_uniform_plans_are_the_uniform_widths(wide: Any, run: Sampling, timesteps: tuple[float, ...]) -> None:
    seen = []
    for bits in (4, 6, 8):
        got = sampled(apply_plan(wide, PrecisionPlan.uniform(timesteps, bits)), run)
        assert torch.equal(got, sampled(at_width(wide, bits), run))
        seen.append(got)
    assert torch.equal(seen[-1], sampled(wide, run))  # the widest, where there is no plan
    assert not torch.equal(seen[0], seen[1])


def test_a_width_is_what_a_recipe_of_that_width_alone_gives(pipe: Any, wide: Any, run: Sampling) -> None:
    alone = quick_recipe("w4a6", 4)
    assert torch.equal(sampled(at_width(wide, 6), run), sampled(quantize(pipe, alone, run), run))
    with pytest.raises(InputError, match="ranges for 4 and 6 and 8 bits, not for 5"):
        at_width(wide, 5)


def test_each_step_has_its_own_bits(wide: Any, run: Sampling, mixed: PrecisionPlan) -> None:
    """Watched at the layers themselves, with guidance, and against a run whose widths are set by hand."""
    planned = apply_plan(wide, mixed)
    down, up = planned.unet.down_blocks[0].resnets[0].conv1, planned.unet.up_blocks[0].resnets[0].conv1
    first, attention = planned.unet.conv_in, planned.unet.mid_block.attentions[0].transformer_blocks[0].attn1.products
    seen: list[tuple[int, ...]] = []
    hook = up.register_forward_hook(
        lambda *_: seen.append((down.input.bits, up.input.bits, first.input.bits, attention.key.bits))
    )
    got = sampled(planned, run)
    hook.remove()
    assert seen == [(4, 8, 8, 8), (4, 6, 8, 6), (6, 8, 8, 8), (8, 8, 8, 8)]  # conv_in is the recipe's rule's
    by_hand = at_width(wide, 8)
    names = [(n, q) for n, q in by_hand.unet.named_modules() if hasattr(q, "widths") and len(q.widths) > 1]
    calls = [0]

    def turn(*_: Any) -> None:
        for name, quantizer in names:
            bits = mixed.bits[calls[0]][0 if name.startswith(("down_blocks", "time_embedding")) else 1]
            quantizer.active = BitWidth((4, 6, 8).index(bits))
        calls[0] += 1

    by_hand.unet.register_forward_pre_hook(turn)
    assert torch.equal(sampled(by_hand, run), got)


def test_a_planned_pipeline_is_saved_loaded_and_edited(
    pipe: Any, wide: Any, run: Sampling, mixed: PrecisionPlan, tmp_path: Path
) -> None:
    plan = mixed.replace(weights={"conv_in": 5, "mid_block.resnets.0.conv1": 2}, made={"rule": "by hand"})
    with pytest.raises(InputError, match="the plan gives 'conv_in' 5-bit weights, the model holds 8-bit ones"):
        apply_plan(wide, plan)
    with pytest.raises(InputError, match="'conv_in' is no full-precision layer"):
        apply_plan(wide, plan, wide)
    planned = apply_plan(wide, plan, pipe)
    other = apply_plan(planned, mixed.replace(weights={"conv_out": 3}), pipe)
    assert (other.unet.conv_in.weights.bits, other.unet.conv_out.weights.bits) == (8, 3)  # the recipe's again
    assert torch.equal(other.unet.conv_in.codes, wide.unet.conv_in.codes)
    assert at_width(planned, 6).unet.hf_quantizer.quantization_config.recipe["rules"][-1]["weight_bits"] == 2
    assert planned.unet.conv_in.weights.bits == 5
    assert planned.unet.conv_in.codes.numel() < wide.unet.conv_in.codes.numel()
    assert planned.unet.conv_in.input.widths == (8,)  # the rule's activations stay
    assert planned.unet.conv_out.codes.data_ptr() == wide.unet.conv_out.codes.data_ptr()  # what is the same is shared
    want = sampled(planned, run)
    planned.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(sampled(loaded, run), want)
    assert plan_of(loaded) == plan
    config = tmp_path / "unet" / "config.json"
    text = config.read_text()
    assert '"1: t 501, bits 4 6"' in text
    config.write_text(text.replace('"1: t 501, bits 4 6"', '"1: t 501, bits 8 6"'))
    edited = load(tmp_path)
    assert plan_of(edited).bits[1] == (8, 6)
    assert not torch.equal(sampled(edited, run), want)
    for old, new, message in (
        ('"1: t 501, bits 4 6"', '"1: t 501, bits 5 6"', "step 1 of the plan asks for 5 bits, the model has ranges"),
        ('        "1: t 501, bits 4 6",\n', "", "lacks step 1"),
        ('"conv_in": 5', '"conv_in": 4', "conv_in.codes"),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=message):
            load(tmp_path)


def test_a_plan_for_another_schedule_is_refused(wide: Any, run: Sampling, mixed: PrecisionPlan) -> None:
    planned = apply_plan(wide, mixed)
    with pytest.raises(MismatchError, match="made for 4 steps"):
        sampled(planned, run.replace(steps=5))
    with pytest.raises(MismatchError, match="made for 4 steps"):
        sampled(planned, run.replace(steps=2))  # whose timesteps the plan has, but not in a row
    sampled(planned, run)


def test_plans_that_do_not_fit(
    pipe: Any, qpipe: Any, wide: Any, mixed: PrecisionPlan, timesteps: tuple[float, ...]
) -> None:
    with pytest.raises(InputError, match=r"ranges for one width; quantize with a recipe such as w4a4\+8"):
        apply_plan(qpipe, mixed)
    with pytest.raises(InputError, match=r"step 0 of the plan asks for 5 bits.*such as w4a4\+5\+6\+8"):
        apply_plan(wide, PrecisionPlan.uniform(timesteps, 5))
    with pytest.raises(InputError, match=r"'nobody' .nowhere.\*. has no layer"):
        apply_plan(wide, mixed.replace(groups=(("nobody", ("nowhere.*",)), ("rest", ("*",)))))
    with pytest.raises(InputError, match="no group of the plan matches the layer"):
        apply_plan(wide, mixed.replace(groups=(("down", ("down_blocks.*",)), ("up", ("up_blocks.*",)))))
    with pytest.raises(InputError, match="'nowhere', which is no quantized layer"):
        apply_plan(wide, mixed.replace(weights={"nowhere": 4}), pipe)
    with pytest.raises(InputError, match="is not quantized; quantize it with ptqd first"):
        apply_plan(pipe, mixed)
    with pytest.raises(InputError, match="has no plan"):
        plan_of(wide)


def test_all_widths_cost_one_full_precision_run_and_one_quantized_run_each(pipe: Any, wide: Any, run: Sampling) -> None:
    calls = {"full": 0, "quantized": 0}
    full = with_components(pipe, unet=tiny_pipeline().unet)
    full.unet.register_forward_pre_hook(lambda *_: calls.update(full=calls["full"] + 1))
    watched = at_width(wide, 8)
    watched.unet.register_forward_pre_hook(lambda *_: calls.update(quantized=calls["quantized"] + 1))
    stats = measure_widths(full, watched, run)
    batches, steps = 2, 4
    assert calls == {"full": batches * steps, "quantized": 3 * batches * steps}
    assert list(stats) == [4, 6, 8]
    for bits, found in stats.items():
        alone = measure(pipe, at_width(wide, bits), run)
        assert torch.equal(found.moments, alone.moments)
        assert torch.equal(found.joint, alone.joint)
        assert found.measured_on == alone.measured_on
    assert len({found.measured_on.activation_bits for found in stats.values()}) == 3


def test_one_width_is_nothing_to_choose_from(pipe: Any, qpipe: Any, run: Sampling) -> None:
    with pytest.raises(InputError, match="ranges for 8-bit activations only"):
        measure_widths(pipe, qpipe, run)
    with pytest.raises(InputError, match="is not quantized; quantize it with ptqd first"):
        measure_widths(pipe, pipe, run)


def test_corrections_are_measured_for_the_plan_as_it_runs(
    pipe: Any, wide: Any, run: Sampling, mixed: PrecisionPlan, tmp_path: Path
) -> None:
    planned = apply_plan(wide, mixed)
    stats = measure(pipe, planned, run)
    widths = measure_widths(pipe, wide, run)
    # step 3 is at 8 bits in both groups, and is asked about the same samples
    assert torch.equal(stats.moments[:, 3], widths[8].moments[:, 3])
    assert not torch.equal(stats.moments[:, 0], widths[8].moments[:, 0])
    corrected = correct(planned, stats, ("cnc", "bc", "vsc"))
    want = sampled(corrected, run)
    assert not torch.equal(want, sampled(planned, run))
    corrected.save_pretrained(tmp_path)
    assert torch.equal(sampled(load(tmp_path), run), want)
    with pytest.raises(MismatchError, match="at other activation bits"):
        correct(wide, stats, ("cnc", "bc", "vsc"))
    with pytest.raises(MismatchError, match="at other activation bits"):
        correct(planned, widths[8], ("cnc", "bc", "vsc"))
    config = tmp_path / "unet" / "config.json"
    config.write_text(config.read_text().replace('"1: t 501, bits 4 6"', '"1: t 501, bits 4 4"'))
    with pytest.raises(InputError, match="the plan was changed after the correction was measured"):
        load(tmp_path)
    again = apply_plan(corrected, mixed.replace(bits=((8, 8),) * 4))
    assert type(again.scheduler) is type(planned.scheduler)  # a correction of other bits is dropped


def test_a_correction_that_tells_other_timesteps_keeps_the_bits(
    pipe: Any, wide: Any, run: Sampling, mixed: PrecisionPlan
) -> None:
    still = run.replace(eta=0.0)
    planned = apply_plan(wide, mixed)
    stats = measure(pipe, planned, still)
    corrected = correct(planned, fit_correction(stats, ("cnc", "stepbaq")))
    assert corrected.scheduler.correction.model_timesteps
    seen: list[int] = []
    corrected.unet.up_blocks[0].resnets[0].conv1.register_forward_pre_hook(
        lambda layer, _: seen.append(layer.input.bits)
    )
    sampled(corrected, still)
    assert seen == [8, 6, 8, 8]
    clocked, own = StepState.of(planned.unet), StepState.of(corrected.unet)
    assert clocked is not None
    assert own is not None
    assert own.aliases
    assert clocked.aliases == {}  # of the pipeline that is not corrected
    assert corrected.unet.conv_in.codes.data_ptr() == planned.unet.conv_in.codes.data_ptr()
    with pytest.raises(MismatchError, match="made for 4 steps"):
        sampled(planned, still.replace(steps=5))
    with pytest.raises(MismatchError, match="the plan is for 4 steps, the correction for 6"):
        correct(planned, stats, ("cnc", "stepbaq"), steps=6)


def test_half_precision_takes_other_weights(
    pipe: Any, wide: Any, run: Sampling, mixed: PrecisionPlan, tmp_path: Path
) -> None:
    wide.save_pretrained(tmp_path)
    half = load(tmp_path, dtype=torch.float16)
    planned = apply_plan(half, mixed.replace(weights={"conv_in": 5}), pipe)
    assert planned.unet.conv_in.weight.dtype == planned.unet.conv_in.bias.dtype == torch.float16
    assert bool(torch.isfinite(sampled(planned, run)).all())


def test_planning_imports_nothing_of_the_report() -> None:
    code = "import sys, ptqd.mixed_precision.solver; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_step_policies_of_serving_engines() -> None:
    """The schema is that of vLLM-Omni's pull request 6560, which the others share."""
    timesteps = tuple(float(t) for t in range(10, 0, -1))
    plan = PrecisionPlan.first_last(timesteps, 8)
    assert [row[0] for row in plan.bits] == [16] * 3 + [8] * 4 + [16] * 3
    assert plan.step_policy() == {
        "schema_version": 1,
        "type": "first_last_n",
        "index_space": "denoising_loop_iteration",
        "scope": ["transformer"],
        "default_mode": "native",
        "first_steps": {"count": 3, "mode": "a16"},
        "last_steps": {"count": 3, "mode": "a16"},
        "overlap": "a16",
        "reasoner": "a16",
    }
    one = PrecisionPlan.first_last(timesteps, 4, first=1, last=0).step_policy(["unet"])
    assert (one["first_steps"]["count"], one["last_steps"]["count"], one["scope"]) == (1, 0, ["unet"])
    assert PrecisionPlan.uniform(timesteps, 8).step_policy()["first_steps"]["count"] == 0
    assert PrecisionPlan.uniform(timesteps, 16).step_policy()["first_steps"]["count"] == 10
    for other in (
        plan.holding((4,)),
        plan.replace(bits=(*plan.bits[:5], (16,), *plan.bits[6:])),
        plan.replace(bits=(*plan.bits[:5], (4,), *plan.bits[6:])),
    ):
        with pytest.raises(InputError, match="plan is another"):
            other.step_policy()
