"""Sweeps over grids of fits, and the report of what they show."""
