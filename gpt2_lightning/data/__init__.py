"""From token shards on disk to micro-batches: the training order, reading and writing shards, the LightningDataModule.

``prepare/`` makes the shards from documents. Nothing here imports the network.
"""
