"""Standardised evaluation: packaged models and data, measurements, reports and the command line."""
