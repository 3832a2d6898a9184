"""What domain adaptation and learning from few labels compute."""
