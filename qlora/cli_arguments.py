"""Arguments that commands share."""

import click

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[section.key=value]...")
RECIPE = click.argument("recipe", metavar="RECIPE")
