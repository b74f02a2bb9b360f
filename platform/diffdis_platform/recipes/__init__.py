"""Recipes: functions that return a whole, typed configuration. A variant changes fields of its parent."""
