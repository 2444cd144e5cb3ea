"""Documents to token shards: where they come from, how they are read, encoded and written."""
