"""Evaluations as functions: tensors and models in, numbers out. When to call them is in callbacks/."""
