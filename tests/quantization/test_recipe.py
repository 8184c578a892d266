from pathlib import Path

import pytest

from ptqd import InputError, Recipe
from ptqd.quantization.methods import METHODS, LowRank, Smooth
from ptqd.quantization.recipe import WORDS

TOML = """
calibration_samples = 16
attention = false

[weights]
bits = 4
symmetric = true
range = "minmax"

[activations]
bits = 8
symmetric = false
range = "percentile"
percentile = 99

[[rules]]
match = "conv_in"
weight_bits = 8

[[rules]]
match = "*.to_k"
skip = true
"""


def test_shorthand() -> None:
    recipe = Recipe.parse("w4a8")
    assert (recipe.weights.bits, recipe.activations.bits) == (4, 8)
    assert recipe.weights.symmetric
    assert not recipe.activations.symmetric
    assert recipe.name == "w4a8"
    assert [rule.match for rule in recipe.rules][:2] == ["conv_in", "conv_out"]
    assert all(rule.optional and rule.weight_bits == rule.activation_bits == 8 for rule in recipe.rules)
    assert recipe.widths == (8,)


@pytest.mark.parametrize("word", ["affine", "brecq", "ptq4dm", "qdiffusion", "tfmq"])
def test_affine_weights(word: str) -> None:
    """As published: one scale and one zero point for each output channel."""
    assert not Recipe.parse(f"w4a8-{word}").weights.symmetric


def test_formats_have_no_zero_points() -> None:
    with pytest.raises(InputError, match="mxfp4 has no zero point"):
        Recipe.parse("wmxfp4a8-affine")
    assert Recipe.parse("wmxfp4a8-ptq4dm").weights.format == "mxfp4"


@pytest.mark.parametrize(
    "first", [*METHODS, *WORDS, "affine", "dynamic", "g64", "steps8", "svd32", "svd32x8", "rotate16"]
)
@pytest.mark.parametrize("second", ["best", "wide"])
def test_words_go_together(first: str, second: str) -> None:
    """Whatever comes before a word, what decides on the other methods' work is the first of them."""
    if first in (second, "best") or (first, second) == ("convrot", "best"):  # named twice, or one smooths
        return
    names = [method.name for method in Recipe.parse(f"w4a4-{first}-{second}").methods]
    assert names.index("wide") == 0
    assert len(names) == len(set(names))


def test_words_of_branches_and_rotations() -> None:
    smooth, low_rank = Recipe.parse("w4a4-svd32x8-rotate16").methods
    assert (smooth, low_rank) == (Smooth(rotate=16), LowRank(32, 8))
    assert Recipe.parse("w4a4-svd").methods == (Smooth(), LowRank())
    best = Recipe.parse("w4a4-rotate-best")
    assert [m for m in best.methods if isinstance(m, Smooth)] == [Smooth(rotate=64)]
    assert Recipe.from_dict(best.to_dict()) == best
    assert Recipe.parse("w4a4-best-rotate") == best
    assert Recipe.parse("w4a4-smooth-rotate").methods == (Smooth(rotate=64),)
    for wrong in ("svdx8", "rotate16x8", "svd16x"):
        with pytest.raises(InputError, match=f"unknown word '{wrong}'"):
            Recipe.parse(f"w4a4-{wrong}")
    with pytest.raises(InputError, match="bits of a branch must be 2 to 8, or 16; got 9"):
        Recipe.parse("w4a4-svd16x9")
    for wrong, message in (("rotate512", "rotate must be 2 to 256"), ("rotate0", "rotate must be 2"), ("svd0", "rank")):
        with pytest.raises(InputError, match=message):
            Recipe.parse(f"w4a4-{wrong}")


def test_shorthand_of_several_widths() -> None:
    recipe = Recipe.parse("w4a8+4+6")
    assert (recipe.activations.bits, recipe.step_bits, recipe.widths) == (8, (4, 6), (4, 6, 8))
    assert recipe.name == "w4a4+6+8"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(InputError, match="bits must be 2 to 16; got 17"):
        Recipe.parse("w4a4+17")


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TOML)
    recipe = Recipe.parse(path)
    assert recipe.weights.bits == 4
    assert recipe.activations.percentile == 99.0
    assert recipe.rule_for("blocks.0.to_k", "linear") == recipe.rules[1]
    assert recipe.rule_for("mid.conv", "conv") is None
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widths = 4", "unknown key 'widths'"),
        ("[weights]\nbitz = 4", "unknown key 'bitz'"),
        ("[weights]\nbits = 9", "bits must be 2 to 8; got 9"),
        ("[weights]\nbits = '4'", "must be int; got '4'"),
        ("[weights]\nrange = 'mse'", "must be one of 'minmax'"),
        ("[activations]\npercentile = 0", "percentile must be in"),
        ("[activations]\np = -1.0", "p must be positive"),
        ("attention = 1", "must be bool"),
        ("rules = 3", "must be a list"),
        ("weights = 3", "must be a table"),
        ("[[rules]]\nweight_bits = 8", "match"),
        ("[[rules]]\nmatch = 'a'\nweight_bits = 1", "bits must be 2 to 8; got 1"),
        ("calibration_samples = 0", "at least 1"),
        ("a = = b", "cannot be read as TOML"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        Recipe.parse(path)
    assert "bad.toml" in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("w4", "neither a shorthand"), ("none.toml", "does not exist")])
def test_bad_names(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.parse(text)


def test_bad_shorthand_bits() -> None:
    with pytest.raises(InputError, match="weights' bits must be 2 to 8; got 16"):
        Recipe.parse("w16a16")
    assert Recipe.parse("w4a16").activations.bits == 16
