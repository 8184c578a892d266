import inspect

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


def test_paths_are_taken_as_text_too() -> None:
    public = {name: getattr(ptqd, name) for name in ptqd.__all__}
    calls = {name: value for name, value in public.items() if inspect.isfunction(value)}
    for kind, value in public.items():
        if inspect.isclass(value) and value.__module__.startswith("ptqd"):
            own = {name: getattr(value, name) for name in vars(value) if not name.startswith("_")}
            calls |= {f"{kind}.{name}": method for name, method in own.items() if callable(method)}
    parameters = [(name, p) for name, call in calls.items() for p in inspect.signature(call).parameters.values()]
    assert any("Path" in str(p) for _, p in parameters)
    assert [f"{name} {p}" for name, p in parameters if "Path" in str(p) and "str" not in str(p)] == []
