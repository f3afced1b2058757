"""What is taken as true: transformers, whole and one layer at a time."""
