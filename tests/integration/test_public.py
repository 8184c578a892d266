import ptqd


def test_the_public_names_are_these() -> None:
    assert ptqd.__all__ == [
        "Choice",
        "Correction",
        "InputError",
        "LatentClassPipeline",
        "LatentPipeline",
        "MismatchError",
        "NoiseStats",
        "PtqdError",
        "Quantizer",
        "Recipe",
        "Rule",
        "Sampling",
        "StepPlan",
        "apply_plan",
        "correct",
        "fit_auto",
        "fit_correction",
        "load",
        "measure",
        "measure_widths",
        "paper_rule",
        "plan_steps",
        "quantize",
        "sample",
    ]


def test_every_public_name_resolves_and_says_what_it_is() -> None:
    for name in ptqd.__all__:
        assert getattr(ptqd, name).__doc__, name
    assert not hasattr(ptqd, "nonsense")
