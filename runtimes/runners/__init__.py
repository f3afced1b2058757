"""What every runner offers, and what runners of one cache form share."""
