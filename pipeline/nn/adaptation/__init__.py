"""What domain adaptation and learning from few labels compute: statistics of domains, and what objectives share."""
