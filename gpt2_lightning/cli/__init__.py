"""Starting and ending a run: the commands, launchers and signals, the run's folder, the list of callbacks, messages."""
