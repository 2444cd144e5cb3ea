"""Weights on disk: ``load`` reads any format, ``export`` writes one for other programs.

One file per format: ours (Lightning's checkpoints), Hugging Face's folders, llm.c's ``.bin``.
"""
