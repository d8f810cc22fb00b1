"""Trainers: each integration translates hooks into phases and holds no rule."""
