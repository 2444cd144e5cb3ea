"""When to evaluate, sample, measure, save and stop. What is computed then lives in evals/ and generate.py."""
