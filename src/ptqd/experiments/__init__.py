"""A run folder from end to end."""

from ptqd.experiments.benchmark import candidates, run_benchmark, speed_report
from ptqd.experiments.experiment import MEASURED, named_recipes
from ptqd.experiments.manifest import Manifest, reproduce, run_with_manifest
from ptqd.experiments.meta_pipeline import bare_denoiser, denoiser_config, one_call
from ptqd.experiments.plan_request import PlanRequest
from ptqd.experiments.results import FULL_PRECISION, ChoiceRow, Interval, Report, Row, RowKey, SamplerSettings, StepRow
from ptqd.experiments.sharding import judged, labels_of, load_images, measure_shards, observe_images, sample_images
from ptqd.experiments.study import Study, compare_with_published, estimate

__all__ = [
    "FULL_PRECISION",
    "MEASURED",
    "ChoiceRow",
    "Interval",
    "Manifest",
    "PlanRequest",
    "Report",
    "Row",
    "RowKey",
    "SamplerSettings",
    "StepRow",
    "Study",
    "bare_denoiser",
    "candidates",
    "compare_with_published",
    "denoiser_config",
    "estimate",
    "judged",
    "labels_of",
    "load_images",
    "measure_shards",
    "named_recipes",
    "observe_images",
    "one_call",
    "reproduce",
    "run_benchmark",
    "run_with_manifest",
    "sample_images",
    "speed_report",
]
