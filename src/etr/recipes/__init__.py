"""Recipes: functions that return configs."""

from etr.recipes.demo import demo, smoke

__all__ = ["demo", "smoke"]
