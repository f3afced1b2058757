"""Time, memory, speed and quality, measured beside the peers; `python -m olmo2_export.bench`."""
