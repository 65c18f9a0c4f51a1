"""The samples, each run as it stands."""
