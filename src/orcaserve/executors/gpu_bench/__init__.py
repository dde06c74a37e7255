"""Measures whole engines on a GPU: the sections of `orcaserve bench gpu` that need a model.

`lab` makes what the others measure: a model with random weights, its executor, and a scheduler to drive it.
"""
