"""What every part may know: types, protocols, registry, manifest format, errors, per-sample random numbers."""
