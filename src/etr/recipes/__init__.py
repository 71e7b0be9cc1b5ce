"""Recipes: functions that return configs."""

from etr.recipes.demo import demo, quick_demo, smoke

__all__ = ["demo", "quick_demo", "smoke"]
