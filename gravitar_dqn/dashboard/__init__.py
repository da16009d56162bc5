"""The live dashboard: charts of a run's files on a Visdom server."""
