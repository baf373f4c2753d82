"""The report of a run: one HTML file with results, curves, examples, data, config and machine."""
