"""Starting and ending a run: commands, launchers, the run's folder, the list of callbacks, messages."""
