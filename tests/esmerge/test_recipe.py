"""What a recipe's YAML means."""

from esmerge.recipe import load_recipe


def test_numbers_with_exponents_are_numbers(tmp_path):
    (tmp_path / "recipe.yaml").write_text("base: b\nspecialists: {a: a, b: b}\ncoefficients: {a: 5e-1, b: 1E0}\n")
    recipe = load_recipe(tmp_path / "recipe.yaml", ["coefficients.b=25e-2", "base=12e-x"])
    assert recipe.coefficients.numbers("any", ["a", "b"]).tolist() == [0.5, 0.25]
    assert recipe.base == "12e-x"
