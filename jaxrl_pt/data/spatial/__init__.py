"""Spatial reasoning on pictures that are drawn from scenes, each answer known exactly.

`base.py` says what a task is, `canvas.py` draws, one file holds one task, and `items.py` makes an
item of (task, level, split, seed, index).
"""
