"""What version 0.1 wrote, as committed: a corrected, planned, quantized pipeline, statistics, a plan and a report."""

from pathlib import Path

from safetensors.torch import load_file

from ptqd import NoiseStats, PrecisionPlan, Sampling, correct, load
from ptqd.diffusion import run_batch
from ptqd.experiments import FULL_PRECISION, Report, RowKey

STORED = Path(__file__).parent.parent / "data" / "stored"
RUN = Sampling(steps=2, eta=1.0, samples=2, batch=2, call={"class_labels": [0, 1], "guidance_scale": 2.0})


def test_a_saved_pipeline_samples_as_it_did() -> None:
    pipe = load(STORED / "corrected")
    want = load_file(STORED / "latents.safetensors")["latents"]
    found = run_batch(pipe, RUN, range(2), "latent")
    assert (found - want).square().mean() < 1e-3 * want.var()  # another processor rounds a code that lies between two


def test_statistics_correct_as_they_did() -> None:
    pipe, stats = load(STORED / "corrected"), NoiseStats.load(STORED / "noise.safetensors")
    assert stats.measured_on.steps == 2
    assert stats.measured_on.guidance == 2.0
    again = correct(pipe, stats, ["cnc", "bc", "vsc"])
    assert again.scheduler.correction == pipe.scheduler.correction


def test_a_plan_is_read() -> None:
    plan = PrecisionPlan.load(STORED / "plan.toml")
    assert plan.bits == ((8,), (4,))


def test_a_report_is_read() -> None:
    report = Report.load(STORED)
    assert report.rows[0].key == FULL_PRECISION
    assert report.rows[3].key == RowKey("w4a8", None, ("cnc", "bc"))
    assert report.rows[3].metrics["psnr"].value is not None
    assert report.steps[0].settings.steps == 20
    assert [trial.name for trial in report.choices[0].trials if trial.kept] == [report.choices[0].taken]
