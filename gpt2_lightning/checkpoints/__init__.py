"""Model weights on disk: `load` opens them, `export` writes them, one file a format."""
