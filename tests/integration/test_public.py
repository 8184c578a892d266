import ptqd


def test_the_public_names_are_these() -> None:
    assert ptqd.__all__ == [
        "ArtifactError",
        "Budget",
        "Correction",
        "CorrectionSearch",
        "Evaluator",
        "Experiment",
        "InputError",
        "LatentClassPipeline",
        "LatentPipeline",
        "MismatchError",
        "MissingDependencyError",
        "NoiseStats",
        "PixelPipeline",
        "PrecisionPlan",
        "PtqdConfig",
        "PtqdError",
        "QuantSpec",
        "Recipe",
        "ResourceError",
        "Rule",
        "Sampling",
        "UnsupportedError",
        "apply_plan",
        "compare_runs",
        "correct",
        "count_cost",
        "evaluate",
        "explain",
        "export",
        "export_checkpoint",
        "fit_correction",
        "from_module",
        "keep_weights",
        "load",
        "load_evaluator",
        "measure",
        "measure_widths",
        "paper_plan",
        "push_to_hub",
        "quantize",
        "run_experiment",
        "sample",
        "search_correction",
        "search_plan",
    ]


def test_every_public_name_resolves_and_says_what_it_is() -> None:
    for name in ptqd.__all__:
        assert getattr(ptqd, name).__doc__, name
    assert not hasattr(ptqd, "nonsense")
    assert ptqd.__version__
