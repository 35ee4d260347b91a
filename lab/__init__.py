"""Studies beside the main road, each run as python -m lab.NAME."""
