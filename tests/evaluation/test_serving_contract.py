import json

from qlora.artifacts import read_json
from qlora.pipeline import Pipeline
from qlora.recipe_file import load_recipe


def test_it(tiny_recipe):
    recipe = load_recipe(tiny_recipe())
    Pipeline(recipe).run()
    c = read_json(recipe.run_dir / "evaluation" / "contract.json")
    print(json.dumps({k: v for k, v in c.items() if k != "engines"}, indent=1)[:6000])
