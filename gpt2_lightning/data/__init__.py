"""Tokens on disk to micro-batches: which sequences a step trains on, the shards, the LightningDataModule."""
