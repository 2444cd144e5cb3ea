"""Turns documents into token shards: where documents come from, how they are read, encoded and written."""
