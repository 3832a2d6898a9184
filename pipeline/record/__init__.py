"""What a run writes about itself, and reading it back: metrics, pictures, results, and the report page. No torch."""
