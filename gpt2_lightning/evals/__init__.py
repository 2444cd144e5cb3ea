"""Evaluations: HellaSwag and the validation loss. Models and tensors in, numbers out.

When to evaluate is decided in ``callbacks/``.
"""
